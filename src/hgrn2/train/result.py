"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgrn2.train.counters import Counters
from hgrn2.train.metrics import METRICS_NAME, read_metrics


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        run_dir: the run folder.
        checkpoint: the newest checkpoint.
        counters: steps, tokens, seconds, skipped steps, best validation.
        last_validation: the last validation record of metrics.jsonl; None if there is none, or if it was not finite.
        stopped_by: name of the signal that stopped the run; None if its budget is used up.
        had_ended: whether the budget was already used up, so that nothing was done.
        metric: key of the figure that decides which checkpoint is best.
    """

    run_dir: Path
    checkpoint: Path
    counters: Counters
    last_validation: dict[str, Any] | None = None
    stopped_by: str | None = None
    had_ended: bool = False
    metric: str = "val_loss"


def last_validation(run_dir: Path) -> dict[str, Any] | None:
    """Return the last validation record of a run; None if there is none, or if its loss was not finite."""
    records = read_metrics(run_dir) if (run_dir / METRICS_NAME).exists() else []
    last = next((record for record in reversed(records) if record["kind"] == "validation"), None)
    return None if last is None or last["val_loss"] is None else last
