"""The device that kernels are launched on."""

from __future__ import annotations

import contextlib

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a device the current one, which is where kernels are launched."""
    # only the interpreter and the tests' emulator get here with a CPU. Most calls find the device current; to make it
    # so again would cost the host as much as a launch
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
