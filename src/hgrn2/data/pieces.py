"""Documents cut into pieces that give, one after the other, the tokens of the whole document.

A tokenizer is free to look at as much of a text as it likes, so a cut is only made where it is known, or was tried,
to leave the tokens on both sides unchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hgrn2.data.text import PIECE_CHARS
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError

# a document in which no place to cut is found is encoded whole up to here: about 350 MB of memory
WHOLE_CHARS = 1 << 22
# what is tried around a cut, and a shorter left side that has to give the same
_TRIAL_CHARS = 256
_SHORT_TRIAL_CHARS = 97
# what a piece may have before it, so that its first word is not taken for the start of a text
_CONTEXT_CHARS = 16
# places tried for a cut, of each kind
_MOST_TRIALS = 24


@dataclass(frozen=True)
class Piece:
    """A part of a document.

    Attributes:
        text: the part.
        context: characters before it that the tokenizer has to see. Their tokens belong to the piece before.
    """

    text: str
    context: str = ""


def piece_tokens(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[np.ndarray]:
    """Token ids of each piece, one 1-D integer array a piece."""
    encoded = tokenizer.encode_batch([piece.context + piece.text for piece in pieces])
    contexts = sorted({piece.context for piece in pieces if piece.context})
    sizes = dict(zip(contexts, map(len, tokenizer.encode_batch(contexts)), strict=True)) if contexts else {}
    return [ids[sizes[piece.context] :] if piece.context else ids for piece, ids in zip(pieces, encoded, strict=True)]


def keeps_text(tokenizer: Tokenizer, piece: Piece, ids: np.ndarray) -> bool:
    """Whether the text of a piece can be told from its tokens; a space at its very start does not count.

    A normalizer may have changed it (lower case, line ends), or a vocabulary may lack some of it.
    """
    if tokenizer.is_lossless:
        return True
    before = tokenizer.encode(piece.context) if piece.context else []
    found = tokenizer.decode([*before, *ids.tolist()])[len(tokenizer.decode(before)) :]
    return piece.text in (found, f" {found}") or found == f" {piece.text}"


def cut_document(tokenizer: Tokenizer, blocks: Iterable[str], piece_chars: int = PIECE_CHARS) -> Iterator[Piece]:
    """Cut a document into pieces of about piece_chars characters, whatever blocks it comes in; none is empty.

    Memory is bounded: where no place to cut is found, a piece grows up to `WHOLE_CHARS`.

    Raises:
        UserError: there is none in as many characters.
    """
    if tokenizer.splits_anywhere:
        yield from (Piece(block) for block in blocks if block)
        return
    rest, context = "", ""
    # how much of the rest was searched in vain
    searched = 0
    for block in blocks:
        rest += block
        while len(rest) >= searched + piece_chars + _TRIAL_CHARS:
            stop = searched + piece_chars
            # no further back than the middle, or pieces would get small
            found = _find_cut(tokenizer, rest, searched or piece_chars // 2, stop)
            if found is None:
                searched = stop
                if searched >= max(WHOLE_CHARS, piece_chars):
                    raise UserError(
                        f"tokenizer {tokenizer.name!r}: no place to cut in {searched:,} characters of a text; break "
                        "its lines, or use the tokenizer 'bytes'",
                        "unsupported",
                    )
                continue
            end, next_context = found
            yield Piece(rest[:end], context)
            rest, context, searched = rest[end:], next_context, 0
    if rest:
        yield Piece(rest, context)


def _find_cut(tokenizer: Tokenizer, text: str, start: int, stop: int) -> tuple[int, str] | None:
    """The last good place for a cut in [start, stop), and the context of what comes after; None if there is none."""
    for places in (_line_ends(text, start, stop), _spaces(text, start, stop)):
        for place in itertools.islice(places, _MOST_TRIALS):
            if tokenizer.splits_at_spaces:
                return place, ""
            context = _try_cut(tokenizer, text, place)
            if context is not None:
                return place, context
    return None


def _line_ends(text: str, start: int, stop: int) -> Iterator[int]:
    """Places after a line end between two characters that are no space, from the last one back."""
    end = text.rfind("\n", start, stop)
    while end > start:
        if not text[end - 1].isspace() and not text[end + 1].isspace():
            yield end + 1
        end = text.rfind("\n", start, end)


def _spaces(text: str, start: int, stop: int) -> Iterator[int]:
    """Places before white space, from the last one back, where none of the words around is long."""
    for place in range(stop - 1, start, -1):
        if not text[place].isspace() or text[place - 1].isspace():
            continue
        before, after = text[max(place - _SHORT_TRIAL_CHARS, 0) : place], text[place : place + _TRIAL_CHARS]
        # inside a run of one kind of character, a pattern may count from its start
        if any(map(str.isspace, before)) and not after.isspace():
            yield place


def _try_cut(tokenizer: Tokenizer, text: str, place: int) -> str | None:
    """The context with which what comes after a place has the tokens of the whole; None if the place is no good."""
    after = text[place : place + _TRIAL_CHARS]
    befores = [text[max(place - size, 0) : place] for size in (_TRIAL_CHARS, _SHORT_TRIAL_CHARS)]
    contexts = ["", text[max(place - _CONTEXT_CHARS, 0) : place]]
    heads = [*befores, *contexts]
    encoded = [ids.tolist() for ids in tokenizer.encode_batch([*heads, *(head + after for head in heads)])]
    tails = []
    for head, whole in zip(encoded[: len(heads)], encoded[len(heads) :], strict=True):
        # None where the place is inside a token, or the tokens before it depend on what comes after
        tails.append(whole[len(head) :] if whole[: len(head)] == head else None)
    wanted, *others, plain, with_context = tails
    if wanted is None or any(tail != wanted for tail in others):
        return None
    if plain == wanted:
        return ""
    return contexts[1] if with_context == wanted else None
