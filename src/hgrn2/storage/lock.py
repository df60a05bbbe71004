"""Locks between processes, released by the system however a process ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hgrn2.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

LOCK_NAME = ".lock"
HAS_LOCKS = fcntl is not None


def hold(file: IO[bytes] | int, *, wait: bool) -> None:
    """Hold an exclusive lock on an open file or folder until it is closed.

    Nothing is held where the system or the file system has no locks, as on some network mounts.

    Args:
        file: the file, or its descriptor.
        wait: wait for a process that holds it.

    Raises:
        BlockingIOError: another process holds it, and wait is False.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        # a file system without locks
        return


@contextmanager
def run_lock(run_dir: Path) -> Iterator[Callable[[], None]]:
    """Hold the run folder, which is made if it does not exist: one process trains in it at a time.

    Read what lies in the folder only while holding it, if a decision depends on it.

    Yields:
        A check that raises a UserError if the folder of this name is no longer the one that is held: it may have
        been removed, and another run begun in its place.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # the file stays: removing it would let two processes hold two files of the same name
        file = (run_dir / LOCK_NAME).open("ab")
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot write in the run folder ({error.strerror}); name another folder", "unwritable"
        ) from None
    with file:
        try:
            hold(file, wait=False)
        except BlockingIOError:
            raise UserError(
                f"{run_dir}: another process is training in it; wait for it, or name another folder", "in-use"
            ) from None

        def check() -> None:
            try:
                held = os.path.samestat(os.fstat(file.fileno()), (run_dir / LOCK_NAME).stat())
            except OSError:
                held = False
            if not held:
                raise UserError(
                    f"{run_dir}: removed, or replaced by another run, while this one was training in it; "
                    "nothing more is written there; train again, in another folder",
                    "in-use",
                )

        yield check
