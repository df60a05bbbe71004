"""Compile CUDA C++ and load its kernels, using only the libraries of torch's CUDA builds.

NVRTC (the compiler) and the driver are called through ctypes: their C interfaces are stable, and no toolkit is needed.
Binaries are cached in a folder, from which later processes load them in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

_MAX_DYNAMIC_SHARED_BYTES = 8
_NVRTC_SUCCESS = 0
# created once: creating it takes the host a microsecond, of the few that a launch takes
_ONE_POINTER = ctypes.c_void_p * 1


class Kernel:
    """A kernel on one device.

    Args:
        function: handle of the driver.
        shared_bytes: dynamic shared memory of a program.
        threads: threads of a program.
    """

    def __init__(self, function: ctypes.c_void_p, shared_bytes: int, threads: int):
        self.function, self.shared_bytes, self.threads = function, shared_bytes, threads
        self._launch = _driver().cuLaunchKernel
        _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes), "cuFuncSetAttribute")

    def launch(self, grid: tuple[int, int, int], arguments: ctypes.Structure, stream: int) -> None:
        """Launch the kernel on a stream of the current context, with one argument passed by value."""
        parameters = _ONE_POINTER(ctypes.addressof(arguments))
        code = self._launch(
            self.function, *grid, self.threads, 1, 1, self.shared_bytes, ctypes.c_void_p(stream), parameters, None
        )
        _check(code, "cuLaunchKernel")


def current_stream(device: torch.device) -> int:
    """Return the driver's handle of torch's current stream, and make its context current in this thread.

    Args:
        device: the current device.
    """
    _make_context_current()
    # torch.cuda.current_stream() wraps this and costs the host as much as a launch
    return torch._C._cuda_getCurrentRawStream(device.index)


def problem() -> str | None:
    """Return the reason why nothing can be compiled here, or None."""
    try:
        _compiler()
        _driver()
    except OSError as reason:
        return f"a library of CUDA is missing ({reason})"
    return None


@functools.cache
def begin(source: str, options: tuple[str, ...]) -> Future[bytes]:
    """Start compiling in the background what `load` will need: the compiler takes seconds.

    A process that ends meanwhile waits for it.

    Args:
        source: CUDA C++.
        options: options of the compiler.
    """
    return _threads().submit(_compiled, source, options)


def load(source: str, options: tuple[str, ...], name: str, shared_bytes: int, threads: int) -> Kernel:
    """Compile source, or take the cached binary, and load one of its kernels on the current device.

    Args:
        source: CUDA C++.
        options: options of the compiler, the architecture included.
        name: name of an extern "C" kernel.
        shared_bytes: dynamic shared memory of a program.
        threads: threads of a program.

    Raises:
        RuntimeError: the compiler or the driver fails; the message holds theirs.
    """
    _make_context_current()
    module, function = _module(source, options, torch.cuda.current_device()), ctypes.c_void_p()
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
    return Kernel(function, shared_bytes, threads)


@functools.cache
def _module(source: str, options: tuple[str, ...], device: int) -> ctypes.c_void_p:
    module = ctypes.c_void_p()
    code = _driver().cuModuleLoadData(ctypes.byref(module), begin(source, options).result())
    if code:
        # a crash may have left a damaged file in the cache
        binary = _compiled(source, options, anew=True)
        _check(_driver().cuModuleLoadData(ctypes.byref(module), binary), "cuModuleLoadData")
    return module


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="hgrn2-compiler")


def _compiled(source: str, options: tuple[str, ...], anew: bool = False) -> bytes:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _compiler().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    key = repr((source, options, major.value, minor.value)).encode()
    # without a readable and writable folder, each process compiles again
    no_folder = contextlib.suppress(OSError, RuntimeError)
    if not anew:
        with no_folder:
            return _cached(key).read_bytes()
    binary = _compile(source, options)
    with no_folder:
        path = _cached(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            Path(folder, path.name).write_bytes(binary)
            Path(folder, path.name).replace(path)
    return binary


def _cached(key: bytes) -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "hgrn2" / "cubin"
    return folder / f"{hashlib.sha256(key).hexdigest()}.cubin"


def _compile(source: str, options: tuple[str, ...]) -> bytes:
    compiler, program, size = _compiler(), ctypes.c_void_p(), ctypes.c_size_t()
    code = compiler.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"hgrn2.cu", 0, None, None)
    assert code == _NVRTC_SUCCESS, f"nvrtcCreateProgram returned {code}"
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        code = compiler.nvrtcCompileProgram(program, len(options), words)
        if code != _NVRTC_SUCCESS:
            compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            compiler.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC could not compile the kernels (code {code}):\n{log.value.decode()}")
        compiler.nvrtcGetCUBINSize(program, ctypes.byref(size))
        binary = ctypes.create_string_buffer(size.value)
        compiler.nvrtcGetCUBIN(program, binary)
        return binary.raw
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _compiler() -> ctypes.CDLL:
    # the version of the CUDA that torch was built with; any version in tests without one
    version = torch.version.cuda.split(".")[0] if torch.version.cuda else "[0-9]"
    # NVRTC opens its builtins by name and does not search the folders of wheels, but finds a library that is loaded
    for path in _in_wheels(f"libnvrtc-builtins.so.{version}*"):
        ctypes.CDLL(str(path))
    try:
        return ctypes.CDLL(f"libnvrtc.so.{version}")
    except OSError:
        for path in _in_wheels(f"libnvrtc.so.{version}*"):
            return ctypes.CDLL(str(path))
        raise


def _in_wheels(pattern: str) -> list[Path]:
    """Return libraries in NVIDIA's wheels, on which torch's CUDA builds depend."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    return [path for place in places or () for path in sorted(Path(place).glob(f"*/lib/{pattern}"))]


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _make_context_current() -> None:
    """Give the thread a context, which it lacks until torch calls CUDA's runtime in it."""
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if not context.value:
        _check(
            _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), torch.cuda.current_device()),
            "cuDevicePrimaryCtxRetain",
        )
        _check(_driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{what} failed with code {code}: {(text.value or b'unknown').decode()}")
