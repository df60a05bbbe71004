"""Cut documents into pieces whose tokens, concatenated, are the tokens of the whole document.

A tokenizer may look at any amount of context, so a document is only cut where the tokens on both sides are known, or
have been checked, to stay the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hgrn2.data.text import PIECE_CHARS
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError

# a document that cannot be cut is encoded whole, up to this length: about 350 MB of memory
WHOLE_CHARS = 1 << 22
# text encoded on each side of a cut to check it, and a shorter left side that must give the same tokens
_TRIAL_CHARS = 256
_SHORT_TRIAL_CHARS = 97
# context given to a piece, so that its first word is not encoded as the start of a text
_CONTEXT_CHARS = 16
# most candidate cuts tried of each kind
_MAX_TRIALS = 24


@dataclass(frozen=True)
class Piece:
    """A part of a document.

    Attributes:
        text: the text of the piece.
        context: characters before it that the tokenizer must see; their tokens belong to the previous piece.
    """

    text: str
    context: str = ""


def piece_tokens(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[np.ndarray]:
    """Return the token ids of each piece, one 1-D integer array per piece."""
    encoded = tokenizer.encode_batch([piece.context + piece.text for piece in pieces])
    contexts = sorted({piece.context for piece in pieces if piece.context})
    sizes = dict(zip(contexts, map(len, tokenizer.encode_batch(contexts)), strict=True)) if contexts else {}
    return [ids[sizes[piece.context] :] if piece.context else ids for piece, ids in zip(pieces, encoded, strict=True)]


def keeps_text(tokenizer: Tokenizer, piece: Piece, ids: np.ndarray) -> bool:
    """Return whether decoding the tokens restores the text of a piece, up to a space at its start.

    It does not if a normalizer changed the text (lower case, line ends) or the vocabulary lacks parts of it.
    """
    if tokenizer.is_lossless:
        return True
    before = tokenizer.encode(piece.context) if piece.context else []
    found = tokenizer.decode([*before, *ids.tolist()])[len(tokenizer.decode(before)) :]
    return piece.text in (found, f" {found}") or found == f" {piece.text}"


def cut_document(tokenizer: Tokenizer, blocks: Iterable[str], piece_chars: int = PIECE_CHARS) -> Iterator[Piece]:
    """Cut a document into non-empty pieces of about piece_chars characters, independent of the input blocks.

    Memory is bounded: if there is nowhere to cut, a piece grows to at most `WHOLE_CHARS` characters.

    Raises:
        UserError: there is nowhere to cut in that many characters.
    """
    if tokenizer.splits_anywhere:
        yield from (Piece(block) for block in blocks if block)
        return
    rest, context = "", ""
    # characters of the rest that were searched without finding a cut
    searched = 0
    for block in blocks:
        rest += block
        while len(rest) >= searched + piece_chars + _TRIAL_CHARS:
            stop = searched + piece_chars
            # search only the second half, or pieces would become small
            found = _find_cut(tokenizer, rest, searched or piece_chars // 2, stop)
            if found is None:
                searched = stop
                if searched >= max(WHOLE_CHARS, piece_chars):
                    raise UserError(
                        f"tokenizer {tokenizer.name!r}: found nowhere to cut in {searched:,} characters; add line "
                        "breaks to the text, or use the tokenizer 'bytes'",
                        "unsupported",
                    )
                continue
            end, next_context = found
            yield Piece(rest[:end], context)
            rest, context, searched = rest[end:], next_context, 0
    if rest:
        yield Piece(rest, context)


def _find_cut(tokenizer: Tokenizer, text: str, start: int, stop: int) -> tuple[int, str] | None:
    """Return the last valid cut in [start, stop) and the context of the piece after it; None if there is none."""
    for places in (_line_ends(text, start, stop), _spaces(text, start, stop)):
        for place in itertools.islice(places, _MAX_TRIALS):
            if tokenizer.splits_at_spaces:
                return place, ""
            context = _try_cut(tokenizer, text, place)
            if context is not None:
                return place, context
    return None


def _line_ends(text: str, start: int, stop: int) -> Iterator[int]:
    """Yield the positions after line ends between two non-space characters, from the end backwards."""
    end = text.rfind("\n", start, stop)
    while end > start:
        if not text[end - 1].isspace() and not text[end + 1].isspace():
            yield end + 1
        end = text.rfind("\n", start, end)


def _spaces(text: str, start: int, stop: int) -> Iterator[int]:
    """Yield the positions before white space away from long words, from the end backwards."""
    for place in range(stop - 1, start, -1):
        if not text[place].isspace() or text[place - 1].isspace():
            continue
        before, after = text[max(place - _SHORT_TRIAL_CHARS, 0) : place], text[place : place + _TRIAL_CHARS]
        # within a long run of one kind of character, a pattern may depend on the start of the run
        if any(map(str.isspace, before)) and not after.isspace():
            yield place


def _try_cut(tokenizer: Tokenizer, text: str, place: int) -> str | None:
    """Return the context that the text after a cut needs to keep its tokens; None if the cut changes tokens."""
    after = text[place : place + _TRIAL_CHARS]
    contexts_before = [text[max(place - size, 0) : place] for size in (_TRIAL_CHARS, _SHORT_TRIAL_CHARS)]
    contexts = ["", text[max(place - _CONTEXT_CHARS, 0) : place]]
    prefixes = [*contexts_before, *contexts]
    encoded = [ids.tolist() for ids in tokenizer.encode_batch([*prefixes, *(prefix + after for prefix in prefixes)])]
    tails = []
    for prefix, whole in zip(encoded[: len(prefixes)], encoded[len(prefixes) :], strict=True):
        # None if the cut is inside a token, or the tokens before it depend on the text after it
        tails.append(whole[len(prefix) :] if whole[: len(prefix)] == prefix else None)
    expected, with_short_context, without_context, with_context = tails
    if expected is None or with_short_context != expected:
        return None
    if without_context == expected:
        return ""
    return contexts[1] if with_context == expected else None
