"""Draw the report's figures: losses, speed, learning rate, gradient norm and gates."""

from __future__ import annotations

import numpy as np

from hgrn2.train.curves import Record, bits_per_nat, loss_limits, smooth, thin, time_unit
from hgrn2.train.gates import GateSummary
from hgrn2.train.report.charts import (
    MAX_POINTS,
    Axis,
    Band,
    Label,
    Line,
    LineChart,
    Moment,
    density_chart,
    strip_chart,
)
from hgrn2.train.report.facts import RunFacts
from hgrn2.train.report.words import compact


def loss_figures(facts: RunFacts) -> list[str]:
    """Return the figures of the loss against tokens and against time."""
    train, measured = facts.train, facts.measured
    losses = np.array([r["loss"] for r in train], dtype=float)
    smoothed = smooth(losses)
    low, high = loss_limits(train, facts.validation)
    factor = bits_per_nat(facts.validation)
    levels = {name: bits / factor for name, bits in facts.compressors.items()} if factor else {}
    low, high = min([low, *(v - 0.04 * (high - low) for v in levels.values())]), max([high, *levels.values()])
    y = Axis(low, high, facts.task.unit, "{:g}".format)
    right = None if factor is None else Axis(low * factor, high * factor, "bits per byte", "{:g}".format)
    figures = []
    for key, x, against in (
        ("tokens", _tokens_axis(facts), facts.task.counted), ("elapsed_s", _time_axis(facts), "time"),
    ):  # fmt: skip
        at = np.array([r[key] for r in train], dtype=float)
        some = thin(len(train), MAX_POINTS)
        held_out = Line([r[key] for r in measured], [r["val_loss"] for r in measured], "held-out")
        labels = _curve_labels(at, smoothed, measured, key, y, list(levels.values()))
        for index, (name, value) in enumerate(sorted(levels.items(), key=lambda item: item[1])):
            # put the label of the lowest line below it
            side = "level under" if index == 0 and len(levels) > 1 else "level"
            labels.append(Label(x.high, value, f"{name}  {facts.compressors[name]:.2f}", "level", side))
        figure = LineChart(
            f"Loss against {against}", x, y, right=right, x_key=key,
            bands=[Band(at, losses, "train")],
            lines=[Line(at[some].tolist(), smoothed[some].tolist(), "train"), held_out],
            dots=[held_out], labels=labels, moments=_moments(facts, key),
            summary=_loss_summary(smoothed, measured, f"{x.label}, in {y.label}"),
        )  # fmt: skip
        figures.append(figure.html())
    return figures


def metric_figure(facts: RunFacts) -> list[str]:
    """Return a chart of the task's first figure of a validation, such as the accuracy, against tokens.

    Figures at other lengths or options are dotted lines without labels. Return nothing for tasks whose figures follow
    from the loss, such as perplexity, or with fewer than two validations.
    """
    shown = next(iter(facts.task.figures), None)
    if shown is None or not shown.style.endswith("%"):
        return []
    keys = [shown.key, *sorted({k for r in facts.validation for k in r if k.startswith(f"{shown.key}_")})]
    lines = []
    for index, key in enumerate(keys):
        found = [(r["tokens"], value) for r in facts.validation if isinstance(value := r.get(key), int | float)]
        if len(found) > 1:
            role = "train" if index == 0 else "held-out"
            lines.append(Line([x for x, _ in found], [y for _, y in found], role))
    if not lines:
        return []
    x, y = _tokens_axis(facts), Axis(-0.02, 1.02, shown.label, "{:.0%}".format)
    title = f"{shown.label[:1].upper()}{shown.label[1:]} against {facts.task.counted}"
    ends = [float(line.y[-1] or 0.0) for line in lines]
    labels = [
        Label(
            lines[0].x[-1],
            ends[0],
            f"{shown.label} {ends[0]:.1%}",
            "train",
            "above end" if ends[0] < 0.9 else "below end",
        )
    ]
    summary = f"{title}: from {lines[0].y[0]:.1%} to {ends[0]:.1%} on held-out examples."
    return [LineChart(title, x, y, lines=lines, dots=lines, labels=labels, summary=summary).html()]


def _curve_labels(
    at: np.ndarray, smoothed: np.ndarray, measured: list[Record], key: str, y: Axis, levels: list[float]
) -> list[Label]:
    """Return labels of the curves: above the falling training curve, and at the last held-out point."""
    height = y.high - y.low
    labels = []
    low_enough = np.flatnonzero(smoothed < y.high - 0.35 * height)
    # farther right, the text would leave the chart
    if len(low_enough) and at[low_enough[0]] < 0.7 * at[-1]:
        i = low_enough[0]
        labels.append(Label(float(at[i]), float(smoothed[i]), "training", "train", "above"))
    if measured:
        last = measured[-1]
        loss = last["val_loss"]
        crowded = any(0 < level - loss < 0.2 * height for level in levels)
        side = "above" if loss > smoothed[-1] and not crowded else "below"
        labels.append(Label(last[key], loss, f"held-out {loss:.2f}", "held-out", f"{side} end"))
    return labels


def _loss_summary(smoothed: np.ndarray, measured: list[Record], against: str) -> str:
    words = f"Training loss against {against}: from {smoothed[0]:.2f} to {smoothed[-1]:.2f}."
    if measured:
        words += f" Held-out loss at the end: {measured[-1]['val_loss']:.2f}."
    return words + " The table below has the numbers."


def _moments(facts: RunFacts, key: str) -> list[Moment]:
    """Return markers for resumptions and unfreezing, which may bend the curves."""
    found = [(r["step"], "resumed") for r in facts.starts if r["step"] > 0]
    found += [(r["step"], "all weights learn") for r in facts.records if r["kind"] == "unfreeze"]
    where = {r["step"]: r[key] for r in facts.steps}
    moments = [Moment(where[step], text) for step, text in found if step in where]
    # with many resumptions, draw the lines without labels
    return moments if len(moments) <= 4 else [Moment(m.x, "") for m in moments[:100]]


def small_figures(facts: RunFacts) -> list[str]:
    """Return the figures of speed, learning rate and gradient norm against time."""
    x, steps = _time_axis(facts), facts.steps
    figures = []
    for key, title, unit in (
        ("tokens_per_s", "Speed", f"{facts.task.counted} per second"),
        ("learning_rate", "Learning rate", "learning rate"),
        ("grad_norm", "Gradient norm", "before clipping"),
    ):
        found = [(r["elapsed_s"], r[key]) for r in steps if isinstance(r.get(key), int | float)]
        if not found:
            continue
        at, values = np.array(found, dtype=float).T
        high = float(values.max() if key == "learning_rate" else np.quantile(values, 0.98))
        y = Axis(0.0, 1.1 * high or 1.0, unit, compact, most_ticks=4)
        some = thin(len(values), MAX_POINTS)
        middle = values if key == "learning_rate" else smooth(values)
        summary = f"{title}: {compact(float(middle[0]))} at first, {compact(float(middle[-1]))} at the end."
        is_smooth = key == "learning_rate"
        figure = LineChart(
            title, x, y, x_key="elapsed_s", is_small=True, summary=summary,
            bands=[] if is_smooth else [Band(at, values, "train")],
            lines=[Line(at[some].tolist(), middle[some].tolist(), "train")],
        )  # fmt: skip
        figures.append(figure.html())
    return figures


def gate_figures(gates: GateSummary) -> list[str]:
    """Return the figures of half-life, forget gate, lower bound and state norm, one row per layer."""
    layers = [int(layer) for layer in gates.layer]
    half_lives = gates.half_life_tokens
    low, high = (float(v) for v in np.quantile(half_lives, [0.001, 0.999]))
    low, high = max(low / 1.3, 1e-3), max(high * 1.3, low * 2)
    medians = np.median(half_lives, axis=1)
    longest, shortest = int(medians.argmax()), int(medians.argmin())
    share = Axis(0.0, 1.0, "forget gate f", "{:g}".format)
    top = float(gates.state_norm.max()) or 1.0
    return [
        strip_chart(
            "Memory half-life", "Tokens after which a channel has forgotten half of its content.",
            Axis(low, high, "tokens", compact, is_log=True), layers, half_lives,
            f"Median half-life by layer: shortest {compact(medians[shortest])} tokens in layer {layers[shortest]}, "
            f"longest {compact(medians[longest])} in layer {layers[longest]}.",
        ),
        density_chart(
            "Forget gate", f"Share of gates in each bin: {_KEY}", share, layers, gates.forget_gate_counts,
            gates.forget_gate_edges, "Histogram of the forget gate for each layer.",
        ),
        strip_chart(
            "Lower bound", "Learned minimum of the forget gate, one value per channel.",
            Axis(0.0, 1.0, "lower bound of f", "{:g}".format), layers, gates.lower_bound,
            "Learned lower bound of the forget gate for each layer; the table below has the medians.",
        ),
        strip_chart(
            "State norm", "Frobenius norm of a head's final state, averaged over heads.",
            Axis(0.0, 1.1 * top, "norm", "{:g}".format), layers, gates.state_norm[:, None],
            "Norm of the final state for each layer; the table below has the numbers.",
        ),
    ]  # fmt: skip


# two shades per decade, as in density_chart
_KEY = (
    '<span class="key"><i class="s1"></i> 0.01 % <i class="s3"></i> 0.1 % <i class="s5"></i> 1 % '
    '<i class="s7"></i> 10 %</span>'
)


def _tokens_axis(facts: RunFacts) -> Axis:
    end = max(r["tokens"] for r in [*facts.steps, *facts.validation])
    return Axis(0.0, max(end, 1) * 1.02, f"training {facts.task.counted}", compact)


def _time_axis(facts: RunFacts) -> Axis:
    end = max(r["elapsed_s"] for r in [*facts.steps, *facts.validation])
    scale, unit = time_unit(end)
    return Axis(0.0, max(end, 1e-3) * 1.02, unit, "{:g}".format, unit=scale)
