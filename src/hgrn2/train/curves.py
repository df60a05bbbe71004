"""Data of a run's curves, shared by its pictures and its report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Record = dict[str, Any]


def smooth(losses: np.ndarray) -> np.ndarray:
    """Return a centred moving average over two hundredths of the run, narrower at its ends."""
    num_steps = len(losses)
    index = np.arange(num_steps)
    reach = np.minimum(max(num_steps // 100, min(5, num_steps // 10)), index)
    stop = np.minimum(index + reach + 1, num_steps)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    return (sums[stop] - sums[index - reach]) / (stop - index + reach)


def loss_limits(train: list[Record], validation: list[Record]) -> tuple[float, float]:
    """Return limits for the loss axis that ignore the high losses of the first few steps."""
    held_out = [r["val_loss"] for r in validation if r["val_loss"] is not None]
    losses = np.array([r["loss"] for r in train] + held_out)
    low, high = float(losses.min()), max(float(np.quantile(losses, 0.98)), *held_out, -math.inf)
    margin = 0.08 * max(high - low, 1e-3)
    return low - margin, high + margin


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the length in seconds and the name of a time unit suitable for a run of this length."""
    return (3600.0, "hours") if seconds > 7200 else (60.0, "minutes") if seconds > 120 else (1.0, "seconds")


def bits_per_nat(validation: list[Record]) -> float | None:
    """Return the factor from nats per token to bits per byte on the held-out text; None if not measured."""
    for record in reversed(validation):
        loss, bits = record["val_loss"], record.get("val_bits_per_byte")
        if loss and bits:
            return bits / loss
    return None


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return about `most` round numbers between two limits, spaced by 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # multiply instead of adding up, which would accumulate rounding errors
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two positive limits of a logarithmic axis."""
    decades = math.log10(high / low)
    factors = (1, 2, 5) if decades < 2.5 else (1,)
    every = max(1, round(decades / 6))
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def thin(length: int, most: int) -> np.ndarray:
    """Return at most `most` evenly spaced indices of a sequence, including the first and the last."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int)) if length else np.arange(0)
