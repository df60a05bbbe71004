"""Sequences split into pieces over the ranks of a group: each rank has the same share of every row.

A recurrence with diagonal decays maps the state before a piece to the state after it by S -> Diag(d) S + E, where d is
the product of the decays and E the state that the piece alone leaves. Ranks exchange d and E, one row and one matrix
per head, and fold those of the pieces before their own. Everything is exact, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hgrn2.shapes import BTHK, BTHV

# tokens whose gates are expanded at a time
_CHUNK = 4096
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _not_compiled(function: _Function) -> _Function:
    """Return a function that torch.compile calls as it is."""
    return cast(_Function, torch.compiler.disable(function))


@dataclass(frozen=True)
class PieceGroup:
    """The ranks that share sequences.

    Attributes:
        group: their process group.
        index: the piece of this rank, 0 <= index < count.
        count: number of pieces.
    """

    group: Any
    index: int
    count: int


@dataclass(frozen=True)
class Pieces:
    """A row of sequences, split into pieces of equal length.

    Attributes:
        ranks: the ranks that hold the pieces.
        continues: for each piece, whether its first sequence began in an earlier piece.
        passes: for each piece, whether that sequence does not end before the last token of the piece.
        cu_seqlens: [N + 1], bounds of the sequences of the whole row; None if every row is one sequence.
    """

    ranks: PieceGroup
    continues: tuple[bool, ...]
    passes: tuple[bool, ...]
    cu_seqlens: Tensor | None = None


@_not_compiled
def state_before(k: BTHK, v: BTHV, log_f: BTHK, cu_seqlens: Tensor | None, pieces: Pieces) -> Tensor:
    """Return the state before the first token of each sequence of this rank's piece.

    Args:
        k: [B, T, H, K], the keys of this piece.
        v: [B, T, H, V].
        log_f: [B, T, H, K], log decays in the dtype of the state, at most 0.
        cu_seqlens: [N + 1], bounds of the sequences of this piece (B = 1), or None.
        pieces: the split.

    Returns:
        [N, H, K, V], zero for sequences that begin in this piece; N is B without cu_seqlens.
    """
    decay, state = _end_of_last(k, v, log_f, cu_seqlens)
    before = _Fold.apply(decay, state, pieces)
    return _first_of(before, cu_seqlens)


@_not_compiled
def rows_before(x: Tensor, count: int, cu_seqlens: Tensor | None, pieces: Pieces) -> Tensor:
    """Return the last rows before the first token of each sequence of this rank's piece.

    Args:
        x: [B, T, D] of this piece, T >= count.
        count: number of rows.
        cu_seqlens: [N + 1], bounds of the sequences of this piece (B = 1), or None.
        pieces: the split.

    Returns:
        [N, count, D], zero before the start of a sequence.
    """
    own = x[:, x.shape[1] - count :]
    if cu_seqlens is not None:
        rows = torch.arange(x.shape[1] - count, x.shape[1], device=x.device)
        own = own.masked_fill((rows < cu_seqlens[-2]).view(1, -1, 1), 0)
    return _first_of(_Previous.apply(own, pieces), cu_seqlens)


@_not_compiled
def to_heads(x: Tensor, ranks: PieceGroup) -> Tensor:
    """Exchange tokens for heads: from all heads of a piece to all tokens of some heads.

    Args:
        x: [B, T, H, E]; the number of pieces divides H.
        ranks: the ranks that hold the pieces.

    Returns:
        [B, count * T, H / count, E].
    """
    return _ToHeads.apply(x, ranks)  # pyright: ignore[reportReturnType]


@_not_compiled
def to_tokens(x: Tensor, ranks: PieceGroup) -> Tensor:
    """Invert `to_heads`."""
    return _ToTokens.apply(x, ranks)  # pyright: ignore[reportReturnType]


def _first_of(first: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the tensor with zeros for all sequences but the first of a packed row."""
    if cu_seqlens is None:
        return first
    return torch.cat([first, first.new_zeros((cu_seqlens.shape[0] - 2, *first.shape[1:]))])


def _end_of_last(k: Tensor, v: Tensor, log_f: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the product of the decays [B, H, K] of the last sequence, and the state [B, H, K, V] that it leaves."""
    if cu_seqlens is not None:
        rows = torch.arange(k.shape[1], device=k.device)
        is_earlier = (rows < cu_seqlens[-2]).view(1, -1, 1, 1)
        k, log_f = k.masked_fill(is_earlier, 0), log_f.masked_fill(is_earlier, 0)
    decay, state = None, None
    for start in range(0, k.shape[1], _CHUNK):
        part = tuple(x[:, start : start + _CHUNK] for x in (k, v, log_f))
        # keeps the operands only, not what is computed from them
        log_decay, written = checkpoint(_end_of_chunk, *part, use_reentrant=False, preserve_rng_state=False)
        own = log_decay.exp()
        decay = own if decay is None else decay * own
        state = written if state is None else own.unsqueeze(-1) * state + written
    assert decay is not None
    assert state is not None
    return decay, state


def _end_of_chunk(k: Tensor, v: Tensor, log_f: Tensor) -> tuple[Tensor, Tensor]:
    # sums of later decays; differences of sums would lose digits
    later = torch.cat([log_f[:, 1:], torch.zeros_like(log_f[:, :1])], 1).flip(1).cumsum(1).flip(1)
    kept = k.to(log_f.dtype) * later.exp()
    written = torch.einsum("bthk,bthv->bhkv", kept, v.to(log_f.dtype))
    return log_f.sum(1), written


class _Fold(torch.autograd.Function):
    """Fold the ends of earlier pieces into the state before this one."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, state: Tensor, pieces: Pieces) -> Tensor:
        decays, states = _gather(decay, pieces.ranks), _gather(state, pieces.ranks)
        before = torch.zeros_like(state)
        for piece in range(pieces.ranks.index):
            after = states[piece]
            if pieces.passes[piece]:
                after = after + decays[piece].unsqueeze(-1) * before
            before = after if pieces.continues[piece + 1] else torch.zeros_like(after)
        ctx.pieces = pieces
        ctx.save_for_backward(before, *decays)
        return before

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        before, *decays = ctx.saved_tensors
        pieces = ctx.pieces
        grads = _gather(grad, pieces.ranks)
        # the gradient of the state after a piece, from the last piece back to this one
        after = torch.zeros_like(grad)
        for piece in range(pieces.ranks.count - 1, pieces.ranks.index, -1):
            own = grads[piece]
            if pieces.passes[piece]:
                own = own + decays[piece].unsqueeze(-1) * after
            after = own if pieces.continues[piece] else torch.zeros_like(own)
        if pieces.passes[pieces.ranks.index]:
            return (after * before).sum(-1), after, None
        return torch.zeros_like(decays[0]), after, None


class _Previous(torch.autograd.Function):
    """Return the tensor of the piece before; zeros if no sequence continues from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pieces: Pieces) -> Tensor:
        ctx.pieces = pieces
        index = pieces.ranks.index
        found = _gather(x, pieces.ranks)
        return found[index - 1] if pieces.continues[index] else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pieces = ctx.pieces
        following = pieces.ranks.index + 1
        found = _gather(grad, pieces.ranks)
        is_used = following < pieces.ranks.count and pieces.continues[following]
        return found[following] if is_used else torch.zeros_like(grad), None


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: PieceGroup) -> Tensor:
        ctx.ranks = ranks
        return _tokens_for_heads(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _heads_for_tokens(grad, ctx.ranks), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: PieceGroup) -> Tensor:
        ctx.ranks = ranks
        return _heads_for_tokens(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _tokens_for_heads(grad, ctx.ranks), None


def _tokens_for_heads(x: Tensor, ranks: PieceGroup) -> Tensor:
    # [B, T, heads, E] to [pieces of heads, B, T, some heads, E]
    sent = x.unflatten(2, (ranks.count, -1)).permute(2, 0, 1, 3, 4).contiguous()
    return _exchange(sent, ranks).transpose(0, 1).flatten(1, 2)


def _heads_for_tokens(x: Tensor, ranks: PieceGroup) -> Tensor:
    sent = x.unflatten(1, (ranks.count, -1)).transpose(0, 1).contiguous()
    return _exchange(sent, ranks).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _exchange(x: Tensor, ranks: PieceGroup) -> Tensor:
    """Send x[r] to rank r, and return what all ranks have sent to this one."""
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=ranks.group)
    return received


def _gather(x: Tensor, ranks: PieceGroup) -> list[Tensor]:
    x = x.contiguous()
    found = [torch.empty_like(x) for _ in range(ranks.count)]
    dist.all_gather(found, x, group=ranks.group)
    return found
