"""Parity of the bits so far, the simplest state tracking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hgrn2.tasks.generators.base import Examples, SyntheticOptions, register_generator
from hgrn2.tasks.generators.draws import Draws


@register_generator("parity")
@dataclass(frozen=True)
class ParityOptions(SyntheticOptions):
    """Predict at every position whether the number of ones so far is odd.

    Distribution. Bits are independent and fair. Every position has a target, 0 or 1. Gates in [0, 1] cannot learn it
    for all lengths (arXiv 2411.12537).
    """

    vocab_size: ClassVar[int] = 2

    def draw(self, draws: Draws) -> Examples:
        """Return one block of examples."""
        bits = draws.columns(self.length, 2)
        return Examples(bits, np.cumsum(bits, axis=1) % 2)
