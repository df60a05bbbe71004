"""Launch the kernels of the element-wise recurrence."""

# a kernel's call takes a grid and compile-time options that its signature does not show
# pyright: reportCallIssue=false, reportIndexIssue=false, reportMissingImports=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hgrn2.ops.device import multiprocessors, on_device
from hgrn2.ops.triton.linear_scan import carry_kernel, gradient_kernel, scan_kernel

# tokens of a block, forward and backward, its channels and warps: the fastest on an H200; one warp exchanges nothing
# with others
BLOCK_TOKENS, BACKWARD_TOKENS, BLOCK_CHANNELS, WARPS = 64, 16, 32, 1
COMPLEX_TOKENS = 16
# depth of the pipeline of loads
STAGES = 1
# programs below which sequences are cut, and the number that the parts then make, for each multiprocessor
FEWEST_PROGRAMS, CUT_PROGRAMS = 3, 8
SHORTEST_SEGMENT = 64


class Segments(NamedTuple):
    """Division of sequences into segments.

    Attributes:
        size: tokens of a segment.
        each: segments of a sequence that is not packed.
        total: segments of all sequences; an upper bound for packed ones, whose lengths only the device knows.
        sequences: N.
        first: [N + 1] int32, first segment of each packed sequence, or None.
        sequence: [total] int32, the packed sequence of each segment, or None.
    """

    size: int
    each: int
    total: int
    sequences: int
    first: Tensor | None
    sequence: Tensor | None

    @property
    def is_whole(self) -> bool:
        """Whether each segment is a sequence."""
        return self.first is None and self.each == 1


def cut(batch: int, length: int, cu_seqlens: Tensor | None, size: int) -> Segments:
    """Cut sequences into segments, without waiting for the device.

    Args:
        batch: B.
        length: T.
        cu_seqlens: [N + 1], or None.
        size: tokens of a segment.
    """
    if cu_seqlens is None:
        each = max(1, -(-length // size))
        return Segments(size, each, batch * each, batch, None, None)
    count = cu_seqlens.shape[0] - 1
    places = torch.arange(count + 1, device=cu_seqlens.device)
    # room for the segments of every sequence: floor(start / size) + n never exceeds it, and needs no sum
    first = (cu_seqlens.clamp(0, length) // size + places).to(torch.int32)
    total = length // size + count
    sequence = torch.searchsorted(first, torch.arange(total, device=first.device, dtype=torch.int32), right=True)
    sequence = (sequence - 1).clamp_(0, max(count - 1, 0)).to(torch.int32)
    return Segments(size, -1, total, count, first, sequence)


class Launcher:
    """Launches the kernels of one call, with the arguments they share.

    Args:
        a: [B, T, D], or [B, T, D, 2] if complex.
        b: [B, T, D], or [B, T, D, 2] if the state is complex.
        turn: [D, 2], a rotation of each channel that multiplies real a, or None.
        cu_seqlens: [N + 1], or None.
        reverse: run from the last token of each sequence to its first.
    """

    def __init__(self, a: Tensor, b: Tensor, turn: Tensor | None, cu_seqlens: Tensor | None, reverse: bool):
        self.a, self.turn, self.reverse = a, None if turn is None else turn.contiguous(), reverse
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.batch, self.length, self.width = a.shape[:3]
        self.is_complex, self.a_is_complex = b.dim() == 4, a.dim() == 4
        self.channels = min(BLOCK_CHANNELS, triton.next_power_of_2(max(self.width, 1)))
        self.blocks = -(-self.width // self.channels)
        size = self._segment_size()
        self.segments = cut(self.batch, self.length, self.cu_seqlens, size)
        self.flags: dict[str, Any] = {
            "BD": self.channels,
            "COMPLEX": self.is_complex,
            "A_COMPLEX": self.a_is_complex,
            "TURNED": turn is not None,
            "PACKED": cu_seqlens is not None,
            "REVERSE": reverse,
            "STAGES": STAGES,
            "num_warps": WARPS,
        }

    def _segment_size(self) -> int:
        """Return the tokens of a segment, from shapes alone."""
        most = multiprocessors(self.a.device)
        programs = self.batch * self.blocks
        if self.cu_seqlens is None and programs >= FEWEST_PROGRAMS * most:
            return max(self.length, 1)
        parts = max(1, -(-CUT_PROGRAMS * most // max(programs, 1)))
        return max(SHORTEST_SEGMENT, -(-self.length // (parts * SHORTEST_SEGMENT)) * SHORTEST_SEGMENT)

    def is_empty(self) -> bool:
        """Return whether there is no token, so that nothing is launched."""
        return self.batch == 0 or self.length == 0 or self.width == 0 or self.segments.sequences == 0

    def new_states(self, count: int) -> Tensor:
        """Return uninitialised memory for `count` states."""
        shape = (count, self.width, 2) if self.is_complex else (count, self.width)
        return torch.empty(shape, dtype=torch.float32, device=self.a.device)

    def _tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.cu_seqlens, self.segments.sequence, self.segments.first

    def _grid(self) -> tuple[int, int]:
        return self.segments.total, self.blocks

    def scan(
        self, b: Tensor, before: Tensor | None, h: Tensor | None, after: Tensor | None, product: Tensor | None
    ) -> None:
        """Write h of all tokens and the states after segments or, without h, the summaries of segments."""
        scan_kernel[self._grid()](
            self.a, b, self.turn, before, h, after, product, *self._tables(),
            *self.a.stride()[:3], *b.stride()[:3], self.length, self.width, self.segments.size, self.segments.each,
            HAS_BEFORE=before is not None, HAS_AFTER=after is not None, SUMMARY=h is None,
            BT=COMPLEX_TOKENS if self.is_complex else BLOCK_TOKENS, **self.flags,
        )  # fmt: skip

    def gradient(
        self, h: Tensor, dh: Tensor, initial: Tensor | None, after: Tensor | None, before: Tensor,
        results: tuple[Tensor | None, ...], product: Tensor | None,
    ) -> None:  # fmt: skip
        """Write gradients (da, db, d_turn), and that of the state before each segment."""
        gradient_kernel[self._grid()](
            self.a, h, dh, self.turn, initial, after, *results, before, product, *self._tables(),
            *self.a.stride()[:3], *dh.stride()[:3], self.length, self.width, self.segments.size, self.segments.each,
            HAS_AFTER=after is not None, HAS_INITIAL=initial is not None, SUMMARY=product is not None,
            BT=COMPLEX_TOKENS if self.is_complex else BACKWARD_TOKENS, **self.flags,
        )  # fmt: skip

    def carry(self, product: Tensor, states: Tensor, initial: Tensor | None, final: Tensor, from_end: bool) -> None:
        """Turn summaries of segments into the states before them."""
        carry_kernel[(self.segments.sequences, self.blocks)](
            product, states, initial, final, self.segments.first, self.width, self.segments.each,
            BD=self.channels, COMPLEX=self.is_complex, PACKED=self.segments.first is not None, FROM_END=from_end,
            HAS_INITIAL=initial is not None, num_warps=1,
        )  # fmt: skip


def forward(
    a: Tensor, b: Tensor, turn: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Compute h and the final states, float32; pairs of real numbers where complex.

    Args:
        a: [B, T, D] or [B, T, D, 2], any strides, the last 1 if it is of pairs.
        b: [B, T, D] or [B, T, D, 2], likewise.
        turn: [D, 2] float32, a rotation that multiplies real a, or None.
        initial: [N, D] or [N, D, 2] float32, or None.
        cu_seqlens: [N + 1], or None.
        reverse: run from the last token of each sequence to its first.
    """
    run = Launcher(a, b, turn, cu_seqlens, reverse)
    # rows that wrong boundaries leave out are zeros
    make = torch.empty if cu_seqlens is None else torch.zeros
    h = make(b.shape, dtype=torch.float32, device=b.device)
    initial = None if initial is None else initial.contiguous()
    final = run.new_states(run.segments.sequences)
    if run.is_empty():
        return h, final.zero_() if initial is None else final.copy_(initial)
    with on_device(a.device):
        if run.segments.is_whole:
            run.scan(b, initial, h, final, None)
        else:
            product, states = run.new_states(run.segments.total), run.new_states(run.segments.total)
            run.scan(b, None, None, states, product)
            run.carry(product, states, initial, final, reverse)
            run.scan(b, states, h, None, None)
    return h, final


def backward(
    a: Tensor, h: Tensor, turn: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None, reverse: bool,
    dh: Tensor, d_final: Tensor | None, b_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return the gradients of a, b, turn and the initial states; two runs give the same bits.

    Args:
        a: as in `forward`, like turn, initial, cu_seqlens and reverse.
        h: result of `forward`.
        turn: see a.
        initial: see a.
        cu_seqlens: see a.
        reverse: see a.
        dh: gradient of h.
        d_final: gradient of the final states, or None for zeros.
        b_dtype: dtype of b.
    """
    run = Launcher(a, h, turn, cu_seqlens, reverse)
    make = torch.empty if cu_seqlens is None else torch.zeros
    da = make(a.shape, dtype=a.dtype, device=a.device)
    db = make(h.shape, dtype=b_dtype, device=a.device)
    d_initial = run.new_states(run.segments.sequences)
    d_turn = None if turn is None else torch.zeros((run.segments.total, *turn.shape), device=a.device)
    d_final = None if d_final is None else d_final.contiguous()
    if run.is_empty():
        d_initial = d_initial.zero_() if d_final is None else d_initial.copy_(d_final)
        return da, db, None if d_turn is None else d_turn.sum(0), d_initial
    dh = dh if not run.is_complex or dh.stride(-1) == 1 else dh.contiguous()
    initial = None if initial is None else initial.contiguous()
    with on_device(a.device):
        if run.segments.is_whole:
            run.gradient(h, dh, initial, d_final, d_initial, (da, db, d_turn), None)
        else:
            product, states = run.new_states(run.segments.total), run.new_states(run.segments.total)
            run.gradient(h, dh, None, None, states, (None, None, None), product)
            run.carry(product, states, d_final, d_initial, not reverse)
            run.gradient(h, dh, initial, states, product, (da, db, d_turn), None)
    return da, db, None if d_turn is None else d_turn.sum(0), d_initial
