"""The chunkwise form of the gated scan in plain torch, for every device.

The recurrence S_t = Diag(f_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t (arXiv 2404.07904, section 3) is computed for
chunks of tokens with matrix products. The usual way takes cumulative sums of log f and exponentials of their
differences, which overflow, or lose digits, when gates are extreme. Here nothing is divided and no logarithm is taken:
inside a chunk, neighbouring blocks of 1, 2, 4, ... tokens are joined in pairs. When the earlier block E of a pair meets
the later block L,

    scores(L, E) = (q_L * prefix_L) (k_E * suffix_E)^T

where prefix_L[t] is the product of f from the start of L through t, and suffix_E[s] the product of f after s to the end
of E. Both are products of numbers in [0, 1], so every score keeps its relative precision for any gate down to f = 0.
After a join q_L is multiplied by the whole decay of E, and k_E by that of L: right for the next, twice as large pair.
After the last join q carries the decay since the chunk's start and k the decay to the chunk's end, which is what the
state between chunks needs.

A product of many gates just below 1 would gather rounding errors that all point the same way. So the complement
c = 1 - f is joined beside the decay (c = c_E + f_E c_L, a sum of non-negative numbers) and decides where it is small.

The gradient runs the joins backwards; it too is right at f = 0. A scan in reverse time swaps the roles of E and L.

Letters: M = sequences * heads * chunks of a tile, C = chunk size, K and V as in `hgrn2.shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hgrn2.ops.gates import FreeGate, TiedGate
from hgrn2.ops.tiles import (
    Tile,
    batch_per_tile,
    boundaries,
    chunk_size,
    load,
    max_tiles,
    store,
    tiles,
)

# after the join of blocks of this size the complement, where small, replaces the product of decays
COMPLEMENT_FROM_BLOCK = 8
COMPLEMENT_BELOW = 0.5


@dataclass
class Joined:
    """A tile after all joins.

    Attributes:
        scores: [M, C, C] in the low dtype, scores[t, s] of the tokens of one chunk, 0 where s comes after t.
        q: [M, C, K], the query times the decay since the chunk's start.
        k: [M, C, K], the key times the decay to the chunk's end.
        keep: [M, K], 0 or 1; keep + change is the decay across the chunk, with more digits than one number has.
        change: [M, K], see keep.
        joins: per join (q_L, k_E, decay_E, decay_L) before it, kept for the gradient.
    """

    scores: Tensor
    q: Tensor
    k: Tensor
    keep: Tensor
    change: Tensor
    joins: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)


def _block(x: Tensor, size: int, which: int) -> Tensor:
    """View of x [M, n, W]: of each pair of blocks of `size` rows the first (0) or second (1), [M * pairs, size, W]."""
    m, rows, width = x.shape
    return x.as_strided((m * rows // (2 * size), size, width), (2 * size * width, width, 1), which * size * width)


def _score_block(scores: Tensor, size: int, late: int, early: int) -> Tensor:
    """View of scores [M, C, C]: of every pair, the rows of the later and the columns of the earlier block."""
    m, chunk, _ = scores.shape
    shape, strides = (m, chunk // (2 * size), size, size), (chunk * chunk, 2 * size * (chunk + 1), chunk, 1)
    return scores.as_strided(shape, strides, late * size * chunk + early * size)


def join(q: Tensor, k: Tensor, f: Tensor, c: Tensor, low: torch.dtype, reverse: bool, keep: bool) -> Joined:
    """Joins the blocks of every chunk, from single tokens to the whole chunk.

    Args:
        q: [M, C, K].
        k: [M, C, K].
        f: [M, C, K], the decay, in [0, 1].
        c: [M, C, K], 1 - f without cancellation (for a tied key, k itself).
        low: dtype of the large matrix products.
        reverse: time runs from the last row to the first.
        keep: keep what the gradient needs, the arguments included; else they are overwritten.
    """
    m, chunk, _ = q.shape
    early, late = (1, 0) if reverse else (0, 1)
    scores = q.new_zeros((m, chunk, chunk), dtype=low)
    scores.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
    # c may be k itself: the first join reads it before it changes k
    q, k = (q * f, k.clone()) if keep else (q.mul_(f), k)
    joins = []
    decay, complement = f, c
    size = 1
    while size < chunk:
        q_l, k_e = _block(q, size, late), _block(k, size, early)
        decay_e, decay_l = _block(decay, 1, early), _block(decay, 1, late)
        # single rows: a product of matrices would cost a call each
        products = (q_l * k_e).sum(-1, keepdim=True) if size == 1 else torch.bmm(q_l, k_e.mT)
        _score_block(scores, size, late, early).copy_(products.view(m, -1, size, size))
        if keep:
            joins.append((q_l.clone(), k_e.clone(), decay_e, decay_l))
        complement = torch.addcmul(_block(complement, 1, early), decay_e, _block(complement, 1, late))
        complement = complement.view(m, -1, q.shape[2])
        decay = (decay_e * decay_l).view_as(complement)
        if size == COMPLEMENT_FROM_BLOCK:
            decay = torch.where(complement < COMPLEMENT_BELOW, 1 - complement, decay)
        q_l *= decay_e
        k_e *= decay_l
        size *= 2
    decay, complement = decay.squeeze(1), complement.squeeze(1)
    small = complement < COMPLEMENT_BELOW
    change = torch.where(small, -complement, decay)
    return Joined(scores, q, k, small.to(change.dtype), change, joins)


def unjoin(
    joined: Joined,
    q: Tensor,
    k: Tensor,
    f: Tensor,
    d_scores: Tensor,
    dq: Tensor,
    dk: Tensor,
    d_decay: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `join`.

    Args:
        joined: its result, with joins kept.
        q: its argument, likewise k and f.
        k: see q.
        f: see q.
        d_scores: [M, C, C] in the low dtype; what stands above the diagonal is not read.
        dq: [M, C, K], gradient of the joined q; changed in place.
        dk: [M, C, K], gradient of the joined k; changed in place.
        d_decay: [M, K], gradient of the decay across the chunk.
        reverse: as in `join`.

    Returns:
        Gradients of q, k and f.
    """
    m, size, width = q.shape
    early, late = (1, 0) if reverse else (0, 1)
    d_decay = d_decay.unsqueeze(1)
    for q_l, k_e, decay_e, decay_l in reversed(joined.joins):
        size //= 2
        dq_l, dk_e = _block(dq, size, late), _block(dk, size, early)
        d_before = q.new_empty((m, q.shape[1] // size, width))
        d_joined = d_decay.reshape(-1, 1, width)
        torch.addcmul((dq_l * q_l).sum(1, keepdim=True), d_joined, decay_l, out=_block(d_before, 1, early))
        torch.addcmul((dk_e * k_e).sum(1, keepdim=True), d_joined, decay_e, out=_block(d_before, 1, late))
        d_decay = d_before
        # small products are not faster in low precision
        d_products = _score_block(d_scores, size, late, early).reshape(-1, size, size).to(q.dtype)
        from_k, from_q = _products(d_products, k_e), _products(d_products.mT, q_l)
        torch.addcmul(from_k, dq_l, decay_e, out=dq_l)
        torch.addcmul(from_q, dk_e, decay_l, out=dk_e)
    d_diagonal = d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1).to(q.dtype)
    df = torch.addcmul(d_decay, dq, q)
    dq = torch.addcmul(d_diagonal * k, dq, f)
    dk = dk.addcmul_(d_diagonal, q)
    return dq, dk, df


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Matrix products of a [N, n, n] with b [N, n, W]; for n = 1, element by element."""
    return a * b if a.shape[-1] == 1 else torch.bmm(a, b)


def scan_states(
    updates: Tensor,
    keep: Tensor,
    change: Tensor,
    state: Tensor,
    tile: Tile,
    starts: Tensor,
    ends: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Carries the state across the chunks of a tile.

    Args:
        updates: [B, H, chunks, K, V], what each chunk adds to the state by its end.
        keep: [B, H, chunks, K], 0 or 1; with change the decay across each chunk.
        change: see keep.
        state: [B, H, K, V], the state that enters the tile.
        tile: says which chunks begin and end a sequence.
        starts: [sequences, B, H, K, V], the states the sequences start from; read.
        ends: [sequences, B, H, K, V], the states they end with; written.
        reverse: time runs from the last chunk to the first.

    Returns:
        The states before each chunk [B, H, chunks, K, V], and the state that leaves the tile.
    """
    begins, finishes = (tile.ends, tile.begins) if reverse else (tile.begins, tile.ends)
    before = torch.empty_like(updates)
    keep, change = keep.unsqueeze(-1), change.unsqueeze(-1)
    order = range(tile.num_chunks)
    place = None
    for i in reversed(order) if reverse else order:
        if begins[i]:
            state = starts[tile.sequences[i]]
        if place is None or begins[i]:
            before[:, :, i] = state
        # written straight to where the next chunk reads it
        following = i - 1 if reverse else i + 1
        place = before[:, :, following] if 0 <= following < tile.num_chunks else torch.empty_like(state)
        # small numbers first: a state that hardly decays is rounded once, not in its product with the decay as well
        torch.addcmul(updates[:, :, i], change[:, :, i], state, out=place)
        state = place.addcmul_(keep[:, :, i], state)
        if finishes[i]:
            ends[tile.sequences[i]] = state
    return before, state


def _state_frame(initial_state: Tensor | None, shape: tuple[int, ...], packed: bool, like: Tensor) -> Tensor:
    """Initial states as [sequences, B, H, K, V]: packed ones lie along the first axis, a batch along the second."""
    if initial_state is None:
        initial_state = like.new_zeros(shape)
    return initial_state.unsqueeze(1 if packed else 0)


def forward(
    gate: TiedGate | FreeGate,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    tile_chunks: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan.

    Args:
        gate: holds the inputs.
        initial_state: [N, H, K, V] or None for zeros.
        cu_seqlens: [N + 1] or None.
        reverse: time runs from the last row to the first.
        tile_chunks: chunks that are worked on together.
        keep_states: keep the states between tiles, which `backward` needs.

    Returns:
        y [B, T, H, V], final state [N, H, K, V], kept states [tiles, B, H, K, V] (tiles = 0 unless asked for).
    """
    q, v = gate.inputs[0], gate.inputs[2]
    plan = _plan(gate, cu_seqlens, tile_chunks)
    low = _low_dtype(gate)
    batch, length, heads, width = q.shape
    y = q.new_empty((batch, length, heads, v.shape[-1]))
    num_states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (num_states, heads, width, v.shape[-1])
    starts = _state_frame(initial_state, state_shape, cu_seqlens is not None, q.new_empty(0, dtype=gate.dtype))
    # sequences without a token keep their state
    ends = starts.clone(memory_format=torch.contiguous_format)
    kept = ends.new_empty(kept_states_shape(q, v, cu_seqlens, tile_chunks, keep_states))
    for first in range(0, batch, plan.batch):
        part = slice(first, min(first + plan.batch, batch))
        # every first chunk begins a sequence and takes that one's state
        state = starts.new_zeros(starts[:, part].shape[1:])
        for i in reversed(range(len(plan.tiles))) if reverse else range(len(plan.tiles)):
            tile = plan.tiles[i]
            if keep_states:
                kept[i, part] = state
            gated = gate.load(part, tile, plan.chunk_size, low, keep=False)
            shape = gated.q.shape[:3]
            q_, k_, v_, f_, c_ = (x.flatten(0, 2) for x in (gated.q, gated.k, gated.v, gated.f, gated.c))
            joined = join(q_, k_, f_, c_, low, reverse, keep=False)
            updates = torch.bmm(joined.k.to(low).mT, v_).to(gate.dtype)
            before, state = scan_states(
                updates.unflatten(0, shape),
                joined.keep.unflatten(0, shape),
                joined.change.unflatten(0, shape),
                state,
                tile,
                starts[:, part],
                ends[:, part],
                reverse,
            )
            out = torch.bmm(joined.scores, v_)
            out = out.baddbmm_(joined.q.to(low), before.flatten(0, 2).to(low))
            store(y[part], out.unflatten(0, shape), tile)
    return y, ends.flatten(0, 1), kept


def backward(
    gate: TiedGate | FreeGate,
    dy: Tensor,
    d_final_state: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    reverse: bool,
    tile_chunks: int,
) -> Tensor:
    """Gradient of `forward`; those of the inputs are left in the gate.

    Returns:
        The gradient of the initial state, [N, H, K, V].
    """
    q, _v = gate.inputs[0], gate.inputs[2]
    plan = _plan(gate, cu_seqlens, tile_chunks)
    low = _low_dtype(gate)
    batch, _, _heads, _width = q.shape
    gate.allocate_gradients()
    packed = cu_seqlens is not None
    starts = _state_frame(initial_state, tuple(d_final_state.shape), packed, d_final_state)
    d_ends = _state_frame(d_final_state, (), packed, d_final_state)
    d_starts = d_ends.clone(memory_format=torch.contiguous_format)
    unused = torch.empty_like(starts)
    for first in range(0, batch, plan.batch):
        part = slice(first, min(first + plan.batch, batch))
        d_state = starts.new_zeros(starts[:, part].shape[1:])
        for i in range(len(plan.tiles)) if reverse else reversed(range(len(plan.tiles))):
            tile = plan.tiles[i]
            gated = gate.load(part, tile, plan.chunk_size, low, keep=True)
            shape = gated.q.shape[:3]
            q_, k_, v_, f_, c_ = (x.flatten(0, 2) for x in (gated.q, gated.k, gated.v, gated.f, gated.c))
            joined = join(q_, k_, f_, c_, low, reverse, keep=True)
            k_low, q_low = joined.k.to(low), joined.q.to(low)
            keep, change = joined.keep.unflatten(0, shape), joined.change.unflatten(0, shape)
            updates = torch.bmm(k_low.mT, v_).to(gate.dtype).unflatten(0, shape)
            before, _ = scan_states(
                updates, keep, change, kept[i, part], tile, starts[:, part], unused[:, part], reverse
            )
            d_out = load(dy[part], tile, plan.chunk_size, low).flatten(0, 2)
            updates = torch.bmm(q_low.mT, d_out).to(gate.dtype).unflatten(0, shape)
            d_after, d_state = scan_states(
                updates, keep, change, d_state, tile, d_ends[:, part], d_starts[:, part], not reverse
            )
            before_low, d_after_low = before.flatten(0, 2).to(low), d_after.flatten(0, 2).to(low)
            dq = torch.bmm(d_out, before_low.mT).to(gate.dtype)
            dk = torch.bmm(v_, d_after_low.mT).to(gate.dtype)
            dv = torch.bmm(k_low, d_after_low).baddbmm_(joined.scores.mT, d_out).to(gate.dtype)
            d_scores = torch.bmm(d_out, v_.mT)
            d_decay = (before * d_after).sum(-1).flatten(0, 2)
            dq, dk, df = unjoin(joined, q_, k_, f_, d_scores, dq, dk, d_decay, reverse)
            gate.backward(part, tile, gated, *(x.unflatten(0, shape) for x in (dq, dk, dv, df)))
    return d_starts.flatten(0, 1)


def kept_states_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, tile_chunks: int, keep: bool) -> tuple[int, ...]:
    """Shape of the states `forward` keeps, [tiles, B, H, K, V]: known from the shapes of its inputs alone."""
    batch, length, heads, width = q.shape
    num_packed = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (max_tiles(length, num_packed, tile_chunks) if keep else 0, batch, heads, width, v.shape[-1])


@dataclass(frozen=True)
class _Plan:
    """How the work is cut."""

    tiles: list[Tile]
    chunk_size: int
    batch: int


def _plan(gate: TiedGate | FreeGate, cu_seqlens: Tensor | None, tile_chunks: int) -> _Plan:
    q, v = gate.inputs[0], gate.inputs[2]
    batch, length, heads, width = q.shape
    width = max(width, v.shape[-1])
    size = chunk_size(length)
    return _Plan(
        tiles(boundaries(cu_seqlens, length), size, tile_chunks, q.device),
        size,
        batch_per_tile(batch, length, heads, width, tile_chunks, q.dtype, q.device),
    )


def _low_dtype(gate: TiedGate | FreeGate) -> torch.dtype:
    """Dtype of the large matrix products: that of the inputs."""
    dtype = gate.inputs[0].dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else gate.dtype
