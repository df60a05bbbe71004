"""The configuration of a comparison: models, tasks, seeds and learning rates, read from tables and checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.models import HGRN2Config, presets
from hgrn2.nn.mixers import find_mixer, mixer_names
from hgrn2.storage.toml_files import read_toml_file
from hgrn2.tasks import find_task
from hgrn2.tasks.registry import option_names
from hgrn2.train.config import BUDGETS, TrainConfig

GUIDE = "docs/guide/comparing.md"
# parts of folder names, so no dots and no separators
_NAME = re.compile(r"[A-Za-z0-9_-]{1,60}")
_MODEL_KEYS = [field.name for field in fields(HGRN2Config)]
_TRAIN_KEYS = [field.name for field in fields(TrainConfig)]
# settings that the grid sets, and the keys that replace them
_GRID_KEYS = {"seed": "seeds", "learning_rate": "learning_rates"}
MATCHES = ("first", "none")


@dataclass(frozen=True)
class ModelEntry:
    """A model of a comparison.

    Attributes:
        name: its name in the report.
        settings: keys of `HGRN2Config`, and `preset`; they override the shared ones.
        learning_rates: learning rates of this model only; empty means those of the comparison.
        seeds: seeds of this model only; empty means those of the comparison.
    """

    name: str
    settings: Mapping[str, Any]
    learning_rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()

    def own_axes(self) -> dict[str, Any]:
        """Return the learning rates and seeds that only this model has, as in a file."""
        axes = {"learning_rates": self.learning_rates, "seeds": self.seeds}
        return {name: list(values) for name, values in axes.items() if values}


@dataclass(frozen=True)
class TaskEntry:
    """A task of a comparison.

    Attributes:
        name: its name in the report.
        task: name of the registered task.
        settings: options of the task and settings of training, including a budget, which override the shared ones.
        data: the table [data] of `hgrn2 train`, for tasks that read text.
    """

    name: str
    task: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A grid of runs: every model on every task, with every seed and learning rate.

    Attributes:
        models: the models, the first of which sets the size of all.
        tasks: the tasks.
        seeds: seeds of weights and data order; all models see the same batches of a seed in the same order.
        learning_rates: peak learning rates, for models without their own.
        match: "first" gives every model as many parameters as the first, "none" leaves sizes alone, and a number is
            the wanted number of parameters.
        model: settings that all models share.
        train: settings of training that all runs share.
        keep_checkpoints: whether runs that have ended keep their weights.
        muon_learning_rates: peak learning rates of Muon, each combined with every learning rate of AdamW, for tasks
            whose optimizer is muon; empty leaves muon_learning_rate as it is.

    Example:
        >>> found = Comparison.from_tables({
        ...     "model": {"hidden_size": 32, "num_hidden_layers": 2, "expand_ratio": 16},
        ...     "models": {"hgrn2": {}, "attention": {"mixers": {"attention": {"num_heads": 2}}}},
        ...     "tasks": {"text": {"task": "language", "max_steps": 10}},
        ... })
        >>> [model.name for model in found.models]
        ['hgrn2', 'attention']
    """

    models: tuple[ModelEntry, ...]
    tasks: tuple[TaskEntry, ...]
    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[float, ...] = (1e-3,)
    match: str | int = "first"
    model: Mapping[str, Any] | None = None
    train: Mapping[str, Any] | None = None
    keep_checkpoints: bool = True
    muon_learning_rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.muon_learning_rates and not any(self.uses_muon(task) for task in self.tasks):
            raise UserError(
                'muon_learning_rates has no effect, as no task has optimizer = "muon"; set that in [train] or drop it',
                "contradiction",
            )

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """Read a TOML file.

        Raises:
            UserError: the file cannot be read, a name in it does not exist (near matches are named), or a value is
                invalid.
        """
        return cls.from_tables(read_toml_file(path, GUIDE), str(path))

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any], where: str = "comparison") -> Comparison:
        """Return the comparison that tables describe, as `to_tables` returns them.

        Args:
            tables: the content of a file.
            where: the file, for messages.

        Raises:
            UserError: a name does not exist (near matches are named), or a value is invalid.
        """
        known = [field.name for field in fields(cls)]
        for key in tables:
            if key not in known:
                raise UserError(unknown_key_message(where, key, known), "unknown-name")
        model, train = (_table(tables.get(key, {}), where, key) for key in ("model", "train"))
        _check_keys(model, [*_MODEL_KEYS, "preset"], f"{where}: [model]")
        _check_train(train, f"{where}: [train]")
        muon = tables.get("muon_learning_rates", [])
        return cls(
            models=tuple(_read_model(*item, where) for item in _entries(tables, "models", where)),
            tasks=tuple(_read_task(*item, where) for item in _entries(tables, "tasks", where)),
            seeds=_seeds(tables.get("seeds", [0]), where),
            learning_rates=_rates(tables.get("learning_rates", [1e-3]), f"{where}: learning_rates"),
            match=_match(tables.get("match", "first"), where),
            model=model,
            train=train,
            muon_learning_rates=_rates(muon, f"{where}: muon_learning_rates") if muon else (),
            keep_checkpoints=_boolean(tables.get("keep_checkpoints", True), where, "keep_checkpoints"),
        )

    def to_tables(self) -> dict[str, Any]:
        """Return JSON values from which `from_tables` makes the same comparison."""
        return {
            "seeds": list(self.seeds),
            "learning_rates": list(self.learning_rates),
            "match": self.match,
            # plans of earlier versions do not have them
            **({} if self.keep_checkpoints else {"keep_checkpoints": False}),
            **({"muon_learning_rates": list(self.muon_learning_rates)} if self.muon_learning_rates else {}),
            "model": dict(self.model or {}),
            "train": dict(self.train or {}),
            "models": {m.name: {**m.settings, **m.own_axes()} for m in self.models},
            "tasks": {
                t.name: {"task": t.task, **t.settings, **({"data": t.data} if t.data else {})} for t in self.tasks
            },
        }

    def rates_of(self, model: ModelEntry) -> tuple[float, ...]:
        """Return the learning rates of a model."""
        return model.learning_rates or self.learning_rates

    def seeds_of(self, model: ModelEntry) -> tuple[int, ...]:
        """Return the seeds of a model."""
        return model.seeds or self.seeds

    def uses_muon(self, task: TaskEntry) -> bool:
        """Return whether the optimizer of a task is Muon."""
        return {**(self.train or {}), **task.settings}.get("optimizer") == "muon"

    def muon_rates_of(self, task: TaskEntry) -> tuple[float | None, ...]:
        """Return the learning rates of Muon on a task; None leaves that to the settings."""
        return self.muon_learning_rates if self.muon_learning_rates and self.uses_muon(task) else (None,)

    @property
    def num_runs(self) -> int:
        """Number of runs of the whole grid."""
        per_rate = sum(len(self.seeds_of(model)) * len(self.rates_of(model)) for model in self.models)
        return per_rate * sum(len(self.muon_rates_of(task)) for task in self.tasks)

    def model_config(self, model: ModelEntry, task_settings: Mapping[str, Any]) -> HGRN2Config:
        """Return the configuration of a model before its size is matched.

        Args:
            model: one of the models.
            task_settings: settings that follow from the task, such as vocab_size; those of the model override them.

        Raises:
            UserError: a setting does not exist or is invalid; the message names the model.
        """
        shared = dict(self.model or {})
        keys = dict(task_settings) | shared | dict(model.settings)
        if "layers" not in keys and "attn" not in keys and model.name in mixer_names():
            keys["layers"] = model.name
        own = model.settings.get("mixers", {})
        if shared_mixers := shared.get("mixers"):
            # options of mixers that other models have
            layers = keys.get("layers") or ()
            names = [name.strip() for name in layers.split(",")] if isinstance(layers, str) else list(layers)
            keys["mixers"] = {
                n: {**shared_mixers.get(n, {}), **own.get(n, {})} for n in [*shared_mixers, *own] if n in names
            }
            if not keys["mixers"]:
                del keys["mixers"]
        preset = keys.pop("preset", None)
        try:
            return HGRN2Config.from_dict(keys) if preset is None else presets.preset(preset, **keys)
        except UserError as error:
            raise UserError(f"models.{model.name}: {error}", error.code) from None


def _table(value: Any, where: str, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {key} is {value!r}; wanted a table, [{key}]")
    return dict(value)


def _boolean(value: Any, where: str, key: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} is {value!r}; wanted true or false")
    return value


def _entries(tables: Mapping[str, Any], key: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    found = _table(tables.get(key, {}), where, key)
    if not found:
        raise UserError(f"{where}: no {key}; add a table [{key}.NAME] for each", "incomplete")
    for name in found:
        if not _NAME.fullmatch(name):
            raise UserError(f"{where}: {key}.{name}: wanted a name of letters, digits, - and _, at most 60")
    return [(name, _table(value, where, f"{key}.{name}")) for name, value in found.items()]


def _check_keys(values: Iterable[str], known: Iterable[str], what: str) -> None:
    known = list(known)
    for key in values:
        if key in _GRID_KEYS and key not in known:
            raise UserError(
                f"{what}: {key} is set by the grid; name {_GRID_KEYS[key]} at the top of the file", "contradiction"
            )
        if key not in known:
            raise UserError(unknown_key_message(what, key, known), "unknown-name")


def _check_train(values: Mapping[str, Any], what: str) -> None:
    # the rest belongs to tasks, whose settings are read with these
    _check_keys(values, [key for key in _TRAIN_KEYS if key not in _GRID_KEYS], what)


def _read_model(name: str, table: dict[str, Any], where: str) -> ModelEntry:
    what = f"{where}: models.{name}"
    rates, seeds = table.pop("learning_rates", None), table.pop("seeds", None)
    _check_keys(table, [*_MODEL_KEYS, "preset", "learning_rates", "seeds"], what)
    if not table:
        find_mixer(name, f"{what} has no settings, so its name is that of a mixer")
    _table(table.get("mixers", {}), where, f"models.{name}.mixers")
    return ModelEntry(
        name,
        table,
        () if rates is None else _rates(rates, f"{what}: learning_rates"),
        () if seeds is None else _seeds(seeds, what),
    )


def _read_task(name: str, table: dict[str, Any], where: str) -> TaskEntry:
    what = f"{where}: tasks.{name}"
    data = _table(table.pop("data", {}), where, f"tasks.{name}.data")
    task_name = table.pop("task", name)
    if not isinstance(task_name, str):
        raise UserError(f"{what}: task is {task_name!r}; wanted the name of a task")
    try:
        task = find_task(task_name)
    except UserError as error:
        raise UserError(f"{what}: {error}", error.code) from None
    known = [*option_names(task), *(key for key in _TRAIN_KEYS if key not in _GRID_KEYS), "task"]
    _check_keys(table, [*known, "data"] if task.reads_text else known, what)
    if data and not task.reads_text:
        raise UserError(f"{what}: task {task_name!r} reads no text; drop [tasks.{name}.data]", "contradiction")
    return TaskEntry(name, task_name, table, data)


def _seeds(values: Any, where: str) -> tuple[int, ...]:
    values = values if isinstance(values, list | tuple) else [values]
    if not values or any(type(seed) is not int or seed < 0 for seed in values) or len(set(values)) < len(values):
        raise UserError(f"{where}: seeds is {values!r}; wanted different whole numbers, 0 or more")
    return tuple(values)


def _rates(values: Any, what: str) -> tuple[float, ...]:
    values = values if isinstance(values, list | tuple) else [values]
    if not values or not all(_is_rate(rate) for rate in values) or len(set(map(float, values))) < len(values):
        raise UserError(f"{what} is {values!r}; wanted different numbers above 0")
    return tuple(float(rate) for rate in values)


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _match(value: Any, where: str) -> str | int:
    if value in MATCHES or (type(value) is int and value > 0):
        return value
    raise UserError(f"{where}: match is {value!r}; wanted {' or '.join(map(repr, MATCHES))}, or a number of parameters")


def has_budget(settings: Mapping[str, Any]) -> bool:
    """Return whether settings of training have a budget."""
    return not settings.keys().isdisjoint(BUDGETS)
