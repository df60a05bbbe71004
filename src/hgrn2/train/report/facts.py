"""Read the facts about a run from its folder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hgrn2.errors import UserError
from hgrn2.formats.run_folder import read_config
from hgrn2.tasks import Metric, TaskReport, find_task
from hgrn2.train.curves import Record
from hgrn2.train.gates import GATES_NAME, GateSummary
from hgrn2.train.metrics import read_metrics

_BUDGETS = {"max_steps": "step", "max_tokens": "tokens", "max_time_s": "elapsed_s"}


def figure(record: Any, key: str) -> float | None:
    """Return a finite number from a record; None if it is missing or anything else."""
    value = record.get(key) if isinstance(record, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


@dataclass(frozen=True)
class RunFacts:
    """A run as its files describe it.

    Attributes:
        run_dir: the run folder.
        records: the records of metrics.jsonl.
        config: the content of config.json; empty if it cannot be read.
        gates: the content of gates.npz; None if it is missing or cannot be read.
    """

    run_dir: Path
    records: list[Record]
    config: dict[str, Any] = field(default_factory=dict)
    gates: GateSummary | None = None

    @classmethod
    def read(cls, run_dir: Path) -> RunFacts:
        """Read a run folder.

        Raises:
            UserError: metrics.jsonl is missing or damaged.
        """
        records = read_metrics(run_dir)
        try:
            config = read_config(run_dir)
        except UserError:
            config = {}
        gates = None
        if (run_dir / GATES_NAME).exists():
            try:
                gates = GateSummary.load(run_dir)
            except UserError:
                gates = None
        return cls(run_dir, records, config, gates)

    @cached_property
    def steps(self) -> list[Record]:
        """Training steps, including skipped ones."""
        return self._records("train")

    @cached_property
    def train(self) -> list[Record]:
        """Training steps with a finite loss."""
        return [r for r in self.steps if r["loss"] is not None]

    @cached_property
    def validation(self) -> list[Record]:
        """Validations, including those that were not finite."""
        return self._records("validation")

    @cached_property
    def measured(self) -> list[Record]:
        """Validations with a finite loss."""
        return [r for r in self.validation if r["val_loss"] is not None]

    @cached_property
    def samples(self) -> list[Record]:
        """Text samples of the model."""
        return [r for r in self._records("sample") if isinstance(r.get("text"), str)]

    @cached_property
    def starts(self) -> list[Record]:
        """Starts and resumptions."""
        return self._records("start")

    @cached_property
    def compressors(self) -> dict[str, float]:
        """Bits per byte of compressors on the held-out text; empty if they were not measured."""
        found = self._records("compressors")
        bits = found[-1].get("bits_per_byte") if found else None
        return {name: rate for name in bits if (rate := figure(bits, name))} if isinstance(bits, dict) else {}

    @property
    def compressed_bytes(self) -> int:
        """Bytes of the text that the compressors compressed; 0 if they were not measured."""
        found = self._records("compressors")
        return int(figure(found[-1], "text_bytes") or 0) if found else 0

    @cached_property
    def data(self) -> dict[str, Any]:
        """Sizes of the data from the last start record; empty for runs of older versions."""
        found = self._newest("data")
        return found if isinstance(found, dict) else {}

    @property
    def num_training_bytes(self) -> int | None:
        """Bytes of the training text; None if not recorded."""
        found = figure(self.data.get("train"), "text_bytes")
        return None if found is None else int(found)

    @property
    def prompt(self) -> str:
        """The first words of a held-out document; empty if not recorded."""
        found = self._newest("prompt")
        return found if isinstance(found, str) else ""

    @property
    def num_parameters(self) -> int | None:
        """Number of parameters of the model; None if not recorded."""
        found = self._newest("parameters")
        return found if isinstance(found, int) else None

    @property
    def last(self) -> Record | None:
        """The last training step or validation."""
        both = [r for r in self.records if r["kind"] in ("train", "validation")]
        return both[-1] if both else None

    @property
    def progress(self) -> float | None:
        """Fraction of the budget used; None if the settings have no budget."""
        budgets = {k: b for k in _BUDGETS if isinstance(b := self.section("train").get(k), int | float) and b > 0}
        if not budgets:
            return None
        last = self.last
        return 0.0 if last is None else min(1.0, max(last[_BUDGETS[name]] / budget for name, budget in budgets.items()))

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second over all steps, excluding validations and samples; None if not recorded."""
        tokens, seconds, before = 0.0, 0.0, 0
        for record in self.steps:
            own, before = record["tokens"] - before, record["tokens"]
            speed = figure(record, "tokens_per_s")
            if speed and own > 0:
                tokens, seconds = tokens + own, seconds + own / speed
        return tokens / seconds if seconds > 0 else None

    @property
    def memory_bytes(self) -> float | None:
        """Peak memory of the process, or of its GPU; None if not recorded."""
        return max((figure(record, "memory_bytes") or 0 for record in self.steps), default=0) or None

    @cached_property
    def task(self) -> TaskReport:
        """How the task describes itself; defaults for a task that does not exist here."""
        if self._task is None:
            return TaskReport()
        report = self._task.report
        newest = self.measured[-1] if self.measured else {}
        further = [
            found._replace(key=key, label=f"{found.label}, {key[len(found.key) + 1 :].replace('_', ' ')}")
            for found in report.figures
            for key in newest
            if key.startswith(f"{found.key}_")
        ]
        report = replace(report, figures=(*report.figures, *further))
        return report if self.config else replace(report, model="A model")

    @property
    def metric(self) -> Metric:
        """The figure that decides which checkpoint is best; the loss for a task that does not exist here."""
        return Metric("val_loss") if self._task is None else self._task.metric

    @cached_property
    def _task(self) -> Any:
        try:
            # older runs, and runs on text, have no such table
            return find_task(str(self.section("task").get("name", "language")))
        except UserError:
            return None

    @property
    def reads_text(self) -> bool:
        """Whether the run was trained on text."""
        return bool(self.section("data"))

    def section(self, name: str) -> dict[str, Any]:
        """Return one section of the configuration: model, train or data."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    def _records(self, kind: str) -> list[Record]:
        return [r for r in self.records if r["kind"] == kind]

    def _newest(self, key: str) -> Any:
        return next((r[key] for r in reversed(self.starts) if key in r), None)
