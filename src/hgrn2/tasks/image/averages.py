"""A running mean of a model's weights, for validation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# name of the number of updates in a checkpoint, among the names of the tensors
UPDATES = "num_updates"


class RunningMean:
    """Exponential mean of the parameters and buffers of a model.

    The decay rises as (1 + t) / (10 + t) with the number t of updates until it reaches its limit, as in TensorFlow's
    ExponentialMovingAverage, so that the mean forgets the initial weights. Updates do not wait for the
    device, and may be part of a captured step.

    Args:
        decay: limit of the decay.
        saved: result of `state`; None to start at the first update.
    """

    def __init__(self, decay: float, saved: Mapping[str, Tensor] | None = None) -> None:
        self._decay = decay
        tensors = dict(saved or {})
        self._updates = tensors.pop(UPDATES, None)
        self.tensors: dict[str, Tensor] = tensors

    def state(self) -> dict[str, Tensor]:
        """Return the mean by name, and the number of updates; {} before the first update."""
        return {} if self._updates is None else {**self.tensors, UPDATES: self._updates}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Include the current weights in the mean."""
        now = dict(model.named_parameters()) | dict(model.named_buffers())
        if self._updates is None:
            self.tensors = {name: _wide(x).detach().clone() for name, x in now.items()}
            self._updates = torch.zeros((), device=next(iter(now.values())).device)
            return
        self._updates += 1
        share = 1 - ((1 + self._updates) / (10 + self._updates)).clamp(max=self._decay)
        means, values = [], []
        for name, x in now.items():
            mean = self.tensors[name]
            if not x.is_floating_point():
                mean.copy_(x)
                continue
            means.append(mean)
            # weights may be bfloat16 copies while training
            values.append(x.to(mean.dtype))
        # one kernel for many tensors; torch.optim uses these functions, which have no public names
        change = torch._foreach_sub(values, means)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(change, share)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(means, change)  # pyright: ignore[reportPrivateImportUsage]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x
