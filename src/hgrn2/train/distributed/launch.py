"""Start the ranks of a job on this machine, pass signals on, and return its exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from hgrn2.train.distributed.environment import RUN_ID

# ranks end by themselves when one has failed
_LEAVE_S = 15.0
_POLL_S = 0.05


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run a command of hgrn2 in several processes of this machine.

    SIGINT, SIGTERM and SIGHUP are passed on: the ranks save and stop after their step.

    Args:
        arguments: the words after `hgrn2`.
        num_processes: number of ranks.

    Returns:
        The exit status of rank 0, or of the first rank that failed.
    """
    # the store is served here, so that no other program can take its port
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": f"{RUN_ID}{os.getpid()}",
    }
    if not torch.cuda.is_available():
        shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    command = [sys.executable, "-m", "hgrn2", *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    with _signals_passed_to(processes):
        try:
            for rank in map(str, range(num_processes)):
                # one by one, so that a signal meanwhile reaches those that exist
                process = subprocess.Popen(command, env=shared | {"RANK": rank, "LOCAL_RANK": rank})
                processes += [process]
            return _wait(processes)
        finally:
            _end(processes)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended, or some time after one has failed."""
    deadline_s = float("inf")
    failed: int | None = None
    while any(process.poll() is None for process in processes):
        if failed is None:
            failed = next((p.returncode for p in processes if p.returncode), None)
            if failed is not None:
                deadline_s = time.monotonic() + _LEAVE_S
        # a run that was stopped may still write its report
        if time.monotonic() > deadline_s and failed is not None and not _is_stop(failed):
            break
        time.sleep(_POLL_S)
    statuses = [process.poll() for process in processes]
    main = statuses[0]
    status = main if main else next((status for status in statuses if status), failed or 0)
    return 128 - status if status < 0 else status


def _is_stop(status: int) -> bool:
    return status - 128 in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


@contextmanager
def _signals_passed_to(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, frame: Any) -> None:
        del frame
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
