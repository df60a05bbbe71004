"""Batch normalisation over all tokens of a batch, in place of a norm over the width."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from hgrn2.nn.autocast import autocast_dtype
from hgrn2.nn.norm import Norm
from hgrn2.shapes import Rows


class BatchNorm(Norm):
    """Norm of each channel over the tokens of a batch; running statistics in evaluation.

    Padding would count as tokens, so all sequences must have the same length.

    Args:
        size: width of the last axis.
        eps: added to the variance.
        momentum: share of the newest batch in the running statistics.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, size: int, eps: float, momentum: float = 0.1):
        super().__init__("layernorm", size, eps, True)
        self.kind, self.momentum = "batchnorm", momentum
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))

    def forward(self, x: Rows) -> Rows:
        """Normalise x [..., size]; the result has the dtype of autocast, else of the weight."""
        assert isinstance(self.weight, nn.Parameter)
        dtype = autocast_dtype(x) or self.weight.dtype
        y = functional.batch_norm(
            x.reshape(-1, self.size).to(self.weight.dtype), self.running_mean, self.running_var, self.weight, self.bias,
            self.training, self.momentum, self.eps,
        )  # fmt: skip
        return y.view(x.shape).to(dtype)
