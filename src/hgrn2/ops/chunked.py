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

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hgrn2.ops.gates import FreeGate, Gated, TiedGate
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


def _block(x: Tensor, size: int, which: int) -> Tensor:
    """View of x [M, n, W]: of each pair of blocks of `size` rows the first (0) or second (1), [M * pairs, size, W]."""
    m, rows, width = x.shape
    return x.as_strided((m * rows // (2 * size), size, width), (2 * size * width, width, 1), which * size * width)


def _score_block(scores: Tensor, size: int, late: int, early: int) -> Tensor:
    """View of scores [M, C, C]: of every pair, the rows of the later and the columns of the earlier block."""
    m, chunk, _ = scores.shape
    shape, strides = (m, chunk // (2 * size), size, size), (chunk * chunk, 2 * size * (chunk + 1), chunk, 1)
    return scores.as_strided(shape, strides, late * size * chunk + early * size)


@dataclass
class _Join:
    """One join: views of the operands and memory for what it makes, n pairs of an earlier block E and a later one L.

    Attributes:
        q_l: [n, size, K].
        k_e: [n, size, K].
        k_e_t: [n, K, size], the same transposed.
        decays: of E and of L, [n, 1, K].
        complements: likewise.
        decay: [n, 1, K], of the pair; in E's place unless the gradient needs that.
        complement: likewise.
        products: [n, size, size].
        scores: [M, n / M, size, size], where the products belong.
        before: copies of q_l and k_e before the join, if the gradient needs them.
    """

    q_l: Tensor
    k_e: Tensor
    k_e_t: Tensor
    decays: tuple[Tensor, Tensor]
    complements: tuple[Tensor, Tensor]
    decay: Tensor
    complement: Tensor
    products: Tensor
    scores: Tensor
    before: tuple[Tensor, Tensor] | None


class Joins:
    """Joins the blocks of every chunk of a tile, from single tokens to the whole chunk.

    Made once for all tiles of a shape: fresh memory and views for every tile would cost a tenth of the whole pass.

    Attributes:
        gated: the operands.
        scores: [M, C, C] in the low dtype, scores[t, s] of the tokens of one chunk, 0 where s comes after t.
        q: [M, C, K], the query times the decay since the chunk's start.
        k: [M, C, K], the key times the decay to the chunk's end.
        keep: [M, K], 0 or 1; keep + change is the decay across the chunk, with more digits than one number has.
        change: [M, K], see keep.
    """

    def __init__(self, gated: Gated, low: torch.dtype, reverse: bool, keep: bool):
        """Makes room.

        Args:
            gated: the operands, read by `run`.
            low: dtype of the large matrix products.
            reverse: time runs from the last row to the first.
            keep: keep what the gradient needs, the operands included; else they are overwritten.
        """
        self.gated = gated
        self.operands = q, k, f = gated.q.flatten(0, 2), gated.k.flatten(0, 2), gated.f.flatten(0, 2)
        m, chunk, width = q.shape
        self.order = early, late = (1, 0) if reverse else (0, 1)
        self.q, self.k = (torch.empty_like(q), torch.empty_like(k)) if keep else (q, k)
        self.scores = q.new_zeros((m, chunk, chunk), dtype=low)
        self.diagonal = self.scores.diagonal(dim1=1, dim2=2)
        self.joins: list[_Join] = []
        decay, complement = f.view(-1, 1, width), gated.c.view(-1, 1, width)
        size = 1
        while size < chunk:
            q_l, k_e = _block(self.q, size, late), _block(self.k, size, early)
            n = q_l.shape[0]
            decays, complements = ((x[early::2], x[late::2]) for x in (decay, complement))
            decay = q.new_empty((n, 1, width)) if keep else decays[0]
            # the first complement may be k itself
            complement = q.new_empty((n, 1, width)) if keep or size == 1 else complements[0]
            products = q.new_empty((n, size, size))
            scores = _score_block(self.scores, size, late, early)
            before = (torch.empty_like(q_l), torch.empty_like(k_e)) if keep else None
            self.joins.append(_Join(q_l, k_e, k_e.mT, decays, complements, decay, complement, products, scores, before))
            size *= 2
        self.decay, self.complement = decay.squeeze(1), complement.squeeze(1)

    def run(self) -> None:
        """Joins what the operands hold."""
        q, k, f = self.operands
        self.diagonal.copy_((q * k).sum(-1))
        torch.mul(q, f, out=self.q)
        if self.k is not k:
            self.k.copy_(k)
        for join in self.joins:
            q_l, k_e, (decay_e, decay_l) = join.q_l, join.k_e, join.decays
            size = q_l.shape[1]
            if size == 1:
                # a product of matrices would cost a call for each number
                torch.sum(q_l * k_e, -1, keepdim=True, out=join.products)
            else:
                torch.bmm(q_l, join.k_e_t, out=join.products)
            join.scores.copy_(join.products.view(join.scores.shape))
            if join.before is not None:
                join.before[0].copy_(q_l)
                join.before[1].copy_(k_e)
            # before the key changes, which the complement may be, and the decays, whose place may be taken
            torch.addcmul(join.complements[0], decay_e, join.complements[1], out=join.complement)
            q_l *= decay_e
            k_e *= decay_l
            torch.mul(decay_e, decay_l, out=join.decay)
            if size == COMPLEMENT_FROM_BLOCK:
                small = join.complement < COMPLEMENT_BELOW
                torch.where(small, 1 - join.complement, join.decay, out=join.decay)
        small = self.complement < COMPLEMENT_BELOW
        self.keep, self.change = small.to(self.decay.dtype), torch.where(small, -self.complement, self.decay)

    def backward(self, d_scores: Tensor, dq: Tensor, dk: Tensor, d_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of `run`, which must have kept what this needs.

        Args:
            d_scores: [M, C, C] in the low dtype; what stands above the diagonal is not read.
            dq: [M, C, K], gradient of the joined q; changed in place.
            dk: [M, C, K], gradient of the joined k; changed in place.
            d_decay: [M, K], gradient of the decay across the chunk.

        Returns:
            Gradients of the operands q, k and f.
        """
        q, k, f = self.operands
        m, size, width = q.shape
        early, late = self.order
        d_decay = d_decay.unsqueeze(1)
        for join in reversed(self.joins):
            size //= 2
            assert join.before is not None
            (q_l, k_e), (decay_e, decay_l) = join.before, join.decays
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
    joined: Joins,
    state: Tensor,
    tile: Tile,
    starts: Tensor,
    ends: Tensor,
    reverse: bool,
) -> Tensor:
    """Carries the state across the chunks of a tile.

    Args:
        updates: [chunks, B, H, K, V], what each chunk adds to the state by its end; overwritten by the states before
            each chunk.
        joined: knows the decay across each chunk.
        state: [B, H, K, V], the state that enters the tile; changed.
        tile: says which chunks begin and end a sequence.
        starts: [sequences, B, H, K, V], the states the sequences start from; read.
        ends: [sequences, B, H, K, V], the states they end with; written.
        reverse: time runs from the last chunk to the first.

    Returns:
        The state that leaves the tile.
    """
    begins, finishes = (tile.ends, tile.begins) if reverse else (tile.begins, tile.ends)
    keep, change = (x.view(*updates.shape[:4], 1) for x in (joined.keep, joined.change))
    chunks = list(zip(updates.unbind(), keep.unbind(), change.unbind(), strict=True))
    after = torch.empty_like(state)
    for i in range(tile.num_chunks)[:: -1 if reverse else 1]:
        if begins[i]:
            state.copy_(starts[tile.sequences[i]])
        update, keep, change = chunks[i]
        after.copy_(update)
        update.copy_(state)
        # small numbers first: a state that hardly decays is rounded once, not in its product with the decay as well
        after.addcmul_(change, state).addcmul_(keep, state)
        state, after = after, state
        if finishes[i]:
            ends[tile.sequences[i]] = state
    return state


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
    joined = None
    for first in range(0, batch, plan.batch):
        part = slice(first, min(first + plan.batch, batch))
        # every first chunk begins a sequence and takes that one's state
        state = starts.new_zeros(starts[:, part].shape[1:])
        for i in reversed(range(len(plan.tiles))) if reverse else range(len(plan.tiles)):
            tile = plan.tiles[i]
            if keep_states:
                kept[i, part] = state
            shape = (tile.num_chunks, part.stop - part.start, heads, plan.chunk_size)
            joined = _room(joined, gate, shape, low, reverse, keep=False)
            gate.load(joined.gated, part, tile, keep=False)
            joined.run()
            v_ = joined.gated.v.flatten(0, 2)
            bad = _bad_values(v_)
            if bad is not None:
                v_ = v_.masked_fill(bad, 0)
            before = torch.bmm(joined.k.to(low).mT, v_)
            if bad is not None:
                before.masked_fill_(bad.any(1, keepdim=True), torch.nan)
            states = before.view(*shape[:3], *before.shape[1:])
            state = scan_states(states, joined, state, tile, starts[:, part], ends[:, part], reverse)
            out = torch.bmm(joined.scores, v_).baddbmm_(joined.q.to(low), before)
            if bad is not None:
                out.masked_fill_(_from_then_on(bad, reverse), torch.nan)
            store(y[part], out.unflatten(0, shape[:3]), tile)
    return y, ends.flatten(0, 1), kept


def _bad_values(v: Tensor) -> Tensor | None:
    """Return where values are not finite, or None when all are, which costs one sum on a CPU.

    A product of matrices would spread them to the tokens before, as 0 times them.
    """
    if v.device.type == "cpu" and math.isfinite(float(v.sum())):
        return None
    return ~v.isfinite()


def _from_then_on(bad: Tensor, reverse: bool) -> Tensor:
    """Return a mask of the places of chunks [M, C, V] at or after a non-finite one in their column."""
    counts = bad.flip(1).cumsum(1).flip(1) if reverse else bad.cumsum(1)
    return counts > 0


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
    """Gradient of `forward`, run again if it kept no states; gradients of the inputs are left in the gate.

    Returns:
        The gradient of the initial state, [N, H, K, V].
    """
    q, _v = gate.inputs[0], gate.inputs[2]
    plan = _plan(gate, cu_seqlens, tile_chunks)
    low = _low_dtype(gate)
    batch, _, heads, _ = q.shape
    if not kept.shape[0] and plan.tiles:
        # a forward pass that was exported kept none
        *_, kept = forward(gate, initial_state, cu_seqlens, reverse, tile_chunks, keep_states=True)
    gate.allocate_gradients()
    packed = cu_seqlens is not None
    starts = _state_frame(initial_state, tuple(d_final_state.shape), packed, d_final_state)
    d_ends = _state_frame(d_final_state, (), packed, d_final_state)
    d_starts = d_ends.clone(memory_format=torch.contiguous_format)
    unused = torch.empty_like(starts)
    joined = None
    for first in range(0, batch, plan.batch):
        part = slice(first, min(first + plan.batch, batch))
        d_state = starts.new_zeros(starts[:, part].shape[1:])
        for i in range(len(plan.tiles)) if reverse else reversed(range(len(plan.tiles))):
            tile = plan.tiles[i]
            shape = (tile.num_chunks, part.stop - part.start, heads, plan.chunk_size)
            joined = _room(joined, gate, shape, low, reverse, keep=True)
            gate.load(joined.gated, part, tile, keep=True)
            joined.run()
            v_ = joined.gated.v.flatten(0, 2)
            k_low, q_low = joined.k.to(low), joined.q.to(low)
            before = torch.bmm(k_low.mT, v_).to(gate.dtype)
            states = before.view(*shape[:3], *before.shape[1:])
            scan_states(states, joined, kept[i, part].clone(), tile, starts[:, part], unused[:, part], reverse)
            d_out = load(dy[part], tile, torch.empty_like(joined.gated.v)).flatten(0, 2)
            d_after = torch.bmm(q_low.mT, d_out).to(gate.dtype)
            states = d_after.view(states.shape)
            d_state = scan_states(states, joined, d_state, tile, d_ends[:, part], d_starts[:, part], not reverse)
            before_low, d_after_low = before.to(low), d_after.to(low)
            dq = torch.bmm(d_out, before_low.mT).to(gate.dtype)
            dk = torch.bmm(v_, d_after_low.mT).to(gate.dtype)
            dv = torch.bmm(k_low, d_after_low).baddbmm_(joined.scores.mT, d_out).to(gate.dtype)
            d_scores = torch.bmm(d_out, v_.mT)
            d_decay = (before * d_after).sum(-1)
            dq, dk, df = joined.backward(d_scores, dq, dk, d_decay)
            gate.backward(part, tile, joined.gated, *(x.unflatten(0, shape[:3]) for x in (dq, dk, dv, df)))
    return d_starts.flatten(0, 1)


def _room(
    last: Joins | None, gate: TiedGate | FreeGate, shape: tuple[int, ...], low: torch.dtype, reverse: bool, keep: bool
) -> Joins:
    """Room for a tile of shape [chunks, B, H, C]: that of the last tile again if it fits."""
    if last is not None and last.gated.q.shape[:4] == shape:
        return last
    return Joins(gate.allocate(shape, low), low, reverse, keep)


def kept_states_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, tile_chunks: int, keep: bool) -> tuple[int, ...]:
    """Shape of the states `forward` keeps, [tiles, B, H, K, V]: known from the shapes of its inputs alone."""
    batch, length, heads, width = q.shape
    num_packed = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (max_tiles(length, num_packed, tile_chunks) if keep else 0, batch, heads, width, v.shape[-1])


@dataclass(frozen=True)
class _Plan:
    """Division of the work into chunks and tiles."""

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
