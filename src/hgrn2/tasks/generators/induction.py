"""Induction heads: continue as it went after the same token before (arXiv 2212.14052, 2312.00752)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hgrn2.constraints import Ge, Le
from hgrn2.errors import UserError
from hgrn2.tasks.generators.base import IGNORE, MAX_TOKENS, Examples, Length, SyntheticOptions, register_generator
from hgrn2.tasks.generators.draws import Draws


@register_generator("induction")
@dataclass(frozen=True)
class InductionOptions(SyntheticOptions):
    """Predict the symbols that came after the marker, when the marker comes again.

    Distribution. The first length - num_copied positions hold uniform symbols, and a marker at a uniform place among
    those with num_copied symbols after it. Then the marker comes again, followed by the first num_copied - 1 of those
    symbols. The targets, from the second marker on, are the num_copied symbols. Mamba's experiment trains with length
    256 and 16 tokens, and evaluates up to a length of 2^20.
    """

    length: Length = 256
    """Tokens of an example, more than 2 num_copied."""
    num_symbols: Annotated[int, Ge(2), Le(2**16)] = 15
    """Symbols; the marker is one more token."""
    num_copied: Annotated[int, Ge(1), Le(MAX_TOKENS // 2)] = 1
    """Symbols to say."""

    @property
    def vocab_size(self) -> int:  # pyright: ignore
        """Marker and symbols."""
        return 1 + self.num_symbols

    def check(self) -> None:
        """Refuse more symbols than fit twice beside the marker."""
        if 2 * self.num_copied + 1 > self.length:
            raise UserError(
                f"{self.what}: num_copied {self.num_copied} need a length of {2 * self.num_copied + 1}, and length is "
                f"{self.length}; raise length or lower num_copied",
                "contradiction",
            )

    def draw(self, draws: Draws) -> Examples:
        """Return one block of examples."""
        num, before = self.num_copied, self.length - self.num_copied
        inputs = draws.columns(self.length, self.num_symbols) + 1
        marker = draws.columns(1, before - num)
        symbols = np.take_along_axis(inputs, marker + np.arange(1, num + 1), 1)
        np.put_along_axis(inputs, marker, 0, 1)
        inputs[:, before], inputs[:, before + 1 :] = 0, symbols[:, :-1]
        targets = np.full_like(inputs, IGNORE)
        targets[:, before:] = symbols
        return Examples(inputs, targets)

    def word(self, token: int) -> str:
        """Return a symbol as a number, the marker as =>."""
        return str(token - 1) if token else "=>"
