"""Normalisation over the model width."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from hgrn2.errors import UserError
from hgrn2.nn.autocast import autocast_dtype
from hgrn2.ops.norm import rms_norm
from hgrn2.shapes import Rows, describe

NORMS = ("rmsnorm", "layernorm")


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, with or without parameters.

    Args:
        kind: "rmsnorm" or "layernorm".
        size: width of the last axis.
        eps: added to the mean square, or the variance.
        affine: whether it has a weight (and, for "layernorm", a bias).
    """

    def __init__(self, kind: str, size: int, eps: float, affine: bool):
        super().__init__()
        if kind not in NORMS:
            raise UserError(f"norm is {kind!r}; wanted one of {', '.join(map(repr, NORMS))}")
        if not isinstance(eps, int | float) or not eps >= 0:
            raise UserError(f"the norm's eps is {describe(eps)}; wanted a number of at least 0")
        self.kind, self.size, self.eps = kind, size, eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine and kind == "layernorm" else None

    def forward(self, x: Rows) -> Rows:
        """Normalise x [..., size]; the result has the dtype of autocast, else of the weight, else of x."""
        computed = x.dtype if self.weight is None else self.weight.dtype
        dtype = autocast_dtype(x) or computed
        if self.kind == "rmsnorm":
            return rms_norm(x, self.weight, self.eps, dtype)
        return functional.layer_norm(x.to(computed), (self.size,), self.weight, self.bias, self.eps).to(dtype)

    def activation_bytes(self, low: int) -> int:
        """Return the bytes per token saved for the backward pass: the input in float32, and the output.

        RMSNorm also saves the normalised values, for the gradient of its weight.

        Args:
            low: bytes of a number whose precision autocast may lower.
        """
        inside = 2 if self.kind == "rmsnorm" and self.weight is not None else 1
        return (4 * inside + low) * self.size

    def extra_repr(self) -> str:
        """Return the settings that print(model) shows."""
        return f"{self.kind}, {self.size}, eps={self.eps}, affine={self.weight is not None}"
