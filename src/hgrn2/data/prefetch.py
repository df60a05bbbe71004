"""The next batches made ready by a thread while the present one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from hgrn2.data.batches import Batch, PackedBatches, StreamBatches


class Prefetch(Iterator[Batch]):
    """The same batches, made ahead by one thread; position and state are those of what was handed out.

    Args:
        batches: what to read ahead of; use it through this object only.
        depth: batches kept ready.

    Example:
        batches = Prefetch(PackedBatches(dataset, batch_size=8, seq_len=1024))
    """

    def __init__(self, batches: PackedBatches | StreamBatches, depth: int = 2):
        assert depth >= 1, f"depth must be at least 1, got {depth}"
        self._batches = batches
        self._depth = depth
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ready: deque[Future[Batch]] = deque()

    @property
    def position(self) -> int:
        """As of the batches behind."""
        return self._batches.position

    @property
    def epoch(self) -> float:
        """As of the batches behind."""
        return self._batches.epoch

    def __next__(self) -> Batch:
        while len(self._ready) <= self._depth:
            ahead = self._batches.position + len(self._ready) * self._batches.step_size
            self._ready.append(self._thread.submit(self._batches.batch_at, ahead))
        batch = self._ready.popleft().result()
        self._batches.position += self._batches.step_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """As of the batches behind."""
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of the batches behind."""
        self._ready.clear()
        self._batches.load_state_dict(state)

    def close(self) -> None:
        """End the thread."""
        self._ready.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)
