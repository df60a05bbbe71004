"""Counters of a run, and lines about settings that changed since a checkpoint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hgrn2.train.config import BUDGETS, TrainConfig
from hgrn2.train.schedule import lr_fraction, used_fraction

_SMOOTHING = 0.95


@dataclass
class Counters:
    """Progress of a run; saved in state.json of every checkpoint.

    Attributes:
        step: optimizer steps, skipped ones included.
        tokens: tokens read for training.
        elapsed_s: wall-clock time of training so far, without pauses between sessions.
        skipped_steps: steps whose loss or gradient was not finite.
        skipped_in_a_row: how many of those came last.
        smoothed_loss: running mean of the finite losses, nats per target.
        validated_step: step of the last validation.
        best: step and metric of the best validation, e.g. {"step", "val_loss"}.
    """

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    smoothed_loss: float | None = None
    validated_step: int = -1
    best: dict[str, Any] | None = None

    def count_outcome(self, loss: float, grad_norm: float) -> bool:
        """Count a skipped step, or smooth the loss of another; return whether both values are finite.

        Args:
            loss: of the step, nats per target.
            grad_norm: norm of its gradient.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            return False
        smoothed = self.smoothed_loss
        self.smoothed_loss = loss if smoothed is None else _SMOOTHING * smoothed + (1 - _SMOOTHING) * loss
        self.skipped_in_a_row = 0
        return True


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any], counters: Counters) -> list[str]:
    """Describe settings that changed since a checkpoint, and a learning rate that rises because of it.

    Args:
        before: config.json of the checkpoint.
        now: config.json of the resumed run.
        counters: progress of the run.
    """
    before, now = _settings(before), _settings(now)
    # a setting that did not exist then has its default
    changed = {key: value for key, value in before.items() if key in now and now[key] != value}
    if changed.get("warmup_steps", 0) is None:
        # older runs did not save the number; it is filled in when they are resumed
        del changed["warmup_steps"]
    if not changed:
        return []
    parts = [f"{key} {_shown(value)} -> {_shown(now[key])}" for key, value in changed.items()]
    lines = [f"settings changed since step {counters.step}: {', '.join(parts)}"]
    if changed.keys() & set(BUDGETS):
        old, new = (_next_rate({**now, **some}, counters) for some in (changed, {}))
        if new > old * (1 + 1e-9):
            lines.append(
                f"the learning rate goes up from {old:.3g} to {new:.3g} at step {counters.step + 1}, because less of "
                "the budget is used now; --schedule and --learning-rate set another"
            )
    return lines


def describe_end(config: TrainConfig, counters: Counters) -> str:
    """Return a line that says the budget is used up, and how to extend it."""
    used = {"max_steps": counters.step, "max_tokens": counters.tokens, "max_time_s": counters.elapsed_s}
    ends = {name: getattr(config, name) for name in BUDGETS if used[name] >= (getattr(config, name) or math.inf)}
    units = {"max_steps": "steps", "max_tokens": "tokens", "max_time_s": "s"}
    parts = [f"{used[name]:,.0f} of {budget:,.0f} {units[name]}" for name, budget in ends.items()]
    flags = " and ".join(f"--{name.replace('_', '-')} N" for name in ends)
    return f"finished: {' and '.join(parts)} used; to continue, give a larger total budget: {flags}"


def _next_rate(settings: dict[str, Any], counters: Counters) -> float:
    with warnings.catch_warnings():
        # warnings about settings without effect have been shown already
        warnings.simplefilter("ignore")
        known = {field.name for field in fields(TrainConfig)}
        config = TrainConfig(**{key: value for key, value in settings.items() if key in known})
    progress = used_fraction(config, counters.step, counters.tokens, counters.elapsed_s)
    return config.learning_rate * lr_fraction(config, counters.step, progress)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of training and of the task in a config.json as one table."""
    task = config.get("task", {})
    settings = dict(config.get("train", {})) | dict(task.get("options", {}))
    # a file has lists where options have tuples
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
