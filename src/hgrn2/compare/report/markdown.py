"""The report of a comparison as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hgrn2.compare.files import repeat_command
from hgrn2.compare.report import tables
from hgrn2.compare.report.recommendation import recommendation
from hgrn2.compare.report.tables import TextTable
from hgrn2.compare.results import Results
from hgrn2.errors import visible


def markdown(results: Results, pictures: Sequence[Path] = ()) -> str:
    """Return the tables, the pictures and a command for each task's best run.

    Args:
        results: what the runs have reached.
        pictures: paths of pictures in the folder of the comparison; their names begin with the task's.
    """
    parts = [f"# {_escaped(tables.headline(results))}", tables.summary(results)]
    if len(results.tasks) > 1:
        parts += ["## All tasks", _table(tables.overview(results))]
    parts += [_picture(results, path) for path in pictures if path.stem == "width"]
    for task in results.tasks:
        parts += [f"## {task.name}", _table(tables.ranking(task))]
        parts += [_picture(results, path) for path in pictures if path.stem.rpartition(".")[0] == task.name]
        parts += [_table(tables.rates(task)), _table(tables.sizes(results, task))]
    parts += ["## Recommendation", *recommendation(results)]
    parts += ["## How to read this", *tables.notes(results)]
    if bad := results.in_state("diverged", "failed"):
        rows = [[run.planned.folder, run.state, run.reason] for run in bad]
        parts += ["## Runs without a result", _table(TextTable(["run", "state", "reason"], rows))]
    commands = [
        repeat_command(results.out, best.finished[0].planned)
        for task in results.tasks
        if (best := task.cells[0].best) is not None
    ]
    if commands:
        parts += ["## Repeat the best run of each task", "\n".join(["```sh", *commands, "```"])]
    return "\n\n".join(parts) + "\n"


def _picture(results: Results, path: Path) -> str:
    return f"![{path.stem}]({path.relative_to(results.out).as_posix()})"


def _table(found: TextTable) -> str:
    lines = [found.head, ["---", *["---:"] * (len(found.head) - 1)], *found.rows]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)


def _escaped(text: str) -> str:
    return visible(text, keep="").replace("|", "\\|").replace("<", "&lt;")
