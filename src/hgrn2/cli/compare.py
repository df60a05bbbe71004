"""`hgrn2 compare`: train models side by side and compare them."""

from __future__ import annotations

import difflib
import math
import signal
from pathlib import Path
from typing import Any

import tyro

from hgrn2.cli.command import Command
from hgrn2.cli.parsing import Texts
from hgrn2.errors import UserError
from hgrn2.storage.toml_files import read_toml_file

_FOLDER = Path("comparisons")


def compare(
    file: tyro.conf.Positional[Path | None] = None,
    out: Path | None = None,
    jobs: int | None = None,
    runs_per_process: int | None = None,
    only: Texts = (),
    start_for_s: float | None = None,
    merge: tuple[Path, ...] = (),
    report_only: Path | None = None,
) -> int:
    """Compare models: train each on each task and write one report.

    Without a file it compares all mixers on two tasks with tiny models, in about ten minutes on two cores. Run it again
    to continue where it stopped; a file that only adds models, tasks, seeds or learning rates extends a comparison.

    Args:
        file: A TOML file with tables [models.NAME] and [tasks.NAME], seeds and learning_rates; see
            docs/guide/comparing.md.
        out: Folder of the comparison (default: comparisons/ and the name of the file).
        jobs: Runs side by side (default: one per core, or four per GPU; 16 per GPU for tiny models with cuda_graph).
        runs_per_process: Runs that share a process, each in a thread (default: one; eight of tiny models on a GPU).
        only: Train only runs whose names match these patterns, such as "text.hgrn2.*"; the others wait.
        start_for_s: Seconds after which no further run is started; runs that are training continue to their end.
        merge: Take over the runs that have ended in these files (runs.jsonl of the same comparison, also gzipped).
            Without FILE nothing is trained: the files are merged into the folder --out.
        report_only: Only write the report of this folder again.
    """
    from hgrn2.cli.output import tell
    from hgrn2.compare import comparison as comparing
    from hgrn2.compare.config import GUIDE, Comparison
    from hgrn2.compare.grid import MAX_RUNS_PER_PROCESS
    from hgrn2.compare.plan import PLAN_NAME

    if report_only is not None:
        if others := [
            name
            for name, value in {
                "FILE": file, "--out": out, "--jobs": jobs, "--runs-per-process": runs_per_process,
                "--only": only or None, "--merge": merge or None, "--start-for-s": start_for_s,
            }.items()
            if value is not None
        ]:  # fmt: skip
            raise UserError(f"--report-only trains nothing; drop {' and '.join(others)}", "contradiction")
        _show(comparing.report(report_only))
        return 0
    if merge and file is None:
        if out is None:
            raise UserError("--merge without a file needs --out, the folder for the merged results", "incomplete")
        _show(comparing.merge(merge, out))
        return 0
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}; wanted 1 or more")
    if runs_per_process is not None and not 1 <= runs_per_process <= MAX_RUNS_PER_PROCESS:
        raise UserError(f"--runs-per-process is {runs_per_process}; wanted 1 to {MAX_RUNS_PER_PROCESS}")
    # NaN fails the comparison
    if start_for_s is not None and not start_for_s >= 0:
        raise UserError(f"--start-for-s is {start_for_s:g}; wanted 0 or more seconds")
    folder = _FOLDER / ("default" if file is None else file.stem) if out is None else out
    if file is not None:
        wanted = Comparison.from_tables(_read(file, GUIDE), str(file))
    elif (folder / PLAN_NAME).exists():
        # continue with the saved plan, even if other mixers or tasks are registered now
        wanted = None
    else:
        from hgrn2.compare.default import default_comparison

        wanted, notes = default_comparison()
        for note in notes:
            tell(note)
    ended = comparing.compare(
        wanted,
        folder,
        jobs,
        runs_per_process=runs_per_process,
        results=merge,
        only=only,
        start_for_s=math.inf if start_for_s is None else start_for_s,
    )
    _show(ended)
    if ended.stopped_by is None:
        return 1 if ended.results.in_state("failed") else 0
    again = f"hgrn2 compare {'' if file is None else f'{file} '}--out {folder}"
    tell(f"stopped by {ended.stopped_by}; nothing is lost, continue with: {again}")
    return 128 + int(signal.Signals[ended.stopped_by])


def _read(file: Path, guide: str) -> dict[str, Any]:
    """Return the content of a file; if it is missing, look for a mixer, a task or a file of a similar name."""
    try:
        return read_toml_file(file, guide)
    except UserError:
        if not file.exists():
            raise _missing_file(file) from None
        raise


def _missing_file(file: Path) -> UserError:
    from hgrn2.nn.mixers import mixer_names
    from hgrn2.tasks.registry import TASKS, load_tasks

    load_tasks()
    for what, names, table in (("mixer", mixer_names(), "models"), ("task", list(TASKS), "tasks")):
        if str(file) in names:
            return UserError(
                f"{file}: wanted a TOML file, and this is the name of a {what}; write [{table}.{file}] into a file, as "
                "examples/compare.toml does",
                "not-found",
            )
    found = [path.name for path in file.parent.glob("*.toml")] if file.parent.is_dir() else []
    near = difflib.get_close_matches(file.name, found, n=1)
    hint = f"did you mean {file.parent / near[0]}?" if near else "name a TOML file"
    return UserError(f"{file}: no such file; {hint}", "not-found")


def _show(ended: object) -> None:
    """Print the ranking of each task, and where the report is; the last line is its path."""
    from hgrn2.compare.comparison import Ended
    from hgrn2.compare.report import tables

    assert isinstance(ended, Ended)
    results = ended.results
    print(tables.summary(results))
    for task in results.tasks:
        print(f"{task.name}: {tables.direction(task)}")
        width = max(len(cell.model) for cell in task.cells)
        for cell in task.cells:
            rate = "" if cell.best is None else f"  at learning rate {cell.best.label}"
            print(f"  {cell.model:<{width}}  {tables.mean_and_spread(task, cell.best)}{rate}")
    for run in results.in_state("diverged", "failed"):
        print(f"{run.state}  {run.planned.folder}: {run.reason}")
    print(f"report   {ended.files[0]}")


COMMAND = Command(
    "compare",
    compare,
    order=15,
    aliases=("comparison", "benchmark", "arena", "sweep", "grid", "versus", "vs"),
    needs_output=True,
)
