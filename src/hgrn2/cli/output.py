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

    # rich would exit with status 1 if the reader has closed the pipe
    console = Console()
    with console.capture() as shown:
        console.print(table)
    print(shown.get(), end="")


def tell(line: str) -> None:
    """Print a line on standard error."""
    # a closed stderr must not stop the command; file names may contain control characters
    with contextlib.suppress(OSError):
        print(visible(line), file=sys.stderr)


def refuse(line: str) -> int:
    """Print an error and return the exit status 2."""
    tell(visible(f"error: {line}", keep=""))
    release_output()
    return 2


def release_output() -> None:
    """Discard output that cannot be written; otherwise Python would report an error at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
