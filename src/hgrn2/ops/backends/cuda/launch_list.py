"""Launches with all arguments but the pointers, prepared once for all calls with the same shapes and settings.

Forward and backward pass together are a dozen launches or more, each with an argument of some forty numbers. Computing
those for each call would take the host longer than the kernels of a small call take the GPU.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import NamedTuple

from hgrn2.ops.backends.cuda.compiler import Kernel

# of workspaces, in bytes
ALIGNMENT = 512


class BufferRef(NamedTuple):
    """An address in a tensor of a call.

    Attributes:
        tensor: name of the tensor.
        offset: bytes from its start.
    """

    tensor: str
    offset: int = 0


NULL = BufferRef("null")


class Launch(NamedTuple):
    """A kernel, its grid, its argument without the pointers, and the buffers those point to."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: ctypes.Structure
    pointers: struct.Struct
    buffers: tuple[BufferRef, ...]


class LaunchList:
    """Launches in order, and the workspace they share.

    Args:
        kernel_of: returns a kernel by its name.

    Attributes:
        launches: in order.
        sizes: bytes of workspace, by the name of its tensor: "scratch", uninitialised, and "zeros".
    """

    def __init__(self, kernel_of: Callable[[str], Kernel]):
        self._kernel_of, self.launches = kernel_of, list[Launch]()
        self.sizes = {"scratch": 0, "zeros": 0}

    def workspace(self, num_bytes: int, zeros: bool = False) -> BufferRef:
        """Reserve memory that lasts until the last launch.

        Args:
            num_bytes: size.
            zeros: fill it with zeros; otherwise it is uninitialised.
        """
        name = "zeros" if zeros else "scratch"
        buffer = BufferRef(name, self.sizes[name])
        self.sizes[name] += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return buffer

    def launch(self, name: str, grid: tuple[int, int, int], arguments: ctypes.Structure, *buffers: BufferRef) -> None:
        """Add a launch.

        Args:
            name: name of the kernel.
            grid: number of programs in three dimensions.
            arguments: its argument, which begins with the pointers; those are filled in for each call.
            *buffers: buffers the pointers point to.
        """
        pointers = struct.Struct(f"{len(buffers)}P")
        self.launches.append(Launch(self._kernel_of(name), grid, arguments, pointers, buffers))
