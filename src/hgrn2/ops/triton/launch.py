"""How the kernels are put together and launched: what is cut how, which buffers stand between them."""

# a kernel's call takes a grid and compile-time options that its signature does not show
# pyright: reportCallIssue=false, reportIndexIssue=false, reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hgrn2.ops.device import on_device
from hgrn2.ops.gates import Floor
from hgrn2.ops.triton.blocks import Blocks, blocks_for, step_block
from hgrn2.ops.triton.chunk_bwd import chunk_gradient_kernel
from hgrn2.ops.triton.chunk_fwd import carry_states_kernel, chunk_output_kernel, chunk_update_kernel
from hgrn2.ops.triton.recurrent import step_kernel

# heads are worked on in groups whose chunk states fit here: memory stays small, and what one kernel writes is still in
# the chip's cache when the next reads it
STATE_BYTES = 1 << 28
CARRY_BLOCK = 512


@dataclass(frozen=True)
class Scan:
    """A checked call of the operator.

    Attributes:
        q: [B, T, H, K].
        f: [B, T, H, K], pre-activation of the forget gate or, beside a key, the log decay.
        k: [B, T, H, K], or None for the tied key of `hgrn2_scan`.
        v: [B, T, H, V].
        bound: [H, K] float32 or None.
        initial_state: [N, H, K, V] float32 or None.
        cu_seqlens: [N + 1] or None.
        reverse: time runs from the last row to the first.
        scale: factor of the outputs.
        q_activation: of q.
        v_activation: of v.
        min_log_decay: floor under the log decay of tied gates, or None.
    """

    q: Tensor
    f: Tensor
    k: Tensor | None
    v: Tensor
    bound: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    reverse: bool
    scale: float
    q_activation: str = "none"
    v_activation: str = "none"
    min_log_decay: float | None = None

    def with_unit_stride(self) -> Scan:
        """The same with inputs whose last axis is contiguous; slices of one projection are so already."""
        q, f, k, v = (None if x is None else _unit_stride(x) for x in (self.q, self.f, self.k, self.v))
        small = (self.bound, self.initial_state, self.cu_seqlens)
        bound, state, cu_seqlens = (None if x is None else x.contiguous() for x in small)
        rest = (cu_seqlens, self.reverse, self.scale, self.q_activation, self.v_activation, self.min_log_decay)
        assert q is not None
        assert f is not None
        assert v is not None
        return Scan(q, f, k, v, bound, state, *rest)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Chunks:
    """How the rows are cut into chunks.

    Attributes:
        size: tokens of a chunk.
        each: chunks of a sequence that is not packed.
        total: chunks of all sequences; with packed ones, whose lengths only the device knows, at most so many.
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
    """Cuts sequences into chunks, without waiting for the device."""
    each = -(-length // size)
    if cu_seqlens is None:
        return Chunks(size, each, batch * each, batch, None, None)
    sequences = cu_seqlens.shape[0] - 1
    # whatever the boundaries say, no row beyond the inputs is touched
    counts = ((cu_seqlens.clamp(0, length).diff() + size - 1) // size).clamp_(min=0)
    total = each + sequences
    # boundaries that go back would make more chunks than there is room for
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).clamp_(max=total).int()
    places = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
    sequence = torch.searchsorted(first, places, right=True, out_int32=True) - 1
    # places beyond the last chunk are seen by their offset in the last sequence
    return Chunks(size, each, total, sequences, first, sequence.clamp_(max=sequences - 1))


class Launcher:
    """The kernels of one call, with the arguments they share."""

    def __init__(self, scan: Scan):
        self.scan = scan = scan.with_unit_stride()
        q, v = scan.q, scan.v
        self.batch, self.length, self.heads, self.width = q.shape
        self.v_width = v.shape[-1]
        self.blocks: Blocks = blocks_for(q.device, q.dtype, self.length, self.width, self.v_width)
        self.chunks = cut(self.batch, self.length, scan.cu_seqlens, self.blocks.chunk)
        self.low_state = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        floor = Floor.of(scan.min_log_decay)
        self.flags: dict[str, Any] = {
            "C": self.blocks.chunk,
            "TIED": scan.k is None,
            "HAS_BOUND": scan.bound is not None,
            "Q_ACTIVATION": scan.q_activation,
            "V_ACTIVATION": scan.v_activation,
            "FLOOR": floor.decay,
            "FLOOR_LOST": floor.lost,
            "PACKED": scan.cu_seqlens is not None,
            "REVERSE": scan.reverse,
            # tf32 alone has three digits; 16-bit inputs are products of their own
            "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        }

    def is_empty(self) -> bool:
        """Whether there is no token of any sequence, so that nothing is launched."""
        return self.batch == 0 or self.length == 0 or self.chunks.sequences == 0

    def groups(self) -> list[tuple[int, int]]:
        """First head and number of heads of each group."""
        head_bytes = self.chunks.total * self.width * self.v_width * self.low_state.itemsize
        most = max(1, STATE_BYTES // head_bytes)
        count = -(-self.heads // most)
        size = -(-self.heads // count)
        return [(head, min(size, self.heads - head)) for head in range(0, self.heads, size)]

    def new_states(self, heads: int) -> Tensor:
        """Room for a group's chunk states."""
        shape = (self.chunks.total, heads, self.width, self.v_width)
        return torch.empty(shape, dtype=self.low_state, device=self.scan.q.device)

    def updates(self, values: Tensor, states: Tensor, decays: Tensor, group: tuple[int, int], of_queries: bool) -> None:
        """Fills states with what each chunk adds; of keys, decays with the decay of each."""
        scan, blocks = self.scan, self.blocks.update
        grid = (self.chunks.total, group[1], _blocks(self.width, blocks.k) * _blocks(self.v_width, blocks.v))
        k = scan.q if scan.k is None else scan.k
        chunk_update_kernel[grid](
            scan.q, scan.f, k, values, scan.bound, states, decays, *self._tables(),
            *_strides(scan.q), *_strides(scan.f), *_strides(k), *_strides(values),
            self.length, self.chunks.each, *group, self.width, self.v_width, scan.scale,
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
        """Turns what chunks add into the states before them."""
        grid = (self.chunks.sequences, group[1], _blocks(self.width * self.v_width, CARRY_BLOCK))
        carry_states_kernel[grid](
            states, decays, initial, final, self._tables()[0], self.chunks.each, *group, self.heads,
            self.width, self.v_width, BLOCK=CARRY_BLOCK, PACKED=self.flags["PACKED"], BACKWARD=back,
            HAS_INITIAL=initial is not None, HAS_FINAL=final is not None, num_warps=4,
        )  # fmt: skip

    def outputs(self, values: Tensor, states: Tensor, y: Tensor, group: tuple[int, int], of_queries: bool) -> None:
        """Writes outputs to y or, of_queries, the gradient of v from values dy."""
        scan, blocks = self.scan, self.blocks.output
        grid = (self.chunks.total, group[1], _blocks(self.v_width, blocks.v))
        k = scan.q if scan.k is None else scan.k
        chunk_output_kernel[grid](
            scan.q, scan.f, k, values, scan.bound, states, y, *self._tables(),
            *_strides(scan.q), *_strides(scan.f), *_strides(k), *_strides(values), *_strides(y),
            scan.v, *_strides(scan.v), self.length, self.chunks.each, *group, self.width, self.v_width, scan.scale,
            BK=blocks.k, BV=blocks.v, OF_QUERIES=of_queries, num_warps=blocks.warps, num_stages=blocks.stages,
            **self.flags,
        )  # fmt: skip

    def gradients(
        self, dy: Tensor, states: Tensor, d_states: Tensor, decays: Tensor, results: tuple[Tensor | None, ...],
        group: tuple[int, int],
    ) -> None:  # fmt: skip
        """Writes the gradients (dq, df, dk, d_bound of each chunk)."""
        scan, blocks = self.scan, self.blocks.gradient
        grid = (self.chunks.total, group[1], _blocks(self.width, blocks.k))
        k = scan.q if scan.k is None else scan.k
        chunk_gradient_kernel[grid](
            scan.q, scan.f, k, scan.v, dy, scan.bound, states, d_states, decays, *results, *self._tables(),
            *_strides(scan.q), *_strides(scan.f), *_strides(k), *_strides(scan.v), *_strides(dy),
            self.length, self.chunks.each, *group, self.heads, self.width, self.v_width, scan.scale,
            BK=blocks.k, BV=blocks.v, num_warps=blocks.warps, num_stages=blocks.stages,
            **self.flags,
        )  # fmt: skip

    def _tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.chunks.first, self.chunks.sequence, self.scan.cu_seqlens


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _initial(scan: Scan, launcher: Launcher) -> Tensor:
    if scan.initial_state is not None:
        return scan.initial_state.clone(memory_format=torch.contiguous_format)
    shape = (launcher.chunks.sequences, launcher.heads, launcher.width, launcher.v_width)
    return torch.zeros(shape, dtype=torch.float32, device=scan.q.device)


def forward(scan: Scan) -> tuple[Tensor, Tensor]:
    """The scan.

    Returns:
        y [B, T, H, V] in q's dtype and the final state [N, H, K, V], float32.
    """
    run = Launcher(scan)
    y = _new_rows(scan.v, scan)
    final = _initial(scan, run)
    if run.is_empty():
        return y, final
    with on_device(scan.q.device):
        for group in run.groups():
            states, decays = run.new_states(group[1]), _new_decays(run, group[1])
            run.updates(run.scan.v, states, decays, group, of_queries=False)
            run.carry(states, decays, run.scan.initial_state, final, group, back=False)
            run.outputs(run.scan.v, states, y, group, of_queries=False)
    return y, final


def backward(
    scan: Scan, dy: Tensor, d_final: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """Gradient of `forward`.

    Returns:
        Gradients of q, f, k (None when tied), v, the lower bound (None without one) and the initial state.
    """
    run = Launcher(scan)
    inputs = run.scan
    dq, df, dv = (_new_rows(x, scan) for x in (scan.q, scan.f, scan.v))
    dk = None if scan.k is None else _new_rows(scan.k, scan)
    d_bound = None
    if scan.bound is not None:
        # a row for each chunk, summed below in a fixed order
        shape = (run.chunks.total, *scan.bound.shape)
        d_bound = torch.zeros(shape, dtype=torch.float32, device=scan.q.device)
    dy, d_final = _unit_stride(dy), d_final.contiguous()
    d_initial = d_final.clone()
    if run.is_empty():
        return dq, df, dk, dv, None if d_bound is None else d_bound.sum(0), d_initial
    with on_device(scan.q.device):
        for group in run.groups():
            states, d_states = run.new_states(group[1]), run.new_states(group[1])
            decays = _new_decays(run, group[1])
            run.updates(inputs.v, states, decays, group, of_queries=False)
            run.carry(states, decays, inputs.initial_state, None, group, back=False)
            run.updates(dy, d_states, decays, group, of_queries=True)
            run.carry(d_states, decays, d_final, d_initial, group, back=True)
            run.outputs(dy, d_states, dv, group, of_queries=True)
            run.gradients(dy, states, d_states, decays, (dq, df, dk, d_bound), group)
    return dq, df, dk, dv, None if d_bound is None else d_bound.sum(0), d_initial


def _new_rows(like: Tensor, scan: Scan) -> Tensor:
    """Room for an output; packed sequences may leave rows at the end to nobody."""
    make = torch.empty if scan.cu_seqlens is None else torch.zeros
    return make(like.shape, dtype=like.dtype, device=like.device)


def _new_decays(run: Launcher, heads: int) -> Tensor:
    """Room for the decay of each chunk and 1 minus it."""
    shape = (run.chunks.total, heads, 2, run.width)
    return torch.empty(shape, dtype=torch.float32, device=run.scan.q.device)


def step(
    q: Tensor, f: Tensor, v: Tensor, state: Tensor, bound: Tensor | None, scale: float, q_activation: str,
    v_activation: str, new_state: Tensor,
) -> Tensor:  # fmt: skip
    """One token: writes the state after it to `new_state`, which may be `state` itself, and returns y [B, H, V]."""
    q, f, v = (_unit_stride(x) for x in (q, f, v))
    batch, heads, width = q.shape
    v_width = v.shape[-1]
    y = torch.empty((batch, heads, v_width), dtype=q.dtype, device=q.device)
    if y.numel():
        block_v = step_block(batch * heads, v_width)
        with on_device(q.device):
            step_kernel[(batch * heads, _blocks(v_width, block_v))](
                q, f, v, state, None if bound is None else bound.contiguous(), y, new_state,
                q.stride(0), q.stride(1), f.stride(0), f.stride(1), v.stride(0), v.stride(1),
                heads, width, v_width, scale, BK=triton.next_power_of_2(width), BV=block_v,
                HAS_BOUND=bound is not None, Q_ACTIVATION=q_activation, V_ACTIVATION=v_activation, num_warps=4,
            )  # fmt: skip
    return y
