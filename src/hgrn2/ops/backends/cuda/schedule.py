"""The launches of a scan, prepared once for all calls that differ only in the addresses of their tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from hgrn2.ops.backends.cuda import kernels, plan
from hgrn2.ops.backends.cuda.arguments import (
    BackwardArguments,
    BoundsArguments,
    CarryArguments,
    ForwardArguments,
    PackedArguments,
)
from hgrn2.ops.backends.cuda.launch_list import NULL, BufferRef, LaunchList
from hgrn2.ops.backends.cuda.plan import WIDTH, ChunkRange, HeadGroup, Plan
from hgrn2.ops.call import ScanSettings
from hgrn2.ops.gates import Floor

# elements of a state that a thread carries
_CARRIED = 4
_STATE = WIDTH * WIDTH
_FLOAT32, _INT32, _SPAN = 4, 4, 16  # bytes
# launch lists that are cached, of each pass
_MAX_KEYS = 64


class LaunchKey(NamedTuple):
    """Cache key of a call's launches: all that decides which kernels run, and with which numbers.

    Attributes:
        shape: shape of q.
        strides: strides of q, f and v.
        dtype: dtype of q, f and v.
        device: index of the device.
        has_bound: whether there is a lower bound.
        has_initial: whether there is an initial state.
        packed: number of packed sequences, and whether cu_seqlens is int64; None when nothing is packed.
        settings: settings of the call.
        coarse: chunks between two states that the forward pass keeps; 0 when it keeps none.
    """

    shape: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: int
    has_bound: bool
    has_initial: bool
    packed: tuple[int, bool] | None
    settings: ScanSettings
    coarse: int

    def kernel_settings(self) -> kernels.Settings:
        """Return what kernels are compiled for."""
        floor = Floor.of(self.settings.min_log_decay)
        return kernels.Settings(self.dtype, self.settings.q_activation, self.packed is not None, floor)


class _Before(NamedTuple):
    """States before segments, [B, segments, heads, K, V].

    Attributes:
        states: the buffer.
        segments: segments in it.
        heads: heads in it.
        segment: index that belongs to the launch's first segment.
        head: index that belongs to the launch's first head.
    """

    states: BufferRef
    segments: int
    heads: int
    segment: int = 0
    head: int = 0

    def fields(self) -> dict[str, int]:
        """Return the fields of the kernels' argument that describe them."""
        names = ("segments", "heads", "segment", "head")
        return {f"before_{name}": getattr(self, name) for name in names}


class _Builder:
    """Builds the launches of a call.

    Args:
        key: cache key of the call.
        *outputs: names of at most three tensors with a row for each row of the inputs.

    Attributes:
        launches: the launches so far.
        plan: division of the work.
        spans: [chunks, 4] int32, of each chunk of packed sequences: row of its first token in time, tokens to its
            sequence's end, its sequence, and whether it is the sequence's first (1) or last (2).
        num_spans: [1] int32, number of spans.
    """

    def __init__(self, key: LaunchKey, *outputs: str):
        self.key, (self.batch, self.length, self.heads, _) = key, key.shape
        num_packed, wide = key.packed or (0, False)
        self.plan = Plan(self.batch, self.length, self.heads, key.coarse, num_packed)
        self.launches = LaunchList(lambda name: kernels.compiled(name, key.kernel_settings(), key.device))
        self.bound = BufferRef("bound") if key.has_bound else NULL
        self.initial = BufferRef("initial") if key.has_initial else NULL
        self.spans = self.num_spans = NULL
        if key.packed:
            # computed on the device, by a kernel that also clears output rows of no sequence
            self.spans, self.num_spans = (
                self.launches.workspace(self.plan.chunks * _SPAN),
                self.launches.workspace(_INT32),
            )
            buffers = [BufferRef("cu_seqlens"), self.spans, self.num_spans, *(BufferRef(name) for name in outputs)]
            buffers += [NULL] * (PackedArguments.OUTPUTS - len(outputs))
            arguments = PackedArguments(
                length=self.length, sequences=num_packed, most=self.plan.chunks, heads=self.heads, wide=wide,
                reverse=key.settings.reverse,
            )  # fmt: skip
            self.launches.launch("cut_sequences", (1, 1, 1), arguments, *buffers)

    def strides(self, **tensors: Sequence[int]) -> dict[str, int]:
        """Return the fields of the kernels' argument that hold these strides."""
        axes = ("batch", "row", "head")
        return {f"{name}_{axis}": x[i] for name, x in tensors.items() for i, axis in enumerate(axes)}

    def add_scan(
        self, name: str, group: HeadGroup, chunks: ChunkRange, *, v: tuple[str, Sequence[int]], initial: BufferRef,
        before: _Before | None = None, **buffers: BufferRef,
    ) -> None:  # fmt: skip
        """Add a launch of a kernel of forward.cu.

        Args:
            name: name of the kernel.
            group: heads to work on.
            chunks: chunks to work on.
            v: name of the values (v, or dy in the backward pass) and their strides.
            initial: [N, H, K, V], the initial states or, in the backward pass, the gradients of the final ones.
            before: states before the segments; None for zeros.
            **buffers: other tensors it reads or writes, by their names in `ForwardArguments`.
        """
        key = self.key
        buffers |= {
            "q": BufferRef("q"),
            "f": BufferRef("f"),
            "v": BufferRef(v[0]),
            "bound": self.bound,
            "initial": initial,
        }
        buffers |= {"spans": self.spans, "num_spans": self.num_spans}
        if before is not None:
            buffers["before"] = before.states
        arguments = ForwardArguments(
            length=self.length, heads=self.heads, first_head=group.first, first_chunk=chunks.first,
            end_chunk=chunks.end, segments=chunks.segments, segment_chunks=chunks.segment,
            coarse_chunks=key.coarse, pieces=self.plan.pieces, kept_chunks=chunks.chunks, reverse=key.settings.reverse,
            scale=key.settings.scale, **self.strides(q=key.strides[0], f=key.strides[1], v=v[1]),
            **({} if before is None else before.fields()),
        )  # fmt: skip
        pointers = _in_order(ForwardArguments.POINTERS, buffers)
        self.launches.launch(name, (chunks.segments, group.count, self.batch), arguments, *pointers)

    def states_before_segments(
        self,
        name: str,
        group: HeadGroup,
        chunks: ChunkRange,
        v: tuple[str, Sequence[int]],
        initial: BufferRef,
        back: bool,
    ) -> _Before:
        """Add launches that compute the states before the segments (back: the gradients after them).

        Args:
            name: name of the kernel that computes what each segment adds, and how it decays.
            group: heads to work on.
            chunks: chunks to work on, all of a sequence.
            v: name of the values (v, or dy in the backward pass) and their strides.
            initial: [N, H, K, V], the initial states or, in the backward pass, the gradients of the final ones.
            back: run from the last segment to the first.
        """
        rows, segments = self.batch * group.count * chunks.segments, chunks.segments
        updates = self.launches.workspace(rows * _STATE * _FLOAT32)
        decays = self.launches.workspace(rows * 2 * WIDTH * _FLOAT32)
        self.add_scan(name, group, chunks, v=v, initial=initial, update=updates, decay=decays)
        blocks = _STATE // (_CARRIED * kernels.CARRY_THREADS)
        arguments = CarryArguments(segments=segments, back=back)
        self.launches.launch("carry_states", (blocks, group.count, self.batch), arguments, updates, decays)
        return _Before(updates, segments, group.count)

    def add_gradients(
        self,
        group: HeadGroup,
        part: ChunkRange,
        dy_strides: Sequence[int],
        before: _Before | None,
        **buffers: BufferRef,
    ) -> None:
        """Add launches of the fast kernel for all gradients, and of the exact one for the chunks it cannot take.

        Args:
            group: heads to work on.
            part: chunks to work on.
            dy_strides: strides of the gradient of the outputs.
            before: gradients of the states after the part's segments; None for zeros.
            **buffers: other tensors they read or write, by their names in `BackwardArguments`.
        """
        key = self.key
        buffers |= {name: BufferRef(name) for name in ("q", "f", "v", "dy", "dq", "df", "dv")}
        buffers |= {"bound": self.bound, "spans": self.spans, "num_spans": self.num_spans}
        if before is not None:
            buffers["before"] = before.states
        q, f, v = key.strides
        arguments = BackwardArguments(
            length=self.length, batches=self.batch, heads=self.heads, chunks=self.plan.chunks, first_head=group.first,
            group=group.count, first_chunk=part.first, end_chunk=part.end, segment_chunks=part.segment,
            part_chunks=part.chunks, reverse=key.settings.reverse, scale=key.settings.scale,
            **self.strides(q=q, f=f, v=v, dy=dy_strides), **({} if before is None else before.fields()),
        )  # fmt: skip
        pointers = _in_order(BackwardArguments.POINTERS, buffers)
        self.launches.launch("backward_walk", (part.segments, group.count, self.batch), arguments, *pointers)
        self.launches.launch("backward_exact", (2 * plan.MULTIPROCESSORS, 1, 1), arguments, *pointers)


@functools.lru_cache(_MAX_KEYS)
def forward_launches(key: LaunchKey) -> LaunchList:
    """Return the launches of a forward pass.

    Args:
        key: cache key of the call.
    """
    if key.coarse:
        # the backward pass follows
        for file in ("backward.cu", "backward_exact.cu"):
            kernels.begin(file, key.kernel_settings(), key.device)
    builder = _Builder(key, "y")
    group, whole = HeadGroup(0, builder.heads), builder.plan.whole
    v, before = ("v", key.strides[2]), None
    if whole.segments > 1:
        before = builder.states_before_segments("forward_summaries", group, whole, v, builder.initial, back=False)
    outputs = {"y": BufferRef("y"), "final": BufferRef("final")}
    if builder.plan.pieces:
        outputs["coarse"] = BufferRef("states")
    builder.add_scan("forward_outputs", group, whole, v=v, initial=builder.initial, before=before, **outputs)
    return builder.launches


@functools.lru_cache(_MAX_KEYS)
def backward_launches(key: LaunchKey, dy_strides: tuple[int, ...], has_d_final: bool, bound_wanted: bool) -> LaunchList:
    """Return the launches of a backward pass.

    Args:
        key: key of the builder.
        dy_strides: strides of the gradient of the outputs.
        has_d_final: whether the final state has a gradient.
        bound_wanted: whether to compute the gradient of the lower bound.
    """
    builder, coarse = _Builder(key, "dq", "df", "dv"), key.coarse
    launches, parts, heads = builder.launches, builder.plan.parts, builder.plan.backward.heads
    assert coarse == parts[0].segment, f"states every {coarse} chunks; wanted {parts[0].segment}"
    # packed sequences may have fewer chunks than there is space for: the rest is never written, but summed and carried
    packed = key.packed is not None
    # one workspace for all groups and parts, as large as the largest needs
    chunks = builder.batch * parts[-1].chunks * heads
    kept, d_kept = (launches.workspace(chunks * _STATE * key.dtype.itemsize) for _ in range(2))
    # a row for each chunk
    rows = builder.batch * builder.plan.chunks
    d_bounds = launches.workspace(rows * builder.heads * WIDTH * _FLOAT32, zeros=packed) if bound_wanted else NULL
    # the gradient of the state between parts; where a sequence ends, that of its final state replaces it
    carries = len(parts) > 1 and parts[-1].segments == 1
    carried = launches.workspace(builder.batch * heads * _STATE * _FLOAT32, zeros=packed) if carries else NULL
    v, dy = ("v", key.strides[2]), ("dy", dy_strides)
    d_final = BufferRef("d_final") if has_d_final else NULL
    d_initial = BufferRef("d_initial") if key.has_initial else NULL
    for group in builder.plan.groups:
        after = _Before(carried, 1, group.count) if carries else None
        if parts[-1].segments > 1:
            # this happens with one group only: several fill the chip without segments
            every = ChunkRange(0, builder.plan.chunks, coarse)
            after = builder.states_before_segments("backward_summaries", group, every, dy, d_final, back=True)
        for part in parts:
            # each kept state begins a segment; initial states are not among them
            first, before = part.first // coarse, None
            if builder.plan.pieces:
                before = _Before(BufferRef("states"), builder.plan.pieces, builder.heads, first - 1, group.first)
            builder.add_scan("forward_states", group, part, v=v, initial=builder.initial, before=before, kept=kept)
            # gradients of the states after each of its segments, or the one that the later part left
            of_part = after if after is None or carries else after._replace(segment=first)
            builder.add_gradients(
                group, part, dy_strides, of_part, states=kept, d_states=d_kept, d_bound=d_bounds, d_final=d_final,
                d_initial=d_initial, after=carried, fallback=launches.workspace(chunks * 2 * _INT32, zeros=True),
            )  # fmt: skip
    if bound_wanted:
        arguments = BoundsArguments(rows=rows, heads=builder.heads)
        launches.launch("sum_bounds", (builder.heads, 1, 1), arguments, d_bounds, BufferRef("d_bound"))
    return launches


def _in_order(pointers: Sequence[str], buffers: Mapping[str, BufferRef]) -> list[BufferRef]:
    """Return buffers in the order of a structure's pointers, NULL where there is none."""
    assert buffers.keys() <= set(pointers), f"no pointers {buffers.keys() - set(pointers)}"
    return [buffers.get(name, NULL) for name in pointers]
