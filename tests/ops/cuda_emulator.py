"""CUDA C++ on a CPU: compiled as plain C++ behind `cuda_emulator.h`, launched by the kernels' own launcher."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from hgrn2.ops.backends.cuda import kernels

# sums of products are rounded twice, as written; a variable of the thread for what a program shares
OPTIONS = (
    "-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fno-extern-tls-init", "-fno-gnu-unique", "-fPIC",
    "-shared", "-w",
)  # fmt: skip
_HEADER = Path(__file__).with_suffix(".h").read_text(encoding="utf-8")
_REPLACED = "instructions.cuh"


class Kernel:
    """In place of `hgrn2.ops.backends.cuda.compiler.Kernel`.

    Args:
        emulator: it belongs to.
        function: that runs it.
        shared_bytes: dynamic shared memory of a program.
        threads: threads of a program.
    """

    def __init__(self, emulator: Emulator, function: Callable[..., bytes | None], shared_bytes: int, threads: int):
        self.emulator, self.function, self.shared_bytes, self.threads = emulator, function, shared_bytes, threads

    def launch(self, grid: tuple[int, int, int], arguments: ctypes.Structure, stream: int = 0) -> None:
        """Runs it to its end.

        Raises:
            RuntimeError: what it does is wrong on any GPU.
        """
        blocks = (ctypes.c_int * 3)(*grid)
        seed = self.emulator.seed
        problem = self.function(ctypes.addressof(arguments), blocks, self.threads, self.shared_bytes, seed)
        if problem:
            raise RuntimeError(problem.decode())


class Emulator:
    """Builds kernels.

    Args:
        folder: where what is built is kept.

    Attributes:
        seed: decides in which order things happen that have none.
        made: names of the kernels asked for.
    """

    def __init__(self, folder: Path):
        self.folder, self.seed = folder, 0
        self.made: set[str] = set()
        self._library = functools.cache(self._build)

    def compiled(self, name: str, settings: kernels.Settings, device: int | None) -> Kernel:
        """A kernel of hgrn2.ops.backends.cuda; in place of `kernels.compiled`."""
        (file,) = (file for file, names in kernels.KERNELS.items() if name in names)
        self.made.add(name)
        return self.kernel(_source(file), kernels.KERNELS[file], name, settings.macros(), *kernels.resources(name))

    def kernel(
        self, source: str, names: tuple[str, ...], name: str, settings: dict[str, str], shared_bytes: int, threads: int
    ) -> Kernel:
        """A kernel of any source.

        Args:
            source: CUDA C++.
            names: of its kernels.
            name: of the wanted one.
            settings: macros and their values.
            shared_bytes: dynamic shared memory of a program.
            threads: threads of a program.
        """
        source = "".join([_HEADER, source, *(f"RUN({kernel})\n" for kernel in names)])
        library = self._library(source, tuple(f"-D{key}={value}" for key, value in settings.items()))
        function = getattr(library, f"run_{name}")
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_void_p, ctypes.c_int * 3, ctypes.c_int, ctypes.c_int, ctypes.c_ulonglong]
        return Kernel(self, function, shared_bytes, threads)

    def _build(self, source: str, definitions: tuple[str, ...]) -> ctypes.CDLL:
        command = [os.environ.get("CXX", "g++"), *OPTIONS, *definitions, "-x", "c++", "-"]
        path = self.folder / f"{hashlib.sha256(repr((source, command, _native_target())).encode()).hexdigest()}.so"
        if not path.exists():
            # whole or not at all: another process may build the same
            new = path.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, "-o", str(new)], input=source, text=True, check=True, timeout=300)
            new.replace(path)
        return ctypes.CDLL(str(path))


@functools.cache
def _native_target() -> str:
    """Return what the compiler defines here: its version and the processor's instructions among it."""
    command = [os.environ.get("CXX", "g++"), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def _source(file: str) -> str:
    folder = Path(kernels.__file__).parent
    parts = [part for part in kernels.SOURCES[file] if part != _REPLACED]
    return "".join((folder / part).read_text(encoding="utf-8") for part in parts)
