"""Pieces of text to tokens, in this process or in several, always in the order they came."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError

# enough text in a task to make its way to a worker and back cheap beside its tokenisation
_TASK_CHARS = 1 << 20
_TASK_PIECES = 4096

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class EncodedPiece:
    """Tokens of a piece of text, 1-D of the dataset's dtype, and the UTF-8 bytes of the text."""

    tokens: np.ndarray
    num_text_bytes: int


def encode_pieces(
    pieces: Iterable[tuple[Tag, str]], tokenizer: Tokenizer, dtype: np.dtype, num_workers: int
) -> Generator[tuple[Tag, EncodedPiece], None, None]:
    """Encode tagged pieces in order, reading only a few tasks ahead.

    Args:
        pieces: (tag, text) pairs; tags stay in this process.
        tokenizer: must be picklable if there are several workers.
        dtype: of the tokens given back.
        num_workers: processes; 1 encodes in this one.

    Raises:
        UserError: a worker process died.
    """
    if num_workers == 1:
        for tags, texts in _tasks(pieces):
            yield from zip(tags, _encode(tokenizer, dtype, texts), strict=True)
        return
    pool = ProcessPoolExecutor(
        num_workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, dtype),
    )
    try:
        waiting: deque[tuple[list[Any], Future[list[EncodedPiece]]]] = deque()
        for tags, texts in _tasks(pieces):
            waiting.append((tags, pool.submit(_encode_in_worker, texts)))
            # the bound keeps a corpus larger than memory out of memory
            if len(waiting) > 2 * num_workers:
                done_tags, future = waiting.popleft()
                yield from zip(done_tags, future.result(), strict=True)
        for done_tags, future in waiting:
            yield from zip(done_tags, future.result(), strict=True)
    except BrokenProcessPool as error:
        raise UserError(
            "preparing data: a worker process ended early (out of memory, or a script without "
            "`if __name__ == '__main__':`); run again with num_workers=1"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _tasks(pieces: Iterable[tuple[Tag, str]]) -> Iterator[tuple[list[Tag], list[str]]]:
    tags: list[Tag] = []
    texts: list[str] = []
    num_chars = 0
    for tag, text in pieces:
        tags.append(tag)
        texts.append(text)
        num_chars += len(text)
        if num_chars >= _TASK_CHARS or len(texts) >= _TASK_PIECES:
            yield tags, texts
            tags, texts, num_chars = [], [], 0
    if texts:
        yield tags, texts


def _encode(tokenizer: Tokenizer, dtype: np.dtype, texts: Sequence[str]) -> list[EncodedPiece]:
    sizes = [len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts]
    encoded = tokenizer.encode_batch(texts)
    return [EncodedPiece(ids.astype(dtype), size) for ids, size in zip(encoded, sizes, strict=True)]


_worker: tuple[Tokenizer, np.dtype]


def _start_worker(tokenizer: Tokenizer, dtype: np.dtype) -> None:
    global _worker
    _worker = (tokenizer, dtype)
    # one thread a process, or the tokenizer would start as many as there are cores in each
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # an interrupt from the keyboard reaches the parent, which ends the pool in order
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the parent is killed, which would otherwise leave it waiting for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        with contextlib.suppress(OSError):
            parent.join()
        os._exit(1)


def _encode_in_worker(texts: list[str]) -> list[EncodedPiece]:
    return _encode(*_worker, texts)
