"""Charts of the report as HTML: lines in an SVG that stretches, text and dots placed over it at their own size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hgrn2.train.curves import log_ticks, nice_ticks, thin
from hgrn2.train.report.words import plain, rich

# more points than this are more than a screen shows
MOST_POINTS = 400
_SIZE = 1000


@dataclass(frozen=True)
class Axis:
    """A range of values laid over 0 to 100 percent.

    Attributes:
        low: value at 0 percent.
        high: value at 100 percent.
        label: what is measured, with its unit.
        form: a tick's text.
        is_log: whether equal distances are equal factors.
        most_ticks: about how many ticks there is room for.
        unit: what the ticks count, in the values' own unit: 60 for minutes where the values are seconds.
    """

    low: float
    high: float
    label: str
    form: Callable[[float], str]
    is_log: bool = False
    most_ticks: int = 5
    unit: float = 1.0

    def percent(self, value: float) -> float:
        """Return the position of a value, clipped to 0 and 100."""
        scale = math.log if self.is_log else float
        low, high = scale(self.low), scale(self.high)
        if high <= low:
            return 0.0
        return min(100.0, max(0.0, 100 * (scale(value) - low) / (high - low)))

    def ticks(self) -> list[tuple[float, str]]:
        """Percent and text of each tick."""
        if not self.is_log:
            values = nice_ticks(self.low / self.unit, self.high / self.unit, self.most_ticks)
        else:
            values = log_ticks(self.low / self.unit, self.high / self.unit)
        return [(self.percent(value * self.unit), self.form(value)) for value in values]


@dataclass(frozen=True)
class Line:
    """Points joined by a line, in a colour that the style sheet names after its role."""

    x: Sequence[float]
    y: Sequence[float | None]
    role: str


@dataclass(frozen=True)
class Band:
    """The range between the least and the largest value of neighbouring points."""

    x: np.ndarray
    y: np.ndarray
    role: str


@dataclass(frozen=True)
class Label:
    """A few words beside a point; `side` is where they stand: above, below, or on a level line across the chart."""

    x: float
    y: float
    text: str
    role: str
    side: str


@dataclass(frozen=True)
class Moment:
    """A vertical line at something that happened."""

    x: float
    text: str


def line_chart(
    title: str, x: Axis, y: Axis, *, lines: Sequence[Line], summary: str, bands: Sequence[Band] = (),
    dots: Sequence[Line] = (), labels: Sequence[Label] = (), moments: Sequence[Moment] = (), right: Axis | None = None,
    x_key: str = "", is_small: bool = False,
) -> str:  # fmt: skip
    """Draw a chart.

    Args:
        title: heading of the chart.
        x: horizontal axis.
        y: vertical axis, on the left.
        lines: drawn from the first to the last.
        summary: what the chart shows in one sentence, for people who do not see it.
        bands: drawn below the lines.
        dots: points marked one by one.
        labels: words on the chart.
        moments: what happened when.
        right: a second scale for the same heights.
        x_key: series of the page's data that the x axis shows, for the read-out; empty: no read-out.
        is_small: half the height.
    """
    shapes = [f'<path class="grid" d="{"".join(f"M0 {_y(p)}H{_SIZE}" for p, _ in y.ticks())}"/>']
    shapes += [f'<path class="moment" d="M{_x(x.percent(m.x))} 0V{_SIZE}"/>' for m in moments]
    shapes += [f'<path class="band {b.role}" d="{_band_path(b, x, y)}"/>' for b in bands]
    levels = [label for label in labels if "level" in label.side]
    shapes += [f'<path class="level" d="M0 {_y(y.percent(label.y))}H{_SIZE}"/>' for label in levels]
    shapes += [f'<path class="line {line.role}" d="{_path(line, x, y)}"/>' for line in lines]
    text = [f'<span class="tick y" style="top:{_css(100 - p)}">{rich(t)}</span>' for p, t in y.ticks()]
    text += [f'<span class="tick x" style="left:{_css(p)}">{rich(t)}</span>' for p, t in x.ticks()]
    if right is not None:
        text += [f'<span class="tick right" style="top:{_css(100 - p)}">{rich(t)}</span>' for p, t in right.ticks()]
        text.append(f'<span class="axis right">{rich(right.label)}</span>')
    text.append(f'<span class="axis y">{rich(y.label)}</span><span class="axis x">{rich(x.label)}</span>')
    for m in moments:
        text.append(f'<span class="moment" style="left:{_css(x.percent(m.x))}">{rich(m.text)}</span>')
    for series in dots:
        text += [
            f'<i class="dot {series.role}" style="left:{_css(x.percent(at))};top:{_css(100 - y.percent(value))}"></i>'
            for at, value in zip(series.x, series.y, strict=True) if value is not None
        ]  # fmt: skip
    for label in labels:
        text.append(
            f'<span class="label {label.side} {label.role}" style="left:{_css(x.percent(label.x))};'
            f'top:{_css(100 - y.percent(label.y))}">{rich(label.text)}</span>'
        )
    probe = f' data-x="{x_key}" data-low="{x.low!r}" data-high="{x.high!r}"' if x_key else ""
    return (
        f'<figure class="chart{" small" if is_small else ""}{" twin" if right else ""}"><h3>{rich(title)}</h3>'
        f'<div class="plot" role="img" aria-label="{plain(summary)}"{probe}>'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg>'
        f'<div aria-hidden="true">{"".join(text)}</div></div></figure>\n'
    )


def strip_chart(title: str, note: str, x: Axis, layers: Sequence[int], values: np.ndarray, summary: str) -> str:
    """Draw the spread of each layer's channels: a row a layer, with the median and two ranges around it.

    Args:
        title: heading of the chart.
        note: how to read it; HTML.
        x: the axis along a row.
        layers: the rows' names, L of them.
        values: [L, D], the channels of every layer; with one channel a dot alone.
        summary: for people who do not see it.
    """
    rows = []
    for row in values:
        low, lower, median, upper, high = (x.percent(v) for v in np.quantile(row, [0.05, 0.25, 0.5, 0.75, 0.95]))
        ranges = "" if len(row) == 1 else _span("wide", low, high) + _span("half", lower, upper)
        rows.append(f'{ranges}<i class="dot median" style="left:{_css(median)}"></i>')
    return _rows(title, note, x, layers, rows, summary)


def density_chart(
    title: str, note: str, x: Axis, layers: Sequence[int], counts: np.ndarray, edges: np.ndarray, summary: str
) -> str:
    """Draw a histogram a layer as a row of shades; a shade is a factor of ten in share.

    Args:
        title: heading of the chart.
        note: how to read it; HTML.
        x: the axis along a row.
        layers: the rows' names, L of them.
        counts: [L, bins].
        edges: [bins + 1].
        summary: for people who do not see it.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    rows = []
    for row in shares:
        paths: dict[int, str] = {}
        for share, left, stop in zip(row, edges[:-1], edges[1:], strict=True):
            if share >= 1e-4:
                # two shades a decade, from one in ten thousand to all
                shade = min(8, 1 + int(2 * (math.log10(share) + 4)))
                start = _x(x.percent(left))
                paths[shade] = paths.get(shade, "") + f"M{start} 0H{_x(x.percent(stop))}V1H{start}"
        shapes = "".join(f'<path class="s{shade}" d="{d}"/>' for shade, d in sorted(paths.items()))
        rows.append(f'<svg viewBox="0 0 {_SIZE} 1" preserveAspectRatio="none" aria-hidden="true">{shapes}</svg>')
    return _rows(title, note, x, layers, rows, summary, style="density")


def _rows(
    title: str, note: str, x: Axis, layers: Sequence[int], rows: Sequence[str], summary: str, style: str = ""
) -> str:
    ticks = "".join(f'<span class="tick x" style="left:{_css(p)}">{rich(t)}</span>' for p, t in x.ticks())
    lines = "".join(f'<i class="grid" style="left:{_css(p)}"></i>' for p, _ in x.ticks())
    # names of a few of very many rows
    every = 1 if len(layers) <= 16 else 2 if len(layers) <= 32 else 4
    cells = "".join(
        f'<div class="row"><b>{layer if index % every == 0 else ""}</b>{row}</div>'
        for index, (layer, row) in enumerate(zip(layers, rows, strict=True))
    )
    classes = f"strips {style}{' dense' if len(layers) > 16 else ''}".strip()
    return (
        f'<figure class="chart"><h3>{rich(title)}</h3><figcaption>{note}</figcaption>'
        f'<div class="{classes}" role="img" aria-label="{plain(summary)}"><div aria-hidden="true">'
        f'{lines}{cells}{ticks}<span class="axis y">layer</span><span class="axis x">{rich(x.label)}</span>'
        "</div></div></figure>\n"
    )


def _span(name: str, low: float, high: float) -> str:
    return f'<i class="{name}" style="left:{_css(low)};width:{_css(high - low)}"></i>'


def _path(line: Line, x: Axis, y: Axis) -> str:
    parts, pen_is_down = [], False
    for at, value in zip(line.x, line.y, strict=True):
        if value is None:
            pen_is_down = False
            continue
        parts.append(f"{'L' if pen_is_down else 'M'}{_x(x.percent(at))} {_y_free(y, value)}")
        pen_is_down = True
    return "".join(parts)


def _band_path(band: Band, x: Axis, y: Axis) -> str:
    starts = thin(len(band.x), MOST_POINTS)
    lows, highs = np.minimum.reduceat(band.y, starts), np.maximum.reduceat(band.y, starts)
    at = [_x(x.percent(value)) for value in band.x[starts]]
    forth = [f"{a} {_y_free(y, value)}" for a, value in zip(at, highs, strict=True)]
    back = [f"{a} {_y_free(y, value)}" for a, value in zip(reversed(at), lows[::-1], strict=True)]
    return f"M{'L'.join(forth + back)}Z"


def _x(percent: float) -> str:
    return f"{percent * _SIZE / 100:.1f}".removesuffix(".0")


def _y(percent: float) -> str:
    return _x(100 - percent)


def _y_free(axis: Axis, value: float) -> str:
    """Return a height that may lie outside the chart, where the line leaves it."""
    height = _SIZE * (1 - (value - axis.low) / (axis.high - axis.low))
    return f"{min(9999.0, max(-9999.0, height)):.1f}".removesuffix(".0")


def _css(percent: float) -> str:
    return f"{percent:.2f}".rstrip("0").rstrip(".") + "%"
