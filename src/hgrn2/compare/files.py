"""Write the files with which `hgrn2 train` repeats one run of a comparison."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from hgrn2.compare.plan import RUNS_NAME, Plan, PlannedRun
from hgrn2.storage.staging import write_text_atomic
from hgrn2.train.config import TrainConfig
from hgrn2.train.hints import program

FOLDER_NAME = "repeat"
_TRAIN_KEYS = {field.name for field in fields(TrainConfig)}


def write_repeat_files(out: Path, plan: Plan) -> None:
    """Write a configuration file for each task, and a model file for each task and model, into OUT/repeat."""
    folder = out / FOLDER_NAME
    folder.mkdir(exist_ok=True)
    for run in {run.task_entry: run for run in plan.runs}.values():
        write_text_atomic(folder / _task_file(run), _task_toml(out, run))
    for run in {(run.task_entry, run.model): run for run in plan.runs}.values():
        write_text_atomic(folder / _model_file(run), json.dumps(run.model_config, indent=1) + "\n")


def repeat_command(out: Path, run: PlannedRun) -> str:
    """Return the command that trains one run again, in a separate folder.

    Args:
        out: folder of the comparison.
        run: the run.
    """
    folder = out / FOLDER_NAME
    words = [program(), "train", "--config", shlex.quote(str(folder / _task_file(run))),
             "--model", shlex.quote(str(folder / _model_file(run))), "--learning-rate", f"{run.learning_rate:g}",
             "--seed", str(run.seed), "--out", shlex.quote(str(Path(RUNS_NAME) / run.folder))]  # fmt: skip
    if run.muon_learning_rate is not None:
        words += ["--muon-learning-rate", f"{run.muon_learning_rate:g}"]
    return " ".join(words)


def _task_file(run: PlannedRun) -> str:
    return f"{run.task_entry}.toml"


def _model_file(run: PlannedRun) -> str:
    return f"{run.task_entry}.{run.model}.json"


def _task_toml(out: Path, run: PlannedRun) -> str:
    """Return [task], [train] and [data] of a run, without its seed and learning rates."""
    flat = {k: v for k, v in run.settings.items() if k not in ("seed", "learning_rate", "muon_learning_rate")}
    train = {k: v for k, v in flat.items() if k in _TRAIN_KEYS}
    task: dict[str, Any] = {"name": run.task} | {k: v for k, v in flat.items() if k not in _TRAIN_KEYS}
    parts = [_toml_table("task", task), _toml_table("train", train)]
    if run.data is not None:
        # tokens that are prepared already
        parts.append(_toml_table("data", {"data": [str((out / run.data["prepared"]).absolute())]}))
    return "\n".join(parts)


def _toml_table(name: str, values: dict[str, Any]) -> str:
    # JSON's texts, numbers, booleans and lists are TOML's
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
    return "\n".join([f"[{name}]", *lines, ""])
