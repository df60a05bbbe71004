"""Read TOML files that people write."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from hgrn2.errors import UserError


def read_toml_file(path: Path, guide: str) -> dict[str, Any]:
    """Return the content of a TOML file.

    Args:
        path: the file.
        guide: page of the documentation that explains the file, for messages.

    Raises:
        UserError: the file cannot be read, or is not TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a TOML file", "unreadable") from None
    except (ValueError, RecursionError) as error:
        # not TOML, not UTF-8, a number of thousands of digits, or tables nested as deep
        raise UserError(f"{path}: not TOML ({error}); see {guide}", "unreadable") from None
