"""Read the configuration file of `hgrn2 train`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from hgrn2.errors import UserError, unknown_key_message


def read_toml(path: Path | None) -> dict[str, dict[str, Any]]:
    """Return the tables [model], [task], [train] and [data] of a file; empty ones for what it does not have."""
    tables: dict[str, dict[str, Any]] = {"model": {}, "task": {}, "train": {}, "data": {}}
    if path is None:
        return tables
    try:
        with path.open("rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a TOML file", "unreadable") from None
    except (ValueError, RecursionError) as error:
        # not TOML, not UTF-8, a number of thousands of digits, or tables nested as deep
        raise UserError(f"{path}: not TOML ({error}); see docs/guide/training.md", "unreadable") from None
    for key, value in found.items():
        if key not in tables:
            raise UserError(unknown_key_message(str(path), key, tables), "unknown-name")
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key} is {value!r}; wanted a table, [{key}]")
    return tables | found
