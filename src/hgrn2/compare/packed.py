"""Keep the results of a comparison in one file: every run that has ended, with its configuration and curve."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hgrn2.compare.outcome import OUTCOME_NAME, Outcome
from hgrn2.compare.plan import RUNS_NAME, Plan, PlannedRun, check_extends
from hgrn2.errors import UserError
from hgrn2.formats.soundness import CONFIG_NAME
from hgrn2.storage.json_files import parse_json
from hgrn2.storage.staging import write_text_atomic
from hgrn2.train.metrics import read_metrics, write_records

PACKED_NAME = "runs.jsonl"
_FORMAT = 1


class PackedResults:
    """The file OUT/runs.jsonl: the plan in its first line, then a line for each run that has ended.

    Args:
        out: folder of the comparison, locked.
        plan: its plan.
    """

    def __init__(self, out: Path, plan: Plan) -> None:
        self._out, self.path = out, out / PACKED_NAME
        head = {"format": _FORMAT, "comparison": plan.comparison.to_tables(), "runs": [r.to_json() for r in plan.runs]}
        lines = [_line(head), *(line for run in plan.runs if (line := _packed(out, run)) is not None)]
        write_text_atomic(self.path, "".join(lines))

    def add(self, run: PlannedRun) -> None:
        """Append a run that has ended; a run without a final outcome is left out."""
        if (line := _packed(self._out, run)) is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)


def _packed(out: Path, run: PlannedRun) -> str | None:
    """Return the line of a run; None if it has not ended, or its files are damaged."""
    run_dir = out / RUNS_NAME / run.folder
    outcome = Outcome.load(run_dir)
    if outcome is None or not outcome.is_final:
        return None
    try:
        config = parse_json((run_dir / CONFIG_NAME).read_bytes())
        records = read_metrics(run_dir)
    except (OSError, ValueError):
        return None
    return _line({"folder": run.folder, "outcome": asdict(outcome), "config": config, "records": records})


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n"


def read_plan(files: Sequence[Path]) -> Plan:
    """Return the plan that files of results have in common.

    Args:
        files: files that `PackedResults` wrote, also compressed with gzip.

    Raises:
        UserError: a file cannot be read, or two files have different settings for a run.
    """
    plans = [_plan_of(path) for path in files]
    widest = max(plans, key=lambda plan: len(plan.runs))
    for path, plan in zip(files, plans, strict=True):
        check_extends(plan, widest, path, ignores_place_of_data=True)
    return widest


def unpack(files: Sequence[Path], out: Path, plan: Plan) -> int:
    """Write the folders of runs that have ended, as if they had been trained here; return their number.

    Runs that have ended here, and those that the plan lacks, are left alone.

    Args:
        files: as for `read_plan`.
        out: folder of the comparison, locked.
        plan: its plan.

    Raises:
        UserError: a file cannot be read, or has different settings for a run.
    """
    planned = {run.folder: run for run in plan.runs}
    num = 0
    for path in files:
        theirs = {run.folder: run for run in _plan_of(path).runs if run.folder in planned}
        common = Plan(plan.comparison, tuple(theirs.values()))
        check_extends(common, plan, path, ignores_place_of_data=True)
        for number, values in _lines(path):
            if number == 1 or values.get("folder") not in planned:
                continue
            run_dir = out / RUNS_NAME / values["folder"]
            before = Outcome.load(run_dir)
            if before is not None and before.is_final:
                continue
            try:
                _write_run(run_dir, values)
            except (LookupError, TypeError) as error:
                raise UserError(f"{path}, line {number}: not a run ({error}); remove the line", "damaged") from None
            num += 1
    return num


def _write_run(run_dir: Path, values: dict[str, Any]) -> None:
    outcome = Outcome(**values["outcome"])
    records, config = values["records"], values["config"]
    run_dir.mkdir(parents=True, exist_ok=True)
    write_records(run_dir, records)
    write_text_atomic(run_dir / CONFIG_NAME, json.dumps(config, indent=1) + "\n")
    # written last: it marks the run as ended
    (run_dir / OUTCOME_NAME).unlink(missing_ok=True)
    outcome.save(run_dir)


def _plan_of(path: Path) -> Plan:
    for _, values in _lines(path):
        if values.get("format") != _FORMAT:
            raise UserError(f"{path}: not results of a comparison; name the {PACKED_NAME} of one", "version")
        return Plan.from_json(values, path)
    raise UserError(f"{path}: empty; name the {PACKED_NAME} of a comparison", "damaged")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the complete lines with their numbers; a kill may have truncated the last."""
    try:
        content = path.read_bytes()
        text = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); name the {PACKED_NAME} of a comparison", "not-found"
        ) from None
    for number, line in enumerate(text.split(b"\n")[:-1], start=1):
        try:
            values = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); remove the line", "damaged") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}, line {number}: found {type(values).__name__}, wanted an object", "damaged")
        yield number, values
