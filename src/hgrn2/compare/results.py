"""Read the results of the runs of a comparison from their folders, and summarise them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hgrn2.compare.outcome import Outcome
from hgrn2.compare.plan import RUNS_NAME, Plan, PlannedRun, runs_by_cell
from hgrn2.errors import UserError
from hgrn2.models import HGRN2Config
from hgrn2.models.cost import Cost, cost
from hgrn2.tasks import Metric, find_task
from hgrn2.train.metrics import METRICS_NAME
from hgrn2.train.report.facts import RunFacts, figure

# length for the costs of tasks without a length of sequences
_SEQ_LEN = 2048


@dataclass(frozen=True)
class RunResult:
    """The state and the figures of one run.

    Attributes:
        planned: the run.
        state: "finished", "diverged", "failed", "unfinished" (begun) or "waiting".
        reason: why it diverged or failed.
        facts: its records; None before it has begun, or if they are damaged.
        metric: the task's metric.
    """

    planned: PlannedRun
    state: str
    reason: str
    facts: RunFacts | None
    metric: Metric

    @classmethod
    def read(cls, out: Path, planned: PlannedRun) -> RunResult:
        """Read the folder of a run."""
        run_dir = out / RUNS_NAME / planned.folder
        metric = find_task(planned.task).metric
        outcome = Outcome.load(run_dir)
        facts, reason = None, "" if outcome is None else outcome.reason
        state = outcome.state if outcome is not None else "waiting"
        if (run_dir / METRICS_NAME).is_file():
            state = "unfinished" if outcome is None else state
            try:
                facts = RunFacts.read(run_dir)
            except UserError as error:
                state, reason = "failed", str(error)
        found = cls(planned, state, reason, facts, metric)
        if state == "finished" and found.value is None:
            return cls(planned, "diverged", f"its last {metric.name} is not finite", facts, metric)
        return found

    @cached_property
    def validation(self) -> dict[str, Any]:
        """The last validation; empty if there is none."""
        return self.facts.validation[-1] if self.facts is not None and self.facts.validation else {}

    @property
    def value(self) -> float | None:
        """The metric at the last validation; None if the run has none or it is not finite."""
        return figure(self.validation, self.metric.name)

    @property
    def num_steps(self) -> int:
        """Training steps so far."""
        return 0 if self.facts is None or self.facts.last is None else int(self.facts.last["step"])

    @property
    def num_tokens(self) -> int:
        """Training tokens so far."""
        return 0 if self.facts is None or self.facts.last is None else int(self.facts.last["tokens"])

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far."""
        return 0.0 if self.facts is None or self.facts.last is None else float(self.facts.last["elapsed_s"])


@dataclass(frozen=True)
class RateSummary:
    """The finished runs of a model on a task with one learning rate.

    Attributes:
        learning_rate: the learning rate.
        finished: the finished runs, one per seed.
        num_diverged: number of diverged runs.
        num_runs: number of runs in the plan.
        muon_learning_rate: the learning rate of Muon; None if it is not set.
    """

    learning_rate: float
    finished: tuple[RunResult, ...]
    num_diverged: int
    num_runs: int
    muon_learning_rate: float | None = None

    @property
    def label(self) -> str:
        """The learning rate, and Muon's if it is set."""
        muon = self.muon_learning_rate
        return f"{self.learning_rate:g}" if muon is None else f"{self.learning_rate:g}, Muon {muon:g}"

    @property
    def values(self) -> list[float]:
        """The metric of each finished run."""
        return [value for run in self.finished if (value := run.value) is not None]

    @property
    def mean(self) -> float | None:
        """Mean over seeds; None without finished runs."""
        return fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None with fewer than two."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class CellSummary:
    """A model on a task.

    Attributes:
        model: name of the model.
        task: name of the task's table.
        rates: one summary for each learning rate, in ascending order.
        metric: the task's metric.
        cost: cost of its configuration.
        config: its configuration.
    """

    model: str
    task: str
    rates: tuple[RateSummary, ...]
    metric: Metric
    cost: Cost
    config: HGRN2Config

    @cached_property
    def best(self) -> RateSummary | None:
        """The learning rate with the best mean among those with the most finished seeds; None without finished runs."""
        found = [rate for rate in self.rates if rate.values]
        if not found:
            return None
        most = max(len(rate.values) for rate in found)
        sign = -1 if self.metric.higher_is_better else 1
        return min((r for r in found if len(r.values) == most), key=lambda r: sign * (r.mean or 0.0))

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate, AdamW's or Muon's, is the smallest or largest of three or more: look beyond it."""
        if self.best is None:
            return False
        for name in ("learning_rate", "muon_learning_rate"):
            every = sorted({value for rate in self.rates if (value := getattr(rate, name)) is not None})
            if len(every) >= 3 and getattr(self.best, name) in (every[0], every[-1]):
                return True
        return False

    def mean_of(self, name: str) -> float | None:
        """Return the mean of a number over the runs of the best learning rate.

        Args:
            name: "num_tokens", "tokens_per_s", "memory_bytes", or a key of the last validation.
        """
        found = []
        for run in self.best.finished if self.best is not None else ():
            if name == "num_tokens":
                found.append(float(run.num_tokens))
                continue
            is_fact = name in ("tokens_per_s", "memory_bytes")
            value = getattr(run.facts, name) if is_fact else figure(run.validation, name)
            if value is not None:
                found.append(float(value))
        return fmean(found) if found else None


@dataclass(frozen=True)
class TaskSummary:
    """All models on a task, the best first; models without finished runs last.

    Attributes:
        name: name of the task's table.
        task: name of the registered task.
        metric: its metric.
        cells: the models.
    """

    name: str
    task: str
    metric: Metric
    cells: tuple[CellSummary, ...]


@dataclass(frozen=True)
class Results:
    """Everything that a report shows.

    Attributes:
        out: folder of the comparison.
        plan: the plan.
        runs: every run, in the order of the plan.
        tasks: the summaries, in the order of the file.
    """

    out: Path
    plan: Plan
    runs: tuple[RunResult, ...]
    tasks: tuple[TaskSummary, ...]

    @classmethod
    def read(cls, out: Path) -> Results:
        """Read the folder of a comparison.

        Raises:
            UserError: there is no comparison, or its plan is damaged.
        """
        plan = Plan.load(out)
        runs = tuple(RunResult.read(out, planned) for planned in plan.runs)
        return cls(out, plan, runs, _summarise(runs))

    def in_state(self, *states: str) -> list[RunResult]:
        """Return the runs in one of several states."""
        return [run for run in self.runs if run.state in states]


def _summarise(runs: Sequence[RunResult]) -> tuple[TaskSummary, ...]:
    by_folder = {run.planned.folder: run for run in runs}
    by_task: dict[str, list[CellSummary]] = {}
    costs: dict[str, Cost] = {}
    for (task, model), planned in runs_by_cell([run.planned for run in runs]).items():
        found = [by_folder[run.folder] for run in planned]
        config = HGRN2Config.from_dict(planned[0].model_config)
        tokens = planned[0].run_settings.options.tokens_per_example
        # some tasks count examples
        seq_len = tokens if tokens > 1 else _SEQ_LEN
        key = repr((planned[0].model_config, seq_len))
        costs[key] = costs.get(key) or cost(config, seq_len)
        rates = []
        by_rate: dict[tuple[float, float | None], list[RunResult]] = {}
        for run in found:
            by_rate.setdefault((run.planned.learning_rate, run.planned.muon_learning_rate), []).append(run)
        for (rate, muon), own in sorted(by_rate.items(), key=lambda item: (item[0][0], item[0][1] or 0.0)):
            finished = tuple(run for run in own if run.state == "finished")
            rates.append(RateSummary(rate, finished, sum(run.state == "diverged" for run in own), len(own), muon))
        cell = CellSummary(model, task, tuple(rates), found[0].metric, costs[key], config)
        by_task.setdefault(task, []).append(cell)
    names = {run.planned.task_entry: run.planned.task for run in runs}
    return tuple(
        TaskSummary(task, names[task], cells[0].metric, tuple(sorted(cells, key=_order)))
        for task, cells in by_task.items()
    )


def _order(cell: CellSummary) -> float:
    mean = cell.best.mean if cell.best is not None else None
    if mean is None:
        return math.inf
    return -mean if cell.metric.higher_is_better else mean


def results_csv(results: Results) -> str:
    """Return a table with a line for each run: the plan, its state, costs, and every figure of the last validation."""
    cells = {(cell.task, cell.model): cell for task in results.tasks for cell in task.cells}
    of_cost = [field.name for field in fields(Cost)]
    hidden = {"kind", "step", "tokens", "elapsed_s"}
    figures = list(dict.fromkeys(key for run in results.runs for key in run.validation if key not in hidden))
    head = ["task", "model", "learning_rate", "muon_learning_rate", "seed",
            "state", "reason", "metric", "metric_value", "steps", "tokens",
            "elapsed_s", "tokens_per_s", "memory_bytes", "intermediate_size", *of_cost, *figures, "folder"]  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for run in results.runs:
        planned, cell = run.planned, cells[run.planned.task_entry, run.planned.model]
        writer.writerow(
            [planned.task_entry, planned.model, planned.learning_rate, planned.muon_learning_rate, planned.seed,
             run.state, run.reason,
             run.metric.name, run.value, run.num_steps, run.num_tokens, run.elapsed_s,
             *((run.facts.tokens_per_s, run.facts.memory_bytes) if run.facts is not None else (None, None)),
             cell.config.intermediate_size, *(getattr(cell.cost, name) for name in of_cost),
             *(run.validation.get(name) for name in figures), f"{RUNS_NAME}/{planned.folder}"]
        )  # fmt: skip
    return text.getvalue()
