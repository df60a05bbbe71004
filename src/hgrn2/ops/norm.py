"""RMSNorm between dtypes: read in one, written in another, computed in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hgrn2.ops.backends import triton_runs

# a row must fit the registers of one program
WIDEST = 1 << 14
# elements from which on the time of the kernels is more than that of launching them
LARGE = 1 << 22


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """X / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467).

    Args:
        x: [..., W].
        weight: [W] or None.
        eps: added to the mean square.
        dtype: of the result.
        backend: "triton", one kernel that reads x in its dtype, computes in float32 and writes `dtype`; "torch", which
            computes in the weight's dtype and converts; "auto" for the first on a GPU where dtypes differ, or where x
            is large and its gradient is recorded, but not under torch.compile, which fuses by itself.

    Returns:
        [..., W].
    """
    width = x.shape[-1]
    if backend == "auto":
        backend = "triton" if not torch.compiler.is_compiling() and _pays(x, weight, dtype) else "torch"
    if backend == "triton" and x.numel():
        rows = x.reshape(-1, width).contiguous()
        return _RMSNorm.apply(rows, weight, eps, dtype).view(x.shape)  # pyright: ignore[reportOptionalMemberAccess]
    computed = torch.promote_types(x.dtype, dtype) if weight is None else weight.dtype
    return functional.rms_norm(x.to(computed), (width,), weight, eps).to(dtype)


def _pays(x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernels can and should be taken."""
    if x.device.type != "cuda" or not 0 < x.shape[-1] <= WIDEST or not triton_runs(x.dtype):
        return False
    mixed = x.dtype != dtype or (weight is not None and weight.dtype != dtype)
    # torch's kernels for one dtype start sooner, and take longer in the backward pass
    return mixed or (x.numel() >= LARGE and x.requires_grad and torch.is_grad_enabled())


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        from hgrn2.ops.triton import norm

        y, factor = norm.forward(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, factor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from hgrn2.ops.triton import norm

        return *norm.backward(dy.contiguous(), *ctx.saved_tensors), None, None
