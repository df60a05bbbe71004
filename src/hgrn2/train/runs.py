"""Start or resume a run in one call: on text, or on a task that generates its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hgrn2.data.prepared import PreparedData
from hgrn2.errors import UserError
from hgrn2.formats.opening import ModelFolder
from hgrn2.models import HGRN2Config
from hgrn2.tasks.base import Sampler
from hgrn2.train.display import Display
from hgrn2.train.parallel import ONE_PROCESS, Parallel
from hgrn2.train.run import Run, RunSpec, SavedRun, resume_run, start_run
from hgrn2.train.settings import RunSettings
from hgrn2.train.specs import (
    check_data,
    fingerprints,
    saved_data_settings,
    saved_model_config,
    task_spec,
    text_spec,
)


def start_language_run(
    run_dir: Path,
    model_config: HGRN2Config,
    settings: RunSettings | Mapping[str, Any],
    data: PreparedData,
    *,
    data_settings: Mapping[str, Any],
    start: ModelFolder | None = None,
    sampler: Sampler | None = None,
    display: Display | None = None,
    compressors: bool = False,
    parallel: Parallel = ONE_PROCESS,
) -> Run:
    """Train a language model, from new weights or from those of another model.

    Args:
        run_dir: the new run folder.
        model_config: configuration of the model.
        settings: settings of training and of the task, or flat keys for `RunSettings.from_flat`.
        data: prepared tokens and their tokenizer.
        data_settings: JSON values that describe the sources of the data; saved as "data" in config.json with the
            location and the fingerprints of the tokens.
        start: a model to take the weights from; None initialises them.
        sampler: writes text samples from the model and a prompt; None writes none.
        display: shows progress; None means standard error.
        compressors: record how gzip and xz compress the held-out text at the end.
        parallel: the ranks that train together, from `hgrn2.train.distributed.joined`.

    Raises:
        UserError: settings contradict each other or the data (nothing is written), or training fails (`Trainer.run`).
    """
    if not isinstance(settings, RunSettings):
        settings = RunSettings.from_flat(settings)
    kept = saved_data_settings(data_settings, data, run_dir) | {"fingerprints": fingerprints(data)}
    spec = text_spec(
        settings.resolved(), model_config, data, kept, sampler=sampler, start=start, compressors=compressors,
        parallel=parallel,
    )  # fmt: skip
    return start_run(run_dir, spec, display, parallel)


def resume_language_run(
    path: Path,
    data: PreparedData,
    *,
    changes: Mapping[str, Any] | None = None,
    task_changes: Mapping[str, Any] | None = None,
    sampler: Sampler | None = None,
    display: Display | None = None,
    compressors: bool = False,
    parallel: Parallel = ONE_PROCESS,
) -> Run:
    """Resume a run on text; on the CPU its losses are bit-identical to those of an uninterrupted run.

    Args:
        path: a run folder, or one of its checkpoints.
        data: the tokens the run was started with, wherever they are now.
        changes: flat settings to change, such as a larger max_steps; saved once the checkpoint is accepted.
        task_changes: options of the task to change.
        sampler: writes text samples from the model and a prompt; None writes none.
        display: shows progress; None means standard error.
        compressors: record how gzip and xz compress the held-out text at the end.
        parallel: the ranks that train together, from `hgrn2.train.distributed.joined`.

    Raises:
        UserError: there is no run, its checkpoint is damaged, data or model do not match, or training fails
            (`Trainer.run`).
    """
    spec_of = saved_text_spec(data, changes or {}, task_changes or {}, sampler, compressors, parallel)
    return resume_run(path, spec_of, display, parallel)


def saved_text_spec(
    data: PreparedData,
    changes: Mapping[str, Any] | None = None,
    task_changes: Mapping[str, Any] | None = None,
    sampler: Sampler | None = None,
    compressors: bool = False,
    parallel: Parallel = ONE_PROCESS,
) -> Callable[[SavedRun], RunSpec]:
    """Return a function from a saved run on text to its specification.

    Args:
        data: the tokens the run was started with, wherever they are now.
        changes: flat settings to change.
        task_changes: options of the task to change.
        sampler: writes text samples from the model and a prompt; None writes none.
        compressors: record how gzip and xz compress the held-out text at the end.
        parallel: the ranks that train together, from `hgrn2.train.distributed.joined`.
    """

    def spec_of(run: SavedRun) -> RunSpec:
        if not run.settings.task.reads_text:
            raise UserError(
                f"{run.run_dir}: task {run.settings.task.name!r} reads no text; leave out the data", "mismatch"
            )
        check_data(run, data)
        model_config = saved_model_config(run)
        kept = saved_data_settings(run.config["data"], data, run.run_dir)
        settings = run.settings.replaced(changes or {}, task_changes or {})
        return text_spec(
            settings, model_config, data, kept, sampler=sampler, compressors=compressors, parallel=parallel
        )

    return spec_of


def start_task_run(
    run_dir: Path,
    model_config: Any,
    settings: RunSettings,
    *,
    start: ModelFolder | None = None,
    display: Display | None = None,
    parallel: Parallel = ONE_PROCESS,
) -> Run:
    """Train a new model on a task that reads no prepared text; arguments as for `start_language_run`."""
    spec = task_spec(settings.resolved(), model_config, start=start, parallel=parallel)
    return start_run(run_dir, spec, display, parallel)


def resume_task_run(
    path: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    task_changes: Mapping[str, Any] | None = None,
    display: Display | None = None,
    parallel: Parallel = ONE_PROCESS,
) -> Run:
    """Resume a run of a task that generates its data; arguments as for `resume_language_run`."""
    return resume_run(path, saved_task_spec(changes, task_changes, parallel), display, parallel)


def saved_task_spec(
    changes: Mapping[str, Any] | None = None,
    task_changes: Mapping[str, Any] | None = None,
    parallel: Parallel = ONE_PROCESS,
) -> Callable[[SavedRun], RunSpec]:
    """Return a function from a saved run without text to its specification.

    Args:
        changes: flat settings to change.
        task_changes: options of the task to change.
        parallel: the ranks that train together.
    """

    def spec_of(run: SavedRun) -> RunSpec:
        settings = run.settings.replaced(changes or {}, task_changes or {})
        return task_spec(settings, saved_model_config(run), parallel=parallel)

    return spec_of
