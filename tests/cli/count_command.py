"""A command in one file, which no file of the package knows."""

from pathlib import Path
from typing import Literal

import tyro

from hgrn2.cli import Command
from hgrn2.errors import UserError


def count(
    text: tyro.conf.Positional[Path],
    unit: Literal["words", "lines"] = "words",
    most: int | None = None,
) -> int:
    """Count what is in a text.

    Args:
        text: A file.
        unit: What to count.
        most: Stop there.
    """
    if not text.is_file():
        raise UserError(f"{text}: no such file; name a text", "not-found")
    found = text.read_text()
    number = len(found.split() if unit == "words" else found.splitlines())
    print(number if most is None else min(number, most))
    return 0 if number else 1


COMMAND = Command("count", count, order=95, common=("unit",), aliases=("wc",))
