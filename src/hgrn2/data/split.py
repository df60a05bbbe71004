"""Hold out documents for validation by a hash of their names; copies of a text stay on the same side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hgrn2.data.copies import NO_TEXT, KeySet, with_key
from hgrn2.data.documents import Document
from hgrn2.data.permutation import keyed_integer

TRAIN, VALIDATION = "train", "validation"


@dataclass
class Split:
    """Assign whole documents to training or validation; `better` finds another threshold if one side stays empty.

    Attributes:
        seed: seed of the hash; other seeds hold out other documents.
        below: threshold; documents whose 64-bit name hash is below it are held out.
        head_bytes: for a corpus of one document, the bytes from its start used for training, extended to the next
            line end; None for several documents.
        num_seen: distinct documents observed so far.
    """

    seed: int
    below: int
    head_bytes: int | None = None
    num_seen: int = 0
    _lowest: int = 2**64
    _highest: int = -1

    def side(self, name: str) -> str:
        """Return the side of a document, "train" or "validation"."""
        return VALIDATION if self._key(name) < self.below else TRAIN

    def assign(self, documents: Iterable[Document]) -> Iterator[tuple[str, Document, bool]]:
        """Yield the non-empty documents with their sides, to be read in this order.

        Copies of a text go to the side of the first one. Only the first piece is compared, so texts whose first
        64 Ki characters agree count as copies too.

        Args:
            documents: the documents of the corpus, in order.

        Yields:
            The side, the document, and whether its text is seen for the first time. The document of a corpus of one
            document comes in two parts, one for each side, and further copies of it are dropped.
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
        """Record a document whose text is seen for the first time."""
        key = self._key(name)
        self.num_seen += 1
        self._lowest, self._highest = min(self._lowest, key), max(self._highest, key)

    def better(self) -> Split | None:
        """Return None if both sides have documents, else a split that gives each at least one.

        Call it after all documents have been observed; needs at least two.
        """
        if self.below <= self._lowest:
            return Split(self.seed, self._lowest + 1)
        if self.below > self._highest:
            return Split(self.seed, self._highest)
        return None

    def _key(self, name: str) -> int:
        return keyed_integer("split", self.seed, name)


class _Head:
    """The start of a text, cut at a line end, and then the rest of it."""

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
    """Return a cut near a position: after the next line end, else after the previous one, else at the position."""
    after = text.find("\n", max(position - 1, 0)) + 1
    if 0 < after < len(text):
        return after
    before = text.rfind("\n", 0, position) + 1
    return before or position
