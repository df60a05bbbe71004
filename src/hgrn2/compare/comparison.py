"""Plan, train and report a comparison in a folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from hgrn2.compare.config import Comparison
from hgrn2.compare.files import write_repeat_files
from hgrn2.compare.grid import Slots, is_ended, train_grid
from hgrn2.compare.packed import PackedResults, read_plan, unpack
from hgrn2.compare.plan import PLAN_NAME, Plan, PlannedRun, check_extends, make_plan
from hgrn2.compare.progress import GridDisplay, make_grid_display
from hgrn2.compare.report import write_reports
from hgrn2.compare.results import Results
from hgrn2.devices import choose_device
from hgrn2.errors import UserError
from hgrn2.storage.lock import run_lock
from hgrn2.storage.staging import check_writable_folder


@dataclass(frozen=True)
class Ended:
    """The end of a comparison.

    Attributes:
        results: what the runs have reached.
        files: paths of the report's files, the page first.
        stopped_by: name of the signal that stopped it; None if every run has ended.
    """

    results: Results
    files: list[Path]
    stopped_by: str | None = None


def compare(
    comparison: Comparison | None,
    out: Path,
    jobs: int | None = None,
    display: GridDisplay | None = None,
    *,
    runs_per_process: int | None = None,
    results: Sequence[Path] = (),
    only: Sequence[str] = (),
    start_for_s: float = math.inf,
) -> Ended:
    """Train every run of a comparison that has not ended yet, side by side, and write the report.

    Args:
        comparison: the configuration; None continues the comparison in the folder.
        out: folder of the comparison, new or with this comparison in it.
        jobs: runs side by side; None chooses as many as the device allows.
        display: shows progress; None means standard error.
        runs_per_process: runs that share a process, each in a thread; None chooses a number.
        results: files of results (`runs.jsonl`) of the same comparison; runs that have ended there are taken over.
        only: patterns of run folders, such as "text.hgrn2.*"; other runs are left for later. Empty means all.
        start_for_s: seconds after which no further run is started; runs that are training continue to their end.

    Raises:
        UserError: the folder holds another comparison, another process works in it, or a setting is invalid. An error
            of a run is recorded in the run's folder and does not end the comparison.
        KeyboardInterrupt: at the second signal.
    """
    check_writable_folder(out)
    _check_free(out)
    with run_lock(out):
        saved = Plan.load(out) if comparison is None or (out / PLAN_NAME).exists() else None
        plan = make_plan(comparison or _of(saved), out)
        if saved is not None:
            check_extends(saved, plan, out)
        chosen = _chosen(plan.runs, only)
        plan.save(out)
        unpack(results, out, plan)
        _check_devices(out, chosen)
        write_repeat_files(out, plan)
        stopped_by = train_grid(
            out,
            chosen,
            Slots.for_machine(chosen, jobs, runs_per_process),
            display or make_grid_display(),
            keep_checkpoints=plan.comparison.keep_checkpoints,
            on_end=PackedResults(out, plan).add,
            start_for_s=start_for_s,
        )
        found = Results.read(out)
        return Ended(found, write_reports(found), stopped_by)


def merge(results: Sequence[Path], out: Path) -> Ended:
    """Merge files of results of one comparison into a folder, and write the report, without data or training.

    Args:
        results: files of results (`runs.jsonl`).
        out: folder of the comparison, new or with this comparison in it.

    Raises:
        UserError: a file cannot be read, the files differ in a run, or the folder holds another comparison.
    """
    plan = read_plan(results)
    check_writable_folder(out)
    _check_free(out)
    with run_lock(out):
        if (out / PLAN_NAME).exists():
            saved = Plan.load(out)
            check_extends(plan, saved, out, ignores_place_of_data=True)
            plan = saved
        plan.save(out)
        unpack(results, out, plan)
        write_repeat_files(out, plan)
        PackedResults(out, plan)
        found = Results.read(out)
        return Ended(found, write_reports(found))


def _check_devices(out: Path, runs: Sequence[PlannedRun]) -> None:
    """Raise a UserError if a run that has not ended cannot have its device here."""
    for run in runs:
        name = str(run.settings.get("device", "auto"))
        # a GPU that is there is opened by the processes of the runs only
        is_gpu = name.startswith("cuda") and torch.cuda.is_available()
        if name != "auto" and not is_gpu and not is_ended(out, run):
            choose_device(name)


def _chosen(runs: Sequence[PlannedRun], only: Sequence[str]) -> list[PlannedRun]:
    """Return the runs whose folder matches a pattern; all without patterns."""
    if not only:
        return list(runs)
    for pattern in only:
        if not any(fnmatchcase(run.folder, pattern) for run in runs):
            raise UserError(
                f"--only {pattern}: no run matches; runs are named TASK.MODEL.lrRATE.seedSEED, as {runs[0].folder}",
                "unknown-name",
            )
    return [run for run in runs if any(fnmatchcase(run.folder, pattern) for pattern in only)]


def report(out: Path) -> Ended:
    """Write the report again from the folders of the runs; the comparison may still be training.

    Args:
        out: folder of a comparison.

    Raises:
        UserError: there is no comparison, or its plan is damaged.
    """
    results = Results.read(out)
    return Ended(results, write_reports(results))


def _of(saved: Plan | None) -> Comparison:
    assert saved is not None, "without a comparison, the folder's plan is loaded"
    return saved.comparison


def _check_free(out: Path) -> None:
    """Raise UserError if the folder exists and holds something else."""
    names: list[str] = []
    with suppress(OSError):
        names = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    # runs/ may hold prepared text of a comparison that was stopped before its plan
    if names and PLAN_NAME not in names and set(names) != {"runs"}:
        raise UserError(
            f"{out}: holds other files ({', '.join(sorted(names)[:3])}); name a new folder with --out", "already-exists"
        )
