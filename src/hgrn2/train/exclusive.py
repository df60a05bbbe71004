"""A lock for runs of one process that train side by side in threads.

Generators of random numbers, the compilation of kernels and the capture of a CUDA graph belong to a process. A run
holds the lock while it seeds and initialises its weights, during its first steps and its first validation, which
compile kernels, and while it captures a step. Training itself draws no random numbers unless the model has dropout, and
every run has its own CUDA stream.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

_LOCK = threading.RLock()
_thread = threading.local()


def exclusive() -> AbstractContextManager[object]:
    """Return a context for one thread of the process at a time; it is reentrant."""
    return _LOCK


def is_side_by_side() -> bool:
    """Return whether the calling thread trains beside other runs of its process."""
    return getattr(_thread, "is_side_by_side", False)


@contextmanager
def side_by_side(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Return a context that marks the calling thread as training beside other runs.

    At the end, freed GPU memory is returned to the device, for runs of other processes.

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
