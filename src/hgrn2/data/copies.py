"""Detect duplicate texts with eight bytes of memory a document."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np

from hgrn2.data.documents import Document

# keys collected in a Python set before they are merged into the sorted array, which grows by at least an eighth
_FEWEST_WAITING = 1 << 12


def text_key(text: str) -> int:
    """Return a 63-bit hash of a text; a collision within a corpus that fits on a disk is very unlikely."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def with_key(document: Document) -> tuple[int, Document]:
    """Return the key of a document's first piece (`NO_TEXT` if it is empty) and a document that still yields it."""
    pieces = iter(document.pieces)
    first = next(pieces, "")
    return text_key(first), Document(document.name, itertools.chain([first] if first else [], pieces))


NO_TEXT = text_key("")


class KeySet:
    """A set of integer keys, stored as compactly as an array."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._waiting: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._waiting)

    def __contains__(self, key: int) -> bool:
        if key in self._waiting:
            return True
        index = int(np.searchsorted(self._sorted, np.uint64(key)))
        return index < len(self._sorted) and int(self._sorted[index]) == key

    def add(self, key: int) -> None:
        """Add a key that is not yet in the set."""
        self._waiting.add(key)
        if len(self._waiting) >= max(_FEWEST_WAITING, len(self._sorted) // 8):
            new = np.fromiter(self._waiting, dtype=np.uint64, count=len(self._waiting))
            self._sorted = np.union1d(self._sorted, new)
            self._waiting = set()
