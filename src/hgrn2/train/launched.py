"""Training steps that are launched but not recorded, while the GPU may already run the next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LaunchedStep:
    """A launched step, which may be running or complete.

    Attributes:
        step: number of the step.
        tokens: tokens of the run up to the end of the step.
        num_tokens: number of tokens of the step.
        num_targets: number of targets summed in the loss.
        learning_rate: learning rate of AdamW.
        started_s: start of the step on the monotonic clock.
        values: "loss" (summed), "grad_norm" and further sums of the task; None until they are known.
    """

    step: int
    tokens: int
    num_tokens: int
    num_targets: int
    learning_rate: float
    started_s: float
    values: dict[str, float] | None = None

    def read_back(self, values: Mapping[str, Tensor]) -> None:
        """Start copying values from a GPU, without waiting for them.

        Args:
            values: scalars by name, including the loss.
        """
        dtype = values["loss"].dtype
        self._names = tuple(values)
        self._copy = torch.stack([x.to(dtype) for x in values.values()]).to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def hold(self, values: Mapping[str, Tensor]) -> None:
        """Keep values on the device for `read_back_together`; arguments as for `read_back`."""
        dtype = values["loss"].dtype
        self._names = tuple(values)
        self._held = torch.stack([x.to(dtype) for x in values.values()])

    def wait(self) -> dict[str, float]:
        """Return `values`, after waiting for the copy if there is one."""
        if self.values is None:
            self._copied.synchronize()
            self.values = dict(zip(self._names, self._copy.tolist(), strict=True))
        return self.values


def read_back_together(steps: Sequence[LaunchedStep]) -> None:
    """Start copying the held values of several steps with the same names from a GPU, without waiting for them."""
    copies = torch.stack([step._held for step in steps]).to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    for step, copy in zip(steps, copies, strict=True):
        step._copy, step._copied = copy, copied
        del step._held
