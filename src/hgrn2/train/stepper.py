"""One optimizer step: forward and backward passes, the norm of the gradient, the update."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hgrn2.errors import UserError
from hgrn2.tasks.base import Task, check_count, check_loss
from hgrn2.train.captured import CapturedSteps
from hgrn2.train.config import TrainConfig
from hgrn2.train.counters import Counters
from hgrn2.train.device_adamw import DeviceAdamW
from hgrn2.train.exclusive import exclusive
from hgrn2.train.launched import LaunchedStep
from hgrn2.train.optim import NamedOptimizer
from hgrn2.train.parallel import Parallel


class Stepper:
    """Runs the steps of a training run.

    On a GPU, a step is launched without waiting for its end if the device itself can skip the update; otherwise the
    loss and the norm of the gradient are read back before the update.

    Args:
        model: the model, on its device.
        task: provides batches and losses.
        optimizer: optimizer of the model.
        config: training settings, of which grad_accumulation, precision, clip_norm and cuda_graph are used.
        parallel: shares counts, losses and gradients with other ranks.
    """

    def __init__(
        self, model: nn.Module, task: Task, optimizer: NamedOptimizer, config: TrainConfig, parallel: Parallel
    ) -> None:
        self._model, self._task, self._optimizer, self._config = model, task, optimizer, config
        self._parallel, self._share = parallel, parallel.share(config)
        self._device = optimizer.parameters[0].device
        self._captured: CapturedSteps | None = None

    def begin(self) -> None:
        """Prepare the first step, once the optimizer has entered its working precision.

        Raises:
            UserError: cuda_graph is set, but steps of this run cannot be captured.
        """
        on_device = self._optimizer.on_device
        if not self._config.cuda_graph:
            return
        if on_device is None:
            raise UserError(
                "cuda_graph needs a GPU with Triton, and steps that carry no state to the next; leave it out",
                "unsupported",
            )

        def step(batch: Any, num_targets: Tensor) -> dict[str, Tensor]:
            return self._on_device(on_device, [batch], num_targets)

        self._captured = CapturedSteps(step, on_device, self._optimizer.zero_grad, self._device)

    def end(self) -> None:
        """Free the captured steps, after the device has run them."""
        if self._captured is not None:
            torch.cuda.current_stream(self._device).synchronize()
            with exclusive():
                self._captured = None

    def autocast(self) -> Any:
        """Return the autocast context of the model."""
        if self._config.precision == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def run(self, counters: Counters, learning_rate: float) -> LaunchedStep:
        """Run one step, or launch it.

        Args:
            counters: counters of the run, to which the step and its tokens are added.
            learning_rate: learning rate of the step, for the record.

        Returns:
            The step; its `values` are None while the device may still be computing it.
        """
        started_s = time.monotonic()
        batches = [self._next_batch() for _ in range(self._config.grad_accumulation)]
        num_targets, num_tokens = self._parallel.sum_counts(
            self._count("num_targets", batches),
            self._count("num_tokens", batches),
        )
        num_targets = max(1, num_targets)
        on_device = self._optimizer.on_device
        copied: dict[str, Tensor] = {}
        values: dict[str, float] | None = None
        if on_device is None:
            values = self._waiting(batches, num_targets)
        else:
            on_device.prepare()
            if self._captured is not None:
                copied = self._captured(batches[0], num_targets)
            else:
                copied = self._on_device(on_device, batches, num_targets)
        self._optimizer.zero_grad()
        counters.step += 1
        counters.tokens += num_tokens
        launched = LaunchedStep(
            counters.step, counters.tokens, num_tokens, num_targets, learning_rate, started_s, values
        )
        if values is None and self._config.record_every == 1:
            launched.read_back(copied)
        elif values is None:
            launched.hold(copied)
        return launched

    def _next_batch(self) -> Any:
        """Return this rank's part of the next batch of all ranks."""
        share = self._share
        if share.num_ranks == 1 or self._task.splits_batches:
            return self._task.next_batch()
        # the same batches, in the same order, for any number of ranks
        return [self._task.next_batch() for _ in range(share.num_ranks)][share.rank]

    def _count(self, method: str, batches: Sequence[Any]) -> int:
        """Return the sum of `Task.num_tokens` or `Task.num_targets` over the batches of a step."""
        count = getattr(self._task, method)
        return sum(check_count(self._task, method, count(batch)) for batch in batches)

    def _waiting(self, batches: Sequence[Any], num_targets: int) -> dict[str, float]:
        """Compute a step, and update unless the loss or the gradient is not finite."""
        sums = self._forward_backward(batches, num_targets)
        norm, clip_norm = self._parallel.global_norm(self._optimizer.gradient_norm()), self._config.clip_norm
        values = {name: x.item() for name, x in sums.items()} | {"grad_norm": norm.item()}
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            if clip_norm:
                torch.nn.utils.clip_grads_with_norm_(self._optimizer.parameters, clip_norm, norm)
            self._optimizer.step()
        else:
            self._task.step_skipped()
        return values

    def _on_device(
        self, on_device: DeviceAdamW, batches: Sequence[Any], num_targets: int | Tensor
    ) -> dict[str, Tensor]:
        """Launch a step whose update the device itself can skip; return the values of `LaunchedStep`."""
        sums = self._forward_backward(batches, num_targets)
        return {**sums, "grad_norm": on_device.step(sums["loss"], self._config.clip_norm)}

    def _forward_backward(self, batches: Sequence[Any], num_targets: int | Tensor) -> dict[str, Tensor]:
        """Compute the gradients of a step; return its summed "loss" and the further sums of the task, of all ranks."""
        loss_sum = torch.zeros((), device=self._device)
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            with self.autocast():
                batch_loss, further = check_loss(self._task, self._task.loss(self._model, batch))
            # every target of the step has the same weight, however targets are distributed over batches
            self._parallel.backward(batch_loss / num_targets, is_last=index == len(batches) - 1)
            loss_sum += batch_loss.detach()
            for name, value in further.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        return self._parallel.sum_values({**sums, "loss": loss_sum})
