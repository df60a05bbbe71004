"""Causal attention whose weights are squared dot products, in chunks, with a state of constant size."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hgrn2.nn.mixers.base import wide_dtype
from hgrn2.ops.device import ROW_ALIGNMENT
from hgrn2.ops.export import is_exporting
from hgrn2.ops.tiles import CHUNK_SIZE
from hgrn2.shapes import BTHK, BTHV

GPU_CHUNK_SIZE = 256
# F = K (K + 1) / 2 products of two features
State = Annotated[Tensor, "N H F V"]


def squared_attention(q: BTHK, k: BTHK, v: BTHV, state: State | None, cu_seqlens: Tensor | None) -> tuple[BTHV, State]:
    """Sum values with squared weights.

        y_t = sum_{j <= t} (q_t . k_j)^2 v_j

    Inside a chunk the products themselves are squared, so that no weight is negative in any precision. Earlier chunks
    are read through the state S = sum_j phi(k_j) v_j^T with (q . k)^2 = phi(q) . phi(k), in float32 or wider.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        state: [N, H, F, V] before the first token; None for zeros.
        cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences (B = 1), or None.

    Returns:
        y [B, T, H, V], float32 or wider, and the new state.
    """
    length, wide = q.shape[1], wide_dtype(q.dtype)
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if state is None:
        shape = (q.shape[2], q.shape[3] * (q.shape[3] + 1) // 2, v.shape[3])
        state = torch.zeros((count, *shape), dtype=wide, device=q.device)
    if not length:
        return v.to(wide), state
    columns = v.shape[3]
    if q.is_cuda and columns % ROW_ALIGNMENT:
        extra = -columns % ROW_ALIGNMENT
        v, state = functional.pad(v, (0, extra)), functional.pad(state, (0, extra))
    # on a GPU, long chunks: states move more bytes than scores
    most = GPU_CHUNK_SIZE if q.is_cuda and cu_seqlens is None else CHUNK_SIZE
    # an exported program has one chunk, because its length is dynamic
    size = length if is_exporting() else min(most, length)
    layout = None if cu_seqlens is None else _Layout.of(length, cu_seqlens, size)
    q, k, v = (_cut(x, size, layout) for x in (q, k, v))
    inside = (q @ k.transpose(-1, -2)).square().tril() @ v
    with torch.autocast(q.device.type, enabled=False):
        updates = pair_products(k.to(wide)).transpose(-1, -2) @ v.to(wide)
        if layout is None:
            states = torch.cat([state.unsqueeze(1), updates], 1).cumsum(1)
            before, end = states[:, :-1], states[:, -1]
        else:
            before, end = layout.sum_updates(updates[0], state)
        y = inside.to(wide) + pair_products(q.to(wide)) @ before
    y = y.transpose(2, 3).flatten(1, 2)
    y = y[:, :length] if layout is None else y.index_select(1, layout.place)
    return y[..., :columns], end[..., :columns]


def pair_products(x: Tensor) -> Tensor:
    """Return phi(x) [..., F], the products of pairs of x [..., K], with phi(x) . phi(y) = (x . y)^2."""
    width = x.shape[-1]
    row, column = torch.triu_indices(width, width, device=x.device)
    # a pair of different features counts twice in the square
    factor = torch.where(row == column, 1.0, 2.0).to(x.dtype).sqrt()
    return (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2).index_select(-1, row * width + column) * factor


def _cut(x: BTHK, size: int, layout: _Layout | None) -> Tensor:
    """Cut x [B, T, H, width] into chunks, [B, chunks, H, size, width], with zeros in the gaps."""
    if layout is None:
        if size == x.shape[1]:
            return x.unsqueeze(1).transpose(2, 3)
        x = functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
        return x.unflatten(1, (-1, size)).transpose(2, 3)
    rows = x.index_select(1, layout.row.flatten()).unflatten(1, (-1, size))
    return rows.masked_fill(layout.is_gap[..., None, None], 0).transpose(2, 3)


class _Layout(NamedTuple):
    """Chunks of packed sequences, none of which holds two.

    Attributes:
        row: [chunks, size], the row of each place; any row in a gap.
        is_gap: [chunks, size] bool, places without a token.
        place: [T], the place of each row among all places.
        sequence: [chunks], the sequence of each chunk.
        first: [N + 1], the first chunk of each sequence.
    """

    row: Tensor
    is_gap: Tensor
    place: Tensor
    sequence: Tensor
    first: Tensor

    @classmethod
    def of(cls, length: int, cu_seqlens: Tensor, size: int) -> _Layout:
        """Lay out T rows; the number of chunks is an upper bound that needs no values."""
        starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        count, device = starts.shape[0], cu_seqlens.device
        first = functional.pad(((stops - starts + size - 1) // size).cumsum(0), (1, 0))
        chunk = torch.arange(-(-length // size) + count, device=device)
        sequence = (torch.searchsorted(first, chunk, right=True) - 1).clamp(0, count - 1)
        row = starts[sequence] + (chunk - first[sequence]) * size
        row = row.unsqueeze(1) + torch.arange(size, device=device)
        is_gap = row >= stops[sequence].unsqueeze(1)
        rows = torch.arange(length, device=device)
        owner = torch.searchsorted(stops, rows, right=True).clamp(max=count - 1)
        place = first[owner] * size + rows - starts[owner]
        return cls(row.clamp(0, length - 1), is_gap, place, sequence, first)

    def sum_updates(self, updates: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state before each chunk [1, chunks, H, F, V] and after each sequence, from the chunks' updates."""
        # differences of sums over all sequences: float64 keeps the digits
        sums = torch.cat([torch.zeros_like(updates[:1]), updates]).cumsum(0, dtype=torch.float64)
        before = (sums[:-1] - sums[self.first[self.sequence]]).to(updates.dtype) + state[self.sequence]
        end = (sums[self.first[1:]] - sums[self.first[:-1]]).to(updates.dtype) + state
        return before.unsqueeze(0), end
