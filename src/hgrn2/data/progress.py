"""A progress bar over bytes of text, and one-line notices on stderr."""

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
    """Callbacks that drive a progress bar; the defaults do nothing.

    Attributes:
        advance: advances the bar by a number of bytes.
        pulse: replaces the title and shows an indefinite bar, for work of unknown length.
    """

    advance: Callable[[int], None] = lambda num_bytes: None
    pulse: Callable[[str], None] = lambda title: None


@contextmanager
def progress_bar(title: str, total_bytes: int | None, show: bool | None) -> Iterator[Bar]:
    """Show a bar on stderr and yield it.

    Args:
        title: printed before the bar.
        total_bytes: the length of the bar; None if unknown.
        show: whether to show the bar; None shows it if stderr is a terminal.
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
    """Print a notice on stderr, wrapped at words to the width of the terminal."""
    line = visible(line)
    # a closed stderr must not stop the run
    with suppress(OSError):
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns
            line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        print(line, file=sys.stderr)
