"""Tensors of which every rank holds a part (DTensor), beside plain ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a rank holds only its part of a tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """Return the whole tensor; all ranks call it together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, other: Any) -> Tensor:
    """Return this rank's part of a tensor that all ranks have, split like another.

    Args:
        tensor: the whole tensor.
        other: a tensor of the same shape, split or not.
    """
    if not is_sharded(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    moved = tensor.to(other.device)
    return distribute_tensor(moved, other.device_mesh, other.placements, src_data_rank=None)
