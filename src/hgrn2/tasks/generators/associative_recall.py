"""Associative recall with one question at the end (arXiv 2212.14052)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hgrn2.constraints import Ge, Le
from hgrn2.errors import UserError
from hgrn2.tasks.generators.base import IGNORE, Examples, Length, SyntheticOptions, register_generator
from hgrn2.tasks.generators.draws import Draws, Ints


@register_generator("associative_recall")
@dataclass(frozen=True)
class AssociativeRecallOptions(SyntheticOptions):
    """Predict the value of one key at the end: pairs that may repeat, then the question.

    Distribution. An example is a sequence of keys of key_length tokens, each followed by a value token; then a marker
    and a key. Each key is uniform among the num_keys ^ key_length, and each has one uniform value per example. The
    last key is uniform among those that have come. The only target is its value, at the last position.
    """

    length: Length = 64
    """Tokens of an example, a multiple of key_length + 1, at least twice that."""
    num_keys: Annotated[int, Ge(1), Le(2**16)] = 16
    """Tokens that keys are made of."""
    num_values: Annotated[int, Ge(2), Le(2**16)] = 16
    """Tokens that are values."""
    key_length: Annotated[int, Ge(1), Le(8)] = 1
    """Tokens of a key; longer keys must be read as a whole."""

    @property
    def vocab_size(self) -> int:  # pyright: ignore
        """The marker, keys and values."""
        return 1 + self.num_keys + self.num_values

    def check(self) -> None:
        """Refuse lengths that keys and values do not fill, and keys that cannot be numbered."""
        step = self.key_length + 1
        if self.length % step or self.length < 2 * step:
            raise UserError(
                f"{self.what}: length is {self.length}, and a key with its value has key_length + 1 = {step} tokens; "
                f"wanted a multiple of {step}, at least {2 * step}",
                "contradiction",
            )
        if self.num_keys**self.key_length > 2**40:
            raise UserError(
                f"{self.what}: num_keys {self.num_keys} and key_length {self.key_length} make more than 2^40 keys; "
                "lower one of them",
                "contradiction",
            )

    def draw(self, draws: Draws) -> Examples:
        """Return one block of examples."""
        rows, step = draws.num_rows, self.key_length + 1
        pairs = self.length // step - 1
        keys = draws.integers((rows, pairs, self.key_length), self.num_keys)
        codes = keys @ (self.num_keys ** np.arange(self.key_length))
        first, num_distinct = _first_occurrences(codes)
        values = np.take_along_axis(draws.columns(pairs, self.num_values), first, 1)
        # the places where keys come first, in order; the question takes one of them
        is_first = first == np.arange(pairs)
        asked = np.argmax(np.cumsum(is_first, axis=1) > draws.below(num_distinct)[:, None], axis=1)
        inputs = np.zeros((rows, self.length), np.int64)
        body = inputs[:, : pairs * step].reshape(rows, pairs, step)
        body[:, :, :-1], body[:, :, -1] = keys + 1, values + 1 + self.num_keys
        inputs[:, -self.key_length :] = keys[np.arange(rows), asked] + 1
        targets = np.full_like(inputs, IGNORE)
        targets[:, -1] = body[np.arange(rows), asked, -1]
        return Examples(inputs, targets)

    def word(self, token: int) -> str:
        """Return a key token as k3, a value as v3, the marker as =>."""
        if token == 0:
            return "=>"
        return f"k{token - 1}" if token <= self.num_keys else f"v{token - 1 - self.num_keys}"


def _first_occurrences(codes: Ints) -> tuple[Ints, Ints]:
    """Return for each code the index in its row where it comes first, and the number of distinct codes of a row."""
    rows, num = codes.shape
    # equal codes become neighbours, in order
    order = np.argsort(codes, axis=1, kind="stable")
    ordered = np.take_along_axis(codes, order, 1)
    is_new = np.ones((rows, num), bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    leader = np.maximum.accumulate(np.where(is_new, np.arange(num), 0), axis=1)
    first = np.empty_like(codes)
    np.put_along_axis(first, order, np.take_along_axis(order, leader, 1), 1)
    return first, is_new.sum(axis=1)
