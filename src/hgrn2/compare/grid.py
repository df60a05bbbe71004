"""Train the runs of a comparison side by side, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from hgrn2.compare.outcome import OUTCOME_NAME, Outcome
from hgrn2.compare.plan import RUNS_NAME, PlannedRun
from hgrn2.compare.progress import GridDisplay, GridProgress
from hgrn2.compare.worker import Progress, work
from hgrn2.train.interrupt import StopRequest

# small models leave most of a GPU idle; each process takes about half a GiB of its memory for itself
_RUNS_PER_GPU = 4
_TICK_S = 0.5
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Slots:
    """How many runs go side by side, and on which GPUs.

    Attributes:
        jobs: runs side by side.
        num_gpus: GPUs over which they are distributed; 0 means the CPU.
    """

    jobs: int
    num_gpus: int

    @classmethod
    def for_machine(cls, runs: Sequence[PlannedRun], jobs: int | None = None) -> Slots:
        """Return as many slots as the device of the runs allows.

        On the CPU: cores, divided by the threads of a run (num_threads of [train], by default one). On GPUs: four runs
        a GPU, at most one a core.

        Args:
            runs: the runs.
            jobs: the number that the user has set; None chooses it.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = {str(run.settings.get("device", "auto")) for run in runs}
        uses_gpu = torch.cuda.is_available() and any(name == "auto" or name.startswith("cuda") for name in devices)
        # a device with an index is the user's choice
        num_gpus = torch.cuda.device_count() if uses_gpu and devices <= {"auto", "cuda"} else 0
        threads = max((run.settings.get("num_threads") or 1 for run in runs), default=1)
        chosen = min(cores, _RUNS_PER_GPU * max(num_gpus, 1)) if uses_gpu else cores // threads
        return cls(max(1, chosen if jobs is None else jobs), num_gpus)


@dataclass
class _Active:
    """A run whose process is alive."""

    run: PlannedRun
    process: Any
    connection: Connection
    slot: int
    started_s: float = field(default_factory=time.monotonic)


def is_ended(out: Path, run: PlannedRun) -> bool:
    """Return whether a run has an outcome that training again would not change."""
    outcome = Outcome.load(out / RUNS_NAME / run.folder)
    return outcome is not None and outcome.is_final


def train_grid(out: Path, runs: Sequence[PlannedRun], slots: Slots, display: GridDisplay) -> str | None:
    """Train all runs that have not ended, side by side.

    Args:
        out: folder of the comparison, locked.
        runs: the runs, in the order to start them.
        slots: how many at a time.
        display: shows the progress.

    Returns:
        The name of the signal that stopped it, or None.

    Raises:
        KeyboardInterrupt: at the second signal; all processes are killed.
    """
    waiting = [run for run in runs if not is_ended(out, run)]
    progress = GridProgress(runs, {run.folder for run in waiting}, slots.jobs)
    active: list[_Active] = []
    context = _context(uses_gpu=slots.num_gpus > 0 or torch.cuda.is_available())
    with StopRequest() as stop, display:
        try:
            while active or (waiting and stop.signal_name is None):
                while waiting and len(active) < slots.jobs and stop.signal_name is None:
                    active.append(_start(context, out, waiting.pop(0), slots, active))
                    progress.start(active[-1].run.folder)
                display.show(progress)
                _listen(active, progress)
                if stop.signal_name is not None:
                    _stop(active)
                for ended in [each for each in active if not each.process.is_alive()]:
                    active.remove(ended)
                    outcome = _settle(out, ended, stop.signal_name is not None)
                    progress.end(ended.run.folder, outcome)
                    display.ended(ended.run, outcome, progress)
            display.show(progress)
        except BaseException:
            for each in active:
                each.process.kill()
            raise
    return stop.signal_name


def _context(*, uses_gpu: bool) -> Any:
    """Return the context of processes.

    On the CPU, a server imports torch once and forks the workers, where the system can. CUDA does not survive a fork,
    so with a GPU each process imports torch itself.
    """
    if uses_gpu or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hgrn2.compare.worker"])
    return context


def _start(context: Any, out: Path, run: PlannedRun, slots: Slots, active: Sequence[_Active]) -> _Active:
    taken = {each.slot for each in active}
    slot = next(index for index in range(slots.jobs) if index not in taken)
    # of an earlier attempt
    (out / RUNS_NAME / run.folder / OUTCOME_NAME).unlink(missing_ok=True)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(out, run, sender))
    with _one_gpu(slot % slots.num_gpus if slots.num_gpus else None):
        process.start()
    sender.close()
    return _Active(run, process, receiver, slot)


@contextmanager
def _one_gpu(index: int | None) -> Iterator[None]:
    """Let processes that start here see one GPU, of those that are visible; None changes nothing."""
    if index is None:
        yield
        return
    before = os.environ.get(_VISIBLE)
    # the variable may name the GPUs of this process already
    os.environ[_VISIBLE] = before.split(",")[index] if before else str(index)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VISIBLE]
        else:
            os.environ[_VISIBLE] = before


def _listen(active: Sequence[_Active], progress: GridProgress) -> None:
    """Wait for progress or the end of a process, for a moment."""
    by_handle: dict[Any, _Active] = {each.process.sentinel: each for each in active}
    by_handle |= {each.connection: each for each in active if not each.connection.closed}
    for ready in wait(list(by_handle), _TICK_S):
        each = by_handle[ready]
        if ready is not each.connection:
            continue
        try:
            while each.connection.poll():
                message: Progress = each.connection.recv()
                progress.update(each.run.folder, message)
        except (EOFError, OSError):
            each.connection.close()


def _stop(active: Sequence[_Active]) -> None:
    """Ask every process once to stop after its step."""
    for each in active:
        if each.process.is_alive() and not getattr(each.process, "is_asked", False):
            each.process.is_asked = True
            each.process.terminate()


def _settle(out: Path, ended: _Active, is_stopping: bool) -> Outcome | None:
    """Return the outcome of a process that has ended; record one that was killed."""
    ended.process.join()
    ended.connection.close()
    run_dir = out / RUNS_NAME / ended.run.folder
    outcome = Outcome.load(run_dir)
    if outcome is None and not is_stopping:
        code = ended.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        outcome = Outcome("failed", f"its process {how} before the run was complete")
        outcome.save(run_dir)
    return outcome
