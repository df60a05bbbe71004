"""Inputs of a forward pass besides the hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hgrn2.ops.pieces import Pieces

MixerState = dict[str, Tensor]
Order = Literal["causal", "reverse", "bidirectional"]
Axis = Literal["rows", "columns", "both"]


@dataclass(frozen=True)
class Context:
    """Inputs of a forward pass besides the hidden states; made once per pass, then adapted to each layer.

    Attributes:
        cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences (B = 1), or None.
        mask: [B, T] bool, False where a token is padding, or None.
        keep_state: whether to return the new state.
        is_step: whether x is a single token after a state, for which a mixer may use a faster form.
        lower_bound: [D] float32 in [0, 1), the bound of this layer's gates; None for 0, and for mixers that do not use
            lower bounds.
        earlier: features returned by earlier layers, the nearest last; at most `Mixer.num_earlier`.
        grid: rows and columns of an image whose tokens are x, row by row: T = rows * columns. None for sequences.
        order: tokens that a token sees: those before it, those after it, or both. `DirectedMixer.forward` sets it for
            `project` and `mix`, from the mixer's direction.
        axis: sequences of a grid along which tokens are mixed; None for one sequence of all tokens. Set with `order`.
        pieces: how the sequences are split over ranks, of which x is a piece; None if x is whole.
    """

    cu_seqlens: Tensor | None = None
    mask: Tensor | None = None
    keep_state: bool = True
    is_step: bool = False
    lower_bound: Tensor | None = None
    earlier: tuple[MixerState, ...] = ()
    grid: tuple[int, int] | None = None
    order: Order = "causal"
    axis: Axis | None = None
    pieces: Pieces | None = None

    def for_layer(self, lower_bound: Tensor | None, earlier: tuple[MixerState, ...]) -> Context:
        """Return the context of one layer."""
        if lower_bound is None and not earlier:
            return self
        return Context(
            self.cu_seqlens, self.mask, self.keep_state, self.is_step, lower_bound, earlier, self.grid,
            pieces=self.pieces,
        )  # fmt: skip

    def for_order(self, order: Order, axis: Axis | None = None) -> Context:
        """Return the context of a pass without an initial or final state, with this order and axis."""
        return Context(
            self.cu_seqlens, self.mask, False, False, self.lower_bound, self.earlier, self.grid, order, axis
        )  # fmt: skip

    def for_sequences(self, mask: Tensor | None, lower_bound: Tensor | None) -> Context:
        """Return the context of one scan whose sequences are rows or columns."""
        return Context(None, mask, False, False, lower_bound, (), None, self.order)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Context:
        """Move the tensors to a device; Accelerate calls this on the arguments of a layer."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=non_blocking)

        return Context(
            move(self.cu_seqlens), move(self.mask), self.keep_state, self.is_step, move(self.lower_bound),
            tuple({k: x.to(device, non_blocking=non_blocking) for k, x in some.items()} for some in self.earlier),
            self.grid, self.order, self.axis, self.pieces,
        )  # fmt: skip
