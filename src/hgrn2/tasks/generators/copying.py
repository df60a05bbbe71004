"""Copying after a delay (Hochreiter and Schmidhuber 1997, as in arXiv 1511.06464)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hgrn2.constraints import Ge, Le
from hgrn2.errors import UserError
from hgrn2.tasks.generators.base import IGNORE, MAX_TOKENS, Examples, Length, SyntheticOptions, register_generator
from hgrn2.tasks.generators.draws import Draws

BLANK, GO, FIRST_SYMBOL = 0, 1, 2


@dataclass(frozen=True)
class CopyOptions(SyntheticOptions):
    """Options of the generators whose targets are copies of symbols at the end."""

    length: Length = 64
    """Tokens of an example, at least 2 num_copied."""
    num_copied: Annotated[int, Ge(1), Le(MAX_TOKENS // 2)] = 10
    """Symbols to copy."""
    num_symbols: Annotated[int, Ge(2), Le(2**16)] = 8
    """Symbols of the alphabet."""

    @property
    def vocab_size(self) -> int:  # pyright: ignore
        """Blank, marker and symbols."""
        return FIRST_SYMBOL + self.num_symbols

    def check(self) -> None:
        """Refuse more symbols than fit twice."""
        if 2 * self.num_copied > self.length:
            raise UserError(
                f"{self.what}: num_copied {self.num_copied} needs {2 * self.num_copied} tokens, to read and to write, "
                f"and length is {self.length}; raise length or lower num_copied",
                "contradiction",
            )

    def word(self, token: int) -> str:
        """Return a symbol as a number, a blank as _, the marker as =>."""
        return str(token - FIRST_SYMBOL) if token >= FIRST_SYMBOL else "_" if token == BLANK else "=>"


@register_generator("copying")
@dataclass(frozen=True)
class CopyingOptions(CopyOptions):
    """Repeat the symbols of the beginning after a delay.

    Distribution. An example is num_copied uniform symbols, length - 2 num_copied blanks, a marker, and
    num_copied - 1 blanks. The targets are the symbols in order, at the marker and the blanks after it.
    """

    def draw(self, draws: Draws) -> Examples:
        """Return one block of examples."""
        num = self.num_copied
        symbols = draws.columns(num, self.num_symbols) + FIRST_SYMBOL
        inputs = np.full((draws.num_rows, self.length), BLANK)
        inputs[:, :num], inputs[:, -num] = symbols, GO
        targets = np.full_like(inputs, IGNORE)
        targets[:, -num:] = symbols
        return Examples(inputs, targets)
