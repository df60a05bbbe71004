"""Which calls the CUDA kernels take, and how they are launched."""

# a kernel's call takes a grid and compile-time options that its signature does not show
# pyright: reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hgrn2.ops.cuda import compiler
from hgrn2.ops.cuda.plan import CHUNK, WIDTH, group_size, num_chunks, segment_chunks

THREADS, GRADIENT_THREADS = 384, 256
Q_ACTIVATIONS = ("none", "silu", "sigmoid")
_TILE_BYTES, _SCORE_BYTES, _HALF = CHUNK * WIDTH * 2, CHUNK * CHUNK * 2, WIDTH // 2
_WALK_SHARED = 11 * _TILE_BYTES + 4 * _SCORE_BYTES + 7 * WIDTH * 4
_GRADIENT_SHARED = 4 * _TILE_BYTES + 5 * CHUNK * _HALF * 2 + (8 + 2 + 4 + 8) * _HALF * 4


class WalkArguments(ctypes.Structure):
    """Argument of the kernels of walk.cu, field by field as there."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "f", "v", "bound", "y", "initial", "final", "update", "decay")]
        + [(name, ctypes.c_void_p) for name in ("coarse", "kept", "kept_decay")]
        + [(f"{x}_{axis}", ctypes.c_longlong) for x in ("q", "f", "v") for axis in ("batch", "row", "head")]
        + [("length", ctypes.c_longlong)]
        + [(name, ctypes.c_int) for name in ("heads", "segments", "segment_chunks", "coarse_chunks")]
        + [(name, ctypes.c_int) for name in ("reverse", "first_head")]
        + [("initial_heads", ctypes.c_int), ("initial_first", ctypes.c_int), ("scale", ctypes.c_float)]
    )


class GradientArguments(ctypes.Structure):
    """Argument of the kernel of gradient.cu, field by field as there."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "f", "v", "dy", "bound", "states", "d_states", "dq", "df")]
        + [(name, ctypes.c_void_p) for name in ("d_bound", "left_over")]
        + [(f"{x}_{axis}", ctypes.c_longlong) for x in ("q", "f", "v", "dy") for axis in ("batch", "row", "head")]
        + [("length", ctypes.c_longlong)]
        + [(name, ctypes.c_int) for name in ("heads", "first_head", "reverse")]
        + [("scale", ctypes.c_float)]
    )


class Group(NamedTuple):
    """Heads that are worked on together."""

    first: int
    count: int


@dataclass(frozen=True)
class Scan:
    """A call of `hgrn2.ops.hgrn2_scan` that `resolve_backend` gives to these kernels.

    Attributes:
        q: [B, T, H, K].
        f: [B, T, H, K].
        v: [B, T, H, V].
        bound: [H, K] float32 or None.
        initial_state: [B, H, K, V] float32 or None.
        reverse: time runs from the last row to the first.
        scale: factor of the outputs.
        q_activation: of q.
    """

    q: Tensor
    f: Tensor
    v: Tensor
    bound: Tensor | None
    initial_state: Tensor | None
    reverse: bool
    scale: float
    q_activation: str

    def aligned(self) -> Scan:
        """The same with inputs that can be read 16 bytes at a time."""
        bound, state = (None if x is None else x.contiguous() for x in (self.bound, self.initial_state))
        return replace(
            self, q=_aligned(self.q), f=_aligned(self.f), v=_aligned(self.v), bound=bound, initial_state=state
        )


class Plan:
    """How the work of a call is cut.

    Attributes:
        scan: the call, aligned.
        batch: B, likewise length T and heads H.
        chunks: of a sequence.
        groups: heads of each pass over the backward pass's kernels.
        coarse: chunks of a segment of the backward pass.
        forward_chunks: chunks of a segment of the forward pass: a multiple of `coarse`.
    """

    def __init__(self, scan: Scan, coarse: int):
        self.scan, self.coarse = scan, coarse
        self.batch, self.length, self.heads, _ = scan.q.shape
        self.chunks = num_chunks(self.length)
        size = group_size(self.batch, self.chunks, self.heads)
        self.groups = [Group(h, min(size, self.heads - h)) for h in range(0, self.heads, size)]
        self.forward_chunks = -(-segment_chunks(self.batch * self.heads, self.chunks) // coarse) * coarse


def coarse_shape(batch: int, length: int, heads: int, coarse: int) -> tuple[int, ...]:
    """Shape of the coarse states; none are kept with a distance of 0, or when the first would be the only one."""
    chunks = num_chunks(length)
    return (batch, -(-chunks // coarse) if 0 < coarse < chunks else 0, heads, WIDTH, WIDTH)


def forward(scan: Scan, coarse: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scan.

    Args:
        scan: the call.
        coarse: chunks between the coarse states `backward` needs; 0 to keep none.

    Returns:
        y [B, T, H, V], the final state [B, H, K, V], float32, and coarse states [B, pieces, H, K, V], float32, of which
        there is none unless asked for.
    """
    scan = scan.aligned()
    plan, device, initial = Plan(scan, max(1, coarse)), scan.q.device, scan.initial_state
    y = torch.empty(scan.v.shape, dtype=scan.v.dtype, device=device)
    final = torch.empty((plan.batch, plan.heads, WIDTH, WIDTH), dtype=torch.float32, device=device)
    states = torch.empty(coarse_shape(plan.batch, plan.length, plan.heads, coarse), dtype=torch.float32, device=device)
    if not y.numel():
        return y, final.zero_() if initial is None else final.copy_(initial), states
    group, chunks = Group(0, plan.heads), plan.forward_chunks
    with torch.cuda.device(device):
        walks = _Walks(plan)
        if chunks < plan.chunks:
            before, decays = walks.summaries("forward_summaries", group, chunks, scan.v)
            _carry(before, decays, initial, final, group, plan.heads, back=False)
        else:
            before = _one_segment(initial)
        kept = {"coarse": states} if states.numel() else {}
        walks.launch("forward_outputs", group, chunks, scan.v, before, 0, y=y, final=final, **kept)
    return y, final, states


def backward(
    scan: Scan, dy: Tensor, d_final: Tensor | None, states: Tensor, coarse: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradient of `forward`, for bfloat16.

    Args:
        scan: the call.
        dy: [B, T, H, V].
        d_final: [B, H, K, V] float32, or None for zeros.
        states: the coarse states, and the distance between them.
        coarse: see states.

    Returns:
        Gradients of q, f, v, the lower bound and the initial state (None where there is none).
    """
    scan, dy = scan.aligned(), _aligned(dy)
    d_final = None if d_final is None else d_final.contiguous()
    plan, device = Plan(scan, coarse), scan.q.device
    dq, df, dv = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (scan.q, scan.f, scan.v))
    # a row for each chunk, summed below in a fixed order
    d_bound = None
    if scan.bound is not None:
        d_bound = torch.empty((plan.batch * plan.chunks, plan.heads, WIDTH), dtype=torch.float32, device=device)
    d_initial = None if scan.initial_state is None else torch.empty_like(scan.initial_state)
    if not dq.numel():
        if d_initial is not None:
            d_initial = d_initial.zero_() if d_final is None else d_initial.copy_(d_final)
        return dq, df, dv, None if d_bound is None else d_bound.sum(0), d_initial
    # every group in the room of the first, the largest
    shape = (plan.batch * plan.chunks, plan.groups[0].count, WIDTH, WIDTH)
    kept, d_kept = (torch.empty(shape, dtype=scan.q.dtype, device=device) for _ in range(2))
    decays = torch.empty(shape[:3], dtype=torch.float32, device=device)
    left_over = torch.zeros((len(plan.groups), *shape[:2], 2), dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        walks = _Walks(plan)
        for group, flags in zip(plan.groups, left_over, strict=True):
            before = states if states.numel() else _one_segment(scan.initial_state)
            walks.launch("forward_states", group, coarse, scan.v, before, group.first, kept=kept, kept_decay=decays)
            if coarse < plan.chunks:
                after, after_decays = walks.summaries("backward_summaries", group, coarse, dy)
                _carry(after, after_decays, d_final, d_initial, group, plan.heads, back=True)
                first = 0
            else:
                after, first = _one_segment(d_final), group.first
            walks.launch("backward_values", group, coarse, dy, after, first, y=dv, final=d_initial, kept=d_kept)
            _gradients(plan, group, dy, kept, d_kept, decays, flags, dq, df, d_bound)
    return dq, df, dv, None if d_bound is None else d_bound.sum(0), d_initial


def _one_segment(states: Tensor | None) -> Tensor | None:
    """States [B, H, K, V] as those before the only segment."""
    return None if states is None else states.unsqueeze(1)


class _Walks:
    """Launches of the kernels of walk.cu for one call."""

    def __init__(self, plan: Plan):
        self.plan, scan = plan, plan.scan
        self.shared = WalkArguments(
            q=scan.q.data_ptr(), f=scan.f.data_ptr(), bound=_pointer(scan.bound), length=plan.length,
            heads=plan.heads, coarse_chunks=plan.coarse, reverse=scan.reverse, scale=scan.scale,
            **_strides(q=scan.q, f=scan.f),
        )  # fmt: skip

    def launch(
        self, name: str, group: Group, chunks: int, values: Tensor, initial: Tensor | None = None,
        initial_first: int = 0, **outputs: Tensor | None,
    ) -> None:  # fmt: skip
        """Launches a kernel.

        Args:
            name: of the kernel.
            group: heads to work on.
            chunks: of a segment.
            values: v, or dy backwards.
            initial: [B, segments, heads, K, V], states before the segments (backwards, gradients of those after).
            initial_first: where the group's first head is in `initial`.
            outputs: by the name of the field of `WalkArguments`; None where not wanted.
        """
        arguments = WalkArguments.from_buffer_copy(self.shared)
        arguments.v = values.data_ptr()
        arguments.v_batch, arguments.v_row, arguments.v_head, _ = values.stride()
        segments = -(-self.plan.chunks // chunks)
        arguments.segments, arguments.segment_chunks, arguments.first_head = segments, chunks, group.first
        if initial is not None:
            arguments.initial, arguments.initial_first = initial.data_ptr(), initial_first
            arguments.initial_heads = initial.shape[2]
        for field, x in outputs.items():
            setattr(arguments, field, _pointer(x))
        scan = self.plan.scan
        kernel = _kernel("walk.cu", name, scan.q.dtype, scan.q_activation, scan.q.device.index)
        kernel.launch((segments, group.count, self.plan.batch), arguments)

    def summaries(self, name: str, group: Group, chunks: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """What each segment adds to the state, [B, segments, heads, K, V], and its decay and 1 minus it."""
        shape = (self.plan.batch, -(-self.plan.chunks // chunks), group.count, WIDTH)
        updates = torch.empty((*shape, WIDTH), dtype=torch.float32, device=values.device)
        decays = torch.empty((*shape[:3], 2, WIDTH), dtype=torch.float32, device=values.device)
        self.launch(name, group, chunks, values, update=updates, decay=decays)
        return updates, decays


def _carry(
    updates: Tensor,
    decays: Tensor,
    initial: Tensor | None,
    final: Tensor | None,
    group: Group,
    all_heads: int,
    back: bool,
) -> None:
    """Replaces what each segment adds by the state before it (back: after it)."""
    from hgrn2.ops.triton.chunk_fwd import carry_states_kernel

    batch, segments, count, _, _ = updates.shape
    block = 512
    carry_states_kernel[(batch, count, WIDTH * WIDTH // block)](
        updates, decays, initial, final, None, segments, *group, all_heads, WIDTH, WIDTH,
        BLOCK=block, PACKED=False, BACKWARD=back, HAS_INITIAL=initial is not None, HAS_FINAL=final is not None,
        num_warps=4,
    )  # fmt: skip


def _gradients(
    plan: Plan, group: Group, dy: Tensor, states: Tensor, d_states: Tensor, decays: Tensor, left_over: Tensor,
    dq: Tensor, df: Tensor, d_bound: Tensor | None,
) -> None:  # fmt: skip
    """Gradients of query and gate; what the fast kernel leaves over, the exact one of ops/triton does."""
    from hgrn2.ops.triton.chunk_bwd import left_over_gradient_kernel

    scan, batch, length, heads = plan.scan, plan.batch, plan.length, plan.heads
    q, f, v = scan.q, scan.f, scan.v
    arguments = GradientArguments(
        q=q.data_ptr(), f=f.data_ptr(), v=v.data_ptr(), dy=dy.data_ptr(), bound=_pointer(scan.bound),
        states=states.data_ptr(), d_states=d_states.data_ptr(), dq=dq.data_ptr(), df=df.data_ptr(),
        d_bound=_pointer(d_bound), left_over=left_over.data_ptr(), length=length, heads=heads,
        first_head=group.first, reverse=scan.reverse, scale=scan.scale, **_strides(q=q, f=f, v=v, dy=dy),
    )  # fmt: skip
    kernel = _kernel("gradient.cu", "backward_gates", q.dtype, scan.q_activation, q.device.index)
    kernel.launch((plan.chunks, 2 * group.count, batch), arguments)
    pieces, block = left_over.numel(), 32
    left_over_gradient_kernel[(-(-pieces // block),)](
        left_over, pieces, q, f, v, dy, scan.bound, states, d_states, decays, dq, df, d_bound,
        *_strides(q=q, f=f, v=v, dy=dy).values(), length, plan.chunks, *group, heads, WIDTH, WIDTH, scan.scale,
        C=CHUNK, BK=_HALF, BV=64, HAS_BOUND=scan.bound is not None, Q_ACTIVATION=scan.q_activation,
        REVERSE=scan.reverse, PIECES=block, num_warps=8, num_stages=1,
    )  # fmt: skip


@functools.cache
def _kernel(file: str, name: str, dtype: torch.dtype, q_activation: str, device: int) -> compiler.Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    options = (
        f"-arch=sm_{major}{minor}a",
        "--std=c++17",
        "-default-device",
        f"-DBFLOAT16={int(dtype == torch.bfloat16)}",
        f"-DQ_ACTIVATION={Q_ACTIVATIONS.index(q_activation)}",
    )
    shared_bytes, threads = (_WALK_SHARED, THREADS) if file == "walk.cu" else (_GRADIENT_SHARED, GRADIENT_THREADS)
    return compiler.load(_source(file), options, name, shared_bytes, threads)


@functools.cache
def _source(name: str) -> str:
    folder = Path(__file__).parent
    return "".join((folder / part).read_text(encoding="utf-8") for part in ("chunk.cuh", name))


def _aligned(x: Tensor) -> Tensor:
    """X itself if its rows can be read 16 bytes at a time, which those of a fused projection can; else a copy."""
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:3])
    return x if fits else x.contiguous()


def _strides(**tensors: Tensor) -> dict[str, int]:
    names = ("batch", "row", "head")
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(names)}


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
