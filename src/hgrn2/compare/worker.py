"""Train one run of a comparison in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hgrn2.compare.outcome import Outcome
from hgrn2.compare.plan import RUNS_NAME, PlannedRun
from hgrn2.data.prepared import PreparedData
from hgrn2.errors import UserError
from hgrn2.formats.run_folder import checkpoints_of, read_config
from hgrn2.models import HGRN2Config
from hgrn2.train.runs import resume_language_run, resume_task_run, start_language_run, start_task_run

with contextlib.suppress(ImportError):
    # imported once by the server that all workers are forked from
    import hgrn2.train.plots  # noqa: F401

LOGS_NAME = "logs"
# of progress messages
_EVERY_S = 0.3
# a worker whose comparison was killed writes a checkpoint first, and may hold its run for that long
_WAIT_FOR_LOCK_S = 60.0


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        fraction: used fraction of the budget.
        step: steps done.
        loss: smoothed training loss; None if not finite.
    """

    fraction: float
    step: int
    loss: float | None


class SendingDisplay:
    """Send progress through a connection; other lines go to standard error, which is the log of the run.

    Args:
        connection: takes a `Progress` now and then.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last_s = 0.0

    def __enter__(self) -> SendingDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def train(self, record: dict[str, Any], progress: float, eta_s: float | None) -> None:
        """Send the progress, unless the last message is recent."""
        if time.monotonic() - self._last_s >= _EVERY_S:
            self._last_s = time.monotonic()
            # the comparison may be gone
            with contextlib.suppress(OSError):
                self._connection.send(Progress(progress, record["step"], record["smoothed_loss"]))

    def validation(self, record: dict[str, Any]) -> None:
        """Show nothing; the record is in metrics.jsonl."""

    def sample(self, record: dict[str, Any]) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Write the line into the log."""
        print(text, file=sys.stderr, flush=True)


def work(out: Path, planned: PlannedRun, connection: Connection) -> None:
    """Train one run to its end and write its outcome; the target of a process.

    SIGTERM stops it after the current step, with a checkpoint, as does the end of the process that started it.

    Args:
        out: folder of the comparison.
        planned: the run.
        connection: takes the progress.
    """
    # Ctrl-C is for the comparison, which tells its workers
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGTERM, _interrupt)
    _stop_with_parent()
    run_dir = out / RUNS_NAME / planned.folder
    with _log(out / LOGS_NAME / f"{planned.folder}.log"):
        try:
            outcome = _outcome_of(out, planned, SendingDisplay(connection))
            if outcome is not None:
                outcome.save(run_dir)
        except KeyboardInterrupt:
            # stopped before training began, or a second signal
            return


def _outcome_of(out: Path, planned: PlannedRun, display: Any) -> Outcome | None:
    """Train; None if a signal stopped the run."""
    try:
        run = _when_free(lambda: train_planned(out, planned, display))
    except UserError as error:
        display.note(f"error: {error}")
        return Outcome("diverged" if error.code == "not-finite" else "failed", _one_line(str(error)))
    # any error of one run must not end the others
    except Exception as error:
        traceback.print_exc()
        return Outcome("failed", _one_line(f"{type(error).__name__}: {error}"))
    if run.result.stopped_by:
        return None
    if run.result.last_validation is None:
        return Outcome("diverged", "the last validation is not finite")
    return Outcome("finished")


def train_planned(out: Path, planned: PlannedRun, display: Any = None) -> Any:
    """Start a run, or resume it from its newest checkpoint.

    Args:
        out: folder of the comparison.
        planned: the run.
        display: shows progress; None means standard error.

    Returns:
        The `hgrn2.train.run.Run`.

    Raises:
        UserError: the folder holds another model, or training fails.
    """
    run_dir = out / RUNS_NAME / planned.folder
    settings, config = planned.run_settings, HGRN2Config.from_dict(planned.model_config)
    data = None if planned.data is None else PreparedData.open(out / planned.data["prepared"])
    if checkpoints_of(run_dir):
        saved = read_config(run_dir).get("model")
        if not isinstance(saved, dict) or HGRN2Config.from_dict(saved).to_dict() != config.to_dict():
            raise UserError(f"{run_dir}: holds a run of another model; move it away", "mismatch")
        if data is None:
            return resume_task_run(run_dir, display=display)
        return resume_language_run(run_dir, data, display=display)
    if data is None:
        return start_task_run(run_dir, config, settings, display=display)
    assert planned.data is not None
    return start_language_run(run_dir, config, settings, data, data_settings=planned.data, display=display)


def _when_free(train: Any) -> Any:
    """Train once no other process holds the run: a worker of a killed comparison may still be writing."""
    deadline_s = time.monotonic() + _WAIT_FOR_LOCK_S
    while True:
        try:
            return train()
        except UserError as error:
            if error.code != "in-use" or time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)


def _stop_with_parent() -> None:
    """End this process, as by SIGTERM, when the process that started it is gone."""
    parent = parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _log(path: Path) -> Iterator[None]:
    """Redirect standard output and error, also those of libraries, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
