"""The kernels: their sources, compile-time settings and resources."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch

from hgrn2.ops.backends.cuda import compiler
from hgrn2.ops.backends.cuda.plan import CHUNK, WIDTH
from hgrn2.ops.gates import Floor

THREADS, EXACT_THREADS, CARRY_THREADS = 512, 256, 128
PACKED_THREADS, BOUNDS_THREADS = 1024, 1024
# parts of each file of kernels, in the order of their dependencies
SOURCES = {
    "forward.cu": (
        "instructions.cuh", "chunk.cuh", "wgmma.cuh", "forward.cuh", "gates.cuh", "dense.cuh", "joins.cuh", "state.cuh",
        "summary.cuh", "carry.cuh", "packed.cuh", "forward.cu",
    ),
    "backward.cu": (
        "instructions.cuh", "chunk.cuh", "wgmma.cuh", "gradients.cuh", "backward.cuh", "bounds.cuh", "backward.cu",
    ),
    "backward_exact.cu": (
        "instructions.cuh", "chunk.cuh", "wgmma.cuh", "gradients.cuh", "backward_exact.cuh", "gates.cuh", "joins.cuh",
        "values.cuh", "backward_exact.cu",
    ),
}  # fmt: skip
KERNELS = {
    "forward.cu": (
        "forward_outputs", "forward_summaries", "forward_states", "backward_summaries", "carry_states", "cut_sequences",
    ),
    "backward.cu": ("backward_walk", "sum_bounds"),
    "backward_exact.cu": ("backward_exact",),
}  # fmt: skip
Q_ACTIVATIONS = ("none", "silu", "sigmoid")
_TILE_BYTES, _SCORE_BYTES, _HALF = CHUNK * WIDTH * 2, CHUNK * CHUNK * 2, WIDTH // 2
_WALK_SHARED = 9 * _TILE_BYTES + 4 * _SCORE_BYTES + 18 * WIDTH * 4 + 2 * 4
_BACKWARD_SHARED = 12 * _TILE_BYTES + 3 * _SCORE_BYTES + (6 + 2 * 8) * WIDTH * 4
_EXACT_SHARED = 4 * _TILE_BYTES + 5 * CHUNK * _HALF * 2 + (8 + 4) * _HALF * 4
_BOUNDS_SHARED = BOUNDS_THREADS // (WIDTH // 4) * WIDTH * 4
_FILES = {name: file for file, names in KERNELS.items() for name in names}


class Settings(NamedTuple):
    """Compile-time settings.

    Attributes:
        dtype: dtype of the inputs.
        q_activation: one of `Q_ACTIVATIONS`.
        packed: whether sequences are packed.
        floor: floor under the decay.
    """

    dtype: torch.dtype
    q_activation: str
    packed: bool
    floor: Floor

    def macros(self) -> dict[str, str]:
        """Return the settings as macros of the sources."""
        bfloat16, q_activation = int(self.dtype == torch.bfloat16), Q_ACTIVATIONS.index(self.q_activation)
        return {
            "BFLOAT16": f"{bfloat16}", "Q_ACTIVATION": f"{q_activation}", "PACKED": f"{int(self.packed)}",
            "FLOOR": f"{self.floor.decay!r}f", "FLOOR_LOST": f"{self.floor.lost!r}f",
        }  # fmt: skip


@functools.cache
def compiled(name: str, settings: Settings, device: int) -> compiler.Kernel:
    """Return a kernel, compiled and loaded on a device.

    Args:
        name: one of `KERNELS`.
        settings: compile-time settings.
        device: index of the device.
    """
    options = _options(settings, device)
    # a kernel belongs to the device that is current when it is loaded
    with torch.cuda.device(device):
        return compiler.load(source(_FILES[name]), options, name, *resources(name))


def begin(file: str, settings: Settings, device: int) -> None:
    """Start compiling a file of kernels in the background.

    Args:
        file: one of `SOURCES`.
        settings: compile-time settings.
        device: index of the device.
    """
    compiler.begin(source(file), _options(settings, device))


def resources(name: str) -> tuple[int, int]:
    """Return the bytes of dynamic shared memory and the threads of a program."""
    special = {
        "carry_states": (0, CARRY_THREADS), "cut_sequences": (0, PACKED_THREADS),
        "backward_walk": (_BACKWARD_SHARED, THREADS), "backward_exact": (_EXACT_SHARED, EXACT_THREADS),
        "sum_bounds": (_BOUNDS_SHARED, BOUNDS_THREADS),
    }  # fmt: skip
    return special.get(name, (_WALK_SHARED, THREADS))


@functools.cache
def source(file: str) -> str:
    """Return the whole source of a file of kernels."""
    folder = Path(__file__).parent
    return "".join((folder / part).read_text(encoding="utf-8") for part in SOURCES[file])


def _options(settings: Settings, device: int) -> tuple[str, ...]:
    major, minor = torch.cuda.get_device_capability(device)
    macros = (f"-D{name}={value}" for name, value in settings.macros().items())
    return (f"-arch=sm_{major}{minor}a", "--std=c++17", "-default-device", *macros)
