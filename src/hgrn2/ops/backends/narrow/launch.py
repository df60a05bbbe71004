"""Forward and backward pass: cut sequences into segments, allocate buffers and launch the kernels for narrow heads."""

# a kernel's call takes a grid and compile-time options that its signature does not show
# pyright: reportCallIssue=false, reportIndexIssue=false, reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hgrn2.ops.backends.narrow.kernels import backward_kernel, forward_kernel, summary_kernel
from hgrn2.ops.backends.narrow.tiles import BACKWARD, FORWARD, Tile, blocks_for, kept_shape, segment_size
from hgrn2.ops.backends.triton.chunk_fwd import carry_states_kernel
from hgrn2.ops.backends.triton.launch import cut, with_unit_stride
from hgrn2.ops.call import ScanCall, ScanGradients
from hgrn2.ops.device import multiprocessors, on_device
from hgrn2.ops.gates import Floor
from hgrn2.shapes import BTHV, NHKV


class Launcher:
    """Launches the kernels of one pass of a call, with the arguments they share.

    Args:
        call: the call.
        table: sizes of tiles, `FORWARD` or `BACKWARD`.
        tokens: tokens of a block; None for those of the table.
    """

    def __init__(self, call: ScanCall, table: dict[int, Tile], tokens: int | None = None):
        self.call = call = with_unit_stride(call)
        q, v, settings = call.q, call.v, call.settings
        self.batch, self.length, self.heads, self.width = q.shape
        self.v_width = v.shape[-1]
        blocks = blocks_for(table, self.width, self.v_width)
        self.head_blocks = -(-self.heads // blocks.heads)
        size = segment_size(
            self.batch, self.length, self.head_blocks, call.cu_seqlens is not None, multiprocessors(q.device)
        )
        self.segments = cut(self.batch, self.length, call.cu_seqlens, size)
        # each segment is a sequence
        self.is_whole = call.cu_seqlens is None and self.segments.each == 1
        floor = Floor.of(settings.min_log_decay)
        self.flags: dict[str, Any] = {
            "BT": tokens or blocks.tokens,
            "BH": blocks.heads,
            "BK": blocks.k,
            "BV": blocks.v,
            "TIED": call.k is None,
            "HAS_BOUND": call.lower_bound is not None,
            "FLOOR": floor.decay,
            "FLOOR_LOST": floor.lost,
            "Q_ACTIVATION": settings.q_activation,
            "V_ACTIVATION": settings.v_activation,
            "PACKED": call.cu_seqlens is not None,
            "REVERSE": settings.reverse,
            "num_warps": 1,
        }

    def is_empty(self) -> bool:
        """Return whether there is no token, so that nothing is launched."""
        return not self.call.q.numel() or self.segments.sequences == 0

    def new_states(self) -> Tensor:
        """Return uninitialised memory for a state of each segment."""
        shape = (self.segments.total, self.heads, self.width, self.v_width)
        return torch.empty(shape, dtype=torch.float32, device=self.call.q.device)

    def _grid(self) -> tuple[int, int]:
        return self.segments.total, self.head_blocks

    def _inputs(self, values: Tensor) -> tuple[Tensor | None, ...]:
        call = self.call
        return call.q, call.f, call.k, values, call.lower_bound

    def _tables(self) -> tuple[Tensor | None, ...]:
        return self.segments.first, self.segments.sequence, self.call.cu_seqlens

    def _strides(self, values: Tensor) -> tuple[int, ...]:
        call = self.call
        k = call.q if call.k is None else call.k
        return (*call.q.stride()[:3], *call.f.stride()[:3], *k.stride()[:3], *values.stride()[:3])

    def _sizes(self) -> tuple[int | float, ...]:
        scale = self.call.settings.scale
        segments = self.segments
        # 1: stride of the states along V
        return (self.length, segments.size, segments.each, 1, self.heads, self.width, self.v_width, scale)

    def boundary_states(self, values: Tensor, initial: Tensor | None, last: Tensor, of_queries: bool) -> Tensor:
        """Return the state before each segment or, of_queries, the gradient of the state after it.

        Args:
            values: v, or the outputs' gradient.
            initial: [N, H, K, V], state before each sequence, or the gradient of that after it; None for zeros.
            last: [N, H, K, V], filled with the state at the other end of each sequence.
            of_queries: go backwards.
        """
        states = self.new_states()
        decays = states.new_empty((self.segments.total, self.heads, 2, self.width))
        summary_kernel[self._grid()](
            *self._inputs(values), states, decays, *self._tables(), *self._strides(values), *self._sizes(),
            OF_QUERIES=of_queries, **self.flags,
        )  # fmt: skip
        numbers = self.flags["BK"] * self.flags["BV"]
        carry_states_kernel[(self.segments.sequences, self.heads, 1)](
            states, decays, initial, last, self.segments.first, self.segments.each, 0, self.heads, self.heads,
            self.width, self.v_width, BLOCK=numbers, PACKED=self.flags["PACKED"], BACKWARD=of_queries,
            HAS_INITIAL=initial is not None, HAS_FINAL=True, num_warps=1,
        )  # fmt: skip
        return states

    def outputs(self, y: Tensor, before: Tensor | None, after: Tensor | None, kept: Tensor | None) -> None:
        """Write y, the state after each segment, and the states that the backward pass needs."""
        forward_kernel[self._grid()](
            *self._inputs(self.call.v), before, y, after, kept, *self._tables(), *self._strides(self.call.v),
            *self._sizes(), HAS_BEFORE=before is not None, HAS_AFTER=after is not None, KEEPS=kept is not None,
            **self.flags,
        )  # fmt: skip

    def gradients(
        self, dy: Tensor, kept: Tensor, after: Tensor | None, results: tuple[Tensor | None, ...],
        before: Tensor | None,
    ) -> None:  # fmt: skip
        """Write the gradients (dq, df, dk, dv, d_bound of each segment), and of the state before each segment."""
        backward_kernel[self._grid()](
            *self._inputs(self.call.v), kept, dy, after, *results, before, *self._tables(),
            *self._strides(self.call.v), *dy.stride()[:3], *self._sizes(),
            HAS_AFTER=after is not None, HAS_BEFORE=before is not None, **self.flags,
        )  # fmt: skip


def forward(call: ScanCall, plan: int) -> tuple[BTHV, NHKV, Tensor | None]:
    """Run a scan.

    Args:
        call: the call.
        plan: tokens between the states that are kept for the backward pass, 0 to keep none.

    Returns:
        y [B, T, H, V] in q's dtype, the final state [N, H, K, V], float32, and the kept states or None.
    """
    run = Launcher(call, FORWARD, plan or None)
    y, final, kept = _new_rows(call.v, call), call.new_states(), None
    if plan:
        # places between packed sequences stay empty
        make = torch.empty if call.cu_seqlens is None else torch.zeros
        kept = make(kept_shape(call, plan), dtype=torch.float32, device=call.q.device)
    if run.is_empty():
        return y, final, kept
    initial = run.call.initial_state
    with on_device(call.q.device):
        if run.is_whole:
            run.outputs(y, initial, final, kept)
        else:
            before = run.boundary_states(run.call.v, initial, final, of_queries=False)
            run.outputs(y, before, None, kept)
    return y, final, kept


def backward(
    call: ScanCall, plan: int, kept: Tensor | None, dy: BTHV, d_final: NHKV | None, bound_wanted: bool
) -> ScanGradients:
    """Compute the gradient of `forward`; arguments of `Backend.backward`."""
    if not plan:
        # an exported program, which keeps nothing
        plan = blocks_for(BACKWARD, call.q.shape[-1], call.v.shape[-1]).tokens
        kept = forward(call, plan)[2]
    assert kept is not None
    run = Launcher(call, BACKWARD, plan)
    dq, df, dv = (_new_rows(x, call) for x in (call.q, call.f, call.v))
    dk = None if call.k is None else _new_rows(call.k, call)
    d_bound = None
    if call.lower_bound is not None:
        # a row for each segment, summed below in a fixed order
        shape = (run.segments.total, *call.lower_bound.shape)
        d_bound = torch.zeros(shape, dtype=torch.float32, device=call.q.device)
    d_final = None if d_final is None else d_final.contiguous()
    d_initial = torch.zeros(call.state_shape(), dtype=torch.float32, device=call.q.device)
    if d_final is not None:
        d_initial.copy_(d_final)
    results = (dq, df, dk, dv, d_bound)
    if not run.is_empty():
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        with on_device(call.q.device):
            if run.is_whole:
                run.gradients(dy, kept, d_final, results, d_initial)
            else:
                after = run.boundary_states(dy, d_final, d_initial, of_queries=True)
                run.gradients(dy, kept, after, results, None)
    d_bound = None if d_bound is None else d_bound.sum(0)
    return ScanGradients(dq, df, dk, dv, d_bound, None if call.initial_state is None else d_initial)


def _new_rows(like: Tensor, call: ScanCall) -> Tensor:
    """Return memory for an output, zeros where packed sequences may not cover every row."""
    make = torch.empty if call.cu_seqlens is None else torch.zeros
    return make(like.shape, dtype=like.dtype, device=like.device)
