"""Train the runs of a comparison side by side, in processes of one run or of several."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from hgrn2.compare.outcome import OUTCOME_NAME, Outcome
from hgrn2.compare.plan import RUNS_NAME, PlannedRun
from hgrn2.compare.progress import GridDisplay, GridProgress
from hgrn2.compare.worker import Progress, work, work_side_by_side
from hgrn2.formats.run_folder import FOLDER_NAME as CHECKPOINTS_NAME
from hgrn2.train.interrupt import StopRequest

# small models leave most of a GPU idle; each process takes about half a GiB of its memory for itself
_RUNS_PER_GPU = 4
# for tiny models with captured steps: threads of a process share the GPU at the same time, processes take turns
_RUNS_PER_PROCESS, _PROCESSES_PER_GPU = 8, 2
MAX_RUNS_PER_PROCESS = 16
_TINY_WIDTH, _TINY_TOKENS = 256, 2**17
_TICK_S = 0.5
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Slots:
    """Number of runs side by side, and the GPUs that they use.

    Attributes:
        jobs: runs side by side.
        num_gpus: GPUs over which processes are distributed; 0 means the CPU.
        runs_per_process: runs that share a process, each in a thread.
    """

    jobs: int
    num_gpus: int
    runs_per_process: int = 1

    @property
    def num_processes(self) -> int:
        """Number of processes for runs that share one."""
        return -(-self.jobs // self.runs_per_process)

    @classmethod
    def for_machine(
        cls, runs: Sequence[PlannedRun], jobs: int | None = None, runs_per_process: int | None = None
    ) -> Slots:
        """Return as many slots as the device of the runs allows.

        On the CPU: cores, divided by the threads of a run (num_threads of [train], by default one). On GPUs: four runs
        per GPU, at most one per core; if all models are tiny and their steps are captured (cuda_graph), two processes
        of eight runs per GPU.

        Args:
            runs: the runs.
            jobs: number of runs side by side, if the user has set it; None chooses it.
            runs_per_process: number of runs per process, if the user has set it; None chooses it.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = {str(run.settings.get("device", "auto")) for run in runs}
        uses_gpu = torch.cuda.is_available() and any(name == "auto" or name.startswith("cuda") for name in devices)
        # a device with an index is the user's choice
        num_gpus = torch.cuda.device_count() if uses_gpu and devices <= {"auto", "cuda"} else 0
        threads = max((run.settings.get("num_threads") or 1 for run in runs), default=1)
        if runs_per_process is None:
            is_tiny = uses_gpu and all(can_share(run, uses_gpu=True) and _is_tiny(run) for run in runs)
            runs_per_process = min(_RUNS_PER_PROCESS, jobs or _RUNS_PER_PROCESS) if is_tiny else 1
        if runs_per_process > 1 and uses_gpu:
            chosen = runs_per_process * min(cores, _PROCESSES_PER_GPU * max(num_gpus, 1))
        else:
            chosen = min(cores, _RUNS_PER_GPU * max(num_gpus, 1)) if uses_gpu else cores // threads
        return cls(max(1, chosen if jobs is None else jobs), num_gpus, runs_per_process)


def _is_tiny(run: PlannedRun) -> bool:
    """Return whether a step leaves most of a GPU idle."""
    return run.model_config["hidden_size"] <= _TINY_WIDTH and run.run_settings.tokens_per_step <= _TINY_TOKENS


def can_share(run: PlannedRun, uses_gpu: bool) -> bool:
    """Return whether a run can train in a process with others, and is faster for it.

    A run that draws random numbers or compiles its layers would depend on the others. Without a CUDA graph, a step on a
    GPU spends its time in the interpreter, which the threads share.
    """
    is_alone = bool(run.settings.get("compile")) or bool(run.model_config.get("dropout"))
    return not is_alone and (not uses_gpu or bool(run.settings.get("cuda_graph")))


@dataclass
class _Worker:
    """A living process and its runs.

    Attributes:
        process: the process.
        connection: receives its messages; sends runs to a process that takes several.
        slot: index of the process, which decides its GPU.
        runs: its runs, by folder.
        is_shared: whether it takes runs until it is told to end.
        is_stopping: whether it was asked to stop.
    """

    process: Any
    connection: Connection
    slot: int
    runs: dict[str, PlannedRun] = field(default_factory=dict)
    is_shared: bool = False
    is_stopping: bool = False


def is_ended(out: Path, run: PlannedRun) -> bool:
    """Return whether a run has an outcome that training again would not change."""
    outcome = Outcome.load(out / RUNS_NAME / run.folder)
    return outcome is not None and outcome.is_final


def train_grid(
    out: Path,
    runs: Sequence[PlannedRun],
    slots: Slots,
    display: GridDisplay,
    *,
    keep_checkpoints: bool = True,
    on_end: Callable[[PlannedRun], None] = lambda run: None,
    start_for_s: float = math.inf,
) -> str | None:
    """Train all runs that have not ended, side by side.

    Args:
        out: folder of the comparison, locked.
        runs: the runs, in the order to start them.
        slots: how many at a time.
        display: shows the progress.
        keep_checkpoints: whether the runs that have ended keep their weights.
        on_end: called with each run whose outcome is known.
        start_for_s: seconds after which no further run is started; runs that are training continue to their end.

    Returns:
        The name of the signal that stopped it, or None.

    Raises:
        KeyboardInterrupt: at the second signal; all processes are killed.
    """
    grid = _Grid(out, runs, slots, display, keep_checkpoints, on_end)
    deadline_s = time.monotonic() + start_for_s
    with StopRequest() as stop, display:
        try:
            while grid.workers or (grid.num_waiting and stop.signal_name is None):
                if time.monotonic() > deadline_s:
                    grid.leave_waiting()
                if stop.signal_name is None:
                    grid.start_runs()
                display.show(grid.progress)
                grid.listen()
                if stop.signal_name is not None:
                    grid.stop()
                grid.settle(is_stopping=stop.signal_name is not None)
            display.show(grid.progress)
        except BaseException:
            for worker in grid.workers:
                worker.process.kill()
            raise
    return stop.signal_name


class _Grid:
    """The runs of a comparison, waiting or in a process."""

    def __init__(
        self,
        out: Path,
        runs: Sequence[PlannedRun],
        slots: Slots,
        display: GridDisplay,
        keep_checkpoints: bool,
        on_end: Callable[[PlannedRun], None],
    ) -> None:
        self._out, self._slots, self._display = out, slots, display
        self._keep_checkpoints, self._on_end = keep_checkpoints, on_end
        uses_gpu = slots.num_gpus > 0 or torch.cuda.is_available()
        self._context = _context(uses_gpu=uses_gpu)
        pending = [run for run in runs if not is_ended(out, run)]
        self.progress = GridProgress(runs, {run.folder for run in pending}, slots.jobs)
        shares = slots.runs_per_process > 1
        self._shareable = [run for run in pending if shares and can_share(run, uses_gpu)]
        self._alone = [run for run in pending if not (shares and can_share(run, uses_gpu))]
        self.workers: list[_Worker] = []
        # folders of runs that failed beside others
        self._retried: set[str] = set()

    @property
    def num_waiting(self) -> int:
        """Number of runs that no process has."""
        return len(self._shareable) + len(self._alone)

    def start_runs(self) -> None:
        """Assign waiting runs to processes until all slots are used."""
        while self._shareable and self._num_active < self._slots.jobs:
            self._assign(self._shareable.pop(0))
        while self._alone and self._num_active < self._slots.jobs:
            run = self._alone.pop(0)
            self._forget_outcome(run)
            self._begin(self._start(work, (self._out, run)), run)
        if not self._shareable:
            for worker in self.workers:
                if worker.is_shared and not worker.runs:
                    _tell_to_end(worker)

    def leave_waiting(self) -> None:
        """Start no further run, except those that must be retried alone after an error."""
        self._shareable.clear()
        self._alone = [run for run in self._alone if run.folder in self._retried]

    @property
    def _num_active(self) -> int:
        return sum(len(worker.runs) for worker in self.workers)

    def _assign(self, run: PlannedRun) -> None:
        """Assign a run to the process with the fewest runs, or to a new one."""
        shared = [worker for worker in self.workers if worker.is_shared and not worker.is_stopping]
        if len(shared) < self._slots.num_processes:
            arguments = self._out, f"process{len(shared)}", self._slots.runs_per_process
            shared.append(self._start(work_side_by_side, arguments))
            shared[-1].is_shared = True
        self._forget_outcome(run)
        worker = min(shared, key=lambda worker: len(worker.runs))
        self._begin(worker, run)
        # the runs of a process that has just died are retried in `settle`
        with suppress(OSError):
            worker.connection.send(run)

    def _forget_outcome(self, run: PlannedRun) -> None:
        """Remove the outcome of an earlier attempt."""
        (self._out / RUNS_NAME / run.folder / OUTCOME_NAME).unlink(missing_ok=True)

    def _begin(self, worker: _Worker, run: PlannedRun) -> None:
        worker.runs[run.folder] = run
        self.progress.start(run.folder)

    def _start(self, target: Any, arguments: tuple[Any, ...]) -> _Worker:
        taken = {worker.slot for worker in self.workers}
        slot = next(index for index in count() if index not in taken)
        own, other = self._context.Pipe()
        process = self._context.Process(target=target, args=(*arguments, other))
        with _one_gpu(slot % self._slots.num_gpus if self._slots.num_gpus else None):
            process.start()
        other.close()
        self.workers.append(_Worker(process, own, slot))
        return self.workers[-1]

    def listen(self) -> None:
        """Wait half a second at most for messages or the end of a process."""
        by_handle: dict[Any, _Worker] = {worker.process.sentinel: worker for worker in self.workers}
        by_handle |= {worker.connection: worker for worker in self.workers if not worker.connection.closed}
        for ready in wait(list(by_handle), _TICK_S):
            if ready is by_handle[ready].connection:
                self._receive(by_handle[ready])

    def _receive(self, worker: _Worker) -> None:
        try:
            while worker.connection.poll():
                folder, message = worker.connection.recv()
                if isinstance(message, Progress):
                    self.progress.update(folder, message)
                else:
                    self._end(worker, worker.runs.pop(folder))
        except (EOFError, OSError):
            worker.connection.close()

    def _end(self, worker: _Worker, run: PlannedRun) -> None:
        """Handle the end of a run in a process with others."""
        outcome = Outcome.load(self._out / RUNS_NAME / run.folder)
        if outcome is None and not worker.is_stopping:
            self._try_alone(run)
        self._show_end(run, outcome)

    def _try_alone(self, run: PlannedRun) -> None:
        self._retried.add(run.folder)
        self._alone.append(run)

    def _show_end(self, run: PlannedRun, outcome: Outcome | None) -> None:
        run_dir = self._out / RUNS_NAME / run.folder
        if outcome is not None and outcome.is_final and not self._keep_checkpoints:
            shutil.rmtree(run_dir / CHECKPOINTS_NAME, ignore_errors=True)
        if outcome is not None:
            self._on_end(run)
        self.progress.end(run.folder, outcome)
        self._display.ended(run, outcome, self.progress)

    def stop(self) -> None:
        """Ask every process once to stop after its step."""
        for worker in self.workers:
            if worker.process.is_alive() and not worker.is_stopping:
                worker.is_stopping = True
                worker.process.terminate()
                if worker.is_shared:
                    _tell_to_end(worker)

    def settle(self, *, is_stopping: bool) -> None:
        """Handle processes that have ended."""
        for worker in [worker for worker in self.workers if not worker.process.is_alive()]:
            worker.process.join()
            # its last messages
            if not worker.connection.closed:
                self._receive(worker)
                worker.connection.close()
            self.workers.remove(worker)
            for run in worker.runs.values():
                self._settle_run(worker, run, is_stopping)

    def _settle_run(self, worker: _Worker, run: PlannedRun, is_stopping: bool) -> None:
        """Handle a run whose process has ended: it is complete, stopped, to be retried alone, or failed."""
        run_dir = self._out / RUNS_NAME / run.folder
        outcome = Outcome.load(run_dir)
        if outcome is None and not is_stopping:
            if worker.is_shared:
                self._try_alone(run)
            else:
                outcome = Outcome("failed", f"its process {_how_it_ended(worker.process)} before the run was complete")
                outcome.save(run_dir)
        self._show_end(run, outcome)


def _tell_to_end(worker: _Worker) -> None:
    """Tell a process that takes several runs that there are no more."""
    with suppress(OSError):
        worker.connection.send(None)


def _how_it_ended(process: Any) -> str:
    code = process.exitcode
    return f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"


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


@contextmanager
def _one_gpu(index: int | None) -> Iterator[None]:
    """Return a context in which started processes see one of the visible GPUs; None changes nothing."""
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
