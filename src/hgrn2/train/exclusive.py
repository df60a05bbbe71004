"""Let runs of one process train in threads side by side: a lock for what belongs to the whole process.

Generators of random numbers, the compilation of kernels and the capture of a CUDA graph belong to a process. A run
holds the lock while it seeds and initialises its weights, during its first steps and its first validation, which
compile kernels, and while it captures a step. Training itself draws no random numbers unless the model has dropout, and
every run has a CUDA stream of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

_LOCK = threading.RLock()
_thread = threading.local()


def exclusive() -> AbstractContextManager[object]:
    """Return a context that one thread of the process may be in at a time; it may enter it again inside."""
    return _LOCK


def is_side_by_side() -> bool:
    """Return whether the calling thread trains beside other runs of its process."""
    return getattr(_thread, "is_side_by_side", False)


@contextmanager
def side_by_side(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Mark the calling thread as one that trains beside other runs.

    The GPU's memory that the run has freed goes back to the device at the end, for runs of other processes.

    Args:
        stream: CUDA stream of the thread, which no other thread uses; None on the CPU.
    """
    _thread.is_side_by_side = True
    try:
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            yield
        with exclusive():
            torch.cuda.empty_cache()
    finally:
        _thread.is_side_by_side = False
