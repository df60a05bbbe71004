"""Check checkpoints (files, checksums, step in name and state) and the tokenizer of a run."""

from __future__ import annotations

import re
from pathlib import Path

from hgrn2.errors import UserError
from hgrn2.storage.hashed import sha256_of
from hgrn2.storage.json_files import parse_json

CONFIG_NAME = "config.json"
MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
TASK_NAME = "task.safetensors"
STATE_NAME = "state.json"
SUMS_NAME = "SHA256SUMS"
FILES = (MODEL_NAME, OPTIMIZER_NAME, TASK_NAME, STATE_NAME, CONFIG_NAME)
# sha256sum separates the name by two spaces, or by a space and a star for binary files
_SUMS_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def is_checkpoint_name(name: str) -> bool:
    """Return whether a folder has the name of a checkpoint, such as "step-00001234"."""
    # isdigit alone accepts digits that int() refuses, such as a superscript two
    digits = name.removeprefix("step-")
    return name.startswith("step-") and digits.isascii() and digits.isdigit()


def is_of_step(path: Path, name: str) -> bool:
    """Return whether a checkpoint's state belongs to the step in a name."""
    try:
        check_step(path, name)
    except (OSError, ValueError):
        return False
    return True


def looks_whole(path: Path, name: str) -> bool:
    """Return whether every file exists in full length and the step matches the name; fast, reads no weights."""
    try:
        check_step(path, name)
        return all(_has_full_length(path / file) for file in FILES)
    except (OSError, ValueError):
        return False


def _has_full_length(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return path.is_file()
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), num_bytes))
    try:
        ends = [entry["data_offsets"][1] for name, entry in parse_json(header).items() if name != "__metadata__"]
        return num_bytes == 8 + len(header) + max(ends, default=0)
    except (AttributeError, LookupError, TypeError):
        return False


def check_step(path: Path, name: str) -> None:
    """Raise a ValueError or OSError if a checkpoint's state does not belong to the step in a name."""
    state = parse_json((path / STATE_NAME).read_bytes())
    step = state.get("step") if isinstance(state, dict) else None
    if type(step) is not int:
        raise ValueError(f"{STATE_NAME} names no step")
    if is_checkpoint_name(name) and step != int(name.removeprefix("step-")):
        raise ValueError(f"the folder was renamed, its state is of step {step}; rename it to step-{step:08d}")


def find_fault(path: Path, name: str, only: tuple[str, ...] = FILES) -> str | None:
    """Return what is wrong with a checkpoint that should have this name, or None; reads all of `only`."""
    try:
        verify(path, only)
        if STATE_NAME in only:
            check_step(path, name)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def verify(path: Path, names: tuple[str, ...]) -> None:
    """Raise a ValueError or OSError for the first file whose checksum does not match."""
    sums = read_sums(path)
    for name in names:
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if sums.get(name) != sha256_of(path / name):
            raise ValueError(f"{name} is truncated or was changed (its checksum is not the one in {SUMS_NAME})")


def read_sums(path: Path) -> dict[str, str]:
    """Return checksums by name, from a folder's SHA256SUMS.

    Raises:
        ValueError: the file is missing, or a line is not a checksum and a name; the message says which.
        OSError: the file cannot be read.
    """
    if not (path / SUMS_NAME).is_file():
        raise ValueError(f"{SUMS_NAME} is missing")
    lines = (path / SUMS_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    sums = {}
    for number, line in enumerate(lines, start=1):
        match = _SUMS_LINE.fullmatch(line)
        if match is None or not match[2].isprintable():
            raise ValueError(f"{SUMS_NAME}: damaged, line {number}")
        sums[match[2]] = match[1]
    return sums


def check_tokenizer(run_dir: Path) -> None:
    """Raise UserError if the tokenizer of a run has changed; older runs have no checksums."""
    if not (run_dir / SUMS_NAME).exists():
        return
    try:
        sums = read_sums(run_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run_dir}: {error}; restore it from a copy of the run, or remove it if you trust the tokenizer there",
            "damaged",
        ) from None
    try:
        verify(run_dir, tuple(sums))
        tokenizers = [path.name for path in run_dir.glob("*tokenizer.json")]
        if others := sorted(set(tokenizers) - sums.keys()):
            raise ValueError(f"{others[0]} is not among the files in {SUMS_NAME}")
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir}: {error}; restore it from a copy, or from the prepared data", "damaged") from None
