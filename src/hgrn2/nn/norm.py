"""Normalisation over the model width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

NORMS = ("rmsnorm", "layernorm")


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, with or without parameters.

    Args:
        kind: "rmsnorm" or "layernorm".
        size: width of the last axis.
        eps: added to the mean square, or the variance.
        affine: learn a weight (and, for "layernorm", a bias).
    """

    def __init__(self, kind: str, size: int, eps: float, affine: bool):
        super().__init__()
        self.kind, self.size, self.eps = kind, size, eps
        self.weight = nn.Parameter(torch.empty(size)) if affine else None
        self.bias = nn.Parameter(torch.empty(size)) if affine and kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [..., size]; computed, and returned, in the weight's dtype where the two differ."""
        if self.weight is not None and x.dtype != self.weight.dtype:
            x = x.to(self.weight.dtype)
        if self.kind == "rmsnorm":
            return functional.rms_norm(x, (self.size,), self.weight, self.eps)
        return functional.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.kind}, {self.size}, eps={self.eps}, affine={self.weight is not None}"
