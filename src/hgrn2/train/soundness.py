"""Checks of a checkpoint: its files, their checksums, and that its name and its state agree on the step."""

from __future__ import annotations

from pathlib import Path

from hgrn2.json_files import parse_json
from hgrn2.layouts.files import sha256_of

CONFIG_NAME = "config.json"
MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
TASK_NAME = "task.safetensors"
STATE_NAME = "state.json"
SUMS_NAME = "SHA256SUMS"
FILES = (MODEL_NAME, OPTIMIZER_NAME, TASK_NAME, STATE_NAME, CONFIG_NAME)


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder is named as checkpoints are, "step-00001234"."""
    # isdigit alone is true of digits that int() refuses, such as a superscript two
    digits = name.removeprefix("step-")
    return name.startswith("step-") and digits.isascii() and digits.isdigit()


def is_of_step(path: Path, name: str) -> bool:
    """Whether a checkpoint's state is of the step in a name."""
    try:
        check_step(path, name)
    except (OSError, ValueError):
        return False
    return True


def looks_whole(path: Path, name: str) -> bool:
    """Whether every file is there at its full length and of the step in a name; fast, as no weights are read."""
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
    """Raise a ValueError or OSError if a checkpoint's state is not of the step in a name."""
    state = parse_json((path / STATE_NAME).read_bytes())
    step = state.get("step") if isinstance(state, dict) else None
    if type(step) is not int:
        raise ValueError(f"{STATE_NAME} names no step")
    if is_checkpoint_name(name) and step != int(name.removeprefix("step-")):
        raise ValueError(f"the folder was renamed, its state is of step {step}; rename it to step-{step:08d}")


def find_fault(path: Path, name: str, only: tuple[str, ...] = FILES) -> str | None:
    """Return what is wrong with a checkpoint that should have this name, or None; reads every file named."""
    try:
        verify(path, only)
        if STATE_NAME in only:
            check_step(path, name)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def verify(path: Path, names: tuple[str, ...]) -> None:
    """Raise a ValueError or OSError that names the first file whose checksum is not the one recorded."""
    sums = read_sums(path)
    for name in names:
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if sums.get(name) != sha256_of(path / name):
            raise ValueError(f"{name} is truncated or was changed (its checksum is not the one in {SUMS_NAME})")


def read_sums(path: Path) -> dict[str, str]:
    """Checksums by name, from a folder's SHA256SUMS; a ValueError if there is no such file."""
    if not (path / SUMS_NAME).is_file():
        raise ValueError(f"{SUMS_NAME} is missing")
    lines = (path / SUMS_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
