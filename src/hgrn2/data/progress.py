"""A progress bar over bytes of text, and lines of news."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from hgrn2.errors import visible


@dataclass(frozen=True)
class Bar:
    """A bar on the screen, or nothing at all.

    Attributes:
        advance: moves it on by a number of bytes.
        pulse: shows another title and an indefinite bar, for work of unknown length.
    """

    advance: Callable[[int], None] = lambda num_bytes: None
    pulse: Callable[[str], None] = lambda title: None


@contextmanager
def progress_bar(title: str, total_bytes: int | None, show: bool | None) -> Iterator[Bar]:
    """Show a bar on stderr and yield it.

    Args:
        title: stands before the bar.
        total_bytes: None if unknown.
        show: None means if stderr is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    measured = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), *measured, console=console) as progress:
        task = progress.add_task(title, total=total_bytes)

        def pulse(title: str) -> None:
            progress.columns = (*progress.columns[:2], TimeElapsedColumn())
            progress.reset(task, description=title, total=None)

        yield Bar(lambda num_bytes: progress.advance(task, num_bytes), pulse)


def announce(line: str) -> None:
    """Print a line of news on stderr, broken between words where a terminal is narrower."""
    line = visible(line)
    # a closed standard error is no reason to stop
    with suppress(OSError):
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns
            line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        print(line, file=sys.stderr)
