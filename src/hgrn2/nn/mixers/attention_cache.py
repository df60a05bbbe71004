"""Positions of tokens, and caches of keys and values, for attention over sequences with padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hgrn2.nn.mixers.context import MixerState
from hgrn2.ops.transforms import is_batched


def token_positions(x: Tensor, state: MixerState | None, cu_seqlens: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the position of each token in its sequence, [B, T]."""
    row = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        sequence = torch.searchsorted(bounds[1:], row, right=True)
        place = row - bounds[sequence]
        return (place if state is None else place + state["position"][sequence]).unsqueeze(0)
    place = row.unsqueeze(0) if mask is None else (mask.long().cumsum(1) - 1).clamp_min(0)
    return place if state is None else place + state["position"].unsqueeze(1)


def stack_caches(rows: list[Tensor], like: Tensor, longest: int) -> Tensor:
    """Stack the caches [length, heads, size] of several sequences, padding first."""
    if not rows:
        return like.new_zeros((0, 0, *like.shape[2:]))
    return torch.stack([functional.pad(row, (0, 0, 0, 0, longest - row.shape[0], 0)) for row in rows])


def close_gaps(k: Tensor, v: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move padding before the tokens, and drop columns of padding alone."""
    order = valid.long().argsort(dim=1, stable=True)
    if valid.numel() and not torch.compiler.is_compiling() and not is_batched(valid):
        order = order[:, order.shape[1] - int(valid.sum(1).max()) :]
    where = order.unsqueeze(-1).unsqueeze(-1)
    return k.take_along_dim(where, 1), v.take_along_dim(where, 1), valid.take_along_dim(order, 1)
