"""Charts as HTML: lines in a stretched SVG, with text and dots of fixed size placed over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hgrn2.train.curves import log_ticks, nice_ticks, thin
from hgrn2.train.report.words import plain, rich

# about as many points as a screen can show
MAX_POINTS = 400
_SIZE = 1000


@dataclass(frozen=True)
class Axis:
    """A range of values mapped to 0 to 100 percent.

    Attributes:
        low: value at 0 percent.
        high: value at 100 percent.
        label: quantity and unit.
        form: formats the text of a tick.
        is_log: whether the scale is logarithmic.
        most_ticks: approximate maximum number of ticks.
        unit: unit of the ticks in units of the values, e.g. 60 for ticks in minutes of values in seconds.
        at: values of the ticks; empty chooses round ones.
    """

    low: float
    high: float
    label: str
    form: Callable[[float], str]
    is_log: bool = False
    most_ticks: int = 5
    unit: float = 1.0
    at: Sequence[float] = ()

    def percent(self, value: float) -> float:
        """Return the position of a value, clipped to 0 and 100."""
        scale = math.log if self.is_log else float
        low, high = scale(self.low), scale(self.high)
        if high <= low:
            return 0.0
        return min(100.0, max(0.0, 100 * (scale(value) - low) / (high - low)))

    def ticks(self) -> list[tuple[float, str]]:
        """Return the position in percent and the text of each tick."""
        if self.at:
            return [(self.percent(value), self.form(value / self.unit)) for value in self.at]
        if not self.is_log:
            values = nice_ticks(self.low / self.unit, self.high / self.unit, self.most_ticks)
        else:
            values = log_ticks(self.low / self.unit, self.high / self.unit)
        return [(self.percent(value * self.unit), self.form(value)) for value in values]


@dataclass(frozen=True)
class Line:
    """A polyline; the style sheet defines the colour of its role."""

    x: Sequence[float]
    y: Sequence[float | None]
    role: str


@dataclass(frozen=True)
class Band:
    """The range between the minimum and maximum of neighbouring points."""

    x: np.ndarray
    y: np.ndarray
    role: str


@dataclass(frozen=True)
class Label:
    """Text at a point; `side` is its position: above, below, or on a horizontal line across the chart."""

    x: float
    y: float
    text: str
    role: str
    side: str


@dataclass(frozen=True)
class Moment:
    """A vertical line that marks an event."""

    x: float
    text: str


@dataclass(frozen=True)
class LineChart:
    """A line chart.

    Attributes:
        title: heading of the chart.
        x: horizontal axis.
        y: vertical axis, on the left.
        lines: lines, drawn in order.
        summary: the content of the chart in one sentence, for screen readers.
        bands: bands drawn below the lines.
        dots: series whose points are marked.
        labels: text on the chart.
        moments: vertical lines at events.
        right: a second vertical axis, on the right.
        x_key: key of the x values in the data of the page, for the read-out; empty means no read-out.
        is_small: draw at half the height.
    """

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    summary: str
    bands: Sequence[Band] = ()
    dots: Sequence[Line] = ()
    labels: Sequence[Label] = ()
    moments: Sequence[Moment] = ()
    right: Axis | None = None
    x_key: str = ""
    is_small: bool = False

    def html(self) -> str:
        """Return the chart as HTML."""
        x, y, right = self.x, self.y, self.right
        shapes = [f'<path class="grid" d="{"".join(f"M0 {_y(p)}H{_SIZE}" for p, _ in y.ticks())}"/>']
        shapes += [f'<path class="moment" d="M{_x(x.percent(m.x))} 0V{_SIZE}"/>' for m in self.moments]
        shapes += [f'<path class="band {b.role}" d="{_band_path(b, x, y)}"/>' for b in self.bands]
        levels = [label for label in self.labels if "level" in label.side]
        shapes += [f'<path class="level" d="M0 {_y(y.percent(label.y))}H{_SIZE}"/>' for label in levels]
        shapes += [f'<path class="line {line.role}" d="{_path(line, x, y)}"/>' for line in self.lines]
        text = [f'<span class="tick y" style="top:{_css(100 - p)}">{rich(t)}</span>' for p, t in y.ticks()]
        text += [f'<span class="tick x" style="left:{_css(p)}">{rich(t)}</span>' for p, t in x.ticks()]
        if right is not None:
            text += [f'<span class="tick right" style="top:{_css(100 - p)}">{rich(t)}</span>' for p, t in right.ticks()]
            text.append(f'<span class="axis right">{rich(right.label)}</span>')
        text.append(f'<span class="axis y">{rich(y.label)}</span><span class="axis x">{rich(x.label)}</span>')
        for m in self.moments:
            at = x.percent(m.x)
            # on a phone, text to the right of a late line would leave the page
            side = " before" if at > 50 else ""
            text.append(f'<span class="moment{side}" style="left:{_css(at)}">{rich(m.text)}</span>')
        for series in self.dots:
            for at, value in zip(series.x, series.y, strict=True):
                if value is not None:
                    place = f"left:{_css(x.percent(at))};top:{_css(100 - y.percent(value))}"
                    text.append(f'<i class="dot {series.role}" style="{place}"></i>')
        for label in self.labels:
            text.append(
                f'<span class="label {label.side} {label.role}" style="left:{_css(x.percent(label.x))};'
                f'top:{_css(100 - y.percent(label.y))}">{rich(label.text)}</span>'
            )
        probe = f' data-x="{self.x_key}" data-low="{x.low!r}" data-high="{x.high!r}"' if self.x_key else ""
        kinds = (" small" if self.is_small else "") + (" twin" if right else "")
        return (
            f'<figure class="chart{kinds}"><h3>{rich(self.title)}</h3>'
            f'<div class="plot" role="img" aria-label="{plain(self.summary)}"{probe}>'
            f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg>'
            f'<div aria-hidden="true">{"".join(text)}</div></div></figure>\n'
        )


def strip_chart(title: str, note: str, x: Axis, layers: Sequence[int], values: np.ndarray, summary: str) -> str:
    """Return a chart with one row per layer: the median over channels and two ranges around it.

    Args:
        title: heading of the chart.
        note: explanation below the title, as HTML.
        x: the horizontal axis of every row.
        layers: names of the L rows.
        values: [L, D], the values of all channels; with D = 1 only a dot is drawn.
        summary: the content of the chart in one sentence, for screen readers.
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
    """Return a chart with one histogram per layer, drawn as shades, two per factor of ten.

    Args:
        title: heading of the chart.
        note: explanation below the title, as HTML.
        x: the horizontal axis of every row.
        layers: names of the L rows.
        counts: [L, bins], the histograms.
        edges: [bins + 1], the edges of the bins.
        summary: the content of the chart in one sentence, for screen readers.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    rows = []
    for row in shares:
        paths: dict[int, str] = {}
        for share, left, stop in zip(row, edges[:-1], edges[1:], strict=True):
            if share >= 1e-4:
                # two shades per decade, from 1e-4 to 1
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
    # label only some of many rows
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
    starts = thin(len(band.x), MAX_POINTS)
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
    """Return a vertical position that may lie outside the chart."""
    height = _SIZE * (1 - (value - axis.low) / (axis.high - axis.low))
    return f"{min(9999.0, max(-9999.0, height)):.1f}".removesuffix(".0")


def _css(percent: float) -> str:
    return f"{percent:.2f}".rstrip("0").rstrip(".") + "%"
