"""The operator of Mamba's recurrence whose kernels are Triton's: opaque to torch.compile, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hgrn2.ops.transforms import differentiable_by_transforms, map_by_loop, records_gradient, refuse_derivatives

# tokens of a block of the kernels, before each of which a state is kept
BLOCK_TOKENS = 8


def scan_by_kernels(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the kernels; arguments and results of `hgrn2.ops.selective_scan`, checked, states and a float32.

    Args:
        u: [B, T, E].
        dt: [B, T, E].
        a: [E, S].
        b: [B, T, S].
        c: [B, T, S].
        state: [N, E, S], or None.
        cu_seqlens: [N + 1], or None.
        reverse: direction of the scan.
    """
    given = (u, dt, a, b, c, state)
    keeps = torch.is_grad_enabled() and any(x is not None and records_gradient(x) for x in given)
    y, final, _ = _traced_scan(*given, cu_seqlens, reverse, keeps)
    return y, final


def _kept_shape(u: Tensor, a: Tensor, cu_seqlens: Tensor | None, keeps: bool) -> tuple[int, ...]:
    """Return the shape of the states before blocks [tiles, S, E], an upper bound for packed sequences."""
    if not keeps:
        return (0,)
    batch, length, width = u.shape
    if cu_seqlens is None:
        return batch * ((length + BLOCK_TOKENS - 1) // BLOCK_TOKENS), a.shape[1], width
    return length // BLOCK_TOKENS + cu_seqlens.shape[0] - 1, a.shape[1], width


@torch.library.custom_op("hgrn2::selective_scan_kernels", mutates_args=())
def _scan_op(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # imports Triton on first use
    from hgrn2.ops.triton import selective_launch

    call = selective_launch.Inputs(u, dt, a, b, c, cu_seqlens, reverse)
    # packed sequences may leave places free
    make = u.new_empty if cu_seqlens is None else u.new_zeros
    kept = make(_kept_shape(u, a, cu_seqlens, keeps), dtype=torch.float32)
    y, final = selective_launch.forward(call, state, kept if keeps else None, BLOCK_TOKENS)
    return y, final, kept


@_scan_op.register_fake
def _(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    num = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = torch.float32
    kept = u.new_empty(_kept_shape(u, a, cu_seqlens, keeps), dtype=wide)
    return u.new_empty(u.shape, dtype=wide), u.new_empty((num, *a.shape), dtype=wide), kept


@torch.library.custom_op("hgrn2::selective_scan_kernels_backward", mutates_args=())
def _backward_op(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, cu_seqlens: Tensor | None, reverse: bool, kept: Tensor,
    dy: Tensor, d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of u, dt, a, b, c and the initial state."""
    from hgrn2.ops.triton import selective_launch

    call = selective_launch.Inputs(u, dt, a, b, c, cu_seqlens, reverse)
    return selective_launch.backward(call, kept, dy, d_final, BLOCK_TOKENS)  # pyright: ignore[reportReturnType]


@_backward_op.register_fake
def _(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, cu_seqlens: Tensor | None, reverse: bool, kept: Tensor,
    dy: Tensor, d_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_state = u.new_empty((num, *a.shape), dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (u, dt, a, b, c)), d_state  # pyright: ignore[reportReturnType]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, state, cu_seqlens, ctx.reverse, _ = inputs
    ctx.has_state = state is not None
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])


def _set_up_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _set_up(ctx, inputs, output)
    # the final state is rarely used: do not allocate zeros for its gradient
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, d_final: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens, kept = ctx.saved_tensors
    u = tensors[0]
    dy = torch.zeros(u.shape, dtype=torch.float32, device=u.device) if dy is None else dy
    *found, d_state = _traced_backward(*tensors, cu_seqlens, ctx.reverse, kept, dy, d_final)
    return *found, d_state if ctx.has_state else None, None, None, None


_scan_op.register_autograd(_differentiate, setup_context=_set_up_op)

_FURTHER = "selective_scan has no second derivative, and none in forward mode"
_traced_scan = differentiable_by_transforms(_scan_op, _set_up, _differentiate, lambda *_: _FURTHER)
_traced_backward = refuse_derivatives(_backward_op, _FURTHER)
for _operator in (_scan_op, _backward_op):
    map_by_loop(_operator)
