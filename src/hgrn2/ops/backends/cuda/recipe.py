"""Launches that are made ready once, for all calls that differ in nothing but where their tensors lie.

Forward and backward pass together are a dozen launches or more, each with an argument of some forty numbers; to find
those anew would take the host longer than the kernels of a small call take the GPU.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hgrn2.ops.backends.cuda.compiler import Kernel, current_stream
from hgrn2.ops.device import on_device

# of rooms in memory, bytes
ALIGNMENT = 512


class Place(NamedTuple):
    """Where something lies: in which tensor of a call, and how many bytes behind its beginning."""

    tensor: str
    offset: int = 0


NOWHERE = Place("nowhere")


class _Launch(NamedTuple):
    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: ctypes.Structure
    pointers: struct.Struct
    places: tuple[Place, ...]


class Recipe:
    """Launches one after the other, and the memory they need between them.

    Args:
        kernel_of: a kernel by its name.
    """

    def __init__(self, kernel_of: Callable[[str], Kernel]):
        self._kernel_of, self._launches = kernel_of, list[_Launch]()
        self._sizes = {"scratch": 0, "zeros": 0}

    def room(self, num_bytes: int, zeros: bool = False) -> Place:
        """Memory that lasts until the recipe has run; what it holds at first nobody knows, unless it is to be zeros."""
        name = "zeros" if zeros else "scratch"
        place = Place(name, self._sizes[name])
        self._sizes[name] += -(-num_bytes // ALIGNMENT) * ALIGNMENT
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
        self._launches.append(_Launch(self._kernel_of(name), grid, arguments, pointers, places))

    def run(self, device: torch.device, **tensors: Tensor | None) -> None:
        """Launches all on the device's current stream.

        Args:
            device: where the tensors are.
            tensors: what `Place` calls by these names; None is nowhere.
        """
        with on_device(device):
            stream = current_stream(device)
            # held until all is launched; whoever gets the memory then comes later in the stream. Whole numbers, which
            # torch, where it fills fresh memory for tests, fills with bits that are not a number in any type
            rooms = {
                name: (torch.zeros if name == "zeros" else torch.empty)(size // 4, dtype=torch.int32, device=device)
                for name, size in self._sizes.items()
                if size
            }
            addresses = {name: 0 if x is None else x.data_ptr() for name, x in (tensors | rooms).items()}
            addresses[NOWHERE.tensor] = 0
            for kernel, grid, template, pointers, places in self._launches:
                # a copy, for another thread may run the same recipe
                arguments = type(template).from_buffer_copy(template)
                pointers.pack_into(arguments, 0, *[addresses[name] + offset for name, offset in places])
                kernel.launch(grid, arguments, stream)
