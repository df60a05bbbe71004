"""One process at a time in a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hgrn2.errors import UserError

LOCK_NAME = ".lock"


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run folder; the system lets go of it however the process ends. No lock where there is no fcntl.

    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    # the file stays: removing it would let two processes hold two files of the same name
    with (run_dir / LOCK_NAME).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run_dir}: another process is training in it; wait for it, or name another folder"
            ) from None
        except OSError:
            # a file system without locks, such as some network mounts
            pass
        yield
