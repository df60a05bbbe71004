"""The training time of a run, and the used fraction of its budget."""

from __future__ import annotations

import time

from hgrn2.train.config import TrainConfig
from hgrn2.train.counters import Counters
from hgrn2.train.parallel import Parallel
from hgrn2.train.schedule import used_fraction


class RunClock:
    """Measures training time, over all sessions of a run, and what is left of the budget.

    Args:
        config: settings of training.
        counters: counters of the run, with the training time of earlier sessions in `elapsed_s`.
        parallel: the ranks that train together.
    """

    def __init__(self, config: TrainConfig, counters: Counters, parallel: Parallel) -> None:
        self._config, self._counters, self._parallel = config, counters, parallel
        self._session_started_s = time.monotonic()
        self._started_s = self._session_started_s - counters.elapsed_s
        self._fraction_at_start = self.used_fraction()

    def set_elapsed(self) -> float:
        """Store the training time so far in the counters; return the present time on the monotonic clock."""
        now_s = time.monotonic()
        self._counters.elapsed_s = now_s - self._started_s
        return now_s

    def used_fraction(self) -> float:
        """Return the used fraction of the budget."""
        elapsed_s = time.monotonic() - self._started_s
        if self._config.max_time_s is not None:
            # clocks differ, and all ranks must stop after the same step
            elapsed_s = self._parallel.from_main(elapsed_s)
        return used_fraction(self._config, self._counters.step, self._counters.tokens, elapsed_s)

    def eta_s(self) -> float | None:
        """Return the estimated seconds until the end of the run; None before the first step of a session."""
        done = self.used_fraction() - self._fraction_at_start
        spent_s = time.monotonic() - self._session_started_s
        return spent_s / done * (1.0 - self.used_fraction()) if done > 0 else None
