"""A roofline picture from a result of `scan.py --device cuda`: how fast each kernel is, and what the chip allows.

    python benchmarks/roofline.py benchmarks/results/scan-cuda.json docs/images/roofline.png

Wants matplotlib, and the rows "copy bandwidth" and "bfloat16 product", which are the two roofs. Across: operations for
each byte that must move; up: those operations by the measured time. Only products are counted, a multiplication and an
addition as two operations, and nothing for gates, masks and softmax. C is the chunk of 64 tokens, K and V the widths.

Operations of the scan (hgrn2 and flash-linear-attention alike, which has chunks of 64 too), for a token and head:

    forward        q S                  2 K V
                   k^T v into S         2 K V
                   scores q k^T         2 K C/2         causal: a token meets half of its chunk
                   scores v             2 V C/2
                   together             4 K V + C (K + V)
    backward       every product has two gradients: twice the forward pass; and states and scores, which are not kept,
                   are computed again:  2 (4 K V + C (K + V)) + 2 K V + C K

At K = V backward is 2.5 times forward. Operations of causal attention, for a token and head, likewise with T/2 for C/2:

    forward        scores and their product with v: 4 T/2 K, so T of them 4 T^2/2 K
    backward       four gradients, and scores again: 2.5 times forward

Bytes, two for each value of a token and head, with forward + backward as the sum of both passes:

    scan           forward q f v y, 2 (2 K + 2 V); backward q f v dy dq df dv, 2 (4 K + 3 V)
    attention      forward q k v y; backward q k v y dy dq dk dv: 2 (2 K + 2 V) and 2 (4 K + 4 V)
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

CHUNK = 64
TIMED = re.compile(r"B(?P<batch>\d+) T(?P<length>\d+): (?P<name>.+), (?P<kind>forward|forward \+ backward)")
# the work of the scan does not depend on the implementation; the names here are drawn
SCANS = {"hgrn2": "#2b6cb0", "fla chunk_gla with gates": "#c05621"}
ATTENTION = {"attention, cuDNN": "#4a7c3a", "attention, FlashAttention-2": "#7f5fa8"}
COLORS = SCANS | ATTENTION
MARKERS = "osD^vP*X"


class Work(NamedTuple):
    """Operations, and bytes that must move, for one token and head."""

    operations: float
    moved: float


class Point(NamedTuple):
    """A timed row: whose, at which size, in which passes, and its work a second."""

    name: str
    size: str
    kind: str
    operations_per_byte: float
    teraflops: float


def scan_work(k_width: int, v_width: int, backward: bool) -> Work:
    """The chunked scan in bfloat16; with `backward` both passes."""
    forward = 4 * k_width * v_width + CHUNK * (k_width + v_width)
    moved = 4 * (k_width + v_width)
    if not backward:
        return Work(forward, moved)
    again = 2 * k_width * v_width + CHUNK * k_width
    return Work(3 * forward + again, moved + 2 * (4 * k_width + 3 * v_width))


def attention_work(length: int, width: int, backward: bool) -> Work:
    """Causal attention over `length` tokens in bfloat16, heads of `width`; with `backward` both passes."""
    forward, moved = 2 * length * width, 8 * width
    return Work(3.5 * forward, 3 * moved) if backward else Work(forward, moved)


def points(result: Mapping[str, Any]) -> list[Point]:
    """Return the points of a result to draw, in the order of its rows."""
    heads, k_width, v_width = (int(result["settings"][key]) for key in "HKV")
    found = []
    for row in result["rows"]:
        match = TIMED.fullmatch(row["name"])
        if match is None or not row["value"] or row["unit"] != "ms":
            continue
        name, backward, length = match["name"], match["kind"] != "forward", int(match["length"])
        if name in SCANS:
            work = scan_work(k_width, v_width, backward)
        elif name in ATTENTION:
            work = attention_work(length, k_width, backward)
        else:
            continue
        operations = work.operations * int(match["batch"]) * length * heads
        size = f"{match['batch']} x {length:,}"
        speed = 1e-12 * operations / (1e-3 * row["value"])
        found.append(Point(name, size, match["kind"], work.operations / work.moved, speed))
    return found


def roofs(result: Mapping[str, Any]) -> tuple[float, float]:
    """Copy bandwidth in TB/s and bfloat16 products in TFLOP/s.

    Raises:
        ValueError: one of the rows is missing.
    """
    found = []
    for name, unit in (("copy bandwidth", "TB/s"), ("bfloat16 product", "TFLOP/s")):
        values = [r["value"] for r in result["rows"] if r["name"].startswith(name) and r["unit"] == unit and r["value"]]
        if not values:
            raise ValueError(f"no row {name!r} in {unit}; wanted a result of benchmarks/scan.py --device cuda")
        found.append(float(values[0]))
    return found[0], found[1]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Writes the picture.

    Raises:
        ValueError: the result has no roofs, or no time of a kernel.
    """
    bandwidth, peak = roofs(result)
    marks = points(result)
    if not marks:
        raise ValueError("no time of a kernel at a size; wanted a result of benchmarks/scan.py --device cuda")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    low = min(p.operations_per_byte for p in marks) / 3
    high = 3 * max(p.operations_per_byte for p in marks)
    # from the slope's lower end over the ridge to the right end
    across = [low, peak / bandwidth, max(high, 2 * peak / bandwidth)]
    axes.loglog(across, [min(bandwidth * x, peak) for x in across], color="#333333", linewidth=1.5)
    axes.annotate(
        f"copy {bandwidth:.3g} TB/s, products {peak:.0f} TFLOP/s", (across[-1], peak), (-4, 8),
        textcoords="offset points", ha="right",
    )  # fmt: skip
    sizes = dict(zip(dict.fromkeys(p.size for p in marks), MARKERS, strict=False))
    for p in marks:
        color = COLORS[p.name]
        # hollow is forward alone
        face = color if p.kind != "forward" else "white"
        axes.plot(
            p.operations_per_byte, p.teraflops, sizes.get(p.size, "."), color=color, markerfacecolor=face, markersize=8
        )
    names = dict.fromkeys(p.name for p in marks)
    legend = [Line2D([], [], color=COLORS[name], linewidth=5, label=name) for name in names]
    legend += [
        Line2D([], [], color="#333333", marker=m, linestyle="", markerfacecolor="white", label=f"{size} tokens")
        for size, m in sizes.items()
    ]
    legend.append(Line2D([], [], linestyle="", label="hollow: forward; filled: with backward"))
    axes.legend(handles=legend, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{result['device']}, bfloat16, commit {result['commit'][:10]}", loc="left", fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_ylim(top=2 * peak)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str]) -> int:
    """Draws; 2 and a message when there is nothing to draw from."""
    if len(arguments) != 2:
        print("usage: python benchmarks/roofline.py RESULT.json OUT.png", file=sys.stderr)
        return 2
    source = Path(arguments[0])
    try:
        draw(json.loads(source.read_text(encoding="utf-8")), Path(arguments[1]))
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {source}: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"error: {source}: no {error}; wanted a result of benchmarks/scan.py --device cuda", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
