"""Snapshots of states, found again by the tokens that they have read."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hgrn2.models.state import ModelState

# bytes of a token in a key
_WIDTH = 4


@dataclass
class Snapshot:
    """The state after some tokens.

    Attributes:
        tokens: the tokens, 4 bytes each.
        state: the state of one sequence, on the engine's device.
        logits: [vocab] after the last token, or None.
        num_bytes: bytes of all three.
        flops_saved: operations that a hit saves over the next shorter snapshot.
        priority: the snapshot with the least one is evicted first.
    """

    tokens: bytes
    state: ModelState
    logits: Tensor | None
    num_bytes: int
    flops_saved: float
    priority: float

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the state has read."""
        return len(self.tokens) // _WIDTH


class PrefixCache:
    """Snapshots under a budget of bytes.

    A state of constant size cannot be cut back, so a prefix can be reused where a snapshot was taken: the engine takes
    them after each prompt and each continuation, at `Request.snapshot_at`, and where a new prompt begins to
    differ from an earlier one. Over the budget, those that save the fewest operations per byte are dropped; age
    counts as in GreedyDual-Size (Cao and Irani, USITS 1997), so that a snapshot that is not used is dropped at last.

    Args:
        budget_bytes: bytes of all snapshots.
        flops_per_token: operations to read one token.

    Attributes:
        num_bytes: bytes of the snapshots held.
        num_hits: lookups that found a snapshot.
        num_evicted: snapshots evicted so far.
    """

    def __init__(self, budget_bytes: int, flops_per_token: float):
        self.budget_bytes, self.flops_per_token = budget_bytes, flops_per_token
        self.num_bytes = self.num_hits = self.num_evicted = 0
        self._snapshots: dict[bytes, Snapshot] = {}
        # number of snapshots of each length
        self._lengths: dict[int, int] = {}
        self._clock = 0.0

    def __len__(self) -> int:
        return len(self._snapshots)

    def find(self, tokens: Sequence[int]) -> Snapshot | None:
        """Return the snapshot of the longest prefix, all tokens included if it has their logits.

        Args:
            tokens: the tokens of a prompt.
        """
        data = _packed(tokens)
        for key in reversed(self._keys(data)):
            found = self._snapshots.get(key)
            # tokens are compared, so that equal digests cannot return the state of another text
            if found is None or not data.startswith(found.tokens):
                continue
            if found.num_tokens < len(tokens) or found.logits is not None:
                self.num_hits += 1
                self._touch(found)
                return found
        return None

    def has(self, tokens: Sequence[int]) -> bool:
        """Return whether there is a snapshot after exactly these tokens."""
        return _digest(_packed(tokens)) in self._snapshots

    def branch(self, tokens: Sequence[int]) -> int:
        """Return the most tokens that a prompt shares with the tokens of any snapshot."""
        data = _packed(tokens)
        return max((_num_shared(data, found.tokens) for found in self._snapshots.values()), default=0)

    def add(self, tokens: Sequence[int], state: ModelState, logits: Tensor | None = None) -> None:
        """Keep the state after some tokens, if it fits the budget.

        Args:
            tokens: all tokens that the state has read.
            state: the state of one sequence; it must not be changed later.
            logits: [vocab] after the last of them, with which the same prompt needs no reading; or None.
        """
        data = _packed(tokens)
        key, num_bytes = _digest(data), state.num_bytes + len(data) + (0 if logits is None else logits.nbytes)
        if not data or key in self._snapshots or num_bytes > self.budget_bytes:
            return
        prefixes = [self._snapshots[k] for k in self._keys(data) if k in self._snapshots]
        shorter = max((len(prefix.tokens) for prefix in prefixes), default=0)
        saved = (len(data) - shorter) // _WIDTH * self.flops_per_token
        snapshot = Snapshot(data, state, logits, num_bytes, saved, 0.0)
        self._touch(snapshot)
        while self.num_bytes + num_bytes > self.budget_bytes:
            worst = min(self._snapshots, key=lambda k: self._snapshots[k].priority)
            if self._snapshots[worst].priority > snapshot.priority:
                return
            self._evict(worst)
        self._snapshots[key] = snapshot
        self._lengths[snapshot.num_tokens] = self._lengths.get(snapshot.num_tokens, 0) + 1
        self.num_bytes += num_bytes

    def clear(self) -> None:
        """Drop all snapshots."""
        self._snapshots.clear()
        self._lengths.clear()
        self.num_bytes = 0

    def _evict(self, key: bytes) -> None:
        gone = self._snapshots.pop(key)
        self._clock = max(self._clock, gone.priority)
        self.num_bytes -= gone.num_bytes
        self.num_evicted += 1
        self._lengths[gone.num_tokens] -= 1
        if not self._lengths[gone.num_tokens]:
            del self._lengths[gone.num_tokens]

    def _touch(self, snapshot: Snapshot) -> None:
        snapshot.priority = self._clock + snapshot.flops_saved / snapshot.num_bytes

    def _keys(self, data: bytes) -> list[bytes]:
        """Return the digests of the prefixes whose length some snapshot has, the shortest first."""
        digest, start, keys = hashlib.blake2b(digest_size=16), 0, []
        for length in sorted(n for n in self._lengths if n <= len(data) // _WIDTH):
            digest.update(data[start : length * _WIDTH])
            start = length * _WIDTH
            keys.append(digest.copy().digest())
        return keys


def _packed(tokens: Sequence[int]) -> bytes:
    return array("I", tokens).tobytes()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _num_shared(one: bytes, two: bytes) -> int:
    """Return the number of tokens at the start that two keys share."""
    low, high = 0, min(len(one), len(two)) // _WIDTH
    while low < high:
        middle = (low + high + 1) // 2
        if one[: middle * _WIDTH] == two[: middle * _WIDTH]:
            low = middle
        else:
            high = middle - 1
    return low
