"""A directory or file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hgrn2.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows, where two processes must not prepare the same directory at once
    fcntl = None

# each one lost means that another process got further, so a handful would do
_ATTEMPTS = 100


class Discard(Exception):
    """Raised inside `staged_directory` to drop the new directory and keep the target, without an error."""


@contextlib.contextmanager
def staged_directory(target: Path, replace: bool = True) -> Iterator[Path]:
    """Give an empty directory beside the target; on success it is synced and takes the target's place.

    Args:
        target: the directory to make.
        replace: whether one that is there by then gives way; otherwise it stays, and the new one is dropped.

    On any exception it is removed and the target stays as it was. A second process that wants the same target
    waits for the first. What a killed process left is cleared by the next one. Parent folders made for it go too.

    Raises:
        UserError: the place cannot be written, the disk is full or a file would pass a limit on its size.
    """
    stage = target.with_name(f".{target.name}.partial")
    lock = None
    new_parents: list[Path] = []
    try:
        new_parents = [folder for folder in target.parents if not folder.exists()]
        lock = _lock_directory(stage)
        try:
            if replace:
                _recover(target)
            _clear(stage)
            yield stage
            _sync_tree(stage)
            if replace:
                _put_in_place(stage, target)
            else:
                _put_beside(stage, target)
        except BaseException as error:
            shutil.rmtree(stage, ignore_errors=True)
            if replace:
                _recover(target)
            if not isinstance(error, Discard):
                raise
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise UserError(f"{target}: the disk is full; nothing was kept, free some space and run again") from error
        if error.errno == errno.EFBIG:
            raise UserError(
                f"{target}: a file would pass the limit on file sizes; nothing was kept, raise the limit "
                "(ulimit -f unlimited, or another file system) and run again"
            ) from error
        if error.errno in {
            errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG,
        }:  # fmt: skip
            raise UserError(f"{target}: cannot be written: {error.strerror}; choose another directory") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
        # empty only after a failure; nearest first
        with contextlib.suppress(OSError):
            for folder in new_parents:
                folder.rmdir()


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Give the name of a file beside the path; on success it is synced and takes the path's place, else removed.

    Raises:
        OSError: the place cannot be written.
    """
    partial = _partial(path)
    try:
        yield partial
        sync_path(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file that appears complete and synced, or not at all; a file that was there stays until then.

    Raises:
        OSError: it cannot be written; nothing half-written is left.
    """
    write_whole(path, text.encode("utf-8"))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file of bytes as `write_text_whole` writes a text."""
    with staged_file(path) as partial:
        partial.write_bytes(data)


def check_file_place(path: Path) -> None:
    """Make sure that a file can be written, before the work whose result it will hold.

    Raises:
        UserError: its folder is missing or cannot be written, or something that is no file is there.
    """
    try:
        # a device would be replaced by a file
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: cannot be written, for it is no file; name a file")
        partial = _partial(path)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name a file in a folder that exists") from None


def check_folder_place(path: Path) -> None:
    """Make sure that a folder can be made and written, before the work whose result it will hold.

    Raises:
        UserError: it, or the nearest folder above it that exists, cannot be written.
    """
    try:
        nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another folder") from None


def _partial(path: Path) -> Path:
    # threads of one process, and processes of several machines with one disk, may write the same file
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def _lock_directory(stage: Path) -> int | None:
    """Create the directory and hold an exclusive lock on it, which ends with the process."""
    while True:
        _make_directory(stage)
        if fcntl is None:
            return None
        try:
            lock = os.open(stage, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            # some network file systems know no locks
            return lock
        # while we waited, the directory may have become another process's finished target
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(stage)):
                return lock
        os.close(lock)


def _make_directory(path: Path) -> None:
    """Make it and its parents, where other processes may rename or remove the same ones at the same moment."""
    for _ in range(_ATTEMPTS - 1):
        # what mkdir found there, or put its directory into, may be gone when it looks again
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            path.mkdir(parents=True, exist_ok=True)
            return
    path.mkdir(parents=True, exist_ok=True)


def _clear(stage: Path) -> None:
    for path in stage.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in [*(os.path.join(folder, file) for file in files), folder]:
            sync_path(name)


def sync_path(path: str | Path) -> None:
    """Bring a file to the disk; of a directory, the names in it, so that renames survive a power cut."""
    if os.path.isdir(path) and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_beside(stage: Path, target: Path) -> None:
    # no rename of directories that refuses an empty one of that name, which holds nothing that could be lost
    try:
        stage.rename(target)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:
            raise
        raise UserError(f"{target}: was made by another process meanwhile and stays; name a new folder") from None
    sync_path(target.parent)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _recover(target: Path) -> None:
    """Finish, or take back, what a process left that was stopped between the two renames of `_put_in_place`."""
    old = _old(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(target)


def _put_in_place(stage: Path, target: Path) -> None:
    old = _old(target)
    if target.exists():
        target.rename(old)
    stage.rename(target)
    sync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)
