"""A progress bar over bytes of text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
