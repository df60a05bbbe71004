"""Describe the device and versions of a run, which are recorded and compared when it is resumed."""

from __future__ import annotations

import sys
from typing import Any

import torch

import hgrn2


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return the device, threads and versions on which the last bits of a loss depend, as JSON values."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "num_threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "hgrn2": hgrn2.__version__,
    }


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far, of the GPU or of the process; 0 if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kibibytes
    return peak if sys.platform == "darwin" else peak * 1024
