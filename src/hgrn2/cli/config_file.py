"""Read the configuration file of `hgrn2 train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.storage.toml_files import read_toml_file


def read_toml(path: Path | None) -> dict[str, dict[str, Any]]:
    """Return the tables [model], [task], [train] and [data] of a file; empty ones for what it does not have."""
    tables: dict[str, dict[str, Any]] = {"model": {}, "task": {}, "train": {}, "data": {}}
    if path is None:
        return tables
    found = read_toml_file(path, "docs/guide/training.md")
    for key, value in found.items():
        if key not in tables:
            raise UserError(unknown_key_message(str(path), key, tables), "unknown-name")
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key} is {value!r}; wanted a table, [{key}]")
    return tables | found
