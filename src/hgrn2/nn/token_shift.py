"""Shift a sequence by one token, so that each place sees the token before it."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from hgrn2.shapes import BT, BTD

# one row for each sequence
Last = Annotated[Tensor, "N D"]


def token_shift(
    x: BTD, state: Last | None, cu_seqlens: Tensor | None = None, mask: BT | None = None
) -> tuple[BTD, Last]:
    """Return the token before each place, and the last token of each sequence.

    Args:
        x: [B, T, D].
        state: [N, D], the token before x; None for zeros.
        cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences (B = 1), or None.
        mask: [B, T] bool, False where a token is padding, which is passed over; or None.

    Returns:
        The shifted x [B, T, D], arbitrary at padding, and the last token [N, D], in x's dtype.
    """
    if cu_seqlens is not None:
        return _packed(x, state, cu_seqlens)
    state = x.new_zeros((x.shape[0], x.shape[2])) if state is None else state.to(x.dtype)
    padded = torch.cat([state.unsqueeze(1), x], 1)
    if mask is None:
        return padded[:, : x.shape[1]], padded[:, x.shape[1]]
    places = torch.arange(1, x.shape[1] + 1, device=x.device)
    # in `padded`, the last token up to each place; the state comes first
    latest = functional.pad(torch.where(mask, places, 0), (1, 0)).cummax(1).values
    found = padded.take_along_dim(latest.unsqueeze(-1), 1)
    return found[:, : x.shape[1]], found[:, x.shape[1]]


def _packed(x: BTD, state: Last | None, cu_seqlens: Tensor) -> tuple[BTD, Last]:
    starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    count, rows = starts.shape[0], torch.arange(x.shape[1], device=x.device)
    # wrong bounds must not lead beyond the inputs
    sequence = torch.searchsorted(stops, rows, right=True).clamp_(max=count - 1)
    is_first = (rows == starts[sequence]).unsqueeze(-1)
    shifted = torch.cat([x[:, :1], x[:, :-1]], 1)
    if state is None:
        shifted = shifted.masked_fill(is_first, 0)
        state = x.new_zeros((count, x.shape[2]))
    else:
        state = state.to(x.dtype)
        shifted = torch.where(is_first, state[sequence], shifted)
    # an empty sequence keeps its state
    last = torch.where(stops > starts, count + stops - 1, torch.arange(count, device=x.device))
    return shifted, torch.cat([state, x[0]]).index_select(0, last)
