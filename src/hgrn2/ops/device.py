"""Helpers for devices: the current device, row alignment and autocast."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

# row widths that are no multiple of this (16 bytes in a 16-bit type) make GPUs fall back to matrix kernels for
# unaligned memory, which are ten times slower
ROW_ALIGNMENT = 8


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which a device is the current one, on which kernels are launched."""
    # a CPU is that of Triton's interpreter or the tests' emulator. Usually the device is current already; setting it
    # again would cost the host as much as a launch
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast for operations on x."""
    # entering it needlessly costs as much as a small operation; the meta device has no autocast
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, 1 for the CPU of Triton's interpreter."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
