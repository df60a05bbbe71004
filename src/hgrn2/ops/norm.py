"""RMSNorm that reads one dtype, computes in float32 and writes another dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hgrn2.errors import UserError
from hgrn2.ops.transforms import are_transforms_active
from hgrn2.ops.triton.installed import triton_runs
from hgrn2.shapes import Rows, require_shape

BACKENDS = ("auto", "torch", "triton")
# a row has to fit the registers of one program
WIDEST = 1 << 14
# number of elements above which the kernels take longer than their launches
LARGE = 1 << 22


def rms_norm(x: Rows, weight: Tensor | None, eps: float, dtype: torch.dtype, backend: str = "auto") -> Rows:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467).

    Args:
        x: [..., W].
        weight: [W] or None.
        eps: added to the mean square.
        dtype: dtype of the result.
        backend: "triton", one kernel that reads x in its dtype, computes in float32 and writes `dtype`; "torch", which
            computes in the weight's dtype and converts. "auto" is "triton" on a GPU where dtypes differ, or where x is
            large and its gradient is recorded; but "torch" under torch.compile, which fuses by itself, under transforms
            of torch.func and for fake tensors.

    Returns:
        [..., W].

    Raises:
        UserError: a weight of another shape, an unknown backend, or dtypes that the kernel does not take.
    """
    if weight is not None:
        require_shape("weight", weight, "W", x.shape[-1:])
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}; wanted one of {', '.join(map(repr, BACKENDS))}", "unknown-name")
    dtypes = (x.dtype, dtype) if weight is None else (x.dtype, dtype, weight.dtype)
    taken = 0 < x.shape[-1] <= WIDEST and triton_runs(*dtypes)
    if backend == "triton" and not taken:
        raise UserError(
            f"x is [..., {x.shape[-1]}], dtypes are {', '.join(map(str, dtypes))}; Triton's kernel needs Triton, up to "
            f"{WIDEST} columns, and float32, bfloat16 or float16; use 'auto' or 'torch'",
            "unsupported",
        )
    if backend == "auto":
        backend = "triton" if taken and not torch.compiler.is_compiling() and _kernel_is_faster(x, dtypes) else "torch"
    if backend == "triton" and x.numel():
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        weight = None if weight is None else weight.contiguous()
        return _RMSNorm.apply(rows, weight, eps, dtype).view(x.shape)  # pyright: ignore[reportOptionalMemberAccess]
    return _in_torch(x, weight, eps, dtype)


def _in_torch(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    computed = torch.promote_types(x.dtype, dtype) if weight is None else weight.dtype
    return functional.rms_norm(x.to(computed), x.shape[-1:], weight, eps).to(dtype)


def _kernel_is_faster(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Return whether x is a plain tensor on a GPU for which the kernel is faster."""
    if x.device.type != "cuda" or type(x) not in (Tensor, nn.Parameter):
        return False
    if are_transforms_active():
        return False
    # torch's kernels for one dtype launch faster, but their backward pass is slower
    return len(set(dtypes)) > 1 or (x.numel() >= LARGE and x.requires_grad and torch.is_grad_enabled())


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        from hgrn2.ops.triton import norm

        y, factor = norm.forward(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, factor)
        ctx.settings = eps, dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from hgrn2.ops.triton import norm

        x, weight, factor = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *norm.backward(dy.contiguous(), x, weight, factor, ctx.needs_input_grad[1]), None, None
        # second derivatives are torch's
        wanted = [t for t, needed in zip((x, weight), ctx.needs_input_grad[:2], strict=True) if needed]
        found = iter(torch.autograd.grad(_in_torch(x, weight, *ctx.settings), wanted, dy, create_graph=True))
        dx, d_weight = (next(found) if needed else None for needed in ctx.needs_input_grad[:2])
        return dx, d_weight, None, None
