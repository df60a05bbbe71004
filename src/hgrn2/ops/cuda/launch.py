"""Which calls the CUDA kernels take, and how they are launched."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from hgrn2.ops.cuda import compiler

WIDTH, CHUNK, THREADS = 128, 64, 512
CAPABILITY = (9, 0)
EXTRA = ()
Q_ACTIVATIONS = ("none", "silu", "sigmoid")
_TILE_BYTES, _SCORE_BYTES = CHUNK * WIDTH * 2, CHUNK * CHUNK * 2
_FORWARD_SHARED = 11 * _TILE_BYTES + 4 * _SCORE_BYTES + 7 * WIDTH * 4


class ForwardArguments(ctypes.Structure):
    """Argument of the kernels of forward.cu, field by field as there."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "f", "v", "bound", "y", "initial", "final", "update", "decay")]
        + [(f"{x}_{axis}", ctypes.c_longlong) for x in "qfv" for axis in ("batch", "row", "head")]
        + [("length", ctypes.c_longlong)]
        + [(name, ctypes.c_int) for name in ("heads", "segments", "segment_chunks", "reverse")]
        + [("scale", ctypes.c_float)]
    )


def forward(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    bound: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    scale: float,
    q_activation: str,
) -> tuple[Tensor, Tensor]:
    """`hgrn2.ops.hgrn2_scan` for calls that `unsuitable` finds nothing wrong with.

    Returns:
        y [B, T, H, V] and the final state [B, H, K, V].
    """
    batch, length, heads, width = q.shape
    q, f, v = (_aligned(x) for x in (q, f, v))
    bound, initial_state = (None if x is None else x.contiguous() for x in (bound, initial_state))
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = torch.empty((batch, heads, width, width), dtype=torch.float32, device=q.device)
    chunks = -(-length // CHUNK)
    segments = _segments(batch * heads, chunks, _multiprocessors(q.device.index))
    segment_chunks = -(-chunks // segments)
    segments = -(-chunks // segment_chunks)
    arguments = ForwardArguments(
        q.data_ptr(), f.data_ptr(), v.data_ptr(), _pointer(bound), y.data_ptr(), _pointer(initial_state),
        final.data_ptr(), None, None, *q.stride()[:3], *f.stride()[:3], *v.stride()[:3],
        length, heads, segments, segment_chunks, reverse, scale,
    )  # fmt: skip
    with torch.cuda.device(q.device):
        if segments > 1:
            states = torch.empty((batch, segments, heads, width, width), dtype=torch.float32, device=q.device)
            decays = torch.empty((batch, segments, heads, 2, width), dtype=torch.float32, device=q.device)
            arguments.update, arguments.decay = states.data_ptr(), decays.data_ptr()
            # of the last segment only the final state would come, and its outputs bring that
            _kernel("forward_summaries", q, q_activation).launch((segments - 1, heads, batch), arguments)
            _carry(states, decays, initial_state, final)
            arguments.initial = states.data_ptr()
        _kernel("forward_outputs", q, q_activation).launch((segments, heads, batch), arguments)
    return y, final


def unsuitable(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, v_activation: str) -> str | None:
    """Why the kernels do not take a call, or None."""
    if q.device.type != "cuda" or torch.version.cuda is None:
        return f"the inputs are on {q.device}, and its kernels need a GPU of NVIDIA"
    if torch.cuda.get_device_capability(q.device) != CAPABILITY:
        return f"its kernels are for devices of capability {'.'.join(map(str, CAPABILITY))}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels do not take {q.dtype}"
    if q.shape[-1] != WIDTH or v.shape[-1] != WIDTH:
        return f"K is {q.shape[-1]} and V {v.shape[-1]}, and its kernels are for {WIDTH}"
    if cu_seqlens is not None:
        return "its kernels do not take packed sequences yet"
    if v_activation != "none":
        return f"its kernels do not take v_activation {v_activation!r}"
    return compiler.problem()


def _carry(states: Tensor, decays: Tensor, initial: Tensor | None, final: Tensor) -> None:
    """Replaces what each segment adds by the state before it."""
    from hgrn2.ops.triton.chunk_fwd import carry_states_kernel

    batch, segments, heads, width, _ = states.shape
    block = 512
    carry_states_kernel[(batch, heads, width * width // block)](
        states, decays, initial, final, None, segments, 0, heads, heads, width, width,
        BLOCK=block, PACKED=False, BACKWARD=False, HAS_INITIAL=initial is not None, num_warps=4,
    )  # fmt: skip


def _segments(rows: int, chunks: int, multiprocessors: int) -> int:
    """Segments of a sequence: as many as keep every multiprocessor busy once."""
    return max(1, min(chunks, multiprocessors // max(1, rows)))


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _kernel(name: str, q: Tensor, q_activation: str) -> compiler.Kernel:
    major, minor = torch.cuda.get_device_capability(q.device)
    options = (
        f"-arch=sm_{major}{minor}a",
        "--std=c++17",
        f"-DBFLOAT16={int(q.dtype == torch.bfloat16)}",
        f"-DQ_ACTIVATION={Q_ACTIVATIONS.index(q_activation)}",
        *EXTRA,
    )
    return compiler.load(_source("forward.cu"), options, name, _FORWARD_SHARED, THREADS, q.device.index)


@functools.cache
def _source(name: str) -> str:
    folder = Path(__file__).parent
    return "".join((folder / part).read_text(encoding="utf-8") for part in ("chunk.cuh", name))


def _aligned(x: Tensor) -> Tensor:
    """X itself if its rows can be read 16 bytes at a time, which those of a fused projection can; else a copy."""
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:3])
    return x if fits else x.contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
