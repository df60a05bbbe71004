"""Which calls the CUDA kernels take, and how they are launched."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hgrn2.ops.cuda import compiler
from hgrn2.ops.cuda.plan import CHUNK, MULTIPROCESSORS, WIDTH, coarse_pieces, num_chunks, passes, segment_chunks

THREADS, LEFT_OVER_THREADS, CARRY_THREADS = 512, 256, 128
PACKED_THREADS, BOUNDS_THREADS = 1024, 1024
# what each file of kernels is compiled with, in the order in which one needs the other
SOURCES = {
    "walk.cu": (
        "instructions.cuh", "chunk.cuh", "wgmma.cuh", "walk.cuh", "gates.cuh", "joins.cuh", "state.cuh", "summary.cuh",
        "carry.cuh", "packed.cuh", "walk.cu",
    ),
    "backward.cu": (
        "instructions.cuh", "chunk.cuh", "wgmma.cuh", "gradients.cuh", "backward.cuh", "gates.cuh", "joins.cuh",
        "bounds.cuh", "backward.cu",
    ),
    "left_over.cu": ("instructions.cuh", "chunk.cuh", "gradients.cuh", "left_over.cuh", "left_over.cu"),
}  # fmt: skip
Q_ACTIVATIONS = ("none", "silu", "sigmoid")
_TILE_BYTES, _SCORE_BYTES, _HALF = CHUNK * WIDTH * 2, CHUNK * CHUNK * 2, WIDTH // 2
_WALK_SHARED = 9 * _TILE_BYTES + 4 * _SCORE_BYTES + 14 * WIDTH * 4 + 2 * 4
# between the tokens of an input: backward.cu counts bytes across four of them in 32 bits
MOST_ROW_BYTES = 2**29
# elements of a state that a thread carries
_CARRIED = 4
_BACKWARD_SHARED = 12 * _TILE_BYTES + 3 * _SCORE_BYTES + (4 + 2 * 8) * WIDTH * 4
_LEFT_OVER_SHARED = 4 * _TILE_BYTES + 5 * CHUNK * _HALF * 2 + (8 + 4) * _HALF * 4
_BOUNDS_SHARED = BOUNDS_THREADS // (WIDTH // 4) * WIDTH * 4


class WalkArguments(ctypes.Structure):
    """Argument of the kernels of walk.cu, field by field as in walk.cuh."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "f", "v", "bound", "spans", "num_spans", "y", "initial", "final")]
        + [(name, ctypes.c_void_p) for name in ("before", "update", "decay", "coarse", "kept")]
        + [(f"{x}_{axis}", ctypes.c_longlong) for x in ("q", "f", "v") for axis in ("batch", "row", "head")]
        + [("length", ctypes.c_longlong)]
        + [(name, ctypes.c_int) for name in ("heads", "first_head", "first_chunk", "end_chunk")]
        + [(name, ctypes.c_int) for name in ("segments", "segment_chunks")]
        + [(f"before_{name}", ctypes.c_int) for name in ("segments", "segment", "heads", "head")]
        + [(name, ctypes.c_int) for name in ("coarse_chunks", "pieces", "kept_chunks", "reverse")]
        + [("scale", ctypes.c_float)]
    )


class BackwardArguments(ctypes.Structure):
    """Argument of the kernels of backward.cu and left_over.cu, field by field as in gradients.cuh."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "f", "v", "dy", "bound", "spans", "num_spans")]
        + [(name, ctypes.c_void_p) for name in ("states", "d_states", "dq", "df", "dv", "d_bound", "left_over")]
        + [(name, ctypes.c_void_p) for name in ("d_final", "d_initial", "before", "after")]
        + [(f"{x}_{axis}", ctypes.c_longlong) for x in ("q", "f", "v", "dy") for axis in ("batch", "row", "head")]
        + [("length", ctypes.c_longlong)]
        + [(name, ctypes.c_int) for name in ("batches", "heads", "chunks", "first_head", "group")]
        + [(name, ctypes.c_int) for name in ("first_chunk", "end_chunk", "segment_chunks")]
        + [(f"before_{name}", ctypes.c_int) for name in ("segments", "segment", "heads", "head")]
        + [(name, ctypes.c_int) for name in ("part_chunks", "reverse")]
        + [("scale", ctypes.c_float)]
    )


class CarryArguments(ctypes.Structure):
    """Argument of the kernel of carry.cuh, field by field as there."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("update", "decay")),
        *((name, ctypes.c_int) for name in ("segments", "back")),
    )


class BoundsArguments(ctypes.Structure):
    """Argument of the kernel of bounds.cuh, field by field as there."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("parts", "sum")),
        ("rows", ctypes.c_longlong),
        ("heads", ctypes.c_int),
    )


class PackedArguments(ctypes.Structure):
    """Argument of the kernel of packed.cuh, field by field as there."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cu_seqlens", "spans", "num_spans")),
        ("outputs", ctypes.c_void_p * 3),
        ("length", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("sequences", "most", "heads", "wide", "reverse")),
    )


class Group(NamedTuple):
    """Heads that are worked on together."""

    first: int
    count: int


class Stretch(NamedTuple):
    """Chunks of every sequence that are worked on together: from the first to before `end`, in segments."""

    first: int
    end: int
    segment: int

    @property
    def chunks(self) -> int:
        """How many there are."""
        return self.end - self.first

    @property
    def segments(self) -> int:
        """How many segments."""
        return -(-self.chunks // self.segment)


class Before(NamedTuple):
    """States before segments: [B, pieces, heads, K, V], and which of them are those of a launch's first."""

    states: Tensor
    segment: int = 0
    head: int = 0


@dataclass(frozen=True)
class Scan:
    """A call of `hgrn2.ops.hgrn2_scan` that `resolve_backend` gives to these kernels.

    Attributes:
        q: [B, T, H, K].
        f: [B, T, H, K].
        v: [B, T, H, V].
        bound: [H, K] float32 or None.
        initial_state: [N, H, K, V] float32 or None.
        cu_seqlens: [N + 1] or None.
        reverse: time runs from the last row to the first.
        scale: factor of the outputs.
        q_activation: of q.
    """

    q: Tensor
    f: Tensor
    v: Tensor
    bound: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    reverse: bool
    scale: float
    q_activation: str

    def aligned(self) -> Scan:
        """The same, to be read 16 bytes at a time; what the kernels know no strides of is contiguous."""
        q, f, v = (_aligned(x) for x in (self.q, self.f, self.v))
        bound = None if self.bound is None else _aligned(self.bound.contiguous())
        state, cu_seqlens = (None if x is None else x.contiguous() for x in (self.initial_state, self.cu_seqlens))
        return replace(self, q=q, f=f, v=v, bound=bound, initial_state=state, cu_seqlens=cu_seqlens)

    def new_states(self, known: Tensor | None) -> Tensor:
        """Room for the states of all sequences; one that is packed and empty has the known one, or zeros."""
        num_states = self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        shape = (num_states, self.q.shape[2], WIDTH, WIDTH)
        make = torch.empty if self.cu_seqlens is None and self.q.numel() else torch.zeros
        states = make(shape, dtype=torch.float32, device=self.q.device)
        return states if make is torch.empty or known is None else states.copy_(known)


class Plan:
    """How the work of a call is cut.

    Attributes:
        scan: the call, aligned.
        batch: B, likewise length T, heads H, and num_packed N of packed sequences, else 0.
        chunks: of a sequence; of packed ones together, at most.
        passes: of the backward pass.
        groups: heads of each pass.
        coarse: chunks between the states that the forward pass keeps; 0 where it keeps none.
        outputs: at most three, a row for each of the inputs.
    """

    def __init__(self, scan: Scan, coarse: int, *outputs: Tensor):
        self.scan, self.coarse, self.outputs = scan, coarse, outputs
        self.batch, self.length, self.heads, _ = scan.q.shape
        self.num_packed = 0 if scan.cu_seqlens is None else scan.cu_seqlens.shape[0] - 1
        self.chunks = num_chunks(self.length, self.num_packed)
        self.passes = passes(self.batch, self.chunks, self.heads)
        size = self.passes.heads
        self.groups = [Group(h, min(size, self.heads - h)) for h in range(0, self.heads, size)]

    @functools.cached_property
    def packed(self) -> _Packed | None:
        """Where packed sequences and their chunks lie; found on the device, which clears outputs of no sequence."""
        return None if self.scan.cu_seqlens is None else _Packed(self)

    @functools.cached_property
    def stream(self) -> int:
        """The stream of all launches; asked for once, with the call's device current."""
        return compiler.current_stream()

    def coarse_shape(self) -> tuple[int, ...]:
        """Shape of the states that the forward pass keeps."""
        return coarse_shape(self.batch, self.length, self.heads, self.coarse, self.num_packed)

    def whole(self) -> Stretch:
        """All chunks, in segments that keep the chip busy."""
        return Stretch(0, self.chunks, segment_chunks(self.batch * self.heads, self.chunks))

    def parts(self) -> list[Stretch]:
        """The parts of the backward pass, from the last to the first."""
        size = self.passes.part
        starts = range(0, self.chunks, size)
        return [Stretch(at, min(at + size, self.chunks), self.passes.coarse) for at in reversed(starts)]


class _Packed:
    """Chunks of packed sequences.

    Attributes:
        spans: [chunks, 4] int32, of each: row of its first token in time, tokens to its sequence's end, its sequence,
            and whether it is the sequence's first (1) or last (2).
        num_spans: [1] int32, how many there are.
    """

    def __init__(self, plan: Plan):
        scan = plan.scan
        assert scan.cu_seqlens is not None
        make = functools.partial(torch.empty, dtype=torch.int32, device=scan.q.device)
        self.spans, self.num_spans = make((plan.chunks, 4)), make(1)
        arguments = PackedArguments(
            scan.cu_seqlens.data_ptr(), self.spans.data_ptr(), self.num_spans.data_ptr(),
            tuple(x.data_ptr() for x in plan.outputs), plan.length, plan.num_packed, plan.chunks, plan.heads,
            scan.cu_seqlens.dtype == torch.int64, scan.reverse,
        )  # fmt: skip
        _kernel("walk.cu", "cut_sequences", scan).launch((1, 1, 1), arguments, plan.stream)


def coarse_shape(batch: int, length: int, heads: int, coarse: int, num_packed: int = 0) -> tuple[int, ...]:
    """Shape of the states that `forward` keeps with a distance of `coarse` chunks."""
    return (batch, coarse_pieces(length, coarse, num_packed), heads, WIDTH, WIDTH)


def forward(scan: Scan, coarse: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scan.

    Args:
        scan: the call.
        coarse: chunks between the states `backward` needs; 0 to keep none.

    Returns:
        y [B, T, H, V], the final state [N, H, K, V], float32, and states on the way [B, pieces, H, K, V], float32.
    """
    scan = scan.aligned()
    y, final = _new_like(scan.v), scan.new_states(scan.initial_state)
    plan, device = Plan(scan, coarse, y), scan.q.device
    states = torch.empty(plan.coarse_shape(), dtype=torch.float32, device=device)
    if not y.numel():
        return y, final, states
    group, stretch = Group(0, plan.heads), plan.whole()
    with torch.cuda.device(device):
        before = None
        if stretch.segments > 1:
            summaries = _Walk(plan, "forward_summaries", scan.v, scan.initial_state)
            before = Before(_states_before_segments(summaries, group, stretch, back=False))
        kept = states if states.numel() else None
        outputs = _Walk(plan, "forward_outputs", scan.v, scan.initial_state, y=y, final=final, coarse=kept)
        outputs.launch(group, stretch, before)
    return y, final, states


def backward(
    scan: Scan, dy: Tensor, d_final: Tensor | None, states: Tensor, coarse: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradient of `forward`, for bfloat16.

    Args:
        scan: the call.
        dy: [B, T, H, V].
        d_final: [N, H, K, V] float32, or None for zeros.
        states: what the forward pass kept, and the distance.
        coarse: see states.

    Returns:
        Gradients of q, f, v, the lower bound and the initial state (None where there is none).
    """
    scan, dy = scan.aligned(), _aligned(dy)
    d_final = None if d_final is None else d_final.contiguous()
    dq, df, dv = (_new_like(x) for x in (scan.q, scan.f, scan.v))
    plan, device = Plan(scan, coarse, dq, df, dv), scan.q.device
    assert coarse == plan.passes.coarse, f"states every {coarse} chunks; wanted {plan.passes.coarse}"
    d_bound = None if scan.bound is None else torch.empty((plan.heads, WIDTH), dtype=torch.float32, device=device)
    d_initial = None if scan.initial_state is None else scan.new_states(d_final)
    if not dq.numel():
        return dq, df, dv, None if d_bound is None else d_bound.zero_(), d_initial
    # packed sequences may have fewer chunks: nobody writes the rest, which is summed and carried like all
    make = torch.empty if scan.cu_seqlens is None else torch.zeros
    # of each chunk
    shape = (plan.batch * plan.chunks, plan.heads, WIDTH)
    d_bounds = None if d_bound is None else make(shape, dtype=torch.float32, device=device)
    # every group and part in the room of the largest
    parts, size = plan.parts(), plan.passes.heads
    shape = (plan.batch * parts[-1].chunks, size, WIDTH, WIDTH)
    kept, d_kept = (torch.empty(shape, dtype=scan.q.dtype, device=device) for _ in range(2))
    left_over = torch.zeros((len(plan.groups), len(parts), *shape[:2], 2), dtype=torch.int32, device=device)
    initial = scan.initial_state
    with torch.cuda.device(device):
        states_walk = _Walk(plan, "forward_states", scan.v, initial, kept=kept)
        summaries = _Walk(plan, "backward_summaries", dy, d_final)
        gradients = _Gradients(plan, dy, kept, d_kept, dq, df, dv, d_bounds, d_final, d_initial)
        for group, flags in zip(plan.groups, left_over, strict=True):
            after = carried = None
            if parts[-1].segments > 1:
                every = Stretch(0, plan.chunks, coarse)
                after = _states_before_segments(summaries, group, every, back=True)
            elif len(parts) > 1:
                # from part to part; a sequence's own end takes its place where one ends
                carried = make((plan.batch, 1, group.count, WIDTH, WIDTH), dtype=torch.float32, device=device)
            for part, part_flags in zip(parts, flags, strict=True):
                first = part.first // coarse
                states_walk.launch(group, part, Before(states, first - 1, group.first) if states.numel() else None)
                known = None if carried is None else Before(carried)
                gradients.launch(group, part, part_flags, known if after is None else Before(after, first), carried)
        if d_bounds is not None and d_bound is not None:
            arguments = BoundsArguments(d_bounds.data_ptr(), d_bound.data_ptr(), d_bounds.shape[0], plan.heads)
            _kernel("backward.cu", "sum_bounds", scan).launch((plan.heads, 1, 1), arguments, plan.stream)
    return dq, df, dv, d_bound, d_initial


class _Walk:
    """A kernel of walk.cu in one call. What all its launches share is put together once: each costs the host time.

    Args:
        plan: of the call.
        name: of the kernel.
        values: v, or dy backwards.
        initial: [N, H, K, V], the states that sequences begin with or, backwards, the gradients of their last.
        outputs: by the name of the field of `WalkArguments`; None where not wanted.
    """

    def __init__(self, plan: Plan, name: str, values: Tensor, initial: Tensor | None, **outputs: Tensor | None):
        scan, packed = plan.scan, plan.packed
        self.plan, self.kernel = plan, _kernel("walk.cu", name, scan)
        self.arguments = WalkArguments(
            q=scan.q.data_ptr(), f=scan.f.data_ptr(), v=values.data_ptr(), bound=_pointer(scan.bound),
            initial=_pointer(initial), spans=None if packed is None else packed.spans.data_ptr(),
            num_spans=None if packed is None else packed.num_spans.data_ptr(), length=plan.length, heads=plan.heads,
            coarse_chunks=plan.coarse, pieces=plan.coarse_shape()[1], reverse=scan.reverse, scale=scan.scale,
            **_strides(q=scan.q, f=scan.f, v=values), **{field: _pointer(x) for field, x in outputs.items()},
        )  # fmt: skip

    def launch(
        self, group: Group, stretch: Stretch, before: Before | None = None,
        summary: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Launches it.

        Args:
            group: heads to work on.
            stretch: chunks to work on.
            before: states before the segments; None for zeros.
            summary: room for what each segment adds to the state, [B, segments, G, K, V], and its decay and 1 minus it.
        """
        arguments, segments = self.arguments, stretch.segments
        arguments.first_head = group.first
        arguments.first_chunk, arguments.end_chunk, arguments.segment_chunks = stretch
        arguments.segments, arguments.kept_chunks = segments, stretch.chunks
        arguments.before = None if before is None else before.states.data_ptr()
        if before is not None:
            arguments.before_segments, arguments.before_heads = before.states.shape[1:3]
            arguments.before_segment, arguments.before_head = before.segment, before.head
        if summary is not None:
            arguments.update, arguments.decay = (x.data_ptr() for x in summary)
        self.kernel.launch((segments, group.count, self.plan.batch), arguments, self.plan.stream)


def _states_before_segments(summaries: _Walk, group: Group, stretch: Stretch, back: bool) -> Tensor:
    """States before the segments (back: after them), from what each adds and how it decays.

    Args:
        summaries: the kernel that finds the latter.
        group: heads to work on.
        stretch: chunks to work on, all of a sequence.
        back: from the last segment to the first.

    Returns:
        [B, segments, G, K, V] float32.
    """
    plan, segments, count = summaries.plan, stretch.segments, group.count
    make = functools.partial(torch.empty, dtype=torch.float32, device=plan.scan.q.device)
    updates = make((plan.batch, segments, count, WIDTH, WIDTH))
    decays = make((plan.batch, segments, count, 2, WIDTH))
    summaries.launch(group, stretch, summary=(updates, decays))
    arguments = CarryArguments(updates.data_ptr(), decays.data_ptr(), segments, back)
    blocks = WIDTH * WIDTH // (_CARRIED * CARRY_THREADS)
    _kernel("walk.cu", "carry_states", plan.scan).launch((blocks, count, plan.batch), arguments, plan.stream)
    return updates


class _Gradients:
    """Gradients: a fast kernel for all, and an exact one for those of query and gate in chunks that it leaves over.

    Args:
        plan: of the call.
        dy: [B, T, H, V].
        states: room of the states before each chunk of a group and part.
        d_states: that of the gradients of the states after them.
        dq: room for the gradient of q.
        df: that of f.
        dv: that of v.
        d_bounds: [B * chunks, H, K], room for that of the lower bound in each chunk, or None.
        d_final: [N, H, K, V], gradients of the last states, or None.
        d_initial: room for those of the first, or None.
    """

    def __init__(
        self, plan: Plan, dy: Tensor, states: Tensor, d_states: Tensor, dq: Tensor, df: Tensor, dv: Tensor,
        d_bounds: Tensor | None, d_final: Tensor | None, d_initial: Tensor | None,
    ):  # fmt: skip
        scan, packed = plan.scan, plan.packed
        self.plan, self.walk = plan, _kernel("backward.cu", "backward_walk", scan)
        self.exact = _kernel("left_over.cu", "backward_left_over", scan)
        self.arguments = BackwardArguments(
            q=scan.q.data_ptr(), f=scan.f.data_ptr(), v=scan.v.data_ptr(), dy=dy.data_ptr(),
            bound=_pointer(scan.bound), spans=None if packed is None else packed.spans.data_ptr(),
            num_spans=None if packed is None else packed.num_spans.data_ptr(),
            states=states.data_ptr(), d_states=d_states.data_ptr(), dq=dq.data_ptr(), df=df.data_ptr(),
            dv=dv.data_ptr(), d_bound=_pointer(d_bounds), d_final=_pointer(d_final), d_initial=_pointer(d_initial),
            length=plan.length, batches=plan.batch, heads=plan.heads, chunks=plan.chunks, reverse=scan.reverse,
            scale=scan.scale, **_strides(q=scan.q, f=scan.f, v=scan.v, dy=dy),
        )  # fmt: skip

    def launch(
        self, group: Group, part: Stretch, left_over: Tensor, before: Before | None, leaving: Tensor | None
    ) -> None:
        """Launches both.

        Args:
            group: heads to work on.
            part: chunks to work on.
            left_over: zeros, one for each chunk, head and half of K.
            before: gradients of the states after the part's segments; None for zeros.
            leaving: [B, 1, G, K, V], room for the gradient of the state before the part, or None.
        """
        plan, arguments = self.plan, self.arguments
        arguments.first_head, arguments.group = group
        arguments.first_chunk, arguments.end_chunk, arguments.segment_chunks = part
        arguments.part_chunks, arguments.left_over = part.chunks, left_over.data_ptr()
        arguments.before = None if before is None else before.states.data_ptr()
        if before is not None:
            arguments.before_segments, arguments.before_heads = before.states.shape[1:3]
            arguments.before_segment, arguments.before_head = before.segment, before.head
        arguments.after = _pointer(leaving)
        self.walk.launch((part.segments, group.count, plan.batch), arguments, plan.stream)
        self.exact.launch((MULTIPROCESSORS, 1, 1), arguments, plan.stream)


def _kernel(file: str, name: str, scan: Scan) -> compiler.Kernel:
    return _compiled(file, name, scan.q.dtype, scan.q_activation, scan.cu_seqlens is not None, scan.q.device.index)


@functools.cache
def _compiled(
    file: str, name: str, dtype: torch.dtype, q_activation: str, packed: bool, device: int
) -> compiler.Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    options = (
        f"-arch=sm_{major}{minor}a",
        "--std=c++17",
        "-default-device",
        f"-DBFLOAT16={int(dtype == torch.bfloat16)}",
        f"-DQ_ACTIVATION={Q_ACTIVATIONS.index(q_activation)}",
        f"-DPACKED={int(packed)}",
    )
    return compiler.load(_source(file), options, name, *_resources(name))


def _resources(name: str) -> tuple[int, int]:
    """Bytes of dynamic shared memory, and threads, of a program."""
    special = {
        "carry_states": (0, CARRY_THREADS), "cut_sequences": (0, PACKED_THREADS),
        "backward_walk": (_BACKWARD_SHARED, THREADS), "backward_left_over": (_LEFT_OVER_SHARED, LEFT_OVER_THREADS),
        "sum_bounds": (_BOUNDS_SHARED, BOUNDS_THREADS),
    }  # fmt: skip
    return special.get(name, (_WALK_SHARED, THREADS))


@functools.cache
def _source(name: str) -> str:
    folder = Path(__file__).parent
    return "".join((folder / part).read_text(encoding="utf-8") for part in SOURCES[name])


def _aligned(x: Tensor) -> Tensor:
    """X itself if its rows can be read 16 bytes at a time, which those of a fused projection can; else a copy."""
    steps = [s * x.element_size() for s in x.stride()[:-1]]
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(step % 16 for step in steps)
    if x.dim() == 4:
        fits &= steps[1] < MOST_ROW_BYTES
    # contiguous() would give back what is contiguous at a bad address
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _new_like(x: Tensor) -> Tensor:
    """Room for a contiguous tensor."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _strides(**tensors: Tensor) -> dict[str, int]:
    names = ("batch", "row", "head")
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(names)}


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
