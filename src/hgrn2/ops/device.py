"""Devices: where kernels are launched, what they ask of memory, and autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

# elements of a row of which matrix kernels of a GPU want a multiple: 16 bytes in a 16-bit type. Rows of another width
# fall back to kernels for unaligned memory, ten times slower
ROW_ALIGNMENT = 8


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a device the current one, where kernels are launched."""
    # a CPU is the interpreter's or the tests' emulator's. The device is current in most calls; to set it again would
    # cost the host as much as a launch
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast for operations on x."""
    # to enter one where autocast is off costs as much as a small operation; a meta tensor's device has none
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
