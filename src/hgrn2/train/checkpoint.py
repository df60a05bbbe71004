"""Write and load checkpoints: folders of safetensors and JSON files, complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hgrn2.data.model_files import companion_files
from hgrn2.errors import UserError
from hgrn2.formats.reading import find_weights
from hgrn2.formats.run_folder import FOLDER_NAME, checkpoints_of, read_config, step_of, way_out
from hgrn2.formats.soundness import (
    CONFIG_NAME,
    MODEL_NAME,
    OPTIMIZER_NAME,
    STATE_NAME,
    SUMS_NAME,
    TASK_NAME,
    find_fault,
    is_checkpoint_name,
    is_of_step,
    looks_whole,
)
from hgrn2.storage.hashed import sha256_of, write_safetensors, write_text
from hgrn2.storage.json_files import parse_json, with_digest
from hgrn2.storage.lock import LOCK_NAME, run_lock
from hgrn2.storage.staging import sync_path, write_text_atomic
from hgrn2.train.sharded_tensors import shard_like

_TEMPORARY = ".tmp-"
# checkpoints after the step a run resumes from, kept until its next checkpoint is complete
_SET_ASIDE = "replaced-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, read and verified.

    Attributes:
        path: the checkpoint's folder.
        model: parameters and buffers by name.
        optimizer: state by "parameter name/key".
        task: tensors that the task carries from step to step.
        state: step, tokens, position in the data, generators, counters.
        config: the content of its config.json.
    """

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    task: dict[str, Tensor]
    state: dict[str, Any]
    config: dict[str, Any]


class CheckpointStore:
    """Write the checkpoints of a run; keep the newest few and the best, remove the rest.

    Args:
        run_dir: the run folder.
        keep_last: number of newest checkpoints to keep.
    """

    def __init__(self, run_dir: Path, keep_last: int) -> None:
        self._folder = run_dir / FOLDER_NAME
        self._keep_last = keep_last
        self._folder.mkdir(parents=True, exist_ok=True)

    def remove_leftovers(self) -> None:
        """Remove partial files of a killed process; the caller must hold the run's lock."""
        for leftover in self._folder.glob(f"{_TEMPORARY}*"):
            final = self._folder / leftover.name.removeprefix(_TEMPORARY)
            # complete if the process was killed just before the rename; perhaps the only one of its step
            is_free = is_checkpoint_name(final.name) and not os.path.lexists(final)
            if is_free and find_fault(leftover, final.name) is None:
                leftover.rename(final)
            else:
                _delete(leftover)
        # temporary files of staged_file
        for leftover in self._folder.parent.glob(".*.partial"):
            leftover.unlink(missing_ok=True)

    def latest(self) -> Path | None:
        """Return the folder of the newest checkpoint; None if there is none."""
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
        """Write one checkpoint, then remove all but the newest few and the best.

        Raises:
            OSError: writing failed; nothing of the new checkpoint is left, the older ones are untouched.
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
                CONFIG_NAME: write_text(temporary / CONFIG_NAME, json.dumps(with_digest(config), indent=1)),
            }
            write_text(temporary / SUMS_NAME, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
            sync_path(temporary)
            if os.path.lexists(final):
                self._set_aside(final)
            temporary.rename(final)
            sync_path(self._folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._retain(final, best_step)
        return final

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints of later steps; they are removed when the next checkpoint is complete."""
        for path in checkpoints_of(self._folder.parent):
            if step_of(path) > step:
                self._set_aside(path)

    def _set_aside(self, path: Path) -> None:
        aside = path.with_name(f"{_SET_ASIDE}{path.name}")
        if os.path.lexists(aside):
            self._remove(aside)
        path.rename(aside)

    def _retain(self, newest: Path, best_step: int | None) -> None:
        for path in self._folder.glob(f"{_SET_ASIDE}step-*"):
            # keep a folder whose state belongs to another step than its name: somebody renamed it
            if is_of_step(path, path.name.removeprefix(_SET_ASIDE)) or _is_dangling_link(path):
                self._remove(path)
        # neither count nor remove renamed or truncated ones, which must not displace good ones
        found = checkpoints_of(self._folder.parent)
        whole = [path for path in found if looks_whole(path, path.name)]
        kept = {*whole[-self._keep_last :], newest}
        oldest_kept = min(map(step_of, kept))
        for path in found:
            is_old_link = _is_dangling_link(path) and step_of(path) < oldest_kept
            if (path in whole or is_old_link) and path not in kept and step_of(path) != best_step:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        # rename first, so that a kill leaves no partial checkpoint under a valid name
        doomed = path.with_name(f"{_TEMPORARY}removed-{path.name}")
        _delete(doomed)
        path.rename(doomed)
        _delete(doomed)


def _delete(path: Path) -> None:
    # remove only the link: its target may be the only copy
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _is_dangling_link(path: Path) -> bool:
    """Return whether it is a symbolic link whose target does not exist, or a loop of links."""
    return path.is_symlink() and not path.exists()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and verify its checksums.

    Args:
        path: the checkpoint's folder.

    Raises:
        UserError: a file is missing, truncated or changed; the message names the newest older good checkpoint.
    """
    try:
        if fault := find_fault(path, path.name):
            raise ValueError(fault)
        return Checkpoint(
            path=path,
            model=load_file(path / MODEL_NAME),
            optimizer=load_file(path / OPTIMIZER_NAME),
            task=load_file(path / TASK_NAME),
            state=parse_json((path / STATE_NAME).read_bytes()),
            config=read_config(path),
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"checkpoint {path}: {error}; {way_out(path)}", "damaged") from None


def check_new_run(run_dir: Path) -> None:
    """Raise UserError if a run cannot begin in the folder: it holds one with a checkpoint, or one that is training."""
    _check_free(run_dir)
    if (run_dir / LOCK_NAME).exists():
        with run_lock(run_dir):
            pass


def _check_free(run_dir: Path) -> None:
    """Raise UserError if the folder holds a model, or a run with a checkpoint."""
    config = run_dir / CONFIG_NAME
    if checkpoints_of(run_dir) or (
        config.exists() and (find_weights(run_dir) is not None or "train" not in read_config(run_dir))
    ):
        raise UserError(
            f"{run_dir}: holds a run already; continue it with --resume {run_dir}, or name another folder",
            "already-exists",
        )


def create_run(run_dir: Path, config: Mapping[str, Any], tokenizer: Any = None) -> None:
    """Make a run folder: the tokenizer, then config.json, whose presence marks a run.

    Args:
        run_dir: new, without a run, or with a run that has no checkpoint, which is replaced.
        config: JSON values; "model", "train" and "data" by convention.
        tokenizer: anything with save(directory).

    Raises:
        UserError: the folder holds a run already, or cannot be made.
    """
    _check_free(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if (run_dir / CONFIG_NAME).exists():
            # files that came with the weights of the replaced run
            sums = run_dir / SUMS_NAME
            listed = sums.read_text(encoding="utf-8", errors="replace").split() if sums.is_file() else []
            companions = [path for path in companion_files(run_dir) if path.name in listed]
            # config.json first: without it the folder is not a run
            for old in (
                run_dir / CONFIG_NAME,
                run_dir / SUMS_NAME,
                *run_dir.glob("*tokenizer.json"),
                *companions,
            ):
                old.unlink(missing_ok=True)
        if tokenizer is not None:
            before = set(run_dir.iterdir())
            tokenizer.save(run_dir)
            saved = sorted(path for path in set(run_dir.iterdir()) - before if path.is_file())
            write_text_atomic(run_dir / SUMS_NAME, "".join(f"{sha256_of(path)}  {path.name}\n" for path in saved))
        write_config(run_dir, config)
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot make the run folder ({error.strerror}); name another folder", "unwritable"
        ) from None


def write_config(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Replace the run's config.json atomically."""
    write_text_atomic(run_dir / CONFIG_NAME, json.dumps(with_digest(config), indent=1))
    sync_path(run_dir)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, tied weights once, under their first name."""
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
        UserError: names or shapes differ from the model's.
    """
    own = model_tensors(model)
    if missing := sorted(own.keys() ^ tensors.keys()):
        raise UserError(
            f"{source}: tensor {missing[0]!r} is not in both model and file; use the config.json next to it", "mismatch"
        )
    for name, tensor in own.items():
        found = tensors[name]
        if found.shape != tensor.shape:
            raise UserError(
                f"{source}: {name} has shape {list(found.shape)}, the model wants {list(tensor.shape)}; "
                "use the config.json next to the file",
                "mismatch",
            )
        tensor.copy_(shard_like(found, tensor))
