"""The chunkwise form, tile by tile, with the state carried from chunk to chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hgrn2.ops.backends.base import Backend
from hgrn2.ops.backends.chunked.joins import Joins
from hgrn2.ops.backends.reference import step_in_torch
from hgrn2.ops.call import CallTraits, ScanCall, ScanGradients
from hgrn2.ops.device import without_autocast
from hgrn2.ops.gates import FreeGate, TiedGate
from hgrn2.ops.tiles import Tile, batch_per_tile, boundaries, chunk_size, chunks_per_tile, load, max_tiles, store, tiles
from hgrn2.shapes import BHKV, BHV, BTHV, NHKV


class ChunkedBackend(Backend):
    """The chunkwise form. Its plan is the number of chunks in a tile, negative where no states are kept."""

    name = "chunked"

    def rejects(self, traits: CallTraits) -> str | None:
        """Return None: it runs every call."""
        return None

    def plan(self, call: ScanCall, needs_grad: bool) -> tuple[ScanCall, int]:
        """Return the call and the number of chunks in a tile."""
        q, v = call.q, call.v
        tile_chunks = chunks_per_tile(q.shape[2], max(q.shape[3], v.shape[3]), q.dtype, q.device)
        return call, tile_chunks if needs_grad else -tile_chunks

    def kept_shape(self, call: ScanCall, plan: int) -> tuple[int, ...]:
        """Return the shape of the states between tiles."""
        return kept_states_shape(call, plan) if plan > 0 else (0,)

    def forward(self, call: ScanCall, plan: int) -> tuple[BTHV, NHKV, Tensor | None]:
        """Run a scan tile by tile."""
        return forward(call, abs(plan), keep_states=plan > 0)

    def backward(
        self, call: ScanCall, plan: int, kept: Tensor | None, dy: BTHV, d_final_state: NHKV | None,
        bound_wanted: bool,
    ) -> ScanGradients:  # fmt: skip
        """Compute the gradient of `forward`."""
        return backward(call, abs(plan), kept if plan > 0 else None, dy, d_final_state)

    def step(self, call: ScanCall, in_place: bool) -> tuple[BHV, BHKV]:
        """Run one token."""
        return step_in_torch(call, in_place)


def scan_states(
    updates: Tensor,
    joined: Joins,
    state: Tensor,
    tile: Tile,
    starts: Tensor,
    ends: Tensor,
    reverse: bool,
) -> Tensor:
    """Carry the state across the chunks of a tile.

    Args:
        updates: [chunks, B, H, K, V], the update each chunk makes to the state by its end; overwritten by the states
            before each chunk.
        joined: holds the decay across each chunk.
        state: [B, H, K, V], the state before the tile; changed.
        tile: says which chunks begin and end a sequence.
        starts: [sequences, B, H, K, V], the initial states; read.
        ends: [sequences, B, H, K, V], the final states; written.
        reverse: time runs from the last chunk to the first.

    Returns:
        The state after the tile.
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
        # the small product first: a state that hardly decays is rounded once, not in its product with the decay as well
        after.addcmul_(change, state).addcmul_(keep, state)
        state, after = after, state
        if finishes[i]:
            ends[tile.sequences[i]] = state
    return state


def _state_frame(states: Tensor, packed: bool) -> Tensor:
    """Return states as [sequences, B, H, K, V]: packed ones lie along the first axis, a batch along the second."""
    return states.unsqueeze(1 if packed else 0)


def forward(call: ScanCall, tile_chunks: int, keep_states: bool) -> tuple[BTHV, NHKV, Tensor | None]:
    """Run a scan.

    Args:
        call: the call.
        tile_chunks: chunks of a tile.
        keep_states: keep the states between tiles, which `backward` needs.

    Returns:
        y [B, T, H, V], final state [N, H, K, V], kept states [tiles, B, H, K, V] or None.
    """
    with without_autocast(call.q):
        return _forward(_gate_of(call), call, tile_chunks, keep_states)


def _forward(
    gate: TiedGate | FreeGate, call: ScanCall, tile_chunks: int, keep_states: bool
) -> tuple[BTHV, NHKV, Tensor | None]:
    q, v, reverse = call.q, call.v, call.settings.reverse
    plan = _plan(call, tile_chunks)
    low = _low_dtype(gate)
    batch, length, heads, _ = q.shape
    y = q.new_empty((batch, length, heads, v.shape[-1]))
    starts = call.initial_state
    if starts is None:
        starts = q.new_zeros(call.state_shape(), dtype=gate.dtype)
    starts = _state_frame(starts, call.cu_seqlens is not None)
    # sequences without a token keep their state
    ends = starts.clone(memory_format=torch.contiguous_format)
    kept = ends.new_empty(kept_states_shape(call, tile_chunks)) if keep_states else None
    joined = None
    for first in range(0, batch, plan.batch):
        part = slice(first, min(first + plan.batch, batch))
        # every first chunk begins a sequence and takes its initial state
        state = starts.new_zeros(starts[:, part].shape[1:])
        for i in reversed(range(len(plan.tiles))) if reverse else range(len(plan.tiles)):
            tile = plan.tiles[i]
            if kept is not None:
                kept[i, part] = state
            shape = (tile.num_chunks, part.stop - part.start, heads, plan.chunk_size)
            joined = _workspace(joined, gate, shape, low, reverse, keep=False)
            gate.load(joined.gated, part, tile, keep=False)
            joined.run()
            v_ = joined.gated.v.flatten(0, 2)
            bad = _non_finite(v_)
            if bad is not None:
                v_ = v_.masked_fill(bad, 0)
            before = torch.bmm(joined.k.to(low).mT, v_)
            if bad is not None:
                before.masked_fill_(bad.any(1, keepdim=True), torch.nan)
            states = before.view(*shape[:3], *before.shape[1:])
            state = scan_states(states, joined, state, tile, starts[:, part], ends[:, part], reverse)
            out = torch.bmm(joined.scores, v_).baddbmm_(joined.q.to(low), before)
            if bad is not None:
                out.masked_fill_(_at_or_after(bad, reverse), torch.nan)
            store(y[part], out.unflatten(0, shape[:3]), tile)
    return y, ends.flatten(0, 1), kept


def _non_finite(v: Tensor) -> Tensor | None:
    """Return a mask of non-finite values, or None when all are finite, which costs one sum on a CPU.

    A matrix product would spread them to earlier tokens, as 0 times them.
    """
    if v.device.type == "cpu" and math.isfinite(float(v.sum())):
        return None
    return ~v.isfinite()


def _at_or_after(bad: Tensor, reverse: bool) -> Tensor:
    """Return a mask of the values of chunks [M, C, V] at or after a non-finite one in their column."""
    counts = bad.flip(1).cumsum(1).flip(1) if reverse else bad.cumsum(1)
    return counts > 0


def backward(
    call: ScanCall, tile_chunks: int, kept: Tensor | None, dy: BTHV, d_final_state: NHKV | None
) -> ScanGradients:
    """Compute the gradient of `forward`, which runs again if it kept no states.

    Args:
        call: the call.
        tile_chunks: chunks of a tile.
        kept: states that `forward` kept, or None.
        dy: [B, T, H, V].
        d_final_state: [N, H, K, V], or None for zeros.
    """
    with without_autocast(call.q):
        gate = _gate_of(call)
        if kept is None:
            # the forward pass of an exported program keeps none
            *_, kept = _forward(gate, call, tile_chunks, keep_states=True)
        assert kept is not None
        if d_final_state is None:
            d_final_state = call.q.new_zeros(call.state_shape(), dtype=gate.dtype)
        d_initial_state = _backward(gate, call, tile_chunks, kept, dy, d_final_state)
        if isinstance(gate, FreeGate):
            dq, dk, dv, df = gate.gradients
            d_bound = None
        else:
            (dq, df, dv), dk = gate.gradients, None
            d_bound = None if gate.d_bound is None else gate.d_bound.to(gate.dtype)
    return ScanGradients(dq, df, dk, dv, d_bound, None if call.initial_state is None else d_initial_state)


def _backward(
    gate: TiedGate | FreeGate, call: ScanCall, tile_chunks: int, kept: Tensor, dy: BTHV, d_final_state: NHKV
) -> Tensor:
    """Leave the gradients of the inputs in the gate and return that of the initial state."""
    reverse, packed = call.settings.reverse, call.cu_seqlens is not None
    plan = _plan(call, tile_chunks)
    low = _low_dtype(gate)
    batch, _, heads, _ = call.q.shape
    gate.allocate_gradients()
    initial_state = torch.zeros_like(d_final_state) if call.initial_state is None else call.initial_state
    starts, d_ends = _state_frame(initial_state, packed), _state_frame(d_final_state, packed)
    d_starts = d_ends.clone(memory_format=torch.contiguous_format)
    unused = torch.empty_like(starts)
    joined = None
    for first in range(0, batch, plan.batch):
        part = slice(first, min(first + plan.batch, batch))
        d_state = starts.new_zeros(starts[:, part].shape[1:])
        for i in range(len(plan.tiles)) if reverse else reversed(range(len(plan.tiles))):
            tile = plan.tiles[i]
            shape = (tile.num_chunks, part.stop - part.start, heads, plan.chunk_size)
            joined = _workspace(joined, gate, shape, low, reverse, keep=True)
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


def _workspace(
    last: Joins | None, gate: TiedGate | FreeGate, shape: tuple[int, ...], low: torch.dtype, reverse: bool, keep: bool
) -> Joins:
    """Return memory for a tile of shape [chunks, B, H, C]: that of the last tile if it fits."""
    if last is not None and last.gated.q.shape[:4] == shape:
        return last
    return Joins(gate.allocate(shape, low), low, reverse, keep)


def kept_states_shape(call: ScanCall, tile_chunks: int) -> tuple[int, ...]:
    """Return the shape [tiles, B, H, K, V] of the states `forward` keeps, from the shapes of its inputs alone."""
    batch, length, heads, width = call.q.shape
    return (max_tiles(length, call.num_packed(), tile_chunks), batch, heads, width, call.v.shape[-1])


def _gate_of(call: ScanCall) -> TiedGate | FreeGate:
    return TiedGate(call) if call.k is None else FreeGate(call)


@dataclass(frozen=True)
class _Plan:
    """Division of the work into chunks and tiles."""

    tiles: list[Tile]
    chunk_size: int
    batch: int


def _plan(call: ScanCall, tile_chunks: int) -> _Plan:
    q, v = call.q, call.v
    batch, length, heads, width = q.shape
    width = max(width, v.shape[-1])
    size = chunk_size(length)
    return _Plan(
        tiles(boundaries(call.cu_seqlens, length), size, tile_chunks, q.device),
        size,
        batch_per_tile(batch, length, heads, width, tile_chunks, q.dtype, q.device),
    )


def _low_dtype(gate: TiedGate | FreeGate) -> torch.dtype:
    """Return the dtype of the large matrix products: that of the inputs."""
    dtype = gate.inputs[0].dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else gate.dtype
