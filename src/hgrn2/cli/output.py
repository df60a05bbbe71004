"""Print tables, errors and warnings to outputs that may be closed or full."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from hgrn2.errors import visible


def show_table(table: Any) -> None:
    """Print a rich table."""
    from rich.console import Console

    # rich itself would end the process with status 1 where the reader has gone
    console = Console()
    with console.capture() as shown:
        console.print(table)
    print(shown.get(), end="")


def tell(line: str) -> None:
    """Print a line on standard error."""
    # a closed standard error is no reason to stop; names of files may hold what a terminal would obey
    with contextlib.suppress(OSError):
        print(visible(line), file=sys.stderr)


def refuse(line: str) -> int:
    """Print an error; returns the exit status that goes with it."""
    tell(visible(f"error: {line}", keep=""))
    release_output()
    return 2


def release_output() -> None:
    """Drop what a closed or full output does not take; otherwise Python would complain of it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
