"""A short convolution along time, with one filter per channel."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from hgrn2.shapes import BT, BTD

# the last inputs before x
History = Annotated[Tensor, "N W D"]


class ShortConv(nn.Module):
    """y_t = sum_j w[:, j] x_{t - width + 1 + j}: each channel looks back width - 1 tokens.

    The weight is [D, 1, width] as in the published checkpoints, the last tap on the current token. There are two more
    orders: "reverse" is the mirror image, y_t = sum_j w[:, j] x_{t + width - 1 - j}, and "bidirectional" is centred,
    y_t = sum_j w[:, j] x_{t - width // 2 + j}, which looks one token further back than ahead if the width is even.

    Args:
        hidden_size: D.
        width: taps.
        order: the order in which the initial weight is the identity.
    """

    def __init__(self, hidden_size: int, width: int, order: str = "causal"):
        super().__init__()
        self.width = width
        weight = torch.zeros(hidden_size, 1, width)
        weight[..., width // 2 if order == "bidirectional" else -1] = 1
        self.weight = nn.Parameter(weight)

    def forward(
        self,
        x: BTD,
        state: History | None,
        cu_seqlens: Tensor | None,
        mask: BT | None = None,
        order: str = "causal",
    ) -> tuple[BTD, History]:
        """Convolve x.

        Args:
            x: [B, T, D].
            state: [N, width - 1, D], the last inputs before x; None for zeros.
            cu_seqlens: [N + 1] starts of packed sequences and the total length, or None.
            mask: [B, T] bool, False where a token is padding (and x is zero), or None.
            order: "causal", "reverse" or "bidirectional"; the latter two take no state.

        Returns:
            y like x, and the new state, which has a meaning in the causal order only.
        """
        weight = self.weight.squeeze(1).to(x.dtype)
        back = self.width - 1
        if order == "reverse":
            weight = weight.flip(1)
        ahead = {"causal": 0, "reverse": back, "bidirectional": back // 2}[order]
        if cu_seqlens is not None:
            return self._packed(x, state, cu_seqlens, weight, ahead)
        if ahead:
            return self._look_ahead(x, mask, weight, ahead), x.new_zeros((x.shape[0], back, x.shape[2]))
        if state is None:
            state = x.new_zeros((x.shape[0], back, x.shape[2]))
        padded = torch.cat([state.to(x.dtype), x], 1)
        moved = None
        if mask is not None:
            # move padding before the history, so that no token sees it
            moved = torch.cat([mask.new_ones((x.shape[0], back)), mask], 1).long().argsort(dim=1, stable=True)
            padded = padded.take_along_dim(moved.unsqueeze(-1), 1)
        if not x.shape[1]:
            return x, padded
        y = functional.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), groups=x.shape[2]).transpose(1, 2)
        if moved is not None:
            # undo the move; values at padding are arbitrary
            places = (moved.argsort(dim=1)[:, back:] - back).clamp_min(0)
            y = y.take_along_dim(places.unsqueeze(-1), 1)
        return y, padded[:, padded.shape[1] - back :]

    def _look_ahead(self, x: BTD, mask: BT | None, weight: Tensor, ahead: int) -> BTD:
        """Convolve whole sequences with the last `ahead` taps on tokens after the current one."""
        if not x.shape[1]:
            return x
        moved = None
        if mask is not None:
            # move padding before the tokens, so that no token sees it
            moved = mask.long().argsort(dim=1, stable=True)
            x = x.take_along_dim(moved.unsqueeze(-1), 1)
        padded = functional.pad(x.transpose(1, 2), (self.width - 1 - ahead, ahead))
        y = functional.conv1d(padded, weight.unsqueeze(1), groups=x.shape[2]).transpose(1, 2)
        return y if moved is None else y.take_along_dim(moved.argsort(dim=1).unsqueeze(-1), 1)

    def _packed(
        self, x: BTD, state: History | None, cu_seqlens: Tensor, weight: Tensor, ahead: int
    ) -> tuple[BTD, History]:
        back = self.width - 1
        starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        if state is None:
            state = x.new_zeros((starts.shape[0], back, x.shape[2]))
        rows = torch.arange(x.shape[1], device=x.device)
        sequence = torch.searchsorted(stops, rows, right=True)
        # lay out each sequence after its history, so that no tap crosses a boundary
        history = starts.unsqueeze(1) + torch.arange(back, device=x.device)
        history = (history + back * torch.arange(starts.shape[0], device=x.device).unsqueeze(1)).flatten()
        place = rows + back * (sequence + 1)
        laid = x.new_zeros((x.shape[1] + back * starts.shape[0] + ahead, x.shape[2]))
        laid = laid.index_copy(0, history, state.to(x.dtype).flatten(0, 1)).index_copy(0, place, x[0])
        y = torch.zeros_like(x[0])
        for tap in range(self.width):
            y = y + laid.index_select(0, place - back + ahead + tap) * weight[:, tap]
        ends = stops + back * torch.arange(1, starts.shape[0] + 1, device=x.device)
        last = ends.unsqueeze(1) - back + torch.arange(back, device=x.device)
        return y.unsqueeze(0), laid.index_select(0, last.flatten()).unflatten(0, last.shape)
