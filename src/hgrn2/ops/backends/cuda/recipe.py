"""Launches that are made ready once, for all calls that differ in nothing but where their tensors lie.

Forward and backward pass together are a dozen launches or more, each with an argument of some forty numbers; to find
those anew would take the host longer than the kernels of a small call take the GPU.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import NamedTuple

from hgrn2.ops.backends.cuda.compiler import Kernel

# of rooms in memory, bytes
ALIGNMENT = 512


class Place(NamedTuple):
    """Where something lies: in which tensor of a call, and how many bytes behind its beginning."""

    tensor: str
    offset: int = 0


NOWHERE = Place("nowhere")


class Launch(NamedTuple):
    """One launch: a kernel, its argument but for the pointers, and where those point."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: ctypes.Structure
    pointers: struct.Struct
    places: tuple[Place, ...]


class Recipe:
    """Launches one after the other, and the memory they need between them.

    Args:
        kernel_of: a kernel by its name.

    Attributes:
        launches: in order.
        sizes: bytes of the memory between them, by the name of its tensor.
    """

    def __init__(self, kernel_of: Callable[[str], Kernel]):
        self._kernel_of, self.launches = kernel_of, list[Launch]()
        self.sizes = {"scratch": 0, "zeros": 0}

    def room(self, num_bytes: int, zeros: bool = False) -> Place:
        """Memory that lasts until the recipe has run; what it holds at first nobody knows, unless it is to be zeros."""
        name = "zeros" if zeros else "scratch"
        place = Place(name, self.sizes[name])
        self.sizes[name] += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return place

    def launch(self, name: str, grid: tuple[int, int, int], arguments: ctypes.Structure, *places: Place) -> None:
        """Adds a launch.

        Args:
            name: of the kernel.
            grid: how many programs, in three dimensions.
            arguments: its argument, but for the pointers, with which it begins.
            places: what those point to.
        """
        pointers = struct.Struct(f"{len(places)}P")
        self.launches.append(Launch(self._kernel_of(name), grid, arguments, pointers, places))
