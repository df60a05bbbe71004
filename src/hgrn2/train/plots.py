"""Pictures of a run, drawn from its metrics.jsonl and gates.npz."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator

from hgrn2.errors import UserError
from hgrn2.storage.staging import staged_file
from hgrn2.train.curves import bits_per_nat, log_ticks, loss_limits, smooth, time_unit
from hgrn2.train.gates import GATES_NAME, GateSummary
from hgrn2.train.metrics import read_metrics
from hgrn2.train.report.facts import RunFacts

FOLDER_NAME = "plots"

STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#555555",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "legend.frameon": False,
    "font.size": 10,
}
_TRAIN, _VALIDATION, _BAND, _CAPTION = "#2b6cb0", "#c05621", "#a9c6e8", "#555555"


def plot_run(run_dir: Path) -> list[Path]:
    """Draw everything the run folder has data for.

    Args:
        run_dir: a run folder; it has gates.npz once the run has ended.

    Returns:
        The paths of the plots, in RUN/plots.

    Raises:
        UserError: the folder has no metrics, or neither training steps nor gates.
    """
    records = read_metrics(run_dir)
    train = [r for r in records if r["kind"] == "train" and r["loss"] is not None]
    pictures = {}
    if train:
        pictures["loss"] = loss_figure(train, [r for r in records if r["kind"] == "validation"], RunFacts.read(run_dir))
    if (run_dir / GATES_NAME).exists():
        pictures["memory"] = memory_figure(GateSummary.load(run_dir))
    if not pictures:
        raise UserError(f"{run_dir}: no training step is recorded; let the run do at least one", "not-found")
    folder = run_dir / FOLDER_NAME
    folder.mkdir(exist_ok=True)
    paths = []
    for name, figure in pictures.items():
        paths.append(folder / f"{name}.png")
        with staged_file(paths[-1]) as partial:
            figure.savefig(partial, dpi=150, format="png")
    return paths


def loss_figure(train: list[dict[str, Any]], validation: list[dict[str, Any]], facts: RunFacts) -> Figure:
    """Draw the loss against tokens (or examples) and against time: steps, their moving average, and validations."""
    losses = np.array([r["loss"] for r in train])
    scale, time = time_unit(max(r["elapsed_s"] for r in [*train, *validation]))
    low, high = loss_limits(train, validation)
    factor = bits_per_nat(validation)
    data = "text" if facts.reads_text else "data"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, key, one in ((left, "tokens", 1.0), (right, "elapsed_s", scale)):
            x = np.array([r[key] for r in train]) / one
            axes.plot(x, losses, color=_BAND, linewidth=0.7)
            axes.plot(x, smooth(losses), color=_TRAIN, linewidth=1.8, label="training, smoothed")
            axes.plot(
                [r[key] / one for r in validation],
                [np.nan if r["val_loss"] is None else r["val_loss"] for r in validation],
                color=_VALIDATION, marker="o", markersize=4, linewidth=1.0, linestyle=":", label=f"held-out {data}",
            )  # fmt: skip
            axes.set_xlim(0, max(x[-1], *(r[key] / one for r in validation), 1e-9) * 1.02)
        left.set_ylim(low, high)
        counted, unit = facts.task.counted, facts.task.unit
        left.set(title=f"Loss against {counted}", xlabel=f"training {counted}", ylabel=unit)
        left.xaxis.set_major_formatter(EngFormatter(sep=""))
        right.set(title="Loss against time", xlabel=time)
        right.legend(loc="upper right")
        if factor is not None:
            bits = right.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
            bits.set_ylabel("bits per byte of held-out text")
        figure.supxlabel(_loss_caption(validation, unit, data), fontsize=9, color=_CAPTION, x=0.01, ha="left")
    return figure


def _loss_caption(validation: list[dict[str, Any]], unit: str, data: str) -> str:
    caption = f"Mean of -log p in {unit}; faint: every step, line: moving average."
    measured = [r for r in validation if r["val_loss"] is not None]
    if not measured:
        return caption
    last = measured[-1]
    caption += f" Held-out {data}, never trained on, at the end: {last['val_loss']:.3f} {unit}"
    bits = last.get("val_bits_per_byte")
    return caption + ("." if bits is None else f", {bits:.3f} bits per byte.")


def memory_figure(gates: GateSummary) -> Figure:
    """Draw lower bounds, forget gates, half-lives and state norms of each layer."""
    num_layers = len(gates.state_norm)
    layers = np.arange(num_layers)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 8.4), layout="constrained")
        ((bounds, gate), (half_life, norm)) = figure.subplots(2, 2)

        _bands(bounds, layers, gates.lower_bound)
        bounds.set(title="Lower bound of the forget gate", ylabel="lower bound", ylim=(-0.02, 1.02))

        density = gates.forget_gate_counts / np.maximum(gates.forget_gate_counts.sum(1, keepdims=True), 1)
        edges = gates.forget_gate_edges
        # logarithmic: most of a layer's gates are in a few bins
        image = gate.pcolormesh(
            np.arange(num_layers + 1) - 0.5, edges, np.where(density > 0, density, np.nan).T,
            norm=LogNorm(vmin=1e-4, vmax=1.0), cmap="viridis", rasterized=True,
        )  # fmt: skip
        gate.grid(False)
        gate.set(title="Forget gate", ylabel="forget gate f", ylim=(0, 1))
        figure.colorbar(image, ax=gate, label=f"share of gates (bins of {edges[1]:.2f})")

        _bands(half_life, layers, gates.half_life_tokens)
        half_life.set_yscale("log")
        half_life.set(title="Memory half-life", ylabel="tokens")
        half_life.legend(loc="upper left")
        low, high = half_life.get_ylim()
        half_life.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
        half_life.yaxis.set_major_formatter(EngFormatter(sep=""))
        half_life.yaxis.set_minor_locator(NullLocator())

        norm.plot(layers, gates.state_norm, color=_TRAIN, marker="o", linewidth=1.8)
        norm.set(title="State norm", ylabel="Frobenius norm of a head")
        norm.set_ylim(0, 1.1 * max(gates.state_norm.max(), 1e-6))
        for axes in (bounds, gate, half_life, norm):
            axes.set_xlabel("layer")
            axes.set_xlim(-0.5, num_layers - 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
            axes.xaxis.set_major_formatter(lambda x, _: str(gates.layer[int(x)]) if 0 <= x < num_layers else "")
        figure.suptitle("What the layers remember", x=0.01, ha="left", fontweight="bold")
        figure.supxlabel(
            f"Measured on {int(gates.num_tokens):,} tokens of held-out text. Layer 0 comes first. The forget gate f "
            "multiplies the state of a channel at every token and cannot fall below its bound;\nthe half-life is the "
            "number of tokens after which half of the state is forgotten, log 2 / mean(-log f).",
            fontsize=9, color=_CAPTION, x=0.01, ha="left",
        )  # fmt: skip
    return figure


def _bands(axes: Axes, layers: np.ndarray, values: np.ndarray) -> None:
    """Draw the median over a layer's channels with its 25 to 75 % and 5 to 95 % ranges."""
    low, lower, median, upper, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
    axes.vlines(layers, low, high, color=_BAND, linewidth=5, label="5 to 95 % of channels")
    axes.vlines(layers, lower, upper, color=_TRAIN, linewidth=5, alpha=0.75, label="25 to 75 %")
    axes.plot(layers, median, color=_VALIDATION, marker="o", markersize=5, linewidth=0, label="median")
