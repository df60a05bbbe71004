"""A training step between its launch and its record, so that the GPU works on the next one meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LaunchedStep:
    """A step whose work is on its way to the device, or done.

    Attributes:
        step: number of the step.
        tokens: tokens of the run up to the end of the step.
        num_tokens: tokens of the step.
        num_targets: targets that the loss is a sum over.
        learning_rate: of AdamW.
        started_s: start of the step by the monotonic clock.
        values: the summed loss, the gradient's norm and the further sums of the task, once they are known.
        names: of the further sums.
    """

    step: int
    tokens: int
    num_tokens: int
    num_targets: int
    learning_rate: float
    started_s: float
    values: tuple[float, ...] | None = None
    names: tuple[str, ...] = ()

    def read_back(self, loss_sum: Tensor, *further: Tensor) -> None:
        """Start to copy the values from a GPU, without waiting for it."""
        self._copy = torch.stack((loss_sum, *(value.to(loss_sum.dtype) for value in further))).to(
            "cpu", non_blocking=True
        )
        self._copied = torch.cuda.Event()
        self._copied.record()

    def wait(self) -> tuple[float, ...]:
        """Return `values`; waits for the copy if there is one."""
        if self.values is None:
            self._copied.synchronize()
            self.values = tuple(self._copy.tolist())
        return self.values
