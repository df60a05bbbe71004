"""Drafts by look-up: what followed the last tokens when they occurred before."""

from __future__ import annotations

from collections.abc import Sequence

# lengths of the n-grams that are looked up, the longest first
_LENGTHS = (4, 3, 2)


class Lookup:
    """Index of the n-grams of one text.

    Args:
        tokens: the text so far.

    Example:
        >>> Lookup([5, 6, 7, 8, 5, 6]).draft(3)
        [7, 8, 5]
    """

    def __init__(self, tokens: Sequence[int]):
        self._tokens: list[int] = []
        # the place after the latest occurrence that something follows
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in _LENGTHS]
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            # n-grams that end before this token are followed by something
            place = len(self._tokens)
            for length, places in zip(_LENGTHS, self._places, strict=True):
                if place >= length:
                    places[tuple(self._tokens[place - length :])] = place
            self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Return at most `most` tokens that followed the last n-gram before; empty if it is new."""
        for length, places in zip(_LENGTHS, self._places, strict=True):
            place = places.get(tuple(self._tokens[-length:]))
            if place is not None and len(self._tokens) >= length:
                return self._tokens[place : place + most]
        return []
