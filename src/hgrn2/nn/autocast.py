"""Autocast for modules that choose the dtype of their output."""

from __future__ import annotations

import torch


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Return the dtype of matrix products with x under autocast; None without autocast, or for float64."""
    # autocast does not apply to meta tensors
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)
