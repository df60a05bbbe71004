"""Train runs of a comparison in a process: one run, or several side by side in threads."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import torch

from hgrn2.compare.outcome import Outcome
from hgrn2.compare.plan import RUNS_NAME, PlannedRun
from hgrn2.data.prepared import PreparedData
from hgrn2.errors import UserError
from hgrn2.formats.run_folder import checkpoints_of, read_config
from hgrn2.models import HGRN2Config
from hgrn2.train.exclusive import side_by_side
from hgrn2.train.interrupt import request_stop
from hgrn2.train.runs import resume_language_run, resume_task_run, start_language_run, start_task_run

with contextlib.suppress(ImportError):
    # imported once by the server that all workers are forked from
    import hgrn2.train.plots  # noqa: F401

LOGS_NAME = "logs"
# between progress messages
_EVERY_S = 0.3
# a worker whose comparison was killed writes a checkpoint first, and may hold its run for that long
_WAIT_FOR_LOCK_S = 60.0
# after which the interpreter switches threads
_SWITCH_S = 1e-4


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


@dataclass(frozen=True)
class RunEnded:
    """End of a run in a process with others; without an outcome it was stopped, or should be retried alone."""


Message = tuple[str, Progress | RunEnded]


class SendingDisplay:
    """Send progress to the comparison; other lines go to a log.

    Args:
        send: called with a `Progress` every 0.3 s or less often.
        log: file for the lines; None means standard error.
    """

    def __init__(self, send: Callable[[Progress], None], log: IO[str] | None = None) -> None:
        self._send, self._log = send, log
        self._last_s = 0.0

    def __enter__(self) -> SendingDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def train(self, record: dict[str, Any], progress: float, eta_s: float | None) -> None:
        """Send the progress, unless the last message is recent."""
        if time.monotonic() - self._last_s >= _EVERY_S:
            self._last_s = time.monotonic()
            self._send(Progress(progress, record["step"], record["smoothed_loss"]))

    def validation(self, record: dict[str, Any]) -> None:
        """Show nothing; the record is in metrics.jsonl."""

    def sample(self, record: dict[str, Any]) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Write the line into the log."""
        print(text, file=self._log or sys.stderr, flush=True)


def work(out: Path, planned: PlannedRun, connection: Connection) -> None:
    """Train one run to its end and write its outcome; the target of a process.

    SIGTERM stops it after the current step, with a checkpoint, as does the end of the process that started it.

    Args:
        out: folder of the comparison.
        planned: the run.
        connection: sends the progress.
    """
    _leave_terminal()
    signal.signal(signal.SIGTERM, _interrupt)
    _stop_with_parent()
    run_dir = out / RUNS_NAME / planned.folder
    display = SendingDisplay(lambda progress: _send(connection, (planned.folder, progress)))
    with _redirect_output(out / LOGS_NAME / f"{planned.folder}.log"):
        try:
            outcome = _outcome_of(out, planned, display)
            if outcome is not None:
                outcome.save(run_dir)
        except KeyboardInterrupt:
            # stopped before training began, or a second signal
            return


def work_side_by_side(out: Path, name: str, num_threads: int, connection: Connection) -> None:
    """Train runs as they come, each in a thread; the target of a process.

    Each thread has its own CUDA stream. An error that another run of the process may have caused, such as full memory,
    leaves a run without an outcome: the comparison trains it again alone. SIGTERM stops every run after its current
    step, with a checkpoint.

    Args:
        out: folder of the comparison.
        name: name of the process's log.
        num_threads: runs side by side, at most 16.
        connection: receives runs, and None at the end; sends the messages of each run.
    """
    _leave_terminal()
    signal.signal(signal.SIGTERM, lambda number, frame: request_stop("SIGTERM"))
    _stop_with_parent()
    # threads that launch work must not wait long for a thread that prepares a run
    sys.setswitchinterval(_SWITCH_S)
    lock, waiting = threading.Lock(), queue.SimpleQueue[PlannedRun | None]()

    def send(message: Message) -> None:
        with lock:
            _send(connection, message)

    def train(stream: Any) -> None:
        while (planned := waiting.get()) is not None:
            with side_by_side(stream):
                _train_beside_others(out, planned, send)
            send((planned.folder, RunEnded()))

    with _redirect_output(out / LOGS_NAME / f"{name}.log"):
        has_gpu = torch.cuda.is_available()
        threads = [
            threading.Thread(target=train, args=(torch.cuda.Stream() if has_gpu else None,)) for _ in range(num_threads)
        ]
        for thread in threads:
            thread.start()
        # the end of the comparison closes the connection
        with contextlib.suppress(EOFError, OSError):
            while (planned := connection.recv()) is not None:
                waiting.put(planned)
        for _ in threads:
            waiting.put(None)
        for thread in threads:
            thread.join()


def _train_beside_others(out: Path, planned: PlannedRun, send: Callable[[Message], None]) -> None:
    """Train one run and write its outcome, unless it was stopped or another run may have caused its error."""
    path = out / LOGS_NAME / f"{planned.folder}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log:
        display = SendingDisplay(lambda progress: send((planned.folder, progress)), log)
        outcome = _outcome_of(out, planned, display, log)
    if outcome is None:
        return
    if outcome.state == "failed":
        _end_process_without_device()
    else:
        outcome.save(out / RUNS_NAME / planned.folder)


def _end_process_without_device() -> None:
    """Exit at once if the GPU fails: after some CUDA errors, every later call of the process fails."""
    if torch.cuda.is_available():
        try:
            torch.cuda.current_stream().synchronize()
        except RuntimeError:
            os._exit(1)


def _leave_terminal() -> None:
    # Ctrl-C is for the comparison, which tells its workers
    if hasattr(os, "setsid"):
        os.setsid()


def _send(connection: Connection, message: Message) -> None:
    # the comparison may be gone
    with contextlib.suppress(OSError):
        connection.send(message)


def _outcome_of(out: Path, planned: PlannedRun, display: Any, log: IO[str] | None = None) -> Outcome | None:
    """Train, and return the outcome; None if a signal stopped the run."""
    try:
        run = _when_free(lambda: train_planned(out, planned, display))
    except UserError as error:
        display.note(f"error: {error}")
        return Outcome("diverged" if error.code == "not-finite" else "failed", _one_line(str(error)))
    # any error of one run must not end the others
    except Exception as error:
        traceback.print_exc(file=log)
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
def _redirect_output(path: Path) -> Iterator[None]:
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
