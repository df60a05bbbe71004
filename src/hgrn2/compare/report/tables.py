"""Tables of a comparison as rows of text, for the page and for Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from hgrn2.compare.config import Comparison
from hgrn2.compare.matching import TOLERANCE
from hgrn2.compare.report.curves import family
from hgrn2.compare.results import CellSummary, RateSummary, Results, RunResult, TaskSummary
from hgrn2.quantities import plural
from hgrn2.tasks import ReportFigure, find_task
from hgrn2.train.report.words import compact, duration, size

NO_VALUE = "–"
# models or tasks in the headline
_MAX_NAMED = 6
# fraction of the tokens of other runs from which a run counts as complete
_FULL = 0.98


@dataclass(frozen=True)
class TextTable:
    """A table; the first column names the rows.

    Attributes:
        head: titles of the columns.
        rows: cells of each row.
    """

    head: list[str]
    rows: list[list[str]]


def direction(task: TaskSummary) -> str:
    """Return the metric of a task in words, with its unit and direction."""
    better = "higher" if task.metric.higher_is_better else "lower"
    return f"{metric_with_unit(task)} ({better} is better)"


def metric_label(task: TaskSummary) -> str:
    """Return the name of a task's metric in words."""
    found = _figure(task)
    if found is not None:
        return found.label
    return f"held-out {task.metric.name.removeprefix('val_').replace('_', ' ')}"


def metric_with_unit(task: TaskSummary) -> str:
    """Return the name of a task's metric in words, for a loss with its unit."""
    unit = f", {find_task(task.task).report.unit}" if task.metric.name == "val_loss" else ""
    return metric_label(task) + unit


def metric_text(task: TaskSummary, value: float | None) -> str:
    """Return a value of the metric, as the task shows it."""
    if value is None:
        return NO_VALUE
    found = _figure(task)
    return f"{value:.4f}" if found is None else format(value, found.table_style)


def _figure(task: TaskSummary) -> ReportFigure | None:
    return next((f for f in find_task(task.task).report.figures if f.key == task.metric.name), None)


def mean_and_spread(task: TaskSummary, rate: RateSummary | None, *, has_count: bool = True) -> str:
    """Return mean ± sample standard deviation, and the number of seeds if it is wanted."""
    if rate is None:
        return NO_VALUE
    spread = "" if rate.deviation is None else f" ± {metric_text(task, rate.deviation)}"
    return f"{metric_text(task, rate.mean)}{spread}{f' (n = {len(rate.values)})' if has_count else ''}"


def overview(results: Results) -> TextTable:
    """Return the metric of each model on each task; the model with the best mean rank first."""
    ranks: dict[str, list[int]] = {model.name: [] for model in results.plan.comparison.models}
    cells: dict[tuple[str, str], str] = {}
    for task in results.tasks:
        for rank, cell in enumerate(task.cells):
            ranks[cell.model].append(rank)
            cells[task.name, cell.model] = mean_and_spread(task, cell.best, has_count=False)
    order = sorted(ranks, key=lambda model: fmean(ranks[model]))
    metrics = {direction(task) for task in results.tasks}
    # one metric for all is said once
    head = ["model", *(task.name if len(metrics) == 1 else f"{task.name}: {direction(task)}" for task in results.tasks)]
    return TextTable(head, [[model, *(cells[task.name, model] for task in results.tasks)] for model in order])


def ranking(task: TaskSummary) -> TextTable:
    """Return the models of a task, the best first, each at its best learning rate."""
    further = [
        found
        for found in find_task(task.task).report.figures
        if found.key != task.metric.name and any(cell.mean_of(found.key) is not None for cell in task.cells)
    ]
    head = ["model", direction(task), "range", "learning rate", *(f.label for f in further), "tokens", "tokens/s",
            "memory", "finished"]  # fmt: skip
    rows = []
    most = max((cell.mean_of("num_tokens") or 0 for cell in task.cells), default=0)
    for cell in task.cells:
        best = cell.best
        values = [] if best is None else best.values
        spread = (
            NO_VALUE if len(values) < 2 else f"{metric_text(task, min(values))} to {metric_text(task, max(values))}"
        )
        rate = NO_VALUE if best is None else f"{best.label}{' (edge)' if cell.is_at_edge else ''}"
        memory, speed = cell.mean_of("memory_bytes"), cell.mean_of("tokens_per_s")
        tokens = cell.mean_of("num_tokens") or 0
        rows.append([
            cell.model, mean_and_spread(task, best), spread, rate,
            *(NO_VALUE if (v := cell.mean_of(f.key)) is None else format(v, f.table_style) for f in further),
            NO_VALUE if not tokens else compact(tokens) + (" (fewer)" if tokens < _FULL * most else ""),
            NO_VALUE if speed is None else f"{speed:,.0f}", NO_VALUE if memory is None else size(memory),
            _finished(cell),
        ])  # fmt: skip
    return _without_empty_columns(TextTable(head, rows))


def _without_empty_columns(found: TextTable) -> TextTable:
    """Return the table without columns that have no value in any row, such as the range with one seed."""
    kept = [i for i in range(len(found.head)) if i == 0 or any(row[i] != NO_VALUE for row in found.rows)]
    return TextTable([found.head[i] for i in kept], [[row[i] for i in kept] for row in found.rows])


def _finished(cell: CellSummary) -> str:
    num_runs = sum(rate.num_runs for rate in cell.rates)
    diverged = sum(rate.num_diverged for rate in cell.rates)
    words = f"{sum(len(rate.finished) for rate in cell.rates)} of {num_runs}"
    return f"{words}, {diverged} diverged" if diverged else words


def sizes(results: Results, task: TaskSummary) -> TextTable:
    """Return what each model of a task costs, in the order of the file."""
    order = [model.name for model in results.plan.comparison.models]
    cells = sorted(task.cells, key=lambda cell: order.index(cell.model))
    match = results.plan.comparison.match
    wanted = match if isinstance(match, int) else cells[0].cost.parameters
    head = [
        "model", "parameters", "difference", "channel mixer", "state", "cache per token", "training FLOPs per token"
    ]  # fmt: skip
    rows = [
        [cell.model, f"{cell.cost.parameters:,}", f"{cell.cost.parameters / wanted - 1:+.2%}",
         str(cell.config.intermediate_size), size(cell.cost.state_bytes),
         size(cell.cost.attention_bytes_per_token) if cell.cost.attention_bytes_per_token else NO_VALUE,
         compact(cell.cost.flops_per_token_training)]
        for cell in cells
    ]  # fmt: skip
    return TextTable(head, rows)


def rates(task: TaskSummary) -> TextTable:
    """Return the metric of each model at each learning rate."""
    pairs = {(r.learning_rate, r.muon_learning_rate or 0.0, r.label) for cell in task.cells for r in cell.rates}
    every = [label for _, _, label in sorted(pairs)]
    rows = []
    for cell in task.cells:
        found = {rate.label: rate for rate in cell.rates}
        rows.append([cell.model, *(_rate_text(task, found.get(rate)) for rate in every)])
    return TextTable(["model", *every], rows)


def _rate_text(task: TaskSummary, rate: RateSummary | None) -> str:
    if rate is None:
        return ""
    if not rate.values:
        return "diverged" if rate.num_diverged else NO_VALUE
    return mean_and_spread(task, rate) + (f", {rate.num_diverged} diverged" if rate.num_diverged else "")


def all_runs(results: Results, runs: list[RunResult]) -> TextTable:
    """Return a line for each of some runs."""
    tasks = {task.name: task for task in results.tasks}
    rows = [
        [run.planned.folder, run.state, metric_text(tasks[run.planned.task_entry], run.value), f"{run.num_steps:,}",
         f"{run.num_tokens:,}", duration(run.elapsed_s)]
        for run in runs
    ]  # fmt: skip
    return TextTable(["run", "state", "metric", "steps", "tokens", "time"], rows)


def summary(results: Results) -> str:
    """Return one sentence about the grid and how many runs have ended."""
    comparison, num_runs = results.plan.comparison, len(results.runs)
    grid = f"{plural(len(comparison.models), 'model')} on {plural(len(comparison.tasks), 'task')} with "
    grid += f"{plural(len(comparison.seeds), 'seed')}: {plural(num_runs, 'run')}"
    states = {
        "finished": "finished", "diverged": "diverged", "failed": "failed", "unfinished": "unfinished",
        "waiting": "not begun",
    }  # fmt: skip
    counts = [f"{count} {words}" for state, words in states.items() if (count := len(results.in_state(state)))]
    return f"{grid}, {', '.join(counts)}."


def headline(results: Results) -> str:
    """Return the models and the tasks by name, such as "hgrn2 and mamba on mqar"; further ones as a number."""
    comparison = results.plan.comparison
    families = {cell.model: family(cell) for task in results.tasks for cell in task.cells}
    models = list(dict.fromkeys(families.get(model.name, model.name) for model in comparison.models))
    tasks, kinds = [task.name for task in comparison.tasks], {task.task for task in comparison.tasks}
    if len(tasks) > 1 and len(kinds) == 1:
        tasks = [f"{kinds.pop()} ({len(tasks)} settings)"]
    return f"{_listed(models, 'other')} on {_listed(tasks, 'other')}"


def _listed(names: list[str], more: str) -> str:
    shown = names if len(names) <= _MAX_NAMED else [*names[: _MAX_NAMED - 1], plural(len(names) - _MAX_NAMED + 1, more)]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def notes(results: Results) -> list[str]:
    """Return how to read the tables: sizes, batches, learning rates, spread, and what limits the comparison."""
    found = [
        _matching(results.plan.comparison),
        "All models see the same batches of a seed in the same order.",
        "A row shows the learning rate with the best mean of the metric over seeds, at the last validation; "
        '"edge" marks the smallest or largest of three or more rates, beyond which a better one may lie; with fewer, '
        "any may. The same held-out data chooses the rate and gives the figure.",
        "± is the sample standard deviation over n seeds; with one seed there is no spread, and small differences "
        "mean nothing.",
        "Tokens/s and memory are those of runs side by side on one machine; memory on a CPU is that of the whole "
        "process. Time includes validations and checkpoints.",
    ]
    if short := _stopped_by_time(results):
        found.append(
            f"{plural(len(short), 'run')} used up the time (max_time_s) before the other budget and read fewer tokens "
            f"than others: {', '.join(run.planned.folder for run in short[:6])}{' and more' if len(short) > 6 else ''}."
        )
    return found


def _matching(comparison: Comparison) -> str:
    if comparison.match == "none":
        return "Sizes are not matched."
    wanted = (
        f"as many parameters as {comparison.models[0].name}"
        if comparison.match == "first"
        else f"{comparison.match:,} parameters"
    )
    return f"Every model has {wanted}, within {TOLERANCE:.0%}, by the width of its channel mixer (intermediate_size)."


def _stopped_by_time(results: Results) -> list[RunResult]:
    most: dict[str, int] = {}
    finished = results.in_state("finished")
    for run in finished:
        entry = run.planned.task_entry
        most[entry] = max(most.get(entry, 0), int(run.planned.settings.get("max_tokens") or 0), run.num_tokens)
    return [
        run
        for run in finished
        if run.planned.settings.get("max_time_s") and run.num_tokens < _FULL * most[run.planned.task_entry]
    ]
