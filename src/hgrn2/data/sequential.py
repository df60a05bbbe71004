"""Batches that read every token of a dataset once with its full context, for exact perplexity and bits per byte."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from hgrn2.data.batches import Batch, _check_sizes, pack_streams
from hgrn2.data.permutation import Permutation, keyed_integer
from hgrn2.data.tokens import TokenDataset
from hgrn2.nn.loss import IGNORE


@dataclass(frozen=True, order=True)
class _Span:
    """Tokens [start, stop) of one document; `whole` is False if the document continues after them."""

    start: int
    stop: int
    whole: bool
    num_text_bytes: int


class SequentialWindows:
    """Whole documents read by parallel streams that carry state; can be iterated any number of times.

    Batches are packed and linked by carry_from and carry_to as in `StreamBatches`. There are always batch_size streams,
    but batches become shorter towards the end as streams run out of documents. `Batch.num_text_bytes`, summed over
    all batches, is `num_text_bytes`.

    Attributes:
        num_tokens: number of targets, including the ends of documents.
        num_text_bytes: UTF-8 bytes of the text behind these targets.
        num_documents: number of documents; the last one may be cut.
        num_streams: equal to batch_size.
    """

    def __init__(self, dataset: TokenDataset, seq_len: int, batch_size: int, max_tokens: int | None = None):
        _check_sizes(batch_size, seq_len, 0, 1)
        self._dataset = dataset
        self._seq_len = seq_len
        spans = _choose(dataset, max_tokens)
        self._streams = _distribute(spans, batch_size)
        self.num_streams = batch_size
        self.num_documents = len(spans)
        self.num_text_bytes = sum(span.num_text_bytes for span in spans)
        # the last token of a cut document has no target: its bytes are not counted
        self.num_tokens = sum(span.stop - span.start - (not span.whole) for span in spans)

    def __len__(self) -> int:
        """Number of batches."""
        longest = max(sum(span.stop - span.start for span in spans) for spans in self._streams)
        return -(-longest // self._seq_len)

    def __iter__(self) -> Iterator[Batch]:
        windows = [self._windows(spans) for spans in self._streams]
        fresh = np.ones(self.num_streams, dtype=bool)
        while True:
            found = [(stream, next(rows, None)) for stream, rows in enumerate(windows)]
            active = [(stream, row) for stream, row in found if row is not None]
            if not active:
                return
            batch = pack_streams(
                [inputs for _, (inputs, _, _) in active],
                [targets for _, (_, targets, _) in active],
                np.array([stream for stream, _ in active]),
                fresh,
                self._dataset.eot_id,
            )
            yield replace(batch, num_text_bytes=sum(size for _, (_, _, size) in active))
            fresh = np.zeros(self.num_streams, dtype=bool)

    def _windows(self, spans: list[_Span]) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Yield inputs, targets and text bytes of the windows of a stream, whose documents are concatenated."""
        inputs: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        room, num_text_bytes = self._seq_len, 0
        for span in spans:
            start = span.start
            while start < span.stop:
                stop = min(start + room, span.stop)
                window = self._dataset.tokens(start, min(stop + 1, span.stop))
                if stop == span.stop:
                    # the target at the end of a document is the start of the next one
                    window = np.append(window, self._dataset.eot_id if span.whole else IGNORE)
                    num_text_bytes += span.num_text_bytes
                inputs.append(window[:-1])
                targets.append(window[1:])
                room -= stop - start
                start = stop
                if room == 0:
                    yield np.concatenate(inputs), np.concatenate(targets), num_text_bytes
                    inputs, targets, room, num_text_bytes = [], [], self._seq_len, 0
        if inputs:
            yield np.concatenate(inputs), np.concatenate(targets), num_text_bytes


def sequential_windows(
    dataset: TokenDataset, seq_len: int, batch_size: int, max_tokens: int | None = None
) -> SequentialWindows:
    """Return batches that cover every token once, each predicted from everything before it in its document.

    Args:
        dataset: the tokens.
        seq_len: tokens per stream and batch; changes the memory needed but not the result.
        batch_size: number of parallel streams.
        max_tokens: limit on the tokens covered: whole documents in a fixed random order, the last of them cut at the
            end of a piece of text (64 KiB), where its byte count is known exactly.

    Example:
        windows = sequential_windows(prepared.validation, seq_len=1024, batch_size=8)
        bits_per_byte = nats / math.log(2) / windows.num_text_bytes
    """
    return SequentialWindows(dataset, seq_len, batch_size, max_tokens)


def _choose(dataset: TokenDataset, max_tokens: int | None) -> list[_Span]:
    """Return the spans of all documents, or of a fixed random sample, in order."""
    bounds = np.append(dataset.document_starts, dataset.num_tokens)
    num_documents = dataset.num_documents
    if max_tokens is None or max_tokens >= dataset.num_tokens:
        return [_whole(dataset, bounds, index) for index in range(num_documents)]
    order = Permutation(num_documents, keyed_integer("evaluation order"))
    left, spans = max_tokens, []
    for position in range(num_documents):
        index = int(order(np.array([position]))[0])
        span = _whole(dataset, bounds, index)
        if span.stop - span.start > left:
            cut = _cut(dataset, span, left, at_least_one=not spans)
            spans.extend([cut] if cut is not None else [])
            break
        spans.append(span)
        left -= span.stop - span.start
    return sorted(spans)


def _whole(dataset: TokenDataset, bounds: np.ndarray, index: int) -> _Span:
    start, stop = int(bounds[index]), int(bounds[index + 1])
    return _Span(start, stop, True, dataset.text_bytes(start, stop))


def _cut(dataset: TokenDataset, span: _Span, num_tokens: int, at_least_one: bool) -> _Span | None:
    """Return the span of the pieces of a document that fit; None if none fits."""
    first, last = np.searchsorted(dataset.piece_ends, [span.start, span.start + num_tokens], side="right")
    if last == first:
        if not at_least_one:
            return None
        last += 1
    stop = int(dataset.piece_ends[last - 1])
    return _Span(span.start, stop, stop == span.stop, dataset.text_bytes(span.start, stop))


def _distribute(spans: list[_Span], num_streams: int) -> list[list[_Span]]:
    """Assign documents, longest first, to the stream with the fewest tokens; each stream reads its own in order."""
    streams: list[list[_Span]] = [[] for _ in range(num_streams)]
    load = [(0, stream) for stream in range(num_streams)]
    for span in sorted(spans, key=lambda s: (s.start - s.stop, s.start)):
        num_tokens, stream = heapq.heappop(load)
        streams[stream].append(span)
        heapq.heappush(load, (num_tokens + span.stop - span.start, stream))
    return [sorted(stream) for stream in streams]
