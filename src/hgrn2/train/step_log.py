"""Records of training steps, made from all steps since the previous record."""

from __future__ import annotations

import math
from typing import Any

import torch

from hgrn2.train.counters import Counters
from hgrn2.train.environment import memory_bytes
from hgrn2.train.exclusive import is_side_by_side
from hgrn2.train.launched import LaunchedStep


class StepLog:
    """Counts the outcomes of steps, and makes the record of the last one.

    Args:
        device: device of the model, whose memory is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # the steps since the last record, and the values of the last of them
        self._steps: list[LaunchedStep] = []
        self._values: dict[str, float] = {}
        self._last_end_s = 0.0

    @property
    def has_unwritten(self) -> bool:
        """Whether steps were counted since the last record."""
        return bool(self._steps)

    def count(self, launched: LaunchedStep, counters: Counters) -> tuple[float, bool]:
        """Wait for a step and count its outcome.

        Args:
            launched: the step.
            counters: counters of the run.

        Returns:
            The loss, nats per target, and whether it and the norm of the gradient are finite.
        """
        self._values = dict(launched.wait())
        self._values["loss"] /= launched.num_targets
        self._steps.append(launched)
        return self._values["loss"], counters.count_outcome(self._values["loss"], self._values["grad_norm"])

    def take_record(self, counters: Counters, now_s: float) -> dict[str, Any]:
        """Return the record of the last counted step; its speed is the mean since the previous record.

        Args:
            counters: counters of the run, with the present `elapsed_s`.
            now_s: time on the monotonic clock.
        """
        steps, last, values = self._steps, self._steps[-1], dict(self._values)
        loss, grad_norm = values.pop("loss"), values.pop("grad_norm")
        # steps may overlap: count the time from the end of the previous step
        began_s = max(steps[0].started_s, self._last_end_s)
        num_tokens = sum(step.num_tokens for step in steps)
        self._steps, self._last_end_s = [], now_s
        record = {
            "kind": "train",
            "step": last.step,
            "tokens": last.tokens,
            "elapsed_s": round(counters.elapsed_s, 3),
            "loss": loss if math.isfinite(loss) else None,
            "smoothed_loss": counters.smoothed_loss,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "learning_rate": last.learning_rate,
            "tokens_per_s": round(num_tokens / max(now_s - began_s, 1e-9), 1),
            "memory_bytes": None if is_side_by_side() else memory_bytes(self._device),
            "skipped_steps": counters.skipped_steps,
        }
        if values:
            means = {name: value / last.num_targets for name, value in values.items()}
            record["figures"] = {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
        return record
