"""What autocast asks of modules that choose a dtype themselves."""

from __future__ import annotations

import torch


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype products of x with weights take here; None without autocast, and for float64, which it leaves alone."""
    # tensors that only have a shape know no autocast
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)
