"""A training step between its launch and its record, so that the GPU works on the next one meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
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
        values: "loss", the summed loss, "grad_norm", and the further sums of the task, once they are known.
    """

    step: int
    tokens: int
    num_tokens: int
    num_targets: int
    learning_rate: float
    started_s: float
    values: dict[str, float] | None = None

    def read_back(self, values: Mapping[str, Tensor]) -> None:
        """Start to copy values from a GPU, without waiting for it.

        Args:
            values: scalars by name, the loss among them.
        """
        dtype = values["loss"].dtype
        self._names = tuple(values)
        self._copy = torch.stack([x.to(dtype) for x in values.values()]).to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def wait(self) -> dict[str, float]:
        """Return `values`; waits for the copy if there is one."""
        if self.values is None:
            self._copied.synchronize()
            self.values = dict(zip(self._names, self._copy.tolist(), strict=True))
        return self.values
