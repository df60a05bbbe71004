"""What kernels of a GPU ask of their device and of memory."""

from __future__ import annotations

import contextlib

import torch

# elements of a row of which matrix kernels of a GPU want a multiple: 16 bytes in a 16-bit type. Rows of another width
# fall back to kernels for unaligned memory, ten times slower
ROW_ALIGNMENT = 8


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a device the current one, which is where kernels are launched."""
    # only the interpreter and the tests' emulator get here with a CPU. Most calls find the device current; to make it
    # so again would cost the host as much as a launch
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
