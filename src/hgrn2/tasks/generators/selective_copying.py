"""Selective copying: symbols at random places among blanks (as in arXiv 2312.00752)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hgrn2.constraints import Ge, Le
from hgrn2.tasks.generators.base import IGNORE, MAX_TOKENS, Examples, Length, register_generator
from hgrn2.tasks.generators.copying import BLANK, FIRST_SYMBOL, GO, CopyOptions
from hgrn2.tasks.generators.draws import Draws


@register_generator("selective_copying")
@dataclass(frozen=True)
class SelectiveCopyingOptions(CopyOptions):
    """Repeat the symbols in order, and leave out the blanks between them.

    Distribution. The first length - num_copied positions hold num_copied uniform symbols at uniformly chosen places,
    and blanks elsewhere. The last num_copied positions hold a marker each; their targets are the symbols in order.
    Mamba's experiment has length 4096, num_copied 16 and num_symbols 16.
    """

    length: Length = 256
    """Tokens of an example, at least 2 num_copied."""
    num_copied: Annotated[int, Ge(1), Le(MAX_TOKENS // 2)] = 16
    """Symbols to copy."""
    num_symbols: Annotated[int, Ge(2), Le(2**16)] = 16
    """Symbols of the alphabet."""

    def draw(self, draws: Draws) -> Examples:
        """Return one block of examples."""
        num = self.num_copied
        symbols = draws.columns(num, self.num_symbols) + FIRST_SYMBOL
        places = np.sort(draws.subset(num, self.length - num), axis=1)
        inputs = np.full((draws.num_rows, self.length), BLANK)
        np.put_along_axis(inputs, places, symbols, 1)
        inputs[:, -num:] = GO
        targets = np.full_like(inputs, IGNORE)
        targets[:, -num:] = symbols
        return Examples(inputs, targets)
