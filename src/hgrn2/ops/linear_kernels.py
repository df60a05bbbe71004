"""The operator of the element-wise recurrence whose kernels are Triton's: opaque to torch.compile, with gradients.

Complex numbers cross torch's library as pairs of real ones, for which torch.compile generates code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hgrn2.ops.transforms import differentiable_by_transforms, map_by_loop, refuse_derivatives


def scan_by_kernels(
    a: Tensor, b: Tensor, rotation: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool,
    is_complex: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the kernels; arguments and results of `hgrn2.ops.linear_scan`, checked.

    Args:
        a: [B, T, ...].
        b: [B, T, ...].
        rotation: [...], complex, or None.
        state: [N, ...], or None.
        cu_seqlens: [N + 1], or None.
        reverse: direction of the scan.
        is_complex: whether the state is.

    Returns:
        h [B, T, ...] and the final state [N, ...], float32 or complex64.
    """
    rest = a.shape[2:]
    rows = _rows(a.flatten(2) if a.dim() != 3 else a, a.is_complex())
    values = _rows(b.flatten(2) if b.dim() != 3 else b, is_complex)
    turn = None if rotation is None else torch.view_as_real(rotation.flatten().to(torch.complex64).resolve_conj())
    if state is not None:
        state = _rows(state.flatten(1), is_complex).float()
    h, final = _traced_scan(rows, values, turn, state, cu_seqlens, reverse)
    if is_complex:
        h, final = torch.view_as_complex(h), torch.view_as_complex(final)
    return h.unflatten(2, rest) if len(rest) != 1 else h, final.unflatten(1, rest) if len(rest) != 1 else final


def _rows(x: Tensor, is_complex: bool) -> Tensor:
    """Return x, or pairs [..., 2] of the real and imaginary parts: a view of complex numbers."""
    if not is_complex:
        return x
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else functional.pad(x.unsqueeze(-1), (0, 1))


@torch.library.custom_op("hgrn2::linear_scan_kernels", mutates_args=())
def _scan_op(
    a: Tensor, b: Tensor, turn: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    # imports Triton on first use
    from hgrn2.ops.triton import linear_launch

    return linear_launch.forward(a, b, turn, state, cu_seqlens, reverse)


@_scan_op.register_fake
def _(
    a: Tensor, b: Tensor, turn: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    num = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return a.new_empty(b.shape, dtype=torch.float32), a.new_empty((num, *b.shape[2:]), dtype=torch.float32)


@torch.library.custom_op("hgrn2::linear_scan_kernels_backward", mutates_args=())
def _backward_op(
    a: Tensor, h: Tensor, turn: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool,
    dh: Tensor, d_final: Tensor | None, b_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from hgrn2.ops.triton import linear_launch

    da, db, d_turn, d_state = linear_launch.backward(a, h, turn, state, cu_seqlens, reverse, dh, d_final, b_dtype)
    # custom ops cannot return None; an empty tensor stands for it
    return da, db, h.new_empty(0) if d_turn is None else d_turn, d_state


@_backward_op.register_fake
def _(
    a: Tensor, h: Tensor, turn: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool,
    dh: Tensor, d_final: Tensor | None, b_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_turn = h.new_empty((0,) if turn is None else turn.shape)
    return a.new_empty(a.shape), h.new_empty(h.shape, dtype=b_dtype), d_turn, h.new_empty((num, *h.shape[2:]))


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, turn, state, cu_seqlens, ctx.reverse = inputs
    ctx.b_dtype = b.dtype
    ctx.save_for_backward(a, output[0], turn, state, cu_seqlens)


def _set_up_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _set_up(ctx, inputs, output)
    # the final state is rarely used: do not allocate zeros for its gradient
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dh: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    a, h, turn, state, cu_seqlens = ctx.saved_tensors
    dh = torch.zeros_like(h) if dh is None else dh
    found = _traced_backward(a, h, turn, state, cu_seqlens, ctx.reverse, dh, d_final, ctx.b_dtype)
    da, db, d_turn, d_state = found
    return da, db, None if turn is None else d_turn, None if state is None else d_state, None, None


_scan_op.register_autograd(_differentiate, setup_context=_set_up_op)

_FURTHER = "linear_scan has no second derivative, and none in forward mode; use backend='reference'"
_traced_scan = differentiable_by_transforms(_scan_op, _set_up, _differentiate, lambda *_: _FURTHER)
_traced_backward = refuse_derivatives(_backward_op, _FURTHER)
for _operator in (_scan_op, _backward_op):
    map_by_loop(_operator)
