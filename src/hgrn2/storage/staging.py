"""Atomic writes: a directory or file appears complete, or not at all."""

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
from hgrn2.storage.lock import HAS_LOCKS, hold

# every failed attempt means that another process made progress, so a handful would do
_ATTEMPTS = 100


class Discard(Exception):
    """Raise inside `staged_directory` to drop the new directory and keep the target without an error."""


@contextlib.contextmanager
def staged_directory(target: Path, replace: bool = True) -> Iterator[Path]:
    """Yield an empty directory beside the target; on success, sync it and rename it to the target.

    On any exception the new directory is removed, with the parent folders made for it, and the target stays as it
    was. A second process that wants the same target waits for the first. Leftovers of a killed process are removed by
    the next one.

    Args:
        target: the directory to make.
        replace: replace a target that exists at the end; otherwise keep it and drop the new directory.

    Raises:
        UserError: the target cannot be written, the disk is full, or a file would exceed the file size limit.
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
                _replace_target(stage, target)
            else:
                _move_unless_taken(stage, target)
        except BaseException as error:
            shutil.rmtree(stage, ignore_errors=True)
            if replace:
                _recover(target)
            if not isinstance(error, Discard):
                raise
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise UserError(
                f"{target}: the disk is full; nothing was kept, free some space and run again", "unwritable"
            ) from error
        if error.errno == errno.EFBIG:
            raise UserError(
                f"{target}: a file would exceed the file size limit; nothing was kept, raise the limit "
                "(ulimit -f unlimited, or another file system) and run again",
                "unwritable",
            ) from error
        if error.errno in {
            errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG,
        }:  # fmt: skip
            raise UserError(
                f"{target}: cannot be written: {error.strerror}; choose another directory", "unwritable"
            ) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
        # only empty after a failure; innermost folder first
        with contextlib.suppress(OSError):
            for folder in new_parents:
                folder.rmdir()


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside the path; on success, sync the file and rename it, otherwise remove it.

    Raises:
        OSError: the file cannot be written.
    """
    partial = _partial(path)
    try:
        yield partial
        sync_path(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically: synced, then renamed over an existing file.

    Raises:
        OSError: the file cannot be written; no partial file is left.
    """
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file of bytes atomically: synced, then renamed over an existing file.

    Raises:
        OSError: the file cannot be written; no partial file is left.
    """
    with staged_file(path) as partial:
        partial.write_bytes(data)


def check_writable_file(path: Path) -> None:
    """Check that a file can be written, before the work whose result it will hold.

    Raises:
        UserError: its folder is missing or not writable, or the path is not a regular file.
    """
    try:
        # the final rename would replace a device by a file
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: cannot be written: not a regular file; name a file", "unwritable")
        partial = _partial(path)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); name a file in a folder that exists", "unwritable"
        ) from None


def check_writable_folder(path: Path) -> None:
    """Check that a folder can be made and written, before the work whose result it will hold.

    Raises:
        UserError: the folder, or its nearest existing parent, is not writable.
    """
    try:
        nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another folder", "unwritable") from None


def _partial(path: Path) -> Path:
    # threads of one process, or processes on machines that share a disk, may write the same file
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def _lock_directory(stage: Path) -> int | None:
    """Create the directory and return an exclusive lock on it; the system releases it when the process ends."""
    while True:
        _make_directory(stage)
        if not HAS_LOCKS:
            # two processes must not prepare the same directory there at once
            return None
        try:
            lock = os.open(stage, os.O_RDONLY)
        except FileNotFoundError:
            continue
        hold(lock, wait=True)
        # another process may have renamed the directory to its target while this one waited
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(stage)):
                return lock
        os.close(lock)


def _make_directory(path: Path) -> None:
    """Make a directory and its parents while other processes may rename or remove the same ones."""
    for _ in range(_ATTEMPTS - 1):
        # a folder that mkdir found, or just made, may be gone when it looks again
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
    """Flush a file to the disk, or the entries of a directory, so that renames survive a power cut."""
    if os.path.isdir(path) and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move_unless_taken(stage: Path, target: Path) -> None:
    # rename replaces an empty directory of that name, which loses nothing
    try:
        stage.rename(target)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:
            raise
        raise UserError(
            f"{target}: another process has created it meanwhile; name a new folder", "already-exists"
        ) from None
    sync_path(target.parent)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _recover(target: Path) -> None:
    """Complete or undo `_replace_target` after a process was killed between its two renames."""
    old = _old(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(target)


def _replace_target(stage: Path, target: Path) -> None:
    old = _old(target)
    if target.exists():
        target.rename(old)
    stage.rename(target)
    sync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)
