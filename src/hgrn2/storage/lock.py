"""One process at a time in a run folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hgrn2.errors import UserError

LOCK_NAME = ".lock"


@contextmanager
def run_lock(run_dir: Path) -> Iterator[Callable[[], None]]:
    """Hold the run folder, made if it is not there; the system lets go of it however the process ends.

    Whatever is decided by what lies in the folder is decided while it is held. No lock where there is no fcntl.

    Yields:
        A check, which raises a UserError if the folder of this name is no longer the one that is held: it may have
        been removed, and another run begun in its place.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # the file stays: removing it would let two processes hold two files of the same name
        file = (run_dir / LOCK_NAME).open("ab")
    except OSError as error:
        raise UserError(f"{run_dir}: cannot write in the run folder ({error.strerror}); name another folder") from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run_dir}: another process is training in it; wait for it, or name another folder"
            ) from None
        except (ImportError, OSError):
            # a system without fcntl, or a file system without locks, such as some network mounts
            pass

        def check() -> None:
            try:
                held = os.path.samestat(os.fstat(file.fileno()), (run_dir / LOCK_NAME).stat())
            except OSError:
                held = False
            if not held:
                raise UserError(
                    f"{run_dir}: removed, or replaced by another run, while this one was training in it; "
                    "nothing more is written there; train again, in another folder"
                )

        yield check
