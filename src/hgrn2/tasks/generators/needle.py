"""A needle in a haystack: one fact in a long text of other words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hgrn2.constraints import Ge, Le
from hgrn2.errors import UserError
from hgrn2.tasks.generators.base import IGNORE, MAX_TOKENS, Examples, Length, SyntheticOptions, register_generator
from hgrn2.tasks.generators.draws import Draws


@register_generator("needle")
@dataclass(frozen=True)
class NeedleOptions(SyntheticOptions):
    """Find a fact in a long text: a key with its value somewhere among other words, and the question at the end.

    Distribution. All but the last two tokens are the haystack: uniform words, and num_needles needles, each a key and
    its value. Keys are distinct and uniform, values uniform. The haystack has (length - 2) // 2 places of two tokens
    from its start on; the needle that is asked for is at a uniform one, or at a given depth, and the others at uniform
    ones of the rest. The last two tokens are a marker and the key; the only target, at the key, is its value.
    """

    length: Length = 256
    """Tokens of an example, at least 2 num_needles + 2."""
    num_needles: Annotated[int, Ge(1), Le(MAX_TOKENS // 4)] = 1
    """Needles; one is asked for."""
    depth: Annotated[float | None, Ge(0), Le(1)] = None
    """Place of the needle that is asked for: 0 at the start, 1 at the end of the haystack; None for any."""
    num_keys: Annotated[int, Ge(1), Le(2**16)] = 16
    """Tokens that are keys."""
    num_values: Annotated[int, Ge(2), Le(2**16)] = 16
    """Tokens that are values."""
    num_words: Annotated[int, Ge(1), Le(2**16)] = 64
    """Tokens that the haystack is made of."""

    @property
    def vocab_size(self) -> int:  # pyright: ignore
        """Marker, words, keys and values."""
        return 1 + self.num_words + self.num_keys + self.num_values

    def check(self) -> None:
        """Refuse more needles than fit the length or than there are keys."""
        if 2 * self.num_needles + 2 > self.length:
            raise UserError(
                f"{self.what}: num_needles {self.num_needles} and the question take {2 * self.num_needles + 2} tokens, "
                f"and length is {self.length}; raise length or lower num_needles",
                "contradiction",
            )
        if self.num_needles > self.num_keys:
            raise UserError(
                f"{self.what}: num_needles is {self.num_needles}, and num_keys {self.num_keys}; every needle has a key "
                "of its own: raise num_keys or lower num_needles",
                "contradiction",
            )

    def draw(self, draws: Draws) -> Examples:
        """Return one block of examples."""
        num_places = (self.length - 2) // 2
        inputs = draws.columns(self.length, self.num_words) + 1
        keys = draws.distinct(self.num_needles, self.num_keys) + 1 + self.num_words
        values = draws.columns(self.num_needles, self.num_values) + 1 + self.num_words + self.num_keys
        if self.depth is None:
            asked = draws.columns(1, num_places)
        else:
            asked = np.full((draws.num_rows, 1), int(self.depth * (num_places - 1) + 0.5))
        others = draws.subset(self.num_needles - 1, num_places - 1)
        # numbers from the place that is taken on mean the next place
        places = 2 * np.concatenate([asked, others + (others >= asked)], axis=1)
        np.put_along_axis(inputs, places, keys, 1)
        np.put_along_axis(inputs, places + 1, values, 1)
        inputs[:, -2], inputs[:, -1] = 0, keys[:, 0]
        targets = np.full_like(inputs, IGNORE)
        targets[:, -1] = values[:, 0]
        return Examples(inputs, targets)

    def word(self, token: int) -> str:
        """Return a word of the haystack as w5, a key as K5, a value as V5, the marker as ?."""
        if token == 0:
            return "?"
        for letter, num in (("w", self.num_words), ("K", self.num_keys)):
            if token <= num:
                return f"{letter}{token - 1}"
            token -= num
        return f"V{token - 1}"
