"""Launch the kernels of Mamba's recurrence."""

# a kernel's call takes a grid and compile-time options that its signature does not show
# pyright: reportCallIssue=false, reportIndexIssue=false, reportMissingImports=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hgrn2.ops.device import on_device
from hgrn2.ops.triton.selective_scan import backward_kernel, forward_kernel


class Tile(NamedTuple):
    """Channels of a program: `each` in a thread, times `side` side by side; and its warps."""

    each: int
    side: int
    warps: int


# the fastest on an H200: one warp exchanges nothing with others
FORWARD = Tile(2, 8, 1)
BACKWARD = Tile(1, 8, 1)


class Inputs(NamedTuple):
    """Inputs of the recurrence.

    Attributes:
        u: [B, T, E], any strides.
        dt: [B, T, E].
        a: [E, S] float32.
        b: [B, T, S].
        c: [B, T, S].
        cu_seqlens: [N + 1], or None.
        reverse: run from the last token of each sequence to its first.
    """

    u: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    cu_seqlens: Tensor | None
    reverse: bool

    def num_sequences(self) -> int:
        """Return N."""
        return self.u.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def is_empty(self) -> bool:
        """Return whether there is no token, so that nothing is launched."""
        return not self.u.numel() or not self.a.numel() or not self.num_sequences()

    def strides(self) -> tuple[int, ...]:
        """Return those of u, dt, b and c."""
        return (*self.u.stride(), *self.dt.stride(), *self.b.stride(), *self.c.stride())

    def contiguous(self) -> Inputs:
        """Return the same with a contiguous a and cu_seqlens."""
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.contiguous()
        return self._replace(a=self.a.contiguous(), cu_seqlens=cu_seqlens)


def _channels(width: int, tile: Tile) -> tuple[int, int]:
    """Return EV and EL, no more than there are channels."""
    most = triton.next_power_of_2(width)
    side = min(tile.side, most)
    return min(tile.each, max(1, most // side)), side


def forward(call: Inputs, initial: Tensor | None, kept: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
    """Run the recurrence.

    Args:
        call: the inputs.
        initial: [N, E, S] float32, or None for zeros.
        kept: [tiles, S, E] float32, gets the states before blocks, which `backward` needs; or None.
        tokens: tokens of a block.

    Returns:
        y [B, T, E] and the final state [N, E, S], float32.
    """
    call = call.contiguous()
    batch, length, width = call.u.shape
    state_size, device = call.a.shape[1], call.u.device
    # rows that wrong boundaries leave out are zeros
    make = torch.empty if call.cu_seqlens is None else torch.zeros
    y = make((batch, length, width), dtype=torch.float32, device=device)
    final = torch.empty((call.num_sequences(), width, state_size), dtype=torch.float32, device=device)
    initial = None if initial is None else initial.contiguous()
    if call.is_empty():
        return y, final.zero_() if initial is None else final.copy_(initial)
    each, side = _channels(width, FORWARD)
    with on_device(device):
        forward_kernel[(call.num_sequences(), triton.cdiv(width, each * side))](
            call.u, call.dt, call.a, call.b, call.c, initial, y, final, kept, call.cu_seqlens, *call.strides(),
            length, width, state_size, triton.cdiv(length, tokens),
            BT=tokens, EV=each, EL=side, BS=triton.next_power_of_2(state_size),
            PACKED=call.cu_seqlens is not None, REVERSE=call.reverse, HAS_INITIAL=initial is not None,
            KEEPS=kept is not None, num_warps=FORWARD.warps,
        )  # fmt: skip
    return y, final


def backward(call: Inputs, kept: Tensor, dy: Tensor, d_final: Tensor | None, tokens: int) -> tuple[Tensor, ...]:
    """Return the gradients of u, dt, a, b, c and the initial state; two runs give the same bits.

    Args:
        call: inputs of `forward`.
        kept: states that it kept.
        dy: [B, T, E], gradient of y.
        d_final: [N, E, S], gradient of the final state, or None for zeros.
        tokens: tokens of a block.
    """
    call = call.contiguous()
    batch, length, width = call.u.shape
    state_size, num, device = call.a.shape[1], call.num_sequences(), call.u.device
    each, side = _channels(width, BACKWARD) if width else (1, 1)
    blocks = triton.cdiv(width, each * side)
    make = torch.empty if call.cu_seqlens is None else torch.zeros
    du, ddt = (make(x.shape, dtype=x.dtype, device=device) for x in (call.u, call.dt))
    da, d_initial = (torch.empty((num, width, state_size), device=device) for _ in range(2))
    db, dc = (make((blocks, batch * length, state_size), device=device) for _ in range(2))
    if call.is_empty():
        d_initial = d_initial.zero_() if d_final is None else d_initial.copy_(d_final)
        return du, ddt, torch.zeros_like(call.a), torch.zeros_like(call.b), torch.zeros_like(call.c), d_initial
    d_final = None if d_final is None else d_final.contiguous()
    with on_device(device):
        backward_kernel[(num, blocks)](
            call.u, call.dt, call.a, call.b, call.c, kept, dy, d_final, du, ddt, da, db, dc, d_initial,
            call.cu_seqlens, *call.strides(), *dy.stride(), length, width, state_size, triton.cdiv(length, tokens),
            batch * length,
            BT=tokens, EV=each, EL=side, BS=triton.next_power_of_2(state_size),
            PACKED=call.cu_seqlens is not None, REVERSE=call.reverse, HAS_FINAL=d_final is not None,
            num_warps=BACKWARD.warps,
        )  # fmt: skip
    db, dc = (d.sum(0).view(x.shape).to(x.dtype) for d, x in ((db, call.b), (dc, call.c)))
    return du, ddt, da.sum(0), db, dc, d_initial
