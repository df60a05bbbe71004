"""Redraw every table and picture of docs/reproduce.md from the committed results.

    python docs/reproduce/redraw.py            # docs/reproduce/results/*.jsonl.gz -> docs/reproduce.md, plots, tables
    python docs/reproduce/redraw.py --check    # only say whether the page is up to date

Results are the files runs.jsonl that `hgrn2 compare` writes, compressed with gzip: NAME.jsonl.gz, or several of one
experiment as NAME-1.jsonl.gz, NAME-2.jsonl.gz. They hold the plan, and the configuration, seed and curve of every run.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from hgrn2.compare.comparison import merge
from hgrn2.compare.report import tables
from hgrn2.compare.report.curves import width_curves
from hgrn2.compare.report.recommendation import recommendation
from hgrn2.compare.results import CellSummary, Results, TaskSummary

HERE = Path(__file__).resolve().parent
NOT_RUN = "Not yet run."
EXPERIMENTS = ("mqar", "language", "ablations", "state-tracking")
EXPANSIONS = [1, 2, 4, 8, 16, 32, 64, 128]


@dataclass(frozen=True)
class Drawn:
    """The text of each block of the page, and the files beside it.

    Attributes:
        blocks: text by the name of the block.
        files: content by path relative to docs/reproduce.
    """

    blocks: dict[str, str]
    files: dict[str, bytes]


def draw(folder: Path) -> Drawn:
    """Return everything that follows from the results in a folder."""
    blocks: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for name in EXPERIMENTS:
        found = sorted(
            path for path in folder.glob(f"{name}*.jsonl.gz") if re.fullmatch(rf"{name}(-\d+)?", path.name[:-9])
        )
        if not found:
            blocks |= {name: NOT_RUN, f"{name}-claim": NOT_RUN}
            continue
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory, name)
            ended = merge(found, out)
            pictures = sorted((out / "plots").glob("*.png"))
            files |= {f"plots/{name}.{path.name}": path.read_bytes() for path in pictures}
            # paths of the temporary folder mean nothing to a reader
            report = (out / "report.md").read_text(encoding="utf-8").replace(str(out), name)
            files[f"tables/{name}.md"] = report.replace("](plots/", f"](../plots/{name}.").encode()
            files[f"tables/{name}.csv"] = (out / "results.csv").read_bytes()
            blocks[name], blocks[f"{name}-claim"] = (
                _experiment(name, ended.results, pictures),
                CLAIMS[name](ended.results),
            )
    return Drawn(blocks, files)


def _experiment(name: str, results: Results, pictures: list[Path]) -> str:
    parts = [tables.summary(results)]
    if len(results.tasks) > 1:
        metrics = {tables.direction(task) for task in results.tasks}
        parts += [f"{' '.join(sorted(metrics))}:", _markdown(tables.overview(results))]
    else:
        parts += [_markdown(tables.ranking(results.tasks[0]))]
    chosen = [p for p in pictures if p.stem == "width"] or [p for p in pictures if p.stem.endswith(".metric")]
    parts += [f"![{name}: {path.stem}](reproduce/plots/{name}.{path.name})" for path in chosen]
    parts += [" ".join(recommendation(results))]
    parts += [
        f"Every table: [{name}.md](reproduce/tables/{name}.md); every run: [{name}.csv](reproduce/tables/{name}.csv)."
    ]
    return "\n\n".join(parts)


def _markdown(found: tables.TextTable) -> str:
    lines = [found.head, ["---", *["---:"] * (len(found.head) - 1)], *found.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _recall(results: Results) -> str:
    """Return at how many widths and lengths HGRN2 is above HGRN1."""
    above, cells, worse = 0, 0, []
    for task in results.tasks:
        curves = {curve.model: dict(zip(curve.x, curve.y, strict=True)) for curve in width_curves(task)}
        one, other = curves.get("hgrn2", {}), curves.get("hgrn1", {})
        for width in sorted(one.keys() & other.keys()):
            cells += 1
            above += one[width] > other[width]
            if one[width] <= other[width]:
                worse.append(f"{task.name} at width {width:g}: {one[width]:.1%} against {other[width]:.1%}")
    if not cells:
        return NOT_RUN
    rest = f"; not in {', '.join(worse)}" if worse else ""
    return f"HGRN2 above HGRN1 in {above} of {cells} cells of length and width{rest}."


def _perplexity(results: Results) -> str:
    """Return the held-out perplexity of HGRN2 and HGRN1, and which is lower."""
    task = results.tasks[0]
    found = {name: _perplexity_of(task, name) for name in ("hgrn2", "hgrn1")}
    if None in found.values():
        return NOT_RUN
    order = "below" if (found["hgrn2"] or 0) < (found["hgrn1"] or 0) else "not below"
    return f"HGRN2 {found['hgrn2']:.2f}, HGRN1 {found['hgrn1']:.2f}: HGRN2 {order} HGRN1."


def _perplexity_of(task: TaskSummary, model: str) -> float | None:
    cell = _cell(task, model)
    return None if cell is None else cell.mean_of("val_perplexity")


def _expansion(results: Results) -> str:
    """Return the held-out loss against the state expansion, and where a larger one is worse by more than the spread."""
    task = results.tasks[0]
    cells = [(k, cell) for k in EXPANSIONS if (cell := _cell(task, f"K{k}")) is not None and cell.best is not None]
    if len(cells) < 2:
        return NOT_RUN
    shown = ", ".join(f"K {k}: {tables.mean_and_spread(task, cell.best, has_count=False)}" for k, cell in cells)
    rises = []
    for (low, one), (high, other) in pairwise(cells):
        assert one.best is not None
        assert other.best is not None
        spread = max(one.best.deviation or 0.0, other.best.deviation or 0.0)
        if (other.best.mean or 0.0) - (one.best.mean or 0.0) > spread:
            rises.append(f"from K {low} to {high}")
    verdict = f"it rises {', '.join(rises)}" if rises else "it falls or stays within the spread at every step"
    return f"Held-out loss: {shown}; {verdict}."


def _tracking(results: Results) -> str:
    """Return the best model of each task at the longest validated length."""
    found = []
    for task in results.tasks:
        keys = {k for cell in task.cells if cell.best for run in cell.best.finished for k in run.validation}
        lengths = sorted(int(k.rpartition("_")[2]) for k in keys if k.startswith("val_accuracy_length_"))
        if not lengths:
            continue
        key = f"val_accuracy_length_{lengths[-1]}"
        values = [(value, cell.model) for cell in task.cells if (value := cell.mean_of(key)) is not None]
        best = max(values)
        plain = next((value for value, model in values if model == "hgrn2"), None)
        beside = "" if plain is None else f", hgrn2 {plain:.1%}"
        found.append(f"{task.name} at {lengths[-1]} tokens: {best[1]} {best[0]:.1%}{beside}")
    return "; ".join(found) + "." if found else NOT_RUN


def _cell(task: TaskSummary, model: str) -> CellSummary | None:
    return next((cell for cell in task.cells if cell.model == model), None)


CLAIMS = {"mqar": _recall, "language": _perplexity, "ablations": _expansion, "state-tracking": _tracking}


def filled(page: str, blocks: dict[str, str]) -> str:
    """Return a page with the text between <!-- NAME --> and <!-- end --> replaced by the block of that name."""

    def replaced(found: re.Match[str]) -> str:
        name, is_line = found[1], "\n" not in found[2]
        text = blocks[name]
        return f"<!-- {name} -->{text}<!-- end -->" if is_line else f"<!-- {name} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"<!-- ([a-z-]+) -->(.*?)<!-- end -->", replaced, page, flags=re.DOTALL)


def main() -> int:
    """Write the page and the files, or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=HERE.parent / "reproduce.md")
    arguments = parser.parse_args()
    drawn = draw(arguments.results)
    before = arguments.page.read_text(encoding="utf-8")
    after = filled(before, drawn.blocks)
    if arguments.check:
        print("up to date" if before == after else f"{arguments.page}: out of date; run {Path(__file__).name}")
        return int(before != after)
    arguments.page.write_text(after, encoding="utf-8")
    for name in ("plots", "tables"):
        shutil.rmtree(arguments.results.parent / name, ignore_errors=True)
    for name, content in drawn.files.items():
        path = arguments.results.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    num = sum(text != NOT_RUN for text in drawn.blocks.values())
    print(f"{arguments.page}: {num} of {len(drawn.blocks)} blocks have results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
