"""One-line messages from the errors of other libraries, and their loggers set to errors only."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import datasets.exceptions


def one_line(error: Exception) -> str:
    """Return a one-line description of an error raised by another library."""
    # the outer error only says that there is a cause
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = " ".join(str(error).split()).removesuffix(".")
    shown = lines if len(lines) <= 200 else f"{lines[:200]}..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


@contextmanager
def errors_only(name: str) -> Iterator[None]:
    """Set a logger to errors only for the duration of the block."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
