"""Settings of a run: flat keys of files and flags, sorted into settings of training and of the task."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hgrn2.errors import UserError
from hgrn2.tasks.base import TaskOptions
from hgrn2.tasks.distillation import DistillationOptions, DistillationTask
from hgrn2.tasks.language import LanguageTask
from hgrn2.tasks.registry import find_task, make_options, option_names, unknown_option
from hgrn2.train.config import TrainConfig
from hgrn2.train.places import from_saved_path, to_saved_path

# limit of tokens per step, whose batches are in memory at once
_MAX_TOKENS = 2**26
_TRAIN_KEYS = tuple(field.name for field in fields(TrainConfig))
# tasks whose options are among the keys of [train] in a file and of "train" in config.json
_FLAT_TASKS = (LanguageTask.name, DistillationTask.name)
_FLAT_DEFAULTS = {field.name: field.default for field in fields(DistillationOptions)}
FLAT_DEFAULTS = {field.name: field.default for field in fields(TrainConfig)} | _FLAT_DEFAULTS


@dataclass(frozen=True)
class RunSettings:
    """Settings of training and of the task; checked together.

    Attributes:
        train: settings of training.
        task: class of the task.
        options: options of the task, an instance of `task.Options`.

    Example:
        >>> RunSettings.from_flat({"max_steps": 10, "batch_size": 2, "seq_len": 64}).tokens_per_step
        128
    """

    train: TrainConfig
    task: type[Any]
    options: TaskOptions

    def __post_init__(self) -> None:
        tokens, train = self.tokens_per_step, self.train
        if tokens > _MAX_TOKENS:
            raise UserError(f"train config: {self._product} is {tokens}; wanted at most {_MAX_TOKENS} tokens per step")
        if train.max_tokens is not None and train.max_tokens < tokens:
            raise UserError(
                f"train config: max_tokens {train.max_tokens} is less than one step of {tokens} ({self._product}); "
                "raise it or shrink the batch",
                "contradiction",
            )

    @property
    def _product(self) -> str:
        return " * ".join(
            ["batch_size", *(["seq_len"] if hasattr(self.options, "seq_len") else []), "grad_accumulation"]
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens (for some tasks, examples) per optimizer step."""
        return self.train.batch_size * self.options.tokens_per_example * self.train.grad_accumulation

    @property
    def num_warmup_steps(self) -> int:
        """warmup_steps, or its default."""
        train = self.train
        return train.default_warmup_steps(self.tokens_per_step) if train.warmup_steps is None else train.warmup_steps

    def resolved(self) -> RunSettings:
        """Return the settings with defaults that depend on the budget replaced by numbers (`TrainConfig.resolved`)."""
        return replace(self, train=self.train.resolved(self.tokens_per_step))

    @classmethod
    def from_flat(
        cls, keys: Mapping[str, Any], task: str | None = None, options: Mapping[str, Any] | None = None
    ) -> RunSettings:
        """Sort flat keys into those of training and those of the task.

        Args:
            keys: settings of training and options of the task.
            task: name of the task; None means language, or distillation if a teacher is given.
            options: further options of the task, which override those among the keys.

        Raises:
            UserError: a key does not exist or belongs to another task, or a value is invalid.
        """
        keys = dict(keys)
        if task is None:
            task = LanguageTask.name if keys.get("teacher") is None else DistillationTask.name
            if task == LanguageTask.name:
                keys = _without_distillation(keys)
        found = find_task(task)
        known = option_names(found)
        own = {key: value for key, value in keys.items() if key in known} | dict(options or {})
        train = {key: value for key, value in keys.items() if key in _TRAIN_KEYS}
        for key in keys.keys() - known - train.keys():
            raise UserError(_unknown_key(found, key), "unknown-name")
        for key in own.keys() & set(_TRAIN_KEYS) - set(known):
            raise UserError(f"task {task!r}: {key!r} is a setting of training; give it as one", "unknown-name")
        return cls(TrainConfig(**train), found, make_options(found, own))

    def to_flat(self) -> dict[str, Any]:
        """Return all settings as flat keys."""
        return self.train.to_dict() | asdict(self.options)

    def replaced(self, changes: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> RunSettings:
        """Return the settings with changes.

        Args:
            changes: flat keys, as for `from_flat`.
            options: options of the task.
        """
        task = None if self.task.name in _FLAT_TASKS else self.task.name
        return RunSettings.from_flat({**self.to_flat(), **changes}, task, options)

    def to_saved(self, run_dir: Path) -> dict[str, Any]:
        """Return tables for config.json: "train" for language models, "train" and "task" for other tasks.

        Args:
            run_dir: the run folder; paths beside it are saved relative to it.
        """
        paths = {
            name: to_saved_path(run_dir, value)
            for name in self.options.paths
            if (value := getattr(self.options, name)) is not None
        }
        if self.task.name in _FLAT_TASKS:
            return {"train": FLAT_DEFAULTS | self.to_flat() | paths}
        return {
            "train": self.train.to_dict(),
            "task": {"name": self.task.name, "options": asdict(self.options) | paths},
        }

    @classmethod
    def from_saved(cls, config: Mapping[str, Any], run_dir: Path, was_at: str | None = None) -> RunSettings:
        """Invert `to_saved`; also reads files of older runs.

        Args:
            config: the content of config.json.
            run_dir: the current folder of the run.
            was_at: the folder of the run when config.json was written, as for `from_saved_path`.

        Raises:
            UserError: the tables are malformed, or the task is not registered.
        """
        table = config.get("task")
        if table is None:
            settings = cls.from_flat(_with_places(config["train"], ("teacher",), run_dir, was_at))
        else:
            if not (isinstance(table, dict) and isinstance(table.get("options"), dict)):
                raise UserError(f"{run_dir}/config.json: task is {table!r}; wanted a name and options", "damaged")
            task = find_task(str(table.get("name")))
            options = _with_places(table["options"], task.Options.paths, run_dir, was_at)
            settings = cls.from_flat(config["train"], task.name, options)
        # older runs did not save the default as a number
        return replace(settings, train=replace(settings.train, warmup_steps=settings.num_warmup_steps))


def _with_places(
    settings: Mapping[str, Any], paths: tuple[str, ...], run_dir: Path, was_at: str | None
) -> dict[str, Any]:
    found = dict(settings)
    for name in paths:
        if isinstance(saved := found.get(name), str):
            found[name] = str(from_saved_path(run_dir, saved, was_at))
    return found


def _without_distillation(keys: dict[str, Any]) -> dict[str, Any]:
    """Drop options of distillation, which have no effect without a teacher."""
    own = option_names(LanguageTask)
    only = {key for key in _FLAT_DEFAULTS if key not in own}
    for name in only - {"teacher"}:
        if keys.get(name) is not None:
            warnings.warn(f"train config: {name} has no effect with no teacher", UserWarning, stacklevel=4)
    return {key: value for key, value in keys.items() if key not in only}


def _unknown_key(task: type[Any], key: str) -> str:
    if task.name in _FLAT_TASKS and key not in _FLAT_DEFAULTS:
        return unknown_option(task, key, (*_TRAIN_KEYS, *_FLAT_DEFAULTS))
    return unknown_option(task, key, _TRAIN_KEYS)
