"""Forward and backward pass and step: cut the work into chunks, allocate buffers and launch the Triton kernels."""

# a kernel's call takes a grid and compile-time options that its signature does not show
# pyright: reportCallIssue=false, reportIndexIssue=false, reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hgrn2.ops.backends.triton.blocks import Blocks, blocks_for, step_block
from hgrn2.ops.backends.triton.chunk_bwd import chunk_gradient_kernel
from hgrn2.ops.backends.triton.chunk_fwd import carry_states_kernel, chunk_output_kernel, chunk_update_kernel
from hgrn2.ops.backends.triton.recurrent import step_kernel
from hgrn2.ops.call import ScanCall, ScanGradients
from hgrn2.ops.device import on_device
from hgrn2.ops.gates import Floor
from hgrn2.shapes import BHKV, BHV, BTHV, NHKV

# limit for the chunk states of a group of heads: it bounds memory, and the next kernel finds them in the cache
STATE_BYTES = 1 << 28
CARRY_BLOCK = 512


def with_unit_stride(call: ScanCall) -> ScanCall:
    """Return the call with inputs whose last axis is contiguous; slices of one projection are so already.

    Args:
        call: a call with tensors of any strides.
    """
    q, f, k, v, bound, state, cu_seqlens, settings = call
    bound, state, cu_seqlens = (None if x is None else x.contiguous() for x in (bound, state, cu_seqlens))
    k = None if k is None else _unit_stride(k)
    return ScanCall(_unit_stride(q), _unit_stride(f), k, _unit_stride(v), bound, state, cu_seqlens, settings)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Chunks:
    """Division of the rows into chunks.

    Attributes:
        size: tokens of a chunk.
        each: chunks of a sequence that is not packed.
        total: chunks of all sequences; an upper bound for packed ones, whose lengths only the device knows.
        sequences: N.
        first: [N + 1] int32, first chunk of each packed sequence; None when nothing is packed.
        sequence: [total] int32, the packed sequence of each chunk.
    """

    size: int
    each: int
    total: int
    sequences: int
    first: Tensor | None
    sequence: Tensor | None


def cut(batch: int, length: int, cu_seqlens: Tensor | None, size: int) -> Chunks:
    """Cut sequences into chunks, without waiting for the device.

    Args:
        batch: B.
        length: T.
        cu_seqlens: [N + 1], or None.
        size: tokens of a chunk.
    """
    each = -(-length // size)
    if cu_seqlens is None:
        return Chunks(size, each, batch * each, batch, None, None)
    sequences = cu_seqlens.shape[0] - 1
    # wrong boundaries must not lead beyond the inputs
    counts = ((cu_seqlens.clamp(0, length).diff() + size - 1) // size).clamp_(min=0)
    total = each + sequences
    # boundaries that fall would make more chunks than were allocated
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).clamp_(max=total).int()
    places = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
    sequence = torch.searchsorted(first, places, right=True, out_int32=True) - 1
    # kernels recognise indices beyond the last chunk by their offset in the last sequence
    return Chunks(size, each, total, sequences, first, sequence.clamp_(max=sequences - 1))


class Launcher:
    """Launches the kernels of one call, with the arguments they share."""

    def __init__(self, call: ScanCall):
        self.call = call = with_unit_stride(call)
        q, v, settings = call.q, call.v, call.settings
        self.key = q if call.k is None else call.k
        self.batch, self.length, self.heads, self.width = q.shape
        self.v_width = v.shape[-1]
        self.blocks: Blocks = blocks_for(q.device, q.dtype, self.length, self.width, self.v_width)
        self.chunks = cut(self.batch, self.length, call.cu_seqlens, self.blocks.chunk)
        self.low_state = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        floor = Floor.of(settings.min_log_decay)
        self.flags: dict[str, Any] = {
            "C": self.blocks.chunk,
            "TIED": call.k is None,
            "HAS_BOUND": call.lower_bound is not None,
            "Q_ACTIVATION": settings.q_activation,
            "V_ACTIVATION": settings.v_activation,
            "FLOOR": floor.decay,
            "FLOOR_LOST": floor.lost,
            "PACKED": call.cu_seqlens is not None,
            "REVERSE": settings.reverse,
            # tf32 alone has three digits; 16-bit inputs are multiplied as they are
            "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        }

    def is_empty(self) -> bool:
        """Return whether there is no token, so that nothing is launched."""
        return self.batch == 0 or self.length == 0 or self.chunks.sequences == 0

    def groups(self) -> list[tuple[int, int]]:
        """Return the first head and the number of heads of each group."""
        head_bytes = self.chunks.total * self.width * self.v_width * self.low_state.itemsize
        most = max(1, STATE_BYTES // head_bytes)
        count = -(-self.heads // most)
        size = -(-self.heads // count)
        return [(head, min(size, self.heads - head)) for head in range(0, self.heads, size)]

    def new_states(self, heads: int) -> Tensor:
        """Return uninitialised memory for the chunk states of a group."""
        shape = (self.chunks.total, heads, self.width, self.v_width)
        return torch.empty(shape, dtype=self.low_state, device=self.call.q.device)

    def updates(self, values: Tensor, states: Tensor, decays: Tensor, group: tuple[int, int], of_queries: bool) -> None:
        """Fill states with the update of each chunk and, unless of_queries, decays with its decay."""
        call, k, blocks = self.call, self.key, self.blocks.update
        grid = (self.chunks.total, group[1], _blocks(self.width, blocks.k) * _blocks(self.v_width, blocks.v))
        chunk_update_kernel[grid](
            call.q, call.f, k, values, call.lower_bound, states, decays, *self._tables(),
            *_strides(call.q), *_strides(call.f), *_strides(k), *_strides(values),
            self.length, self.chunks.each, *group, self.width, self.v_width, call.settings.scale,
            BK=blocks.k, BV=blocks.v, OF_QUERIES=of_queries, num_warps=blocks.warps, num_stages=blocks.stages,
            **self.flags,
        )  # fmt: skip

    def carry(
        self,
        states: Tensor,
        decays: Tensor,
        initial: Tensor | None,
        final: Tensor | None,
        group: tuple[int, int],
        back: bool,
    ) -> None:
        """Turn the updates of chunks into the states before them."""
        grid = (self.chunks.sequences, group[1], _blocks(self.width * self.v_width, CARRY_BLOCK))
        carry_states_kernel[grid](
            states, decays, initial, final, self._tables()[0], self.chunks.each, *group, self.heads,
            self.width, self.v_width, BLOCK=CARRY_BLOCK, PACKED=self.flags["PACKED"], BACKWARD=back,
            HAS_INITIAL=initial is not None, HAS_FINAL=final is not None, num_warps=4,
        )  # fmt: skip

    def outputs(self, values: Tensor, states: Tensor, y: Tensor, group: tuple[int, int], of_queries: bool) -> None:
        """Write outputs to y or, of_queries, the gradient of v from values dy."""
        call, k, blocks = self.call, self.key, self.blocks.output
        grid = (self.chunks.total, group[1], _blocks(self.v_width, blocks.v))
        chunk_output_kernel[grid](
            call.q, call.f, k, values, call.lower_bound, states, y, *self._tables(),
            *_strides(call.q), *_strides(call.f), *_strides(k), *_strides(values), *_strides(y),
            call.v, *_strides(call.v), self.length, self.chunks.each, *group, self.width, self.v_width,
            call.settings.scale,
            BK=blocks.k, BV=blocks.v, OF_QUERIES=of_queries, num_warps=blocks.warps, num_stages=blocks.stages,
            **self.flags,
        )  # fmt: skip

    def gradients(
        self, dy: Tensor, states: Tensor, d_states: Tensor, decays: Tensor, results: tuple[Tensor | None, ...],
        group: tuple[int, int],
    ) -> None:  # fmt: skip
        """Write the gradients (dq, df, dk, d_bound of each chunk)."""
        call, k, blocks = self.call, self.key, self.blocks.gradient
        grid = (self.chunks.total, group[1], _blocks(self.width, blocks.k))
        chunk_gradient_kernel[grid](
            call.q, call.f, k, call.v, dy, call.lower_bound, states, d_states, decays, *results, *self._tables(),
            *_strides(call.q), *_strides(call.f), *_strides(k), *_strides(call.v), *_strides(dy),
            self.length, self.chunks.each, *group, self.heads, self.width, self.v_width, call.settings.scale,
            BK=blocks.k, BV=blocks.v, num_warps=blocks.warps, num_stages=blocks.stages,
            **self.flags,
        )  # fmt: skip

    def _tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.chunks.first, self.chunks.sequence, self.call.cu_seqlens


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def forward(call: ScanCall, plan: int) -> tuple[BTHV, NHKV, None]:
    """Run a scan; nothing is kept for the backward pass.

    Args:
        call: the call.
        plan: not used.

    Returns:
        y [B, T, H, V] in q's dtype, the final state [N, H, K, V], float32, and None.
    """
    run = Launcher(call)
    y, final = _new_rows(call.v, call), call.new_states()
    if run.is_empty():
        return y, final, None
    with on_device(call.q.device):
        for group in run.groups():
            states, decays = run.new_states(group[1]), _new_decays(run, group[1])
            run.updates(run.call.v, states, decays, group, of_queries=False)
            run.carry(states, decays, run.call.initial_state, final, group, back=False)
            run.outputs(run.call.v, states, y, group, of_queries=False)
    return y, final, None


def backward(
    call: ScanCall, plan: int, kept: Tensor | None, dy: BTHV, d_final: NHKV | None, bound_wanted: bool
) -> ScanGradients:
    """Compute the gradient of `forward`; arguments of `Backend.backward`."""
    run = Launcher(call)
    inputs, bound = run.call, call.lower_bound
    dq, df, dv = (_new_rows(x, call) for x in (call.q, call.f, call.v))
    dk = None if call.k is None else _new_rows(call.k, call)
    d_bound = None
    if bound is not None:
        # a row for each chunk, summed below in a fixed order
        d_bound = torch.zeros((run.chunks.total, *bound.shape), dtype=torch.float32, device=call.q.device)
    dy = _unit_stride(dy)
    if d_final is None:
        d_final = torch.zeros(call.state_shape(), dtype=torch.float32, device=call.q.device)
    d_final = d_final.contiguous()
    d_initial = d_final.clone()
    if not run.is_empty():
        with on_device(call.q.device):
            for group in run.groups():
                states, d_states = run.new_states(group[1]), run.new_states(group[1])
                decays = _new_decays(run, group[1])
                run.updates(inputs.v, states, decays, group, of_queries=False)
                run.carry(states, decays, inputs.initial_state, None, group, back=False)
                run.updates(dy, d_states, decays, group, of_queries=True)
                run.carry(d_states, decays, d_final, d_initial, group, back=True)
                run.outputs(dy, d_states, dv, group, of_queries=True)
                run.gradients(dy, states, d_states, decays, (dq, df, dk, d_bound), group)
    d_bound = None if d_bound is None else d_bound.sum(0)
    return ScanGradients(dq, df, dk, dv, d_bound, None if call.initial_state is None else d_initial)


def _new_rows(like: Tensor, call: ScanCall) -> Tensor:
    """Return memory for an output, zeros where packed sequences may not cover every row."""
    make = torch.empty if call.cu_seqlens is None else torch.zeros
    return make(like.shape, dtype=like.dtype, device=like.device)


def _new_decays(run: Launcher, heads: int) -> Tensor:
    """Return uninitialised memory for the decay of each chunk and its complement."""
    shape = (run.chunks.total, heads, 2, run.width)
    return torch.empty(shape, dtype=torch.float32, device=run.call.q.device)


def step(call: ScanCall, in_place: bool) -> tuple[BHV, BHKV]:
    """Run one token.

    Args:
        call: q, f [B, H, K], v [B, H, V], lower_bound and initial_state [B, H, K, V].
        in_place: write the new state over the initial one.

    Returns:
        y [B, H, V] and the new state.
    """
    q, f, v = (_unit_stride(x) for x in (call.q, call.f, call.v))
    old_state, bound, settings = call.initial_state, call.lower_bound, call.settings
    assert old_state is not None
    state = old_state.contiguous()
    # a kernel writes each element of the state after it has read it
    new_state = state if in_place else torch.empty(state.shape, dtype=state.dtype, device=state.device)
    batch, heads, width = q.shape
    v_width = v.shape[-1]
    y = torch.empty((batch, heads, v_width), dtype=q.dtype, device=q.device)
    if y.numel():
        block_v = step_block(batch * heads, v_width)
        with on_device(q.device):
            step_kernel[(batch * heads, _blocks(v_width, block_v))](
                q, f, v, state, None if bound is None else bound.contiguous(), y, new_state,
                q.stride(0), q.stride(1), f.stride(0), f.stride(1), v.stride(0), v.stride(1),
                heads, width, v_width, settings.scale, BK=triton.next_power_of_2(width), BV=block_v,
                HAS_BOUND=bound is not None, Q_ACTIVATION=settings.q_activation, V_ACTIVATION=settings.v_activation,
                num_warps=4,
            )  # fmt: skip
    if not in_place:
        return y, new_state
    return y, old_state if new_state is old_state else old_state.copy_(new_state)
