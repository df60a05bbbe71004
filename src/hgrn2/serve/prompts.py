"""Prompts from their arrival until they are read: rows, shares, and states from the prefix cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor

from hgrn2.serve.pool import StatePool
from hgrn2.serve.prefix_cache import PrefixCache
from hgrn2.serve.requests import Prompt
from hgrn2.serve.scheduler import Scheduler

Read = Callable[[Sequence[tuple[int, int, Sequence[int]]]], Tensor]


class PromptReader:
    """Reads prompts in shares.

    Args:
        pool: the states.
        rows: rows of the pool for prompts.
        read: reads parts of prompts, as `hgrn2.serve.prefill.PackedPrefill`.
        budget: tokens read in one step.
        prefixes: the prefix cache, or None.

    Attributes:
        done: prompts that are read, each with its logits and still in its row, in the order in which they ended.
        num_read: tokens read so far, without those whose state was reused.
        num_reused: tokens whose state came from the prefix cache.
    """

    def __init__(self, pool: StatePool, rows: Sequence[int], read: Read, budget: int, prefixes: PrefixCache | None):
        self.pool, self.prefixes = pool, prefixes
        self.done: deque[Prompt] = deque()
        self.num_read = self.num_reused = 0
        self._read, self._scheduler, self._free = read, Scheduler(budget), list(rows)

    @property
    def num_waiting(self) -> int:
        """Prompts that are not read, or whose continuations have no rows yet."""
        return len(self._all())

    @property
    def num_free_rows(self) -> int:
        """Rows without a prompt."""
        return len(self._free)

    def add(self, prompt: Prompt) -> None:
        """Queue a prompt."""
        self._scheduler.waiting.append(prompt)

    def find(self, request_id: int) -> Prompt | None:
        """Return the prompt of a request, if it is still here."""
        return next((prompt for prompt in self._all() if prompt.request_id == request_id), None)

    def remove(self, prompt: Prompt) -> None:
        """Drop a prompt and free its row."""
        for queue in (self._scheduler.waiting, self._scheduler.reading, self.done):
            if prompt in queue:
                queue.remove(prompt)
        if prompt.row is not None:
            self._free.append(prompt.row)
            prompt.row = None

    def step(self) -> None:
        """Give free rows to prompts that wait, and read a share of each prompt that has one."""
        waiting = self._scheduler.waiting
        while waiting and self._free:
            prompt = waiting.popleft()
            prompt.row = self._free.pop()
            self._begin(prompt, prompt.row)
            (self._scheduler.reading if prompt.logits is None else self.done).append(prompt)
        plan = self._scheduler.plan()
        if not plan:
            return
        parts = [(_row_of(p), p.num_read, p.tokens[p.num_read : p.num_read + count]) for p, count in plan]
        for (prompt, count), logits in zip(plan, self._read(parts), strict=True):
            prompt.num_read += count
            self.num_read += count
            if not prompt.num_left:
                prompt.logits = logits.clone()
                self._scheduler.reading.remove(prompt)
                self.done.append(prompt)
            if prompt.num_read in prompt.stops:
                self.snapshot(_row_of(prompt), prompt.tokens[: prompt.num_read], prompt.logits)

    def snapshot(self, row: int, tokens: Sequence[int], logits: Tensor | None = None) -> None:
        """Keep the state of a row in the prefix cache, if there is one.

        Args:
            row: row of the pool.
            tokens: all tokens that it has read.
            logits: [vocab] after the last of them, or None.
        """
        cache = self.prefixes
        if cache is not None and not cache.has(tokens) and self.pool.bytes_of(len(tokens)) <= cache.budget_bytes:
            cache.add(tokens, self.pool.read([row], len(tokens)), logits)

    def _begin(self, prompt: Prompt, row: int) -> None:
        """Set a row to the state that a prompt begins with, and choose where snapshots are taken."""
        tokens, cache = prompt.tokens, self.prefixes
        if cache is not None:
            found = cache.find(tokens)
            if found is not None and found.num_tokens > prompt.num_read:
                self.num_reused += found.num_tokens - prompt.num_read
                prompt.state, prompt.num_read = found.state, found.num_tokens
                if not prompt.num_left:
                    prompt.logits = found.logits
            before = len(tokens) - len(prompt.request.tokens)
            places = {before + place for place in prompt.request.snapshot_at} | {cache.branch(tokens), len(tokens)}
            prompt.stops = sorted(place for place in places if prompt.num_read < place)
        if prompt.state is None:
            self.pool.clear(row)
        else:
            self.pool.write([row], prompt.state)
            prompt.state = None

    def _all(self) -> list[Prompt]:
        return [*self._scheduler.waiting, *self._scheduler.reading, *self.done]


def _row_of(prompt: Prompt) -> int:
    assert prompt.row is not None
    return prompt.row
