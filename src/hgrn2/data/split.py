"""Hold documents out for validation by a hash of their names; copies of a text stay on one side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hgrn2.data.copies import NO_TEXT, KeySet, with_key
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
        num_seen: documents observed so far, each the first of its text.
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

    def assign(self, documents: Iterable[Document]) -> Iterator[tuple[str, Document, bool]]:
        """The documents that have text, each with its side, to be read in this order.

        Copies of a text go to the side of the first one. What is compared is a text's first piece, so texts that begin
        alike for 64 Ki characters count as copies too.

        Args:
            documents: the corpus, in its order.

        Yields:
            The side, the document, and whether it is the first of its text. A corpus of one document comes in two
            parts, one for each side; further copies of it are left out.
        """
        held_out, trained = KeySet(), KeySet()
        for document in documents:
            key, document = with_key(document)
            if key == NO_TEXT:
                continue
            if self.head_bytes is not None:
                if len(trained):
                    continue
                trained.add(key)
                head = _Head(document.pieces, self.head_bytes)
                yield TRAIN, Document(document.name, iter(head)), True
                yield VALIDATION, Document(f"{document.name} (end)", head.tail()), False
            elif key in trained or key in held_out:
                yield TRAIN if key in trained else VALIDATION, document, False
            else:
                side = self.side(document.name)
                (trained if side == TRAIN else held_out).add(key)
                yield side, document, True

    def observe(self, name: str) -> None:
        """Remember that a document was seen, the first of its text."""
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
