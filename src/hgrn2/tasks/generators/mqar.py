"""Multi-query associative recall (MQAR) as Zoology defines it (arXiv 2312.04927)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hgrn2.constraints import Ge, Gt, Le
from hgrn2.errors import UserError
from hgrn2.tasks.generators.base import IGNORE, MAX_TOKENS, Examples, Length, SyntheticOptions, register_generator
from hgrn2.tasks.generators.draws import Draws


@register_generator("mqar")
@dataclass(frozen=True)
class MQAROptions(SyntheticOptions):
    """Predict the value of each queried key: pairs of keys and values come first, then every key once, at a distance.

    Distribution. An example begins with num_pairs pairs of a key and a value. Keys are distinct and uniform in
    1 .. vocab_size // 2 - 1, values distinct and uniform in vocab_size // 2 .. vocab_size - 1. Places for queries are
    every second position after the pairs, numbered j = 1, 2, ...; the keys, in their order, draw one place each
    without replacement, with weights j^(power - 1). The target of a query is its value. All other positions hold 0,
    or with random_filler a uniform token of the whole vocabulary.

    Zoology's Figure 2 has vocab_size 8192, power 0.01, no random filler, 100,000 training and 3,000 test examples,
    and (length, num_pairs) in (64, 4), (128, 8), (256, 16), (512, 64).
    """

    length: Length = 64
    """Tokens of an example; even, at least 4 num_pairs."""
    num_pairs: Annotated[int, Ge(1), Le(MAX_TOKENS // 4)] = 4
    """Pairs of a key and a value, each asked for once."""
    vocab_size: Annotated[int, Ge(4), Le(MAX_TOKENS)] = 8192
    """Tokens: 0, then keys in the lower half, values in the upper half."""
    power: Annotated[float, Gt(0), Le(100)] = 0.01
    """Exponent a of the power law j^(a - 1) of distances; 1 is uniform."""
    random_filler: bool = False
    """Fill the other positions with random tokens instead of 0."""

    def check(self) -> None:
        """Refuse more pairs than fit the length or the vocabulary."""
        if self.length % 2:
            raise UserError(f"{self.what}: length is {self.length}; wanted an even number", "invalid-value")
        if 4 * self.num_pairs > self.length:
            raise UserError(
                f"{self.what}: num_pairs {self.num_pairs} take {4 * self.num_pairs} tokens, two for a pair and two for "
                f"its query, and length is {self.length}; raise length or lower num_pairs",
                "contradiction",
            )
        keys = self.vocab_size // 2 - 1
        if self.num_pairs > keys:
            raise UserError(
                f"{self.what}: num_pairs is {self.num_pairs}, and a vocab_size of {self.vocab_size} has {keys} keys; "
                "raise vocab_size or lower num_pairs",
                "contradiction",
            )

    def draw(self, draws: Draws) -> Examples:
        """Return one block of examples."""
        half, in_pairs = self.vocab_size // 2, 2 * self.num_pairs
        keys = draws.distinct(self.num_pairs, half - 1) + 1
        values = draws.distinct(self.num_pairs, self.vocab_size - half) + half
        places = np.arange(1, (self.length - in_pairs) // 2 + 1, dtype=np.float64)
        queries = draws.weighted(self.num_pairs, places ** (self.power - 1)) * 2 + in_pairs
        if self.random_filler:
            inputs = draws.columns(self.length, self.vocab_size)
        else:
            inputs = np.zeros((draws.num_rows, self.length), np.int64)
        inputs[:, 0:in_pairs:2], inputs[:, 1:in_pairs:2] = keys, values
        np.put_along_axis(inputs, queries, keys, 1)
        targets = np.full_like(inputs, IGNORE)
        np.put_along_axis(targets, queries, values, 1)
        return Examples(inputs, targets)

    def word(self, token: int) -> str:
        """Return a key as k12, a value as v7, the filler as _."""
        half = self.vocab_size // 2
        if token >= half:
            return f"v{token - half}"
        return f"k{token}" if token else "_"
