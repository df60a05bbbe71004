"""Time in interleaved rounds, and write results as a table for people and as one line of JSON for machines."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import environment  # noqa: F401  (before torch)
import torch

RATE_UNITS = ("tokens/s", "MB/s", "steps/s")


@dataclass
class Row:
    """One measured number.

    Attributes:
        name: what was measured.
        value: the median, in `unit`; None when there is nothing to show, and `note` says why.
        unit: "ms", "tokens/s", ...
        low: smallest of the measurements.
        high: largest of the measurements.
        peer: name of the row this one is compared with.
        ratio: how many times faster than the peer.
        note: anything a reader must know.
    """

    name: str
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    peer: str | None = None
    ratio: float | None = None
    note: str | None = None


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--rounds", type=int, default=9, help="each round times every candidate once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of every candidate")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    return parser


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each candidate, round by round, so that all see the machine in the same moods.

    Args:
        candidates: functions by name; each is called once before anything is timed.
        rounds: how often each is timed.
        device: waited for after each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for function in candidates.values():
        function()
    for i in range(rounds):
        order = list(candidates) if i % 2 == 0 else list(candidates)[::-1]
        for name in order:
            _wait(device)
            start = time.perf_counter()
            candidates[name]()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def row(name: str, values: Sequence[float], unit: str, note: str | None = None) -> Row:
    """A row from repeated measurements: median and range."""
    return Row(name, statistics.median(values), unit, min(values), max(values), note=note)


def compare(rows: Sequence[Row], name: str, peer: str) -> None:
    """Fills in peer and ratio of the row `name`, where both rows have values of one unit."""
    by_name = {r.name: r for r in rows}
    ours, theirs = by_name.get(name), by_name.get(peer)
    if ours is None or theirs is None or not ours.value or not theirs.value:
        return
    assert ours.unit == theirs.unit, f"{name} is in {ours.unit}, {peer} in {theirs.unit}"
    ours.peer = peer
    ours.ratio = ours.value / theirs.value if ours.unit in RATE_UNITS else theirs.value / ours.value


def device_name(device: str) -> str:
    """The processor in words, with the threads used."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
        flags = next((line for line in lines if line.startswith("flags")), "").split()
        marks = [
            mark
            for flag, mark in (("avx512f", "AVX-512"), ("avx512_bf16", "bf16"), ("amx_bf16", "AMX"))
            if flag in flags
        ]
        model += f" ({', '.join(marks)})" if marks else ""
    # the cores this process may use: a benchmark can be confined to some of a larger machine's
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {num_cores} cores, {torch.get_num_threads()} threads"


def report(
    benchmark: str, settings: Mapping[str, object], rows: Sequence[Row], device: str, out: Path | None,
    further: Mapping[str, object] | None = None,
) -> None:  # fmt: skip
    """Prints the table, then one line of JSON, with further keys at its end; writes that line to `out` too."""
    record = make_record(benchmark, settings, rows, device) | dict(further or {})
    _print_table(f"{benchmark}: {', '.join(f'{k} {v}' for k, v in settings.items())}", record["device"], rows)
    if out is not None:
        write_record(record, out)
    print(json.dumps(record))


def make_record(benchmark: str, settings: Mapping[str, object], rows: Sequence[Row], device: str) -> dict[str, object]:
    """Return the values of the line of JSON."""
    return {
        "benchmark": benchmark,
        "settings": dict(settings),
        "device": device_name(device),
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": [_short(r) for r in rows],
    }


def write_record(record: Mapping[str, object], out: Path) -> None:
    """The whole file or nothing of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
    partial.replace(out)


def _short(row: Row) -> dict[str, object]:
    values = {key: _round(value) if isinstance(value, float) else value for key, value in asdict(row).items()}
    always = ("name", "value", "unit", "peer", "ratio")
    return {key: value for key, value in values.items() if key in always or value is not None}


def _round(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")


def cells(row: Mapping[str, object]) -> list[str]:
    """Return the cells of a row of the JSON in a table: name, median, range, comparison, note."""
    value, low, high, ratio = (row.get(key) for key in ("value", "low", "high", "ratio"))
    return [
        str(row["name"]),
        "-" if value is None else f"{_digits(value)} {row['unit']}",
        "" if low is None else f"{_digits(low)} - {_digits(high)}",
        "" if ratio is None else f"{ratio:.2f}x {row['peer']}",
        str(row.get("note") or ""),
    ]


HEADER = ["what", "median", "range", "speed against", "note"]


def _digits(value: object) -> str:
    assert isinstance(value, (int, float))
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _print_table(title: str, device: object, rows: Sequence[Row]) -> None:
    table = [cells(_short(r)) for r in rows]
    # without notes the last column would only take space
    width = 5 if any(line[4] for line in table) else 4
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        sizes = [max(len(line[i]) for line in [HEADER, *table]) for i in range(width)]
        print(f"{title}\n{device}")
        for line in [HEADER, *table]:
            print("  ".join(cell.ljust(size) for cell, size in zip(line, sizes, strict=False)).rstrip())
        return
    shown = Table(title=title, caption=str(device))
    for i, column in enumerate(HEADER[:width]):
        shown.add_column(column, justify="right" if i in (1, 2) else "left", overflow="fold")
    for line in table:
        shown.add_row(*line[:width])
    Console(width=None if os.isatty(1) else 150).print(shown)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (
        "hgrn2",
        "torch",
        "triton",
        "fla-core",
        "numpy",
        "onnx",
        "onnxruntime",
        "transformers",
        "tokenizers",
        "datasets",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "hgrn2" not in found:
        import hgrn2

        found["hgrn2"] = hgrn2.__version__
    return found


def _commit() -> str:
    """The commit that runs; a copy without git may say so in a file `COMMIT` beside the sources."""
    root = Path(__file__).resolve().parent
    told = root.parent / "COMMIT"
    if told.exists():
        return told.read_text(encoding="utf-8").strip()

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "../src", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
