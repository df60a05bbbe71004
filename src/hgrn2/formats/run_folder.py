"""Read a run folder: find its checkpoints, settings and model.

RUN/config.json                          model, train and data settings, with a digest
RUN/tokenizer.json  RUN/SHA256SUMS       the files of the tokenizer, and their checksums
RUN/checkpoints/step-00001234/
    model.safetensors  optimizer.safetensors  task.safetensors
    state.json  config.json  SHA256SUMS  (`sha256sum -c` understands it)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hgrn2.errors import UserError
from hgrn2.formats.diagnose import check_is_model
from hgrn2.formats.reading import find_weights
from hgrn2.formats.soundness import (
    CONFIG_NAME,
    MODEL_NAME,
    STATE_NAME,
    SUMS_NAME,
    check_tokenizer,
    find_fault,
    is_checkpoint_name,
)
from hgrn2.storage.json_files import check_digest, parse_json, read_json_object

FOLDER_NAME = "checkpoints"
# after this many failed reads, each with a new checkpoint, the run is faster than the reader
_MAX_READS = 20

T = TypeVar("T")


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    found = (run_dir / FOLDER_NAME).glob("step-*") if (run_dir / FOLDER_NAME).is_dir() else ()
    return sorted((path for path in found if is_checkpoint_name(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def locate_model(path: Path, which: str = "latest") -> tuple[Path, Path]:
    """Return the folder of a model's weights and settings, and the folder of its tokenizer.

    Args:
        path: a run folder, one checkpoint in it, or a folder with weights of any layout.
        which: "latest" or "best", for a run folder.

    Raises:
        UserError: there is no model there, the best checkpoint is gone, or a checksum does not match.
    """
    folder = model_folder(path, which)
    is_checkpoint = folder.parent.name == FOLDER_NAME
    # a model from elsewhere may come without checksums
    if is_checkpoint or (folder / SUMS_NAME).exists():
        only = (MODEL_NAME, CONFIG_NAME, STATE_NAME) if is_checkpoint else (MODEL_NAME, CONFIG_NAME)
        if fault := find_fault(folder, folder.name, only):
            raise UserError(f"model {folder}: {fault}; {way_out(folder)}", "damaged")
    tokenizer_dir = folder.parent.parent if is_checkpoint else folder
    if is_checkpoint:
        check_tokenizer(tokenizer_dir)
    return folder, tokenizer_dir


def model_folder(path: Path, which: str = "latest") -> Path:
    """Return the folder of a model's weights, without a check of their checksums.

    Args:
        path: a run folder, one checkpoint in it, or a folder with weights of any layout.
        which: "latest" or "best", for a run folder.

    Raises:
        UserError: there is no model there, or the best checkpoint is gone.
    """
    check_is_model(path)
    # the checks of a damaged checkpoint report what it lacks
    if find_weights(path) is not None or _is_checkpoint(path):
        return path
    found = checkpoints_of(path)
    if not found:
        raise UserError(
            f"{path}: no model there; name a run folder, a checkpoint, or a folder with {MODEL_NAME}", "not-found"
        )
    if which == "best":
        try:
            best = parse_json((found[-1] / STATE_NAME).read_bytes()).get("best")
            best_step = best["step"] if best else None
        except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
            raise UserError(f"checkpoint {found[-1]}: {STATE_NAME}: {error}; {way_out(found[-1])}", "damaged") from None
        # a run without a finite validation has no best
        if best_step is not None:
            for folder in found:
                if step_of(folder) == best_step:
                    return folder
            raise UserError(
                f"{path}: the best checkpoint, of step {best_step}, is gone; "
                f"use the latest instead, or name one of {path / FOLDER_NAME}",
                "not-found",
            )
    return found[-1]


def read_while_training(run: Path, read: Callable[[], T]) -> T:
    """Return what a function reads from a run whose checkpoints may be removed while they are read.

    Args:
        run: a run folder; anything else is read once.
        read: the function; called again if it failed and the run has other checkpoints by then.
    """
    for _ in range(_MAX_READS):
        before = checkpoints_of(run)
        try:
            return read()
        # readers report a missing file in different ways
        except Exception:
            if checkpoints_of(run) == before:
                raise
    return read()


def read_config(path: Path) -> dict[str, Any]:
    """Read the settings of a run folder, a checkpoint or a folder written by `hgrn2 convert`.

    Raises:
        UserError: config.json is missing, not a JSON object, damaged or edited.
    """
    file = path / CONFIG_NAME
    if not file.is_file():
        raise UserError(f"{path}: no {CONFIG_NAME} there; name a run folder or one of its checkpoints", "not-found")
    remedy = "restore it from a checkpoint of the run"
    return check_digest(read_json_object(file, remedy), file, f"{remedy}; training settings are changed with flags")


def resume_point(path: Path) -> tuple[Path, Path | None]:
    """Return the run folder and the checkpoint for --resume PATH.

    Args:
        path: one checkpoint, or a run folder, which stands for its newest checkpoint (None if it has none yet).

    Raises:
        UserError: the path is neither.
    """
    check_is_model(path)
    path = Path(os.path.abspath(path))
    if _is_checkpoint(path) or (path.parent.name == FOLDER_NAME and path.is_dir()):
        return path.parent.parent, path
    if not (path / CONFIG_NAME).is_file():
        raise UserError(
            f"{path}: no run to resume there; name a folder that has {CONFIG_NAME} and {FOLDER_NAME}/", "not-found"
        )
    found = checkpoints_of(path)
    return path, found[-1] if found else None


def _is_checkpoint(path: Path) -> bool:
    """Return whether a path is that of a run's checkpoint, damaged or not."""
    return path.parent.name == FOLDER_NAME and is_checkpoint_name(path.name) and os.path.lexists(path)


def read_checkpoint_config(path: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint, verified by their checksum.

    Raises:
        UserError: the file is missing or changed; the message names the newest older good checkpoint.
    """
    if fault := find_fault(path, path.name, (CONFIG_NAME,)):
        raise UserError(f"checkpoint {path}: {fault}; {way_out(path)}", "damaged")
    return read_config(path)


def way_out(path: Path) -> str:
    """Return advice on what to name instead of a bad checkpoint."""
    if path.parent.name != FOLDER_NAME or not is_checkpoint_name(path.name):
        return "restore the folder from a copy"
    for older in reversed(checkpoints_of(path.parent.parent)):
        if step_of(older) < step_of(path):
            if find_fault(older, older.name) is not None:
                continue
            return f"the newest good one before it is {older}: name that instead"
    return "no older checkpoint of this run is good; start a new run"
