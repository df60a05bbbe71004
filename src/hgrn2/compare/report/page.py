"""The report of a comparison as one self-contained page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from importlib.resources import files

from hgrn2.compare.config import ModelEntry
from hgrn2.compare.files import repeat_command
from hgrn2.compare.report import tables
from hgrn2.compare.report.curves import (
    Curve,
    across_tasks,
    family,
    limits,
    loss_curves,
    metric_curves,
    option_curves,
    rate_curves,
    spread_limits,
    width_curves,
)
from hgrn2.compare.report.recommendation import recommendation
from hgrn2.compare.report.tables import TextTable
from hgrn2.compare.results import Results, TaskSummary
from hgrn2.train.curves import time_unit
from hgrn2.train.hints import program
from hgrn2.train.report.charts import Axis, Line, LineChart
from hgrn2.train.report.page import assemble
from hgrn2.train.report.parts import code, details, pairs, section, table
from hgrn2.train.report.words import compact, rich

# further models take the same colours, dashed
NUM_COLOURS = 12
_MAX_TICKS = 7


def page(results: Results) -> str:
    """Return the whole page."""
    lead = f'<p class="lead">{rich(tables.summary(results))}</p>\n'
    body = (
        lead
        + _overview(results)
        + _width_section(results)
        + "".join(_task_section(results, task) for task in results.tasks)
    )
    body += _recommendation(results) + _reading(results) + _bad_runs(results) + _commands(results) + _settings(results)
    style = (files("hgrn2.compare.report") / "compare.css").read_text(encoding="utf-8")
    kind = f"HGRN2 comparison: {results.out.resolve().name}"
    return assemble(kind, tables.headline(results), body, "the runs' own records", {}, style)


def _role(results: Results, model: str) -> str:
    """Return the style of a model's line: a colour for each name without its width, and a pattern for each width."""
    cells = {cell.model: cell for task in results.tasks for cell in task.cells}
    names = [family(cells[m.name]) if m.name in cells else m.name for m in results.plan.comparison.models]
    own = family(cells[model]) if model in cells else model
    index = list(dict.fromkeys(names)).index(own)
    widths = sorted({cells[m].config.hidden_size for m in cells if family(cells[m]) == own}, reverse=True)
    pattern = widths.index(cells[model].config.hidden_size) if model in cells else 0
    pattern += index // NUM_COLOURS
    return f"own m{index % NUM_COLOURS}{('', ' dashed', ' dotted')[min(pattern, 2)]}"


def _html(found: TextTable) -> str:
    return table(found.head, found.rows)


def _overview(results: Results) -> str:
    """Return all tasks in one table, and tasks that differ in an option as charts; empty for a single task."""
    if len(results.tasks) < 2:
        return ""
    charts = []
    for series in across_tasks(results):
        task = series.tasks[0]
        title = f"{_first_upper(tables.metric_label(task))} against {series.option.replace('_', ' ')}"
        label = series.option.replace("_", " ")
        if series.further:
            label += f" (with it {', '.join(series.further).replace('_', ' ')})"
        charts.append(_option_chart(results, task, title, label, series.curves))
    metrics = {tables.direction(task) for task in results.tasks}
    note = (
        f'<p class="note">{_first_upper(rich(metrics.pop()))}, at the best learning rate.</p>'
        if len(metrics) == 1
        else ""
    )
    parts = [f'{note}<div class="overview">{_html(tables.overview(results))}</div>']
    if charts:
        parts += [
            _legend(results, [cell.model for cell in results.tasks[0].cells]),
            f'<div class="pair">{"".join(charts)}</div>',
        ]
    return section("overview", "All tasks", "\n".join(parts))


def _option_chart(results: Results, task: TaskSummary, title: str, label: str, curves: Sequence[Curve]) -> str:
    every = [x for curve in curves for x in curve.x]
    x = Axis(min(every) / 1.1, max(every) * 1.1, label, compact, is_log=True, at=_ticks(every))
    y = Axis(*spread_limits(curves), tables.metric_with_unit(task), _metric_tick(task))
    return _chart(results, title, x, y, curves)


def _ticks(values: Sequence[float]) -> list[float]:
    """Return the distinct values in ascending order, for the ticks of an axis; if there are many, only some of them."""
    found = sorted(set(values))
    return found[:: -(-len(found) // _MAX_TICKS)]


def _task_section(results: Results, task: TaskSummary) -> str:
    parts = [f'<div class="ranking">{_html(tables.ranking(task))}</div>']
    if charts := _charts(results, task):
        parts.append(_legend(results, [cell.model for cell in task.cells]))
        parts.append(f'<div class="pair">{"".join(charts)}</div>')
    parts.append(details("Every learning rate as numbers", _html(tables.rates(task))))
    parts.append(f'<h3 class="after">Sizes</h3>{_html(tables.sizes(results, task))}')
    heading = rich(task.name if task.name == task.task else f"{task.name} ({task.task})")
    return section(f"task-{task.name}", heading, "\n".join(parts))


def _legend(results: Results, models: Sequence[str]) -> str:
    order = [entry.name for entry in results.plan.comparison.models]
    ordered = sorted(models, key=lambda model: order.index(model) if model in order else -1)
    items = "".join(f'<li><i class="{_role(results, model)}"></i>{rich(model)}</li>' for model in ordered)
    return f'<ul class="legend">{items}</ul>'


def _charts(results: Results, task: TaskSummary) -> list[str]:
    unit = f"training loss, {tables.find_task(task.task).report.unit}"
    charts = []
    label = _first_upper(tables.metric_label(task))
    if curves := metric_curves(task):
        end = max(curve.x[-1] for curve in curves)
        x = Axis(0.0, end * 1.02, "training tokens", compact)
        y = Axis(*spread_limits(curves), tables.metric_with_unit(task), _metric_tick(task))
        charts.append(_chart(results, f"{label} against tokens", x, y, curves))
    for key, title in (("tokens", "Loss against tokens"), ("elapsed_s", "Loss against time")):
        if not (curves := loss_curves(task, key)):
            continue
        end = max(curve.x[-1] for curve in curves)
        scale, name = time_unit(end)
        x = (
            Axis(0.0, end * 1.02, "training tokens", compact)
            if key == "tokens"
            else Axis(0.0, max(end, 1e-3) * 1.02, name, "{:g}".format, unit=scale)
        )
        y = Axis(*limits(curves), unit, "{:g}".format)
        charts.append(_chart(results, title, x, y, curves, has_dots=False))
    for of, name in (("learning_rate", "learning rate"), ("muon_learning_rate", "Muon's learning rate")):
        if not (curves := rate_curves(task, of)):
            continue
        every = [x for curve in curves for x in curve.x]
        x = Axis(min(every) / 1.3, max(every) * 1.3, name, "{:g}".format, is_log=True, at=_ticks(every))
        y = Axis(*spread_limits(curves), tables.metric_with_unit(task), _metric_tick(task))
        charts.append(_chart(results, f"{label} against {name}", x, y, curves))
    for option, curves in option_curves(task).items():
        name = option.replace("_", " ")
        charts.append(_option_chart(results, task, f"{label} against {name}", name, curves))
    return charts


def _width_section(results: Results) -> str:
    """Return the metric against the width on each task, for models that are named by their width."""
    found = [(task, curves) for task in results.tasks if (curves := width_curves(task))]
    if not found:
        return ""
    models = list(dict.fromkeys(curve.model for _, curves in found for curve in curves))
    charts = [
        _option_chart(results, task, f"{task.name}: {tables.metric_label(task)}", "width", curves)
        for task, curves in found
    ]
    return section("width", "Against width", f'{_legend(results, models)}<div class="pair">{"".join(charts)}</div>')


def _recommendation(results: Results) -> str:
    sentences = "".join(f"<p>{rich(sentence)}</p>" for sentence in recommendation(results))
    return section("recommendation", "Recommendation", f'<div class="verdict">{sentences}</div>')


def _metric_tick(task: TaskSummary) -> Callable[[float], str]:
    is_share = tables.metric_text(task, 0.5).endswith("%")
    return "{:.0%}".format if is_share else "{:g}".format


def _chart(results: Results, title: str, x: Axis, y: Axis, curves: Sequence[Curve], *, has_dots: bool = True) -> str:
    lines = [Line(curve.x, list(curve.y), f"{_role(results, curve.model)}") for curve in curves]
    ends = ", ".join(f"{curve.model} {curve.y[-1]:.3g}" for curve in curves)
    return LineChart(
        title, x, y, lines=lines, dots=lines if has_dots else [],
        summary=f"{title}: one line for each model; at the end of the lines: {ends}.",
    ).html()  # fmt: skip


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _reading(results: Results) -> str:
    notes = "".join(f"<p>{rich(note)}</p>" for note in tables.notes(results))
    return section("reading", "How to read this", f'<div class="note">{notes}</div>')


def _bad_runs(results: Results) -> str:
    rows = [[run.planned.folder, run.state, run.reason or "–"] for run in results.in_state("diverged", "failed")]
    return section("bad-runs", "Runs without a result", table(["run", "state", "reason"], rows)) if rows else ""


def _commands(results: Results) -> str:
    out = shlex.quote(str(results.out))
    found = [
        ("Continue, or look for runs that failed", f"{program()} compare --out {out}"),
        ("Regenerate this page", f"{program()} compare --report-only {out}"),
    ]
    for task in results.tasks:
        best = task.cells[0]
        if best.best is not None:
            run = best.best.finished[0].planned
            found.append((f"Repeat one run: {best.model} on {task.name}", repeat_command(results.out, run)))
    items = "".join(f"<dt>{rich(title)}</dt><dd>{code(text)}</dd>" for title, text in found)
    every = details("Every run", _html(tables.all_runs(results, list(results.runs))))
    repeat = details(
        "Commands that repeat each run",
        code("\n".join(repeat_command(results.out, run.planned) for run in results.runs)),
    )
    # the button of a block is named after what comes before it
    return section("runs", "Runs and commands", f'<dl class="commands">{items}</dl>{every}{repeat}')


def _settings(results: Results) -> str:
    comparison = results.plan.comparison
    seeds = ", ".join(map(str, comparison.seeds))
    rates = ", ".join(f"{rate:g}" for rate in comparison.learning_rates)
    muon = ", ".join(f"{rate:g}" for rate in comparison.muon_learning_rates)
    shown = [("seeds", seeds), ("learning rates", rates), *([("Muon's learning rates", muon)] if muon else [])]
    parts = [pairs([*shown, ("match", comparison.match)])]
    facts = next((run.facts for run in results.runs if run.facts is not None and run.facts.starts), None)
    if facts is not None:
        about = facts.starts[-1]
        shown = [(name, about[name]) for name in ("device", "num_threads", "torch", "hgrn2") if name in about]
        parts.append(f"<h3>Machine of the first run</h3>{pairs(shown)}")
    if comparison.model:
        parts.append(f"<h3>Settings of all models</h3>{pairs(comparison.model.items())}")
    if comparison.train:
        parts.append(f"<h3>Settings of all runs</h3>{pairs(comparison.train.items())}")
    for task in comparison.tasks:
        shown = {"task": task.task, **task.settings, **({"data": json.dumps(dict(task.data))} if task.data else {})}
        parts.append(f"<h3>Task {rich(task.name)}</h3>{pairs(shown.items())}")
    models = [(model.name, _model_settings(model)) for model in comparison.models]
    parts.append(f"<h3>Models, where they differ</h3>{pairs(models)}")
    return section("settings", "Settings", "\n".join(parts))


def _model_settings(model: ModelEntry) -> str:
    shown = {**model.settings, **model.own_axes()}
    return ", ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in shown.items())
