"""Encode pieces of text in one process or several, in input order."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

import numpy as np

from hgrn2.data.pieces import Piece, keeps_text, piece_tokens
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError

# enough text in a task that sending it to a worker is cheap beside tokenising it
_TASK_CHARS = 1 << 20
_TASK_PIECES = 4096

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class EncodedPiece:
    """A piece of text as tokens.

    Attributes:
        tokens: 1-D array of the dataset's dtype.
        num_text_bytes: UTF-8 bytes of the text.
        num_unknown: number of unknown tokens, which replace text that the vocabulary lacks.
        keeps_text: whether decoding the tokens restores the text.
    """

    tokens: np.ndarray
    num_text_bytes: int
    num_unknown: int = 0
    keeps_text: bool = True


def encode_pieces(
    pieces: Iterable[tuple[Tag, Piece]], tokenizer: Tokenizer, dtype: np.dtype, num_workers: int
) -> Generator[tuple[Tag, EncodedPiece], None, None]:
    """Encode tagged pieces in order, reading only a few tasks ahead.

    Args:
        pieces: (tag, piece) pairs; tags stay in this process.
        tokenizer: the tokenizer; must be picklable for several workers.
        dtype: dtype of the returned tokens.
        num_workers: number of processes; 1 encodes in threads of this process.

    Raises:
        UserError: a worker process died.
    """
    pool: Executor
    if num_workers == 1:
        # the tokenizers library uses all cores itself; one thread waits for it while the other converts ids to arrays
        pool = ThreadPoolExecutor(2, "encode")
        encode = partial(_encode, tokenizer, dtype)
    else:
        pool = ProcessPoolExecutor(
            num_workers,
            _process_context(),
            initializer=_start_worker,
            # pickled once: for a large vocabulary that takes longer than starting a process
            initargs=(pickle.dumps(tokenizer), dtype),
        )
        encode = _encode_in_worker
    try:
        waiting: deque[tuple[list[Any], Future[list[EncodedPiece]]]] = deque()
        for tags, task in _tasks(pieces):
            waiting.append((tags, pool.submit(encode, task)))
            # the bound keeps memory constant for a corpus of any size
            if len(waiting) > 2 * num_workers:
                done_tags, future = waiting.popleft()
                yield from zip(done_tags, future.result(), strict=True)
        for done_tags, future in waiting:
            yield from zip(done_tags, future.result(), strict=True)
    except BrokenProcessPool as error:
        raise UserError(
            "preparing data: a worker process ended early (out of memory, or a script without "
            "`if __name__ == '__main__':`); run again with num_workers=1",
            "unavailable",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _process_context() -> BaseContext:
    """Return a fork server that has imported what workers need; a spawn context where there is no fork server."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tokenizers"])
    return context


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tasks(pieces: Iterable[tuple[Tag, Piece]]) -> Iterator[tuple[list[Tag], list[Piece]]]:
    tags: list[Tag] = []
    task: list[Piece] = []
    num_chars = 0
    for tag, piece in pieces:
        tags.append(tag)
        task.append(piece)
        num_chars += len(piece.text)
        if num_chars >= _TASK_CHARS or len(task) >= _TASK_PIECES:
            yield tags, task
            tags, task, num_chars = [], [], 0
    if task:
        yield tags, task


def _encode(tokenizer: Tokenizer, dtype: np.dtype, pieces: Sequence[Piece]) -> list[EncodedPiece]:
    return [
        EncodedPiece(
            ids.astype(dtype),
            len(piece.text) if piece.text.isascii() else len(piece.text.encode("utf-8")),
            tokenizer.count_unknown(ids),
            keeps_text(tokenizer, piece, ids),
        )
        for piece, ids in zip(pieces, piece_tokens(tokenizer, pieces), strict=True)
    ]


_worker: tuple[Tokenizer, np.dtype]


def _start_worker(pickled_tokenizer: bytes, dtype: np.dtype) -> None:
    global _worker
    _worker = (pickle.loads(pickled_tokenizer), dtype)
    # otherwise the tokenizer of each process would start one thread a core
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches the parent as well, which shuts the pool down in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent is killed; without this the worker would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        with contextlib.suppress(OSError):
            parent.join()
        os._exit(1)


def _encode_in_worker(pieces: list[Piece]) -> list[EncodedPiece]:
    return _encode(*_worker, pieces)
