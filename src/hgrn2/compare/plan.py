"""Plan the runs of a comparison, and keep the plan in the folder of the comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from hgrn2.compare.config import Comparison, ModelEntry, TaskEntry
from hgrn2.compare.matching import count_parameters, match_size
from hgrn2.data.settings import data_settings, prepare_data
from hgrn2.errors import UserError
from hgrn2.models import HGRN2Config
from hgrn2.nn.mixers import find_mixer
from hgrn2.storage.json_files import check_digest, read_json_object, with_digest
from hgrn2.storage.staging import write_text_atomic
from hgrn2.tasks.base import TaskContext
from hgrn2.train.settings import RunSettings

PLAN_NAME = "comparison.json"
RUNS_NAME = "runs"
_FORMAT = 1


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid.

    Attributes:
        folder: name of its folder in OUT/runs.
        model: name of the model.
        task_entry: name of the task's table.
        task: name of the registered task.
        seed: the seed.
        learning_rate: peak learning rate.
        model_config: configuration of the model, as a dictionary, with its size matched.
        settings: flat settings of training and options of the task.
        data: for tasks that read text, settings of the data with the folder of the prepared tokens, relative to the
            folder of the comparison if it is inside; otherwise None.
    """

    folder: str
    model: str
    task_entry: str
    task: str
    seed: int
    learning_rate: float
    model_config: dict[str, Any]
    settings: dict[str, Any]
    data: dict[str, Any] | None

    @property
    def muon_learning_rate(self) -> float | None:
        """Peak learning rate of Muon; None if it is not set."""
        return self.settings.get("muon_learning_rate")

    @property
    def run_settings(self) -> RunSettings:
        """Settings of the run."""
        return RunSettings.from_flat(self.settings, self.task)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison.

    Attributes:
        comparison: its configuration.
        runs: every run, ordered by task, seed, model and learning rate.
    """

    comparison: Comparison
    runs: tuple[PlannedRun, ...]

    def save(self, out: Path) -> None:
        """Write comparison.json into the folder of the comparison, atomically."""
        values = {
            "format": _FORMAT,
            "comparison": self.comparison.to_tables(),
            "runs": [run.to_json() for run in self.runs],
        }
        # through JSON, so that the digest matches the values that are read back
        text = json.dumps(with_digest(json.loads(json.dumps(values))), indent=1)
        write_text_atomic(out / PLAN_NAME, text + "\n")

    @classmethod
    def load(cls, out: Path) -> Plan:
        """Read comparison.json.

        Raises:
            UserError: there is no comparison in the folder, or its file is damaged.
        """
        path = out / PLAN_NAME
        if not path.is_file():
            raise UserError(f"{out}: no comparison there; name a folder that has {PLAN_NAME}", "not-found")
        remedy = "restore it, or begin another comparison in a new folder"
        values = check_digest(read_json_object(path, remedy), path, remedy)
        if values.get("format") != _FORMAT:
            raise UserError(f"{path}: format is {values.get('format')!r}; wanted {_FORMAT}", "version")
        return cls.from_json(values, path, remedy)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], path: Path, remedy: str = "restore it") -> Plan:
        """Return the plan of JSON values, as `save` writes them.

        Args:
            values: with "comparison" and "runs".
            path: the file that holds them, for messages.
            remedy: what to do if they are damaged.

        Raises:
            UserError: they are damaged.
        """
        try:
            runs = tuple(PlannedRun(**run) for run in values["runs"])
            tables = values["comparison"]
        except (LookupError, TypeError) as error:
            raise UserError(f"{path}: not a plan of runs ({error}); {remedy}", "damaged") from None
        return cls(Comparison.from_tables(tables, str(path)), runs)


def make_plan(comparison: Comparison, out: Path) -> Plan:
    """Plan every run: prepare the text of the tasks, match the sizes of the models, check every setting.

    Args:
        comparison: the configuration.
        out: folder of the comparison; prepared tokens go to OUT/runs/prepared.

    Raises:
        UserError: a model does not fit a task or cannot be matched in size, or a setting is invalid.
    """
    runs: list[PlannedRun] = []
    # all mistakes in settings first, before any text is prepared
    checked = [(task, _check_task(comparison, task)) for task in comparison.tasks]
    for task, settings in checked:
        data, of_task = _data_and_model_settings(comparison, task, settings, out)
        configs = _model_configs(comparison, task, settings, of_task)
        seeds = dict.fromkeys(seed for model in comparison.models for seed in comparison.seeds_of(model))
        for seed in seeds:
            for model in comparison.models:
                if seed not in comparison.seeds_of(model):
                    continue
                # through JSON, which has lists instead of tuples
                config = json.loads(json.dumps(configs[model.name].to_dict()))
                for rate, muon in product(comparison.rates_of(model), comparison.muon_rates_of(task)):
                    flat = {**_flat(comparison, task), "seed": seed, "learning_rate": rate}
                    if muon is not None:
                        flat["muon_learning_rate"] = muon
                    rates = f"lr{rate:g}" if muon is None else f"lr{rate:g}.muon{muon:g}"
                    folder = f"{task.name}.{model.name}.{rates}.seed{seed}"
                    runs.append(PlannedRun(folder, model.name, task.name, task.task, seed, rate, config, flat, data))
    return Plan(comparison, tuple(runs))


def check_extends(saved: Plan, new: Plan, out: Path, *, ignores_place_of_data: bool = False) -> None:
    """Check that a new plan keeps every run of the plan in the folder; it may add runs.

    Args:
        saved: the plan in the folder.
        new: the new plan.
        out: the folder, for messages.
        ignores_place_of_data: whether prepared tokens may be in another folder, for results of another machine.

    Raises:
        UserError: a run is missing or differs; the message names the first difference.
    """
    found = {run.folder: run for run in new.runs}
    way_out = "a comparison may only be added to; name another folder with --out"
    if missing := [run.folder for run in saved.runs if run.folder not in found]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{out}: has run {missing[0]}{more}, which the file leaves out; {way_out}", "contradiction")
    for run in saved.runs:
        before, now = run.to_json(), found[run.folder].to_json()
        for part in ("task", "model_config", "settings", "data"):
            old, fresh = before[part], now[part]
            if part == "data" and ignores_place_of_data:
                old, fresh = _without_place(old), _without_place(fresh)
            if old == fresh:
                continue
            keys = _differing(old, fresh) if isinstance(old, dict) and isinstance(fresh, dict) else [part]
            shown = ", ".join(keys) or part
            raise UserError(
                f"{out}: run {run.folder} has other settings in the file ({shown}); {way_out}", "contradiction"
            )


def _without_place(data: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if data is None else {key: value for key, value in data.items() if key not in ("prepared", "data")}


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} {old.get(key)!r} there, {new.get(key)!r} here" for key in {**old, **new} if old.get(key) != new.get(key)
    ]


def _flat(comparison: Comparison, task: TaskEntry) -> dict[str, Any]:
    return {**(comparison.train or {}), **task.settings}


def _check_task(comparison: Comparison, task: TaskEntry) -> RunSettings:
    """Return the settings of a task's runs with the first learning rate."""
    flat = {**_flat(comparison, task), "learning_rate": comparison.learning_rates[0]}
    try:
        settings = RunSettings.from_flat(flat, task.task)
        if not settings.task.reads_text:
            # options that are valid alone may contradict each other, such as more pairs than fit
            settings.task.build(settings.options, TaskContext(1, 0, torch.device("cpu")))
        else:
            data_settings(dict(task.data))
    except UserError as error:
        raise UserError(f"tasks.{task.name}: {error}", error.code) from None
    return settings


def _data_and_model_settings(
    comparison: Comparison, task: TaskEntry, settings: RunSettings, out: Path
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the settings of a task's data, and the model settings that follow from the task."""
    if not settings.task.reads_text:
        return None, dict(settings.task.model_settings(settings.options))
    if not settings.options.__dict__.get("stream"):
        for model in comparison.models:
            _check_packing(task, model.name, comparison.model_config(model, {}))
    data, kept = prepare_data(data_settings(dict(task.data)), out / RUNS_NAME / "new", False, lambda _: None)
    place, top = os.path.abspath(kept["prepared"]), os.path.abspath(out)
    # relative where possible, so that the comparison can be moved
    if os.path.commonpath([place, top]) == top:
        place = os.path.relpath(place, top)
    return {**kept, "prepared": place}, {"vocab_size": data.tokenizer.vocab_size}


def _check_packing(task: TaskEntry, name: str, config: HGRN2Config) -> None:
    for mixer in dict.fromkeys(config.layer_mixers):
        if not find_mixer(mixer).mixer.can_pack:
            raise UserError(
                f"models.{name}: mixer {mixer!r} cannot pack documents, which tasks.{task.name} does; leave one out",
                "unsupported",
            )


def _model_configs(
    comparison: Comparison, task: TaskEntry, settings: RunSettings, of_task: Mapping[str, Any]
) -> dict[str, HGRN2Config]:
    """Return the configuration of each model on a task, with sizes matched."""
    configs: dict[str, HGRN2Config] = {}
    match = comparison.match
    wanted: int | None = match if isinstance(match, int) else None
    for model in comparison.models:
        config = comparison.model_config(model, of_task)
        _check_vocabulary(task, model, config, of_task.get("vocab_size"))
        if wanted is not None:
            if "intermediate_size" in model.settings:
                raise UserError(
                    f"models.{model.name}: intermediate_size follows from the size of the first model; drop it, or set "
                    'match = "none"',
                    "contradiction",
                )
            config = match_size(model.name, settings.task, settings.options, config, wanted)
        elif match == "first":
            wanted = count_parameters(settings.task, settings.options, config)
        configs[model.name] = config
    return configs


def _check_vocabulary(task: TaskEntry, model: ModelEntry, config: HGRN2Config, needed: int | None) -> None:
    if needed is not None and config.vocab_size < needed:
        raise UserError(
            f"models.{model.name}: vocab_size = {config.vocab_size} is less than the {needed} tokens of "
            f"tasks.{task.name}; leave it out, or raise it",
            "contradiction",
        )


def runs_by_cell(runs: Sequence[PlannedRun]) -> dict[tuple[str, str], list[PlannedRun]]:
    """Return the runs of each task and model, in the order of the plan."""
    cells: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in runs:
        cells.setdefault((run.task_entry, run.model), []).append(run)
    return cells
