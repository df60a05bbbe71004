"""A running mean of a model's weights, for validation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class RunningMean:
    """Exponential mean of the parameters and buffers of a model, by torch's own update.

    Args:
        decay: of the mean, for each update.
        tensors: the mean so far, by name; None to start at the first update.
    """

    def __init__(self, decay: float, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._average = get_ema_multi_avg_fn(decay)
        self.tensors: dict[str, Tensor] = dict(tensors or {})

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the current weights into the mean; does not wait for the device."""
        now = dict(model.named_parameters()) | dict(model.named_buffers())
        if not self.tensors:
            self.tensors = {name: _wide(x).detach().clone() for name, x in now.items()}
            return
        means, values = [], []
        for name, x in now.items():
            mean = self.tensors[name]
            if mean.device != x.device:
                mean = self.tensors[name] = mean.to(x.device)
            if not x.is_floating_point():
                mean.copy_(x)
                continue
            means.append(mean)
            # weights may be bfloat16 copies while training
            values.append(x.to(mean.dtype))
        self._average(means, values, 0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x
