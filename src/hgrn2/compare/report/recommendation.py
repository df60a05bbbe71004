"""The recommendation of a report: the model that the data supports, or the reason why it supports none."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hgrn2.compare.report import tables
from hgrn2.compare.results import CellSummary, Results, TaskSummary
from hgrn2.quantities import plural
from hgrn2.train.report.words import size

# standard errors of a difference beyond which two means differ
_ERRORS = 2.0
# models named in a list
_MAX_NAMED = 5


def recommendation(results: Results) -> list[str]:
    """Return one to five sentences.

    A model leads a task if no other is better by more than two standard errors of the difference, from the spread over
    seeds. The model that leads every task is recommended. With one seed there is no spread, and nothing is recommended.

    Args:
        results: results of the runs.
    """
    tasks = [task for task in results.tasks if any(cell.best is not None for cell in task.cells)]
    if not tasks:
        return ["No run has finished, so there is nothing to recommend."]
    found = []
    if missing := len(results.in_state("waiting", "unfinished")):
        found.append(f"{plural(missing, 'run')} of {len(results.runs)} not finished yet: the results below may change.")
    best = [
        f"{task.cells[0].model} on {task.name} ({tables.mean_and_spread(task, task.cells[0].best)})" for task in tasks
    ]
    found.append(f"Best mean: {'; '.join(best)}.")
    if single := [task.name for task in tasks if _has_single_seed(task)]:
        found.append(
            f"No recommendation: on {_listed(single)} the leading models have one seed each, so differences may be "
            "due to chance. Use at least three seeds."
        )
        return found
    leaders = [{cell.model for cell in leaders_of(task)} for task in tasks]
    common = [cell for cell in tasks[0].cells if all(cell.model in some for some in leaders)]
    if len(common) == 1:
        found.append(f"We recommend {_described(tasks, common[0].model)}: no other model is as good on every task.")
    elif common:
        cheapest = min(common, key=_memory)
        found.append(
            f"The data does not decide between {_listed([cell.model for cell in common])}: they differ by less than "
            f"{_ERRORS:g} standard errors. Of these, {cheapest.model} needs the least memory for a sequence "
            f"({_memory_text(cheapest)}), so we recommend {_described(tasks, cheapest.model)}."
        )
    else:
        found.append("No model leads every task, so the choice depends on the task.")
    if edges := [f"{task.cells[0].model} on {task.name}" for task in tasks if task.cells[0].is_at_edge]:
        found.append(f"The best learning rate of {_listed(edges)} is the smallest or largest of the grid: widen it.")
    return found


def leaders_of(task: TaskSummary) -> list[CellSummary]:
    """Return the best model of a task, and those that differ from it by less than two standard errors."""
    cells = [cell for cell in task.cells if cell.best is not None]
    first = cells[0]
    return [first, *(cell for cell in cells[1:] if abs(_difference(first, cell)) <= _ERRORS * _error(first, cell))]


def _difference(one: CellSummary, two: CellSummary) -> float:
    assert one.best is not None
    assert two.best is not None
    return (one.best.mean or 0.0) - (two.best.mean or 0.0)


def _error(one: CellSummary, two: CellSummary) -> float:
    """Return the standard error of the difference of two means; infinite if a spread is unknown."""
    squares = 0.0
    for rate in (one.best, two.best):
        if rate is None or rate.deviation is None:
            return math.inf
        squares += rate.deviation**2 / len(rate.values)
    return math.sqrt(squares)


def _has_single_seed(task: TaskSummary) -> bool:
    first = task.cells[0].best
    others = [cell for cell in task.cells[1:] if cell.best is not None]
    return bool(others) and (first is None or first.deviation is None)


def _described(tasks: Sequence[TaskSummary], model: str) -> str:
    """Return a model with its learning rate on each task."""
    rates = {
        task.name: cell.best.label
        for task in tasks
        for cell in task.cells
        if cell.model == model and cell.best is not None
    }
    if len(set(rates.values())) == 1:
        return f"{model} with a learning rate of {next(iter(rates.values()))}"
    return f"{model} with learning rates of {_listed([f'{rate} on {name}' for name, rate in rates.items()])}"


def _memory(cell: CellSummary) -> tuple[bool, int]:
    """Return a key that sorts models by the memory of a long sequence: those with a growing cache come last."""
    grows = cell.cost.attention_bytes_per_token > 0 and cell.cost.attention_window is None
    return grows, cell.cost.state_bytes


def _memory_text(cell: CellSummary) -> str:
    cache = cell.cost.attention_bytes_per_token
    return f"{size(cell.cost.state_bytes)}{f' and {size(cache)} a token' if cache else ''}"


def _listed(names: Sequence[str]) -> str:
    names = [*names[:_MAX_NAMED], *([f"{len(names) - _MAX_NAMED} more"] if len(names) > _MAX_NAMED else [])]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
