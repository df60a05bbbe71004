"""A progress bar over bytes of text, and lines of news."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hgrn2.errors import visible


@contextmanager
def progress_bar(title: str, total_bytes: int | None, show: bool | None) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr and give a function that moves it on by a number of bytes.

    Args:
        title: stands before the bar.
        total_bytes: None if unknown.
        show: None means if stderr is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def announce(line: str) -> None:
    """Print a line of news on stderr, broken between words where a terminal is narrower."""
    line = visible(line)
    # a closed standard error is no reason to stop
    with suppress(OSError):
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns
            line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        print(line, file=sys.stderr)
