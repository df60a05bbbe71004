"""Learning rate schedules: fractions of the peak as pure functions of progress."""

from __future__ import annotations

import math

from hgrn2.train.config import TrainConfig

# fraction of a time budget
_LONGEST_WARMUP = 0.1


def warmup(step: int, warmup_steps: int) -> float:
    """Return a linear warmup: 1 / warmup_steps at step 0, 1 from step warmup_steps - 1 on."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(progress: float, min_fraction: float) -> float:
    """Return half a cosine from 1 at progress 0 to min_fraction at progress 1."""
    return min_fraction + (1.0 - min_fraction) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def wsd(progress: float, decay_fraction: float, min_fraction: float) -> float:
    """Return warmup-stable-decay: 1, then linear to min_fraction over the last decay_fraction."""
    remaining = max(0.0, 1.0 - progress)
    return min_fraction + (1.0 - min_fraction) * min(1.0, remaining / decay_fraction)


def inverse_sqrt(step: int, warmup_steps: int) -> float:
    """Return 1 during the warmup, then sqrt(warmup_steps / (step + 1)), independent of the budget."""
    return math.sqrt(warmup_steps / max(step + 1, warmup_steps))


def used_fraction(config: TrainConfig, step: int, tokens: int, elapsed_s: float) -> float:
    """Return the used fraction of the budget in [0, 1], the largest over all budgets.

    Args:
        config: provides the budgets.
        step: number of optimizer steps done.
        tokens: number of training tokens read.
        elapsed_s: wall-clock time of the run.
    """
    used = [
        step / config.max_steps if config.max_steps else 0.0,
        tokens / config.max_tokens if config.max_tokens else 0.0,
        elapsed_s / config.max_time_s if config.max_time_s else 0.0,
    ]
    return min(1.0, max(used))


def lr_fraction(config: TrainConfig, step: int, progress: float) -> float:
    """Return the fraction of the peak learning rate for one step, the product of warmup and schedule.

    Args:
        config: provides schedule, num_warmup_steps, decay_fraction and min_lr_fraction.
        step: number of optimizer steps done before this one.
        progress: used fraction of the budget before this step, in [0, 1].
    """
    min_fraction = 0.1 if config.min_lr_fraction is None else config.min_lr_fraction
    decay_fraction = 0.2 if config.decay_fraction is None else config.decay_fraction
    shape = {
        "cosine": lambda: cosine(progress, min_fraction),
        "wsd": lambda: wsd(progress, decay_fraction, min_fraction),
        "inverse-sqrt": lambda: inverse_sqrt(step, config.num_warmup_steps),
        "constant": lambda: 1.0,
    }[config.schedule]
    rise = warmup(step, config.num_warmup_steps)
    if config.max_steps is None and config.max_tokens is None:
        # the number of steps in a time budget is unknown; do not spend all of them on the warmup
        rise = max(rise, min(1.0, progress / _LONGEST_WARMUP))
    return rise * shape()
