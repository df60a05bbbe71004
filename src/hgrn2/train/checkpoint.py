"""Checkpoints: a folder of safetensors and JSON that exists whole or not at all.

RUN/config.json                          model, train and data settings
RUN/tokenizer.json                       or whatever the tokenizer saves
RUN/checkpoints/step-00001234/
    model.safetensors  optimizer.safetensors  task.safetensors
    state.json  config.json  SHA256SUMS  (`sha256sum -c` understands it)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hgrn2.data.staging import sync_path, write_text_whole
from hgrn2.errors import UserError
from hgrn2.layouts.files import sha256_of, write_safetensors, write_text
from hgrn2.layouts.mistaken import check_place
from hgrn2.layouts.reading import find_weights
from hgrn2.train.lock import LOCK_NAME, run_lock

CONFIG_NAME = "config.json"
MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
TASK_NAME = "task.safetensors"
STATE_NAME = "state.json"
SUMS_NAME = "SHA256SUMS"
FOLDER_NAME = "checkpoints"
_TEMPORARY = ".tmp-"
# a run that always has another checkpoint by the time a reader has failed is faster than the reader
_MOST_READS = 20

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on, read and verified.

    Attributes:
        path: the checkpoint's folder.
        model: parameters and buffers by name.
        optimizer: state by "parameter name/key".
        task: tensors the task carries from step to step; empty for most.
        state: step, tokens, position in the data, generators, counters.
    """

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    task: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run: writes, keeps the newest few and the best, removes the rest.

    Args:
        run_dir: the run folder.
        keep_last: how many of the newest to keep.
    """

    def __init__(self, run_dir: Path, keep_last: int) -> None:
        self._folder = run_dir / FOLDER_NAME
        self._keep_last = keep_last
        self._folder.mkdir(parents=True, exist_ok=True)

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half-written; only for the process that holds the run's lock."""
        for leftover in self._folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)
        # see staged_file
        for leftover in self._folder.parent.glob(".*.partial"):
            leftover.unlink(missing_ok=True)

    def latest(self) -> Path | None:
        """Folder of the newest checkpoint, if there is one."""
        found = checkpoints_of(self._folder.parent)
        return found[-1] if found else None

    def save(
        self,
        *,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        task: Mapping[str, Tensor],
        state: Mapping[str, Any],
        config: Mapping[str, Any],
        best_step: int | None,
    ) -> Path:
        """Write one checkpoint, then remove those that are neither among the newest nor the best.

        Raises:
            OSError: the disk refused; nothing of the new checkpoint is left, the older ones are untouched.
        """
        final = self._folder / f"step-{state['step']:08d}"
        temporary = self._folder / f"{_TEMPORARY}{final.name}"
        try:
            temporary.mkdir()
            sums = {
                MODEL_NAME: write_safetensors(temporary / MODEL_NAME, model),
                OPTIMIZER_NAME: write_safetensors(temporary / OPTIMIZER_NAME, optimizer),
                TASK_NAME: write_safetensors(temporary / TASK_NAME, task),
                STATE_NAME: write_text(temporary / STATE_NAME, json.dumps(state, indent=1)),
                CONFIG_NAME: write_text(temporary / CONFIG_NAME, json.dumps(config, indent=1)),
            }
            write_text(temporary / SUMS_NAME, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
            sync_path(temporary)
            self._remove(final)
            temporary.rename(final)
            sync_path(self._folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._retain(final, best_step)
        return final

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which a run that goes on from this step makes anew."""
        for path in checkpoints_of(self._folder.parent):
            if _step_of(path) > step:
                self._remove(path)

    def _retain(self, newest: Path, best_step: int | None) -> None:
        kept = set(checkpoints_of(self._folder.parent)[-self._keep_last :]) | {newest}
        for path in checkpoints_of(self._folder.parent):
            if path not in kept and _step_of(path) != best_step:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        # renamed first, so that a kill in the middle leaves no half of a checkpoint under a good name
        if path.exists():
            doomed = path.with_name(f"{_TEMPORARY}removed-{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed)


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = (run_dir / FOLDER_NAME).glob("step-*") if (run_dir / FOLDER_NAME).is_dir() else ()
    return sorted((path for path in found if _is_checkpoint_name(path.name)), key=_step_of)


def _is_checkpoint_name(name: str) -> bool:
    # isdigit alone is true of digits that int() refuses, such as a superscript two
    digits = name.removeprefix("step-")
    return name.startswith("step-") and digits.isascii() and digits.isdigit()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and verify its checksums.

    Args:
        path: the checkpoint's folder.

    Raises:
        UserError: a file is missing, truncated or changed; the newest older one that is good is named.
    """
    try:
        _verify(path)
        return Checkpoint(
            path=path,
            model=load_file(path / MODEL_NAME),
            optimizer=load_file(path / OPTIMIZER_NAME),
            task=load_file(path / TASK_NAME),
            state=json.loads((path / STATE_NAME).read_text(encoding="utf-8")),
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"checkpoint {path}: {error}; {_way_out(path)}") from None


def locate_model(path: Path, which: str = "latest") -> tuple[Path, Path]:
    """The folder that holds a model's weights and settings, and the one that holds its tokenizer.

    Args:
        path: a run folder, one checkpoint in it, or a folder with weights of any layout.
        which: "latest" or "best", for a run folder.

    Raises:
        UserError: there is no model there, the best one is gone, or a file is not what its checksum says.
    """
    folder = _model_folder(path, which)
    is_checkpoint = folder.parent.name == FOLDER_NAME
    # a model from elsewhere may come without checksums
    if is_checkpoint or (folder / SUMS_NAME).exists():
        try:
            _verify(folder, only=(MODEL_NAME, CONFIG_NAME))
        except (OSError, ValueError) as error:
            raise UserError(f"model {folder}: {error}; {_way_out(folder)}") from None
    return folder, folder.parent.parent if is_checkpoint else folder


def _model_folder(path: Path, which: str) -> Path:
    check_place(path)
    if find_weights(path) is not None:
        return path
    found = checkpoints_of(path)
    if not found:
        raise UserError(f"{path}: no model there; name a run folder, a checkpoint, or a folder with {MODEL_NAME}")
    if which == "best":
        try:
            best = json.loads((found[-1] / STATE_NAME).read_text(encoding="utf-8")).get("best")
            best_step = best["step"] if best else None
        except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
            raise UserError(f"checkpoint {found[-1]}: {STATE_NAME}: {error}; {_way_out(found[-1])}") from None
        # a run without a finite validation has no best
        if best_step is not None:
            for folder in found:
                if _step_of(folder) == best_step:
                    return folder
            raise UserError(
                f"{path}: the best checkpoint, of step {best_step}, is gone; "
                f"use the latest instead, or name one of {path / FOLDER_NAME}"
            )
    return found[-1]


def read_while_training(run: Path, read: Callable[[], T]) -> T:
    """What a function reads from a run's newest or best checkpoint, which may be removed before it is read whole.

    Args:
        run: a run folder; anything else is read once.
        read: called again when it has failed and the run has other checkpoints by then.
    """
    for _ in range(_MOST_READS):
        before = checkpoints_of(run)
        try:
            return read()
        # whatever reads files says in its own way that one is gone
        except Exception:
            if checkpoints_of(run) == before:
                raise
    return read()


def check_new_run(run_dir: Path) -> None:
    """Raises UserError if a run cannot begin in the folder: it holds one with a checkpoint, or one that goes on."""
    _check_free(run_dir)
    if (run_dir / LOCK_NAME).exists():
        with run_lock(run_dir):
            pass


def _check_free(run_dir: Path) -> None:
    """Raises UserError if the folder holds a run or a model; a run that got to no checkpoint is none to keep."""
    config = run_dir / CONFIG_NAME
    if checkpoints_of(run_dir) or (
        config.exists() and (find_weights(run_dir) is not None or "train" not in read_config(run_dir))
    ):
        raise UserError(f"{run_dir}: holds a run already; continue it with --resume {run_dir}, or name another folder")


def create_run(run_dir: Path, config: Mapping[str, Any], tokenizer: Any = None) -> None:
    """Make a run folder: the tokenizer's file, then config.json, whose presence means the folder is a run.

    Args:
        run_dir: new, empty of a run, or with one that ended before its first checkpoint, which is begun anew.
        config: JSON values; "model", "train" and "data" by convention.
        tokenizer: anything with save(directory).

    Raises:
        UserError: the folder holds a run already, or cannot be made.
    """
    _check_free(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if (run_dir / CONFIG_NAME).exists():
            # first config.json, then the tokenizer, which may have another name than the new one
            for old in (run_dir / CONFIG_NAME, *run_dir.glob("*tokenizer.json")):
                old.unlink()
        if tokenizer is not None:
            tokenizer.save(run_dir)
        write_config(run_dir, config)
    except OSError as error:
        raise UserError(f"{run_dir}: cannot make the run folder ({error.strerror}); name another folder") from None


def write_config(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Replace the run's config.json in one move."""
    write_text_whole(run_dir / CONFIG_NAME, json.dumps(config, indent=1))
    sync_path(run_dir)


def read_config(path: Path) -> dict[str, Any]:
    """Settings of a run folder, a checkpoint or a folder that `hgrn2 convert` wrote.

    Raises:
        UserError: no config.json there, or it is no JSON object.
    """
    file = path / CONFIG_NAME
    if not file.is_file():
        raise UserError(f"{path}: no {CONFIG_NAME} there; name a run folder or one of its checkpoints")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); restore it from a checkpoint of the run") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: found {type(config).__name__}, wanted an object; restore it from a checkpoint")
    return config


def resume_point(path: Path) -> tuple[Path, Path | None]:
    """The run folder and the checkpoint that --resume PATH means.

    Args:
        path: a run folder (its newest checkpoint; None if it was stopped before the first) or one checkpoint.

    Raises:
        UserError: it is neither.
    """
    check_place(path)
    path = Path(os.path.abspath(path))
    if path.parent.name == FOLDER_NAME and path.is_dir():
        return path.parent.parent, path
    if not (path / CONFIG_NAME).is_file():
        raise UserError(f"{path}: no run to resume there; name a folder that has {CONFIG_NAME} and {FOLDER_NAME}/")
    found = checkpoints_of(path)
    return path, found[-1] if found else None


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, a tensor with two names (tied weights) under its first."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy tensors into the model in place.

    Raises:
        UserError: names or shapes are not the model's.
    """
    own = model_tensors(model)
    if missing := sorted(own.keys() ^ tensors.keys()):
        raise UserError(f"{source}: tensor {missing[0]!r} is not in both model and file; use the config beside it")
    for name, tensor in own.items():
        found = tensors[name]
        if found.shape != tensor.shape:
            raise UserError(
                f"{source}: {name} has shape {list(found.shape)}, the model wants {list(tensor.shape)}; "
                "use the config beside the file"
            )
        tensor.copy_(found)


def _verify(path: Path, only: tuple[str, ...] | None = None) -> None:
    """Raise a ValueError or OSError that names the first file whose checksum is not the one recorded."""
    if not (path / SUMS_NAME).is_file():
        raise ValueError(f"{SUMS_NAME} is missing")
    lines = (path / SUMS_NAME).read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in only or (MODEL_NAME, OPTIMIZER_NAME, TASK_NAME, STATE_NAME, CONFIG_NAME):
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if sums.get(name) != sha256_of(path / name):
            raise ValueError(f"{name} is truncated or was changed (its checksum is not the one in {SUMS_NAME})")


def _way_out(path: Path) -> str:
    """What to type instead of a bad checkpoint."""
    if path.parent.name != FOLDER_NAME or not _is_checkpoint_name(path.name):
        return "restore the folder from a copy"
    for older in reversed(checkpoints_of(path.parent.parent)):
        if _step_of(older) < _step_of(path):
            try:
                _verify(older)
            except (OSError, ValueError):
                continue
            return f"the newest good one before it is {older}: name that instead"
    return "no older checkpoint of this run is good; start a new run"
