"""Start, resume and evaluate runs of any task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from hgrn2.devices import choose_device
from hgrn2.errors import UserError
from hgrn2.formats.native import RUN_TABLES
from hgrn2.formats.run_folder import locate_model, read_config, resume_point
from hgrn2.formats.soundness import check_tokenizer
from hgrn2.models.inputs import check_pieces
from hgrn2.nn.parameters import check_roles
from hgrn2.nn.short_conv import ShortConv
from hgrn2.storage.lock import run_lock
from hgrn2.tasks.base import Task, check_figures
from hgrn2.train.checkpoint import CheckpointStore, create_run, load_checkpoint, load_model_tensors
from hgrn2.train.config import TrainConfig
from hgrn2.train.counters import describe_end
from hgrn2.train.display import Display, make_display
from hgrn2.train.ending import Ending, EndStep
from hgrn2.train.environment import describe_environment
from hgrn2.train.exclusive import exclusive
from hgrn2.train.freezing import frozen_names
from hgrn2.train.gates import GATES_NAME
from hgrn2.train.loop import Trainer
from hgrn2.train.parallel import ONE_PROCESS, Parallel
from hgrn2.train.places import was_at
from hgrn2.train.report import REPORT_NAME, write_report
from hgrn2.train.result import TrainResult
from hgrn2.train.rng import seed_everything
from hgrn2.train.settings import RunSettings
from hgrn2.train.warm_up import warming_up


class SavesFiles(Protocol):
    """A tokenizer, or another object saved beside config.json."""

    def save(self, directory: Path) -> Any:
        """Write its files into a folder."""
        ...


@dataclass(frozen=True)
class RunSpec:
    """Specification of a run, before anything is built or written.

    Attributes:
        settings: settings of training and of the task.
        build_model: makes the model on a device with its initial weights; called after seeding.
        build_task: makes the task for a device.
        saved: further tables of config.json: "model", and "data" for tasks that read text.
        build_shallow: makes a model with one layer of each kind, whose first step compiles what the model needs; None
            to compile nothing ahead.
        tokenizer: saved into the run folder; None for tasks without a tokenizer.
        describe: returns facts about the model and the data for the start record, as JSON values.
        at_end: measurements at the end of the run.
    """

    settings: RunSettings
    build_model: Callable[[torch.device], nn.Module]
    build_task: Callable[[torch.device], Task]
    saved: Mapping[str, Any]
    build_shallow: Callable[[], nn.Module] | None = None
    tokenizer: SavesFiles | None = None
    describe: Callable[[nn.Module], Mapping[str, Any]] = lambda _: {}
    at_end: Sequence[EndStep] = ()

    def config(self, run_dir: Path) -> dict[str, Any]:
        """Return the content of the run's config.json."""
        tables = self.settings.to_saved(run_dir)
        return {name: table for name in RUN_TABLES if (table := {**tables, **self.saved}.get(name)) is not None}


@dataclass(frozen=True)
class SavedRun:
    """A run folder to resume or evaluate, read while it is locked.

    Attributes:
        run_dir: the run folder.
        config: its config.json.
        checkpoint: the checkpoint to resume from; None if the run was stopped before its first.
        settings: of training and of the task, as the run has them.
    """

    run_dir: Path
    config: dict[str, Any]
    checkpoint: Path | None
    settings: RunSettings

    @classmethod
    def read(cls, run_dir: Path, checkpoint: Path | None) -> SavedRun:
        """Read a run folder.

        Raises:
            UserError: config.json lacks a table or has an unknown one.
        """
        config = read_config(run_dir)
        check_tokenizer(run_dir)
        wanted = {"model", "train"} | (set() if "task" in config else {"data"})
        for key in sorted(wanted, key=("model", "train", "data").index):
            if not isinstance(config.get(key), dict):
                raise UserError(
                    f"{run_dir}/config.json: no {key!r} settings; restore it from a checkpoint of the run", "damaged"
                )
        if further := config.keys() - set(RUN_TABLES):
            raise UserError(f"{run_dir}/config.json: unknown keys {sorted(further)}; remove them", "unknown-name")
        return cls(run_dir, config, checkpoint, RunSettings.from_saved(config, run_dir, was_at(config)))


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        model: the model after the last step.
        result: how the run ended.
        pictures: paths of the plots; empty if a signal stopped the run.
        report: path of report.html; None if it could not be written, or is not wanted.
    """

    model: Any
    result: TrainResult
    pictures: list[Path]
    report: Path | None


def start_run(run_dir: Path, spec: RunSpec, display: Display | None = None, parallel: Parallel = ONE_PROCESS) -> Run:
    """Train a new model.

    Args:
        run_dir: the new run folder.
        spec: the specification.
        display: shows progress; None means standard error.
        parallel: the ranks that train together.

    Raises:
        UserError: settings contradict each other or the data (nothing is written), or training fails (`Trainer.run`).
    """
    parts = _Parts.build(spec, parallel)
    with _lock(run_dir, parallel) as check_lock:
        config = spec.config(run_dir)
        parallel.on_main(lambda: create_run(run_dir, config, spec.tokenizer))
        return parts.run(run_dir, config, None, display, check_lock)


def resume_run(
    path: Path,
    spec_of: Callable[[SavedRun], RunSpec],
    display: Display | None = None,
    parallel: Parallel = ONE_PROCESS,
) -> Run:
    """Resume a run; on the CPU its losses are bit-identical to those of an uninterrupted run.

    Args:
        path: a run folder, or one of its checkpoints.
        spec_of: returns the specification for a saved run, with changed settings if wanted. config.json is updated once
            the checkpoint is accepted.
        display: shows progress; None means standard error.
        parallel: the ranks that train together.

    Raises:
        UserError: there is no run, its checkpoint is damaged, data or model do not match, or training fails
            (`Trainer.run`).
    """
    run_dir, _ = resume_point(path)
    with _lock(run_dir, parallel) as check_lock:
        # a killed process may have left the newest checkpoint under its temporary name
        parallel.on_main(CheckpointStore(run_dir, 1).remove_leftovers)
        # look again: before the lock, another process may have written and removed checkpoints
        checkpoint = parallel.from_main(resume_point(path)[1])
        spec = spec_of(SavedRun.read(run_dir, checkpoint))
        return _Parts.build(spec, parallel).run(run_dir, spec.config(run_dir), checkpoint, display, check_lock)


def evaluate_run(path: Path, spec_of: Callable[[SavedRun], RunSpec], which: str = "latest") -> dict[str, Any]:
    """Return the validation figures of a trained model.

    Args:
        path: a run folder, or one of its checkpoints.
        spec_of: returns the specification for a saved run.
        which: "latest" or "best" checkpoint of a run folder.

    Raises:
        UserError: there is no run or no checkpoint, or it is damaged.
    """
    checkpoint, _ = locate_model(path, which)
    run_dir, _ = resume_point(checkpoint)
    parts = _Parts.build(spec_of(SavedRun.read(run_dir, checkpoint)), ONE_PROCESS)
    load_model_tensors(parts.model, load_checkpoint(checkpoint).model, checkpoint)
    parts.model.eval()
    with torch.no_grad():
        figures = parts.task.evaluate(parts.model)
    check_figures(parts.task, figures)
    return figures


@contextmanager
def _lock(run_dir: Path, parallel: Parallel) -> Iterator[Callable[[], None]]:
    """Hold the run folder on the main rank; an error is raised on every rank."""
    with ExitStack() as stack:
        check_lock = parallel.on_main(lambda: stack.enter_context(run_lock(run_dir)))
        yield check_lock or (lambda: None)


@dataclass(frozen=True)
class _Parts:
    """The model and the task of a run, built before the run folder is touched."""

    spec: RunSpec
    model: Any
    task: Task
    frozen: list[str]
    device: torch.device
    parallel: Parallel

    @classmethod
    def build(cls, spec: RunSpec, parallel: Parallel) -> _Parts:
        config = spec.settings.train
        device = parallel.device(choose_device(config.device))
        parallel.check_same(_facts(spec, device))
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        task = spec.build_task(device)

        def shallow() -> nn.Module:
            assert spec.build_shallow is not None
            # on the device, so that the generator of the CPU is left to the model
            with device:
                return _with_settings(spec.build_shallow(), task, config)

        with exclusive():
            seed_everything(config.seed)
            # the step of a split sequence needs all ranks
            is_alone = parallel.share(config).pieces is None
            with warming_up(shallow if spec.build_shallow is not None and is_alone else None, task, config, device):
                model: Any = spec.build_model(device)
        model = _with_settings(model, task, config)
        if parallel.num_ranks > 1:
            _check_shared(model, spec.settings, task, parallel)
        model = parallel.prepare(model, task, config)
        return cls(spec, model, task, frozen_names(model, config.freeze), device, parallel)

    def run(
        self,
        run_dir: Path,
        run_config: Mapping[str, Any],
        resume_from: Path | None,
        display: Display | None,
        check_lock: Callable[[], None],
    ) -> Run:
        display = display or make_display(counted=self.task.report.counted)
        config = self.spec.settings.train
        trainer = Trainer(
            model=self.model,
            task=self.task,
            roles=self.model.parameter_roles(),
            config=config,
            run_dir=run_dir,
            run_config=run_config,
            resume_from=resume_from,
            frozen=self.frozen,
            display=display,
            check_lock=check_lock,
            parallel=self.parallel,
            about={
                "parameters": sum(p.numel() for p in self.model.parameters()),
                **self.spec.describe(self.model),
            },
        )
        try:
            result = trainer.run()
        except UserError:
            # the report may show why the run stopped
            if trainer.has_started and self.parallel.is_main and config.report:
                with suppress(UserError, OSError):
                    check_lock()
                    write_report(run_dir)
            raise
        if not self.parallel.is_main:
            return Run(self.model, result, [], None)
        if not config.report:
            return Run(self.model, result, [], None)
        ending = Ending(run_dir, self._whole_model(result), self.device, self.spec.at_end, display.note)
        if result.stopped_by:
            return Run(self.model, result, [], ending.report())
        has_news = ending.measure_once(result.counters.step)
        if not has_news and result.had_ended and _is_drawn(run_dir):
            display.note(f"{run_dir}: {describe_end(config, result.counters)}")
            return Run(self.model, result, [], run_dir / REPORT_NAME)
        # the report shows the pictures of the task
        drawn = self._task_pictures(run_dir, ending)
        report = ending.report()
        return Run(self.model, result, [*ending.pictures(), *drawn], report)

    def _task_pictures(self, run_dir: Path, ending: Ending) -> list[Path]:
        """Let the task draw; a failure does not fail the run."""
        self.model.eval()
        try:
            with torch.no_grad(), ending.failure_as_note("the pictures of the task", "plots"):
                return self.task.draw(self.model, run_dir)
        finally:
            self.model.train()
        return []

    def _whole_model(self, result: TrainResult) -> Any:
        """Return a model with all weights, from the newest checkpoint if ranks hold parts of them."""
        if not self.parallel.is_sharded:
            return self.model
        model: Any = self.spec.build_model(self.device)
        load_model_tensors(model, load_checkpoint(result.checkpoint).model, result.checkpoint)
        return model


def _with_settings(model: Any, task: Task, config: TrainConfig) -> Any:
    """Check a new model, and apply those training settings that change how it computes.

    Raises:
        UserError: the model has no roles, or does not support a setting.
    """
    if not hasattr(model, "parameter_roles"):
        raise UserError(
            f"task {task.name!r}: its model {type(model).__name__} has no parameter_roles; return "
            "hgrn2.nn.parameters.parameter_roles(self) there",
            "incomplete",
        )
    check_roles(model, model.parameter_roles())
    if config.activation_checkpointing:
        if not hasattr(model, "activation_checkpointing"):
            raise UserError(
                f"activation_checkpointing: the model of task {task.name!r} does not support it; leave it out",
                "unsupported",
            )
        model.activation_checkpointing = True
    if config.compile:
        backbone = getattr(model, "model", model)
        if not hasattr(backbone, "compile_blocks"):
            raise UserError(f"compile: the model of task {task.name!r} cannot be compiled; leave it out", "unsupported")
        backbone.compile_blocks()
    return model


def _facts(spec: RunSpec, device: torch.device) -> dict[str, Any]:
    """Return what must be the same on all ranks, as JSON values."""
    environment = describe_environment(device)
    data = spec.saved.get("data") or {}
    return {
        **spec.settings.to_saved(Path()),
        "model": spec.saved.get("model"),
        # places may differ between machines
        "data": {"fingerprints": data.get("fingerprints")},
        "versions": {name: environment[name] for name in ("torch", "hgrn2")},
        "device": device.type,
    }


def _check_shared(model: Any, settings: RunSettings, task: Task, parallel: Parallel) -> None:
    """Raise UserError for settings that several processes cannot have."""
    config, share = settings.train, parallel.share(settings.train)
    if share.pieces is not None:
        count = share.pieces.count
        if not task.splits_sequences or task.carries_state:
            raise UserError(
                f"context_parallel: task {task.name!r}, or a state that it carries, cannot be split over processes",
                "unsupported",
            )
        check_pieces(model.model.layers, count, None, None)
        length, odd = divmod(config.batch_size // share.num_ranks * settings.options.tokens_per_example, count)
        taps = max((part.width for part in model.modules() if isinstance(part, ShortConv)), default=1)
        if odd or length < taps:
            raise UserError(
                f"context_parallel is {count}: wanted a divisor of batch_size * seq_len on each rank, with pieces of "
                f"at least {taps} tokens",
                "contradiction",
            )
    if config.cuda_graph:
        raise UserError("cuda_graph cannot be used with several processes; leave it out", "unsupported")
    if task.carries_state and hasattr(model, "state_spec"):
        growing = {name for specs in model.state_spec() for name, spec in specs.items() if spec.grows}
        if growing:
            raise UserError(
                f"stream: states that grow ({', '.join(sorted(growing))}) cannot be shared among processes; train in "
                "one process, or without attention layers",
                "unsupported",
            )


def _is_drawn(run_dir: Path) -> bool:
    """Return whether the report and all plots of a run exist; a full disk may have prevented some."""
    if not (run_dir / REPORT_NAME).exists():
        return False
    names = {path.name for path in (run_dir / "plots").glob("*.png")}
    return "memory.png" in names if (run_dir / GATES_NAME).exists() else bool(names)
