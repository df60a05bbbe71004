"""Pictures of a comparison as PNG files."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from hgrn2.compare.report import tables
from hgrn2.compare.report.curves import limits, loss_curves, rate_curves, width_curves
from hgrn2.compare.results import Results, TaskSummary
from hgrn2.storage.staging import staged_file
from hgrn2.train.curves import time_unit
from hgrn2.train.plots import STYLE

FOLDER_NAME = "plots"
# those of compare.css
_COLOURS = (
    *("#1f6fb2", "#b8480a", "#2f855a", "#8a3ea8", "#a67c00", "#c2255c"),
    *("#0b7285", "#5c4033", "#5f6b75", "#4c6ef5", "#74901a", "#e0699a"),
)


def draw(results: Results) -> list[Path]:
    """Draw the losses and the metric of every task into OUT/plots; a task without finished runs has no pictures.

    Args:
        results: what the runs have reached.

    Returns:
        The paths.
    """
    paths = []
    models = [model.name for model in results.plan.comparison.models]
    styles = {
        name: {"color": _COLOURS[i % len(_COLOURS)], "linestyle": "-" if i < len(_COLOURS) else "--"}
        for i, name in enumerate(models)
    }
    if (widths := _widths(results)) is not None:
        paths.append(_save(widths, results.out / FOLDER_NAME / "width.png"))
    for task in results.tasks:
        figures = {"loss": _losses(task, styles), "metric": _metric(task, styles)}
        for name, figure in figures.items():
            if figure is not None:
                paths.append(_save(figure, results.out / FOLDER_NAME / f"{task.name}.{name}.png"))
    return paths


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    with staged_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return path


def _widths(results: Results) -> Figure | None:
    """Return the metric against the width, a panel for each task; None if models are not named by their width."""
    found = [(task, curves) for task in results.tasks if (curves := width_curves(task))]
    if not found:
        return None
    colours = list(dict.fromkeys(curve.model for _, curves in found for curve in curves))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * len(found) + 1.2, 3.6), layout="constrained")
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, (task, curves) in zip(panels, found, strict=True):
            for curve in curves:
                colour = _COLOURS[colours.index(curve.model) % len(_COLOURS)]
                axes.plot(curve.x, curve.y, marker="o", markersize=4, label=curve.model, color=colour)
            ticks = sorted({x for curve in curves for x in curve.x})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set(title=task.name, xlabel="width")
        panels[0].set_ylabel(tables.metric_label(found[0][0]))
        panels[-1].legend(loc="best", fontsize=8)
    return figure


def _losses(task: TaskSummary, styles: dict[str, dict[str, str]]) -> Figure | None:
    by_tokens, by_time = loss_curves(task, "tokens"), loss_curves(task, "elapsed_s")
    if not by_tokens:
        return None
    scale, unit = time_unit(max(curve.x[-1] for curve in by_time))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, curves, one in ((left, by_tokens, 1.0), (right, by_time, scale)):
            for curve in curves:
                axes.plot([x / one for x in curve.x], curve.y, label=curve.model, linewidth=1.5, **styles[curve.model])
        left.set_ylim(*limits(by_tokens))
        left.set(title=f"{task.name}: loss against tokens", xlabel="training tokens", ylabel="training loss, smoothed")
        left.xaxis.set_major_formatter(EngFormatter(sep=""))
        right.set(title="Loss against time", xlabel=unit)
        right.legend(loc="upper right", fontsize=8, ncols=2 if len(by_tokens) > 6 else 1)
    return figure


def _metric(task: TaskSummary, styles: dict[str, dict[str, str]]) -> Figure | None:
    cells = [cell for cell in task.cells if cell.best is not None]
    if not cells:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.8 + 0.34 * max(6, len(cells))), layout="constrained")
        left, right = figure.subplots(1, 2)
        for row, cell in enumerate(cells):
            assert cell.best is not None
            # the spread is the whole range, as standard deviations of two seeds mislead the eye
            values, color = cell.best.values, styles[cell.model]["color"]
            left.plot([min(values), max(values)], [row, row], color=color, linewidth=4, alpha=0.4)
            left.plot([cell.best.mean], [row], color=color, marker="o")
        left.set_yticks(range(len(cells)), [cell.model for cell in cells])
        left.invert_yaxis()
        left.set(title=f"{task.name}: {tables.direction(task)}", xlabel="mean and range over seeds")
        for curve in rate_curves(task):
            right.plot(curve.x, curve.y, marker="o", markersize=4, label=curve.model, **styles[curve.model])
        right.set_xscale("log")
        rates = sorted({rate.learning_rate for cell in task.cells for rate in cell.rates})
        right.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
        right.xaxis.set_minor_locator(NullLocator())
        right.set(title="Against the learning rate", xlabel="peak learning rate", ylabel=tables.metric_label(task))
    return figure
