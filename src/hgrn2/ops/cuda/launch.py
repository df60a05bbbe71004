"""Which calls the CUDA kernels take, and how they are launched."""

# a kernel's call takes a grid and compile-time options that its signature does not show
# pyright: reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hgrn2.ops.cuda import compiler

WIDTH, CHUNK, THREADS, GRADIENT_THREADS = 128, 64, 512, 256
CAPABILITY = (9, 0)
Q_ACTIVATIONS = ("none", "silu", "sigmoid")
_TILE_BYTES, _SCORE_BYTES, _HALF = CHUNK * WIDTH * 2, CHUNK * CHUNK * 2, WIDTH // 2
_WALK_SHARED = 11 * _TILE_BYTES + 4 * _SCORE_BYTES + 7 * WIDTH * 4
_GRADIENT_SHARED = 4 * _TILE_BYTES + 5 * CHUNK * _HALF * 2 + (8 + 2 + 4 + 8) * _HALF * 4
# heads are worked on in groups whose chunk states, and their gradients, fit here each
STATE_BYTES = 1 << 27


class WalkArguments(ctypes.Structure):
    """Argument of the kernels of forward.cu, field by field as there."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "f", "v", "bound", "y", "initial", "final", "update", "decay")]
        + [(name, ctypes.c_void_p) for name in ("kept", "kept_decay")]
        + [(f"{x}_{axis}", ctypes.c_longlong) for x in ("q", "f", "v") for axis in ("batch", "row", "head")]
        + [("length", ctypes.c_longlong)]
        + [(name, ctypes.c_int) for name in ("heads", "segments", "segment_chunks", "reverse", "first_head")]
        + [("initial_heads", ctypes.c_int), ("initial_first", ctypes.c_int), ("scale", ctypes.c_float)]
    )


class GradientArguments(ctypes.Structure):
    """Argument of the kernel of backward.cu, field by field as there."""

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
    """A call of `hgrn2.ops.hgrn2_scan` for which `unsuitable` finds nothing wrong.

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

    @property
    def chunks(self) -> int:
        """Chunks of a sequence."""
        return -(-self.q.shape[1] // CHUNK)

    def segments(self, group: Group) -> tuple[int, int]:
        """Segments a sequence is cut into, so that all multiprocessors have work, and chunks of each."""
        rows = self.q.shape[0] * group.count
        wanted = max(1, min(self.chunks, _multiprocessors(self.q.device.index) // rows))
        each = -(-self.chunks // wanted)
        return -(-self.chunks // each), each


def unsuitable(device: torch.device, dtype: torch.dtype, k_width: int, v_width: int) -> str | None:
    """Why the kernels cannot take inputs, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the inputs are on {device}, and its kernels need a GPU of NVIDIA"
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        return f"its kernels are for devices of compute capability {'.'.join(map(str, CAPABILITY))}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels do not take {dtype}"
    if k_width != WIDTH or v_width != WIDTH:
        return f"K is {k_width} and V {v_width}, and its kernels are for {WIDTH}"
    return compiler.problem()


def forward(scan: Scan) -> tuple[Tensor, Tensor]:
    """The scan.

    Returns:
        y [B, T, H, V] and the final state [B, H, K, V], float32.
    """
    scan = scan.aligned()
    batch, _, heads, _ = scan.q.shape
    y = torch.empty(scan.v.shape, dtype=scan.v.dtype, device=scan.v.device)
    final = torch.empty((batch, heads, WIDTH, WIDTH), dtype=torch.float32, device=scan.q.device)
    if not y.numel():
        return y, final.copy_(scan.initial_state) if scan.initial_state is not None else final.zero_()
    group = Group(0, heads)
    with torch.cuda.device(scan.q.device):
        initial = _before_segments(scan, group, final)
        _walk("forward_outputs", scan, group, scan.v, y=y, initial=initial, final=final)
    return y, final


def backward(scan: Scan, dy: Tensor, d_final: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradient of `forward`, for bfloat16.

    Returns:
        Gradients of q, f, v, the lower bound (None without one) and the initial state.
    """
    scan, dy, d_final = scan.aligned(), _aligned(dy), d_final.contiguous()
    batch, _, heads, _ = scan.q.shape
    device = scan.q.device
    dq, df, dv = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (scan.q, scan.f, scan.v))
    # a row for each chunk, summed below in a fixed order
    d_bound = None if scan.bound is None else torch.empty((batch * scan.chunks, heads, WIDTH), device=device)
    d_initial = torch.empty_like(d_final)
    if not dq.numel():
        return dq, df, dv, None if d_bound is None else d_bound.sum(0), d_initial.copy_(d_final)
    unused = torch.empty_like(d_final)
    with torch.cuda.device(device):
        for group in _groups(scan):
            shape = (batch * scan.chunks, group.count, WIDTH, WIDTH)
            states, d_states = (torch.empty(shape, dtype=scan.q.dtype, device=device) for _ in range(2))
            decays = torch.empty(shape[:3], dtype=torch.float32, device=device)
            left_over = torch.zeros((*shape[:2], 2), dtype=torch.int32, device=device)
            initial = _before_segments(scan, group, unused)
            _walk("forward_states", scan, group, scan.v, initial=initial, kept=states, kept_decay=decays)
            after = _after_segments(scan, group, dy, d_final, d_initial)
            _walk("backward_values", scan, group, dy, y=dv, initial=after, final=d_initial, kept=d_states)
            _gradients(scan, group, dy, states, d_states, decays, left_over, dq, df, d_bound)
    return dq, df, dv, None if d_bound is None else d_bound.sum(0), d_initial


class _Initial(NamedTuple):
    """States before segments (or gradients of those after): [B, segments, heads, K, V]; the group's first head in it."""

    states: Tensor
    first: int


def _before_segments(scan: Scan, group: Group, final: Tensor) -> _Initial | None:
    """States before the segments of a group's sequences."""
    segments, _ = scan.segments(group)
    if segments == 1:
        return None if scan.initial_state is None else _Initial(scan.initial_state.unsqueeze(1), group.first)
    updates, decays = _summaries("forward_summaries", scan, group, scan.v)
    _carry(updates, decays, scan.initial_state, final, group, back=False)
    return _Initial(updates, 0)


def _after_segments(scan: Scan, group: Group, dy: Tensor, d_final: Tensor, d_initial: Tensor) -> _Initial:
    """Gradients of the states after the segments."""
    segments, _ = scan.segments(group)
    if segments == 1:
        return _Initial(d_final.unsqueeze(1), group.first)
    updates, decays = _summaries("backward_summaries", scan, group, dy)
    _carry(updates, decays, d_final, d_initial, group, back=True)
    return _Initial(updates, 0)


def _summaries(name: str, scan: Scan, group: Group, values: Tensor) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state, [B, segments, heads, K, V], and its decay and 1 minus it."""
    segments, _ = scan.segments(group)
    shape = (scan.q.shape[0], segments, group.count, WIDTH)
    updates = torch.empty((*shape, WIDTH), dtype=torch.float32, device=scan.q.device)
    decays = torch.empty((*shape[:3], 2, WIDTH), dtype=torch.float32, device=scan.q.device)
    _walk(name, scan, group, values, update=updates, decay=decays)
    return updates, decays


def _carry(
    updates: Tensor, decays: Tensor, initial: Tensor | None, final: Tensor, group: Group, back: bool
) -> None:
    """Replaces what each segment adds by the state before it (back: after it)."""
    from hgrn2.ops.triton.chunk_fwd import carry_states_kernel

    batch, segments, count, _, _ = updates.shape
    block = 512
    carry_states_kernel[(batch, count, WIDTH * WIDTH // block)](
        updates, decays, initial, final, None, segments, *group, final.shape[1], WIDTH, WIDTH,
        BLOCK=block, PACKED=False, BACKWARD=back, HAS_INITIAL=initial is not None, num_warps=4,
    )  # fmt: skip


def _walk(
    name: str, scan: Scan, group: Group, values: Tensor, initial: _Initial | None = None, **outputs: Tensor
) -> None:
    """Launches a kernel of forward.cu."""
    q = scan.q
    segments, segment_chunks = scan.segments(group)
    arguments = WalkArguments(
        q=q.data_ptr(), f=scan.f.data_ptr(), v=values.data_ptr(), bound=_pointer(scan.bound), length=q.shape[1],
        heads=q.shape[2], segments=segments, segment_chunks=segment_chunks, reverse=scan.reverse,
        first_head=group.first, scale=scan.scale, **{name: x.data_ptr() for name, x in outputs.items()},
        **_strides(q=q, f=scan.f, v=values),
    )  # fmt: skip
    if initial is not None:
        arguments.initial, arguments.initial_first = initial.states.data_ptr(), initial.first
        arguments.initial_heads = initial.states.shape[2]
    kernel = _kernel("forward.cu", name, q, scan.q_activation, _WALK_SHARED, THREADS)
    kernel.launch((segments, group.count, q.shape[0]), arguments)


def _gradients(
    scan: Scan, group: Group, dy: Tensor, states: Tensor, d_states: Tensor, decays: Tensor, left_over: Tensor,
    dq: Tensor, df: Tensor, d_bound: Tensor | None,
) -> None:  # fmt: skip
    """Gradients of query and gate; what the fast kernel leaves over, the exact one of ops/triton does."""
    from hgrn2.ops.triton.chunk_bwd import chunk_gradient_kernel

    q, f, v = scan.q, scan.f, scan.v
    batch, length, heads, _ = q.shape
    arguments = GradientArguments(
        q=q.data_ptr(), f=f.data_ptr(), v=v.data_ptr(), dy=dy.data_ptr(), bound=_pointer(scan.bound),
        states=states.data_ptr(), d_states=d_states.data_ptr(), dq=dq.data_ptr(), df=df.data_ptr(),
        d_bound=_pointer(d_bound), left_over=left_over.data_ptr(), length=length, heads=heads,
        first_head=group.first, reverse=scan.reverse, scale=scan.scale, **_strides(q=q, f=f, v=v, dy=dy),
    )  # fmt: skip
    kernel = _kernel("backward.cu", "backward_gates", q, scan.q_activation, _GRADIENT_SHARED, GRADIENT_THREADS)
    kernel.launch((scan.chunks, 2 * group.count, batch), arguments)
    block = 64
    chunk_gradient_kernel[(batch * scan.chunks, group.count, WIDTH // block)](
        q, f, q, v, dy, scan.bound, states, d_states, decays, dq, df, None, d_bound, left_over, None, None, None,
        *_strides(q=q, f=f, k=q, v=v, dy=dy).values(), length, scan.chunks, *group, heads, WIDTH, WIDTH, scan.scale,
        C=CHUNK, BK=block, BV=64, TIED=True, HAS_BOUND=scan.bound is not None, Q_ACTIVATION=scan.q_activation,
        V_ACTIVATION="none", PACKED=False, REVERSE=scan.reverse, PRECISION="tf32", LEFT_OVER=True, num_warps=8,
        num_stages=1,
    )  # fmt: skip


def _groups(scan: Scan) -> Iterator[Group]:
    heads = scan.q.shape[2]
    head_bytes = scan.q.shape[0] * scan.chunks * WIDTH * WIDTH * scan.q.dtype.itemsize
    count = -(-heads // max(1, STATE_BYTES // head_bytes))
    size = -(-heads // count)
    return (Group(first, min(size, heads - first)) for first in range(0, heads, size))


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _kernel(file: str, name: str, q: Tensor, q_activation: str, shared_bytes: int, threads: int) -> compiler.Kernel:
    major, minor = torch.cuda.get_device_capability(q.device)
    options = (
        f"-arch=sm_{major}{minor}a",
        "--std=c++17",
        f"-DBFLOAT16={int(q.dtype == torch.bfloat16)}",
        f"-DQ_ACTIVATION={Q_ACTIVATIONS.index(q_activation)}",
    )
    return compiler.load(_source(file), options, name, shared_bytes, threads, q.device.index)


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
