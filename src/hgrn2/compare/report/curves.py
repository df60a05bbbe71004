"""Curves of a comparison, shared by the page and the pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from hgrn2.compare.results import CellSummary, Results, TaskSummary
from hgrn2.tasks import find_task
from hgrn2.tasks.registry import option_names
from hgrn2.train.curves import smooth
from hgrn2.train.report.facts import figure

_MAX_POINTS = 160


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        model: name of the model.
        x: positions, ascending.
        y: values.
    """

    model: str
    x: list[float]
    y: list[float]


def loss_curves(task: TaskSummary, key: str) -> list[Curve]:
    """Return the smoothed training loss of each model at its best learning rate, averaged over seeds.

    Args:
        task: the task.
        key: the horizontal axis, "tokens" or "elapsed_s".
    """
    curves = []
    for cell in task.cells:
        runs = [] if cell.best is None else [run.facts.train for run in cell.best.finished if run.facts is not None]
        runs = [train for train in runs if len(train) > 1]
        if not runs:
            continue
        x = [np.array([r[key] for r in train], dtype=float) for train in runs]
        y = [smooth(np.array([r["loss"] for r in train], dtype=float)) for train in runs]
        # seeds have the same tokens, but not the same seconds
        at = np.linspace(max(each[0] for each in x), min(each[-1] for each in x), min(_MAX_POINTS, len(x[0])))
        mean = np.mean([np.interp(at, one, other) for one, other in zip(x, y, strict=True)], axis=0)
        curves.append(Curve(cell.model, at.tolist(), mean.tolist()))
    return curves


def rate_curves(task: TaskSummary, of: str = "learning_rate") -> list[Curve]:
    """Return the mean metric of each model against a learning rate, at the best of the other one if there are two.

    Args:
        task: the task.
        of: "learning_rate", AdamW's, or "muon_learning_rate".
    """
    best = max if task.metric.higher_is_better else min
    curves = []
    for cell in task.cells:
        found: dict[float, float] = {}
        for rate in cell.rates:
            at = getattr(rate, of)
            if at is not None and rate.mean is not None:
                found[at] = best(rate.mean, found.get(at, rate.mean))
        if found:
            curves.append(Curve(cell.model, sorted(found), [found[at] for at in sorted(found)]))
    return curves


def metric_curves(task: TaskSummary) -> list[Curve]:
    """Return the metric of each model at its best learning rate against tokens, averaged over seeds.

    Return nothing for a task whose metric is a loss, which `loss_curves` shows.
    """
    if task.metric.name == "val_loss":
        return []
    curves = []
    for cell in task.cells:
        by_tokens: dict[float, list[float]] = {}
        runs = () if cell.best is None else cell.best.finished
        for record in (r for run in runs if run.facts is not None for r in run.facts.validation):
            if (value := figure(record, task.metric.name)) is not None:
                by_tokens.setdefault(float(record["tokens"]), []).append(value)
        if len(by_tokens) > 1:
            x = sorted(by_tokens)
            curves.append(Curve(cell.model, x, [fmean(by_tokens[at]) for at in x]))
    return curves


def family(cell: CellSummary) -> str:
    """Return the name of a model without its width: "mamba" for "mamba-128" with hidden_size 128."""
    return cell.model.removesuffix(f"-{cell.config.hidden_size}")


def width_curves(task: TaskSummary) -> list[Curve]:
    """Return the best mean metric of models that are named NAME-WIDTH against their width; a curve for each name."""
    points: dict[str, dict[float, float]] = {}
    for cell in task.cells:
        if family(cell) != cell.model and cell.best is not None and cell.best.mean is not None:
            points.setdefault(family(cell), {})[float(cell.config.hidden_size)] = cell.best.mean
    if not any(len(found) > 1 for found in points.values()):
        return []
    return [Curve(name, sorted(found), [found[x] for x in sorted(found)]) for name, found in points.items()]


def option_curves(task: TaskSummary) -> dict[str, list[Curve]]:
    """Return the metric against an option that the task validates at, such as the length; by the option's name.

    Such figures are called val_accuracy_length_128: metric, option, value.
    """
    pattern = re.compile(rf"{re.escape(task.metric.name)}_([A-Za-z][A-Za-z_]*)_(\d+)")
    charts: dict[str, list[Curve]] = {}
    for cell in task.cells:
        points: dict[str, dict[float, float]] = {}
        for key in _validation_keys(cell):
            if (found := pattern.fullmatch(key)) and (mean := _mean(cell, key)) is not None:
                points.setdefault(found[1], {})[float(found[2])] = mean
        for option, values in points.items():
            x = sorted(values)
            charts.setdefault(option, []).append(Curve(cell.model, x, [values[at] for at in x]))
    return {option: curves for option, curves in charts.items() if any(len(curve.x) > 1 for curve in curves)}


@dataclass(frozen=True)
class TaskSeries:
    """Tasks of a comparison that differ in the value of one option.

    Attributes:
        tasks: the tasks, in ascending order of the option.
        option: the option on the horizontal axis.
        further: other options that change with it.
        curves: the metric of each model.
    """

    tasks: tuple[TaskSummary, ...]
    option: str
    further: tuple[str, ...]
    curves: tuple[Curve, ...]


def across_tasks(results: Results) -> list[TaskSeries]:
    """Return the metric of each model against the option that differs between tasks of one kind, such as the length.

    Args:
        results: results of the runs.
    """
    entries = {entry.name: entry for entry in results.plan.comparison.tasks}
    kinds: dict[str, list[TaskSummary]] = {}
    for task in results.tasks:
        kinds.setdefault(task.task, []).append(task)
    found = []
    for kind, tasks in kinds.items():
        if len(tasks) < 2:
            continue
        options: dict[str, dict[str, Any]] = {
            task.name: {k: entries[task.name].settings.get(k) for k in option_names(find_task(kind))} for task in tasks
        }
        values = {key: [options[task.name][key] for task in tasks] for key in options[tasks[0].name]}
        differing = {key: each for key, each in values.items() if any(value != each[0] for value in each)}
        for key, at in differing.items():
            numbers = [float(value) for value in at if type(value) in (int, float) and value > 0]
            if len(set(numbers)) < len(tasks):
                continue
            place = dict(zip([task.name for task in tasks], numbers, strict=True))
            ordered = tuple(sorted(tasks, key=lambda task: place[task.name]))
            further = tuple(other for other in differing if other != key)
            found.append(TaskSeries(ordered, key, further, tuple(_across(ordered, place))))
            break
    return [series for series in found if series.curves]


def _across(tasks: Sequence[TaskSummary], place: dict[str, float]) -> list[Curve]:
    points: dict[str, list[tuple[float, float]]] = {}
    for task in tasks:
        for cell in task.cells:
            if cell.best is not None and cell.best.mean is not None:
                points.setdefault(cell.model, []).append((float(place[task.name]), cell.best.mean))
    return [Curve(model, [x for x, _ in found], [y for _, y in found]) for model, found in points.items()]


def _validation_keys(cell: CellSummary) -> list[str]:
    runs = () if cell.best is None else cell.best.finished
    return list(dict.fromkeys(key for run in runs for key in run.validation))


def _mean(cell: CellSummary, key: str) -> float | None:
    runs = () if cell.best is None else cell.best.finished
    values = [float(value) for run in runs if (value := figure(run.validation, key)) is not None]
    return fmean(values) if values else None


def limits(curves: list[Curve]) -> tuple[float, float]:
    """Return limits for the loss axis that ignore the high losses of the first few steps."""
    values = np.concatenate([curve.y for curve in curves])
    starts = [curve.y[min(len(curve.y) - 1, max(1, len(curve.y) // 25))] for curve in curves]
    low, high = float(values.min()), max(starts)
    margin = 0.06 * max(high - low, 1e-3)
    return low - margin, high + margin


def spread_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return limits that hold all values."""
    values = [value for curve in curves for value in curve.y]
    margin = 0.08 * max(max(values) - min(values), 1e-3)
    return min(values) - margin, max(values) + margin
