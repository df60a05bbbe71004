"""Which documents are held out for validation, told by a hash of their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hgrn2.data.documents import Document
from hgrn2.data.permutation import keyed_integer

TRAIN, VALIDATION = "train", "validation"


@dataclass
class Split:
    """Assigns whole documents to training or validation; knows a better way if one side stays empty.

    Attributes:
        seed: another seed holds out other documents.
        below: a document is held out if the 64-bit hash of its name is below this.
        head_bytes: with a corpus of one document, how many bytes from its start are for training, counted to
            the next line end; None with several documents.
        num_seen: documents observed so far.
    """

    seed: int
    below: int
    head_bytes: int | None = None
    num_seen: int = 0
    _lowest: int = 2**64
    _highest: int = -1

    def side(self, name: str) -> str:
        """The side a document belongs to."""
        return VALIDATION if self._key(name) < self.below else TRAIN

    def parts(self, document: Document) -> Iterator[tuple[str, Document]]:
        """The side a document belongs to, or both with their parts of it, to be read in this order."""
        if self.head_bytes is None:
            yield self.side(document.name), document
            return
        head = _Head(document.pieces, self.head_bytes)
        yield TRAIN, Document(document.name, iter(head))
        yield VALIDATION, Document(f"{document.name} (end)", head.tail())

    def observe(self, name: str) -> None:
        """Remember that a document with text was seen."""
        key = self._key(name)
        self.num_seen += 1
        self._lowest, self._highest = min(self._lowest, key), max(self._highest, key)

    def better(self) -> Split | None:
        """After all documents were seen: None if both sides have some, or else a split with which they do.

        Needs at least two documents seen.
        """
        if self.below <= self._lowest:
            return Split(self.seed, self._lowest + 1)
        if self.below > self._highest:
            return Split(self.seed, self._highest)
        return None

    def _key(self, name: str) -> int:
        return keyed_integer("split", self.seed, name)


class _Head:
    """The first bytes of a text up to a line end, and then what is left."""

    def __init__(self, pieces: Iterator[str], num_bytes: int):
        self._pieces = pieces
        self._num_bytes = num_bytes
        self._left_over = ""

    def __iter__(self) -> Iterator[str]:
        left = self._num_bytes
        for piece in self._pieces:
            size = len(piece.encode("utf-8"))
            if size < left:
                left -= size
                yield piece
                continue
            cut = _line_end_near(piece, len(piece.encode("utf-8")[:left].decode("utf-8", "ignore")))
            self._left_over = piece[cut:]
            if cut:
                yield piece[:cut]
            return

    def tail(self) -> Iterator[str]:
        if self._left_over:
            yield self._left_over
        yield from self._pieces


def _line_end_near(text: str, position: int) -> int:
    """A cut after the first line end from a position on, or the last one before, or just there."""
    after = text.find("\n", max(position - 1, 0)) + 1
    if 0 < after < len(text):
        return after
    before = text.rfind("\n", 0, position) + 1
    return before or position
