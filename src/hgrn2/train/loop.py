"""The training loop: steps, records, checkpoints, stopping and resuming."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hgrn2.errors import UserError
from hgrn2.tasks.base import Task, check_figures
from hgrn2.train import checkpoint as ckpt
from hgrn2.train.config import TrainConfig
from hgrn2.train.counters import Counters
from hgrn2.train.display import Display, SilentDisplay, make_display
from hgrn2.train.environment import describe_environment
from hgrn2.train.exclusive import exclusive
from hgrn2.train.freezing import Freezing
from hgrn2.train.interrupt import StopRequest
from hgrn2.train.launched import LaunchedStep, read_back_together
from hgrn2.train.metrics import MetricsWriter, SilentMetrics
from hgrn2.train.optim import NamedOptimizer
from hgrn2.train.parallel import ONE_PROCESS, Parallel
from hgrn2.train.result import TrainResult, last_validation
from hgrn2.train.rng import seed_everything, shielded_rng
from hgrn2.train.run_clock import RunClock
from hgrn2.train.run_state import RunState
from hgrn2.train.schedule import lr_fraction, used_fraction
from hgrn2.train.step_log import StepLog
from hgrn2.train.stepper import Stepper

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Trainer:
    """Train a model on a task in a run folder that can be resumed at any time.

    The caller must hold `run_lock` from before it chooses `resume_from` until the run ends.

    Attributes:
        model: the model, already on its device.
        task: batches, loss and metric.
        roles: role of every parameter, for `NamedOptimizer`.
        frozen: names of parameters that are frozen at first, for `Freezing`.
        config: settings of training.
        run_dir: the run folder, made by create_run.
        run_config: content of config.json, written once the checkpoint to resume from is accepted, and copied into
            every checkpoint.
        resume_from: the checkpoint to resume from; later checkpoints and records of the run are removed. None starts
            at the beginning and removes the remains of an earlier attempt.
        display: shows progress; by default on standard error.
        check_lock: the check yielded by `run_lock`, which raises if the folder was replaced; called before every
            checkpoint.
        parallel: the ranks that train together.
        about: JSON values for the start record, such as sizes of model and data.
        has_started: whether the start record is written; set by `run`.
    """

    model: nn.Module
    task: Task
    roles: Mapping[str, str]
    config: TrainConfig
    run_dir: Path
    run_config: Mapping[str, Any]
    resume_from: Path | None = None
    frozen: Collection[str] = ()
    display: Display = field(default_factory=make_display)
    check_lock: Callable[[], None] = lambda: None
    parallel: Parallel = ONE_PROCESS
    about: Mapping[str, Any] = field(default_factory=dict)
    has_started: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not self.parallel.is_main:
            self.display = SilentDisplay()
        self._counters = Counters()
        self._optimizer = NamedOptimizer(
            self.model, self.roles, self.config, self.frozen, waits_for_step=self.task.carries_state
        )
        self._freezing = Freezing(self.model, self.frozen, self.config)
        self._device = self._optimizer.parameters[0].device
        self._stepper = Stepper(self.model, self.task, self._optimizer, self.config, self.parallel)
        self._state = RunState(self.model, self._optimizer, self.task, self._freezing, self.run_config)
        self._store = ckpt.CheckpointStore(self.run_dir, self.config.keep_last)
        self._saved_step = -1
        self._saved_records: int | None = None
        # steps without a record, and those whose values are on the way from the device
        self._launched: list[LaunchedStep] = []
        self._returning: list[LaunchedStep] = []
        self._log = StepLog(self._device)
        # of any rank
        self._signal_name: str | None = None

    def run(self) -> TrainResult:
        """Train until the budget is used up or a signal asks to stop.

        Raises:
            UserError: too many non-finite steps in a row, a full disk, or a checkpoint that cannot be read;
                the message names the last good checkpoint.
            KeyboardInterrupt: at the second signal.
        """
        try:
            self.parallel.on_main(self._store.remove_leftovers)
            self._restore()
            if self._has_ended():
                return self._result(finished=True, had_ended=True)
            with (
                StopRequest(self.parallel.signal_repeat_s) as stop,
                self._open_metrics() as metrics,
                self.display,
            ):
                # only now: settings that do not fit the checkpoint would make every later attempt fail
                self.parallel.on_main(lambda: ckpt.write_config(self.run_dir, self.run_config))
                self._clock = RunClock(self.config, self._counters, self.parallel)
                with self._optimizer.working_precision():
                    try:
                        finished = self._train(stop, metrics)
                    finally:
                        self._stepper.end()
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise UserError(
                f"{self.run_dir}: {error.strerror} at step {self._counters.step}; {self._last_good()}; "
                f"free some space, then: hgrn2 train --resume {self.run_dir}",
                "unwritable",
            ) from error
        except ValueError as error:
            # with such weights, operators reject their inputs before a loss exists
            is_of_values = not isinstance(error, UserError) or error.code == "invalid-value"
            if not is_of_values or all(bool(p.isfinite().all()) for p in self._optimizer.parameters):
                raise
            raise UserError(
                f"{self.run_dir}: stopped after step {self._counters.step}, which left weights that are not finite; "
                f"{self._last_good()}; lower learning_rate or raise warmup_steps",
                "not-finite",
            ) from error
        # a signal after the last step has not stopped anything
        return self._result(finished, self._signal_name)

    def _open_metrics(self) -> MetricsWriter | SilentMetrics:
        writer = self.parallel.on_main(
            lambda: MetricsWriter(
                self.run_dir,
                resume_step=self._counters.step,
                tensorboard=self.config.tensorboard,
                # only then, so that an earlier error leaves the later checkpoints in place
                before_dropping=lambda: self._store.set_aside_after(self._saved_step),
            )
        )
        return SilentMetrics() if writer is None else writer

    def _has_ended(self) -> bool:
        """Return whether the checkpoint to resume from is the end of the run: budget used up, and validated."""
        counters = self._counters
        progress = used_fraction(self.config, counters.step, counters.tokens, counters.elapsed_s)
        is_at_end = progress >= 1.0 or self._has_reached_metric()
        return self.resume_from is not None and is_at_end and counters.validated_step == counters.step

    def _has_reached_metric(self) -> bool:
        """Return whether the validation after the last step has the metric at which the run ends."""
        best, metric, wanted = self._counters.best, self.task.metric, self.config.stop_at
        if wanted is None or best is None or best["step"] != self._counters.step:
            return False
        # the first value that is reached is the best so far
        return best[metric.name] == wanted or metric.is_better(best[metric.name], wanted)

    def _result(self, finished: bool, signal_name: str | None = None, had_ended: bool = False) -> TrainResult:
        newest = self._store.latest()
        assert newest is not None, "a run that ends has a checkpoint"
        return TrainResult(
            self.run_dir,
            newest,
            self._counters,
            last_validation(self.run_dir),
            None if finished else signal_name,
            had_ended,
            self.task.metric.name,
        )

    def _train(self, stop: StopRequest, metrics: MetricsWriter | SilentMetrics) -> bool:
        """Train until the budget is used up (return True) or a signal arrives (return False)."""
        config, counters = self.config, self._counters
        if num_lost := max(0, (self._saved_records or 0) - metrics.num_records):
            self.display.note(
                f"metrics.jsonl: {num_lost:,} of {self._saved_records:,} records up to step {counters.step} are "
                "missing; training continues, the plots will lack them"
            )
        metrics.write({"kind": "start", "step": counters.step, **describe_environment(self._device), **self.about})
        self.has_started = True
        self._stepper.begin()
        finished = self._clock.used_fraction() >= 1.0
        self._signal_name = signal_name = self.parallel.first_of(stop.signal_name)
        while not finished and signal_name is None:
            self._step(metrics)
            finished = self._clock.used_fraction() >= 1.0
            self._signal_name = signal_name = self.parallel.first_of(stop.signal_name)
            if finished or signal_name or self._is_evaluated_or_saved(counters.step):
                self._finish_steps(metrics)
            new_best = (finished or _due(counters.step, config.validation_every)) and self._validate(metrics)
            finished = finished or self._has_reached_metric()
            # before the checkpoint, so that a run resumed from it does not sample again
            if finished or _due(counters.step, config.sample_every):
                self._sample(metrics)
            # after a skipped step the weights may be bad, so keep the older checkpoints
            due = _due(counters.step, config.checkpoint_every) and not counters.skipped_in_a_row
            if finished or (new_best and config.save_best) or due:
                self._save(metrics)
        # a run that was resumed with nothing left to do
        if finished and counters.validated_step != counters.step:
            self._validate(metrics)
            self._save(metrics)
        self._finish_steps(metrics)
        # a run that a signal has stopped
        if self._saved_step != counters.step:
            self._save(metrics)
        if not finished:
            self.display.note(
                f"stopped by {signal_name} after step {counters.step}; resume with: hgrn2 train --resume {self.run_dir}"
            )
        return finished

    def _is_evaluated_or_saved(self, step: int) -> bool:
        """Return whether a validation, a sample or a checkpoint follows this step."""
        config = self.config
        return any(
            _due(step, every) for every in (config.validation_every, config.sample_every, config.checkpoint_every)
        )

    def _step(self, metrics: MetricsWriter | SilentMetrics) -> None:
        fraction = lr_fraction(self.config, self._counters.step, self._clock.used_fraction())
        learning_rate = self._optimizer.set_lr_fraction(fraction, self._freezing.lr_fraction())
        launched = self._stepper.run(self._counters, learning_rate)
        self._launched.append(launched)
        if launched.values is not None:
            steps, self._launched = self._launched, []
            self._record(steps, metrics)
        elif _due(launched.step, self.config.record_every):
            self._read_back(metrics)

    def _read_back(self, metrics: MetricsWriter | SilentMetrics) -> None:
        """Record the steps whose values the device has sent or is about to, and let it send those of later ones."""
        self._record(self._returning, metrics)
        self._returning, self._launched = self._launched, []
        if self._returning and self.config.record_every > 1:
            read_back_together(self._returning)

    def _finish_steps(self, metrics: MetricsWriter | SilentMetrics) -> None:
        """Record every launched step; wait for the device if necessary."""
        if self._launched and self._launched[0].values is None:
            self._read_back(metrics)
        steps, self._returning, self._launched = self._returning + self._launched, [], []
        self._record(steps, metrics)
        if self._log.has_unwritten:
            self._write_record(metrics)

    def _record(self, steps: Sequence[LaunchedStep], metrics: MetricsWriter | SilentMetrics) -> None:
        """Count the outcomes of steps; write a record of every record_every-th."""
        for launched in steps:
            loss, is_finite = self._log.count(launched, self._counters)
            if _due(launched.step, self.config.record_every) or not is_finite:
                self._write_record(metrics)
            if not is_finite:
                self._report_nonfinite(launched.step, loss)
            elif self._freezing.count(loss):
                metrics.write({"kind": "unfreeze", "step": self._counters.step, "tokens": self._counters.tokens})
                self.display.note(
                    f"step {self._counters.step}: the loss has stopped improving; training all weights from here on"
                )

    def _write_record(self, metrics: MetricsWriter | SilentMetrics) -> None:
        record = self._log.take_record(self._counters, self._clock.set_elapsed())
        metrics.write(record)
        self.display.train(record, self._clock.used_fraction(), self._clock.eta_s())

    def _report_nonfinite(self, step: int, loss: float) -> None:
        counters = self._counters
        what = "gradient" if math.isfinite(loss) else "loss"
        skipped = f"{counters.skipped_steps} skipped so far"
        self.display.note(f"step {step} skipped: its {what} is not finite ({skipped})")
        if counters.skipped_in_a_row >= self.config.max_nonfinite:
            raise UserError(
                f"{self.run_dir}: stopped at step {step}, the {what} was not finite in "
                f"{counters.skipped_in_a_row} steps in a row; {self._last_good()}; "
                "lower learning_rate or raise warmup_steps",
                "not-finite",
            )

    def _validate(self, metrics: MetricsWriter | SilentMetrics) -> bool:
        """Write a validation record; True if it is the best so far."""
        counters = self._counters
        # the first compiles kernels
        with exclusive() if self._counters.validated_step < 0 else nullcontext(), self._evaluation_mode():
            figures = self.task.evaluate(self.model)
        # ranks must agree on what follows from them
        figures = self.parallel.from_main(figures)
        try:
            check_figures(self.task, figures)
        except UserError:
            # the steps are not lost: the run can be resumed once the task is corrected
            self._save(metrics)
            raise
        counters.validated_step = counters.step
        self._clock.set_elapsed()
        record = {
            "kind": "validation",
            "step": counters.step,
            "tokens": counters.tokens,
            "elapsed_s": round(counters.elapsed_s, 3),
            **figures,
        }
        metrics.write(record)
        self.display.validation(record)
        metric = self.task.metric
        value, best = figures[metric.name], counters.best
        is_better = metric.is_better(value, None if best is None else best[metric.name])
        if is_better:
            counters.best = {"step": counters.step, metric.name: value}
        return is_better

    def _sample(self, metrics: MetricsWriter | SilentMetrics) -> None:
        # generation calls parts of the model, which do not gather its weights
        if self.parallel.is_sharded:
            return
        try:
            with self._evaluation_mode():
                text = self.task.sample(self.model)
        except UserError as error:
            # diverged weights must not end the run here
            self.display.note(f"step {self._counters.step}: no sample ({error})")
            return
        if text is not None:
            record = {
                "kind": "sample",
                "step": self._counters.step,
                "tokens": self._counters.tokens,
                "text": text,
            }
            metrics.write(record)
            self.display.sample(record)

    def _save(self, metrics: MetricsWriter | SilentMetrics) -> None:
        counters = self._counters
        self.parallel.on_main(self.check_lock)
        # the records up to this step must be on the disk before the checkpoint that relies on them
        metrics.sync()
        self._clock.set_elapsed()
        parts = self._state.collect(counters, metrics.num_records)
        if self.task.carries_state:
            parts["task"] = self.parallel.join_streams(parts["task"])
        self.parallel.save(self._store, **parts)
        self._saved_step = counters.step
        self.parallel.advise(f"; resume from step {counters.step} with: hgrn2 train --resume {self.run_dir}")

    def _restore(self) -> None:
        if self.resume_from is None:
            seed_everything(self.parallel.own_seed(self.config.seed))
            return
        saved = self.parallel.load(self.resume_from)
        if self.task.carries_state:
            saved = replace(saved, task=self.parallel.own_streams(saved.task))
        restored = self._state.restore(saved)
        self.parallel.advise(f"; resume with: hgrn2 train --resume {self.run_dir}")
        self._counters, self._saved_records = restored.counters, restored.num_records
        self._saved_step = self._counters.step
        for line in restored.notes:
            self.display.note(line)

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Switch to evaluation mode without gradients and with separate generators, so training is not affected."""
        self.model.eval()
        try:
            with torch.no_grad(), shielded_rng(self.config.seed), self._stepper.autocast():
                yield
        finally:
            self.model.train()

    def _last_good(self) -> str:
        newest = self._store.latest()
        return f"last good checkpoint: {newest}" if newest else "no checkpoint was written yet"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
