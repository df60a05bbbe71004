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


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """X / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467).

    Args:
        x: [..., W].
        weight: [W] or None.
        eps: added to the mean square.
        dtype: of the result.
        backend: "triton", one kernel that reads x in its dtype, computes in float32 and writes `dtype`; "torch", which
            computes in the weight's dtype and converts; "auto" for the first on a GPU where dtypes differ (torch has a
            kernel for equal ones), but not under torch.compile, which fuses by itself.

    Returns:
        [..., W].
    """
    width = x.shape[-1]
    if backend == "auto":
        mixed = x.dtype != dtype or (weight is not None and weight.dtype != dtype)
        fits = mixed and 0 < width <= WIDEST and x.device.type == "cuda" and triton_runs(x.dtype)
        backend = "triton" if fits and not torch.compiler.is_compiling() else "torch"
    if backend == "triton" and x.numel():
        rows = x.reshape(-1, width).contiguous()
        return _RMSNorm.apply(rows, weight, eps, dtype).view(x.shape)  # pyright: ignore[reportOptionalMemberAccess]
    computed = x.dtype if weight is None else weight.dtype
    return functional.rms_norm(x.to(computed), (width,), weight, eps).to(dtype)


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
