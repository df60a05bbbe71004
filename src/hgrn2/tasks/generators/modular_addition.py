"""The sum so far modulo a number: state tracking in a cyclic group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hgrn2.constraints import Ge, Le
from hgrn2.tasks.generators.base import Examples, SyntheticOptions, register_generator
from hgrn2.tasks.generators.draws import Draws


@register_generator("modular_addition")
@dataclass(frozen=True)
class ModularAdditionOptions(SyntheticOptions):
    """Predict at every position the sum so far, modulo a number.

    Distribution. Inputs are independent and uniform in 0 .. modulus - 1. Every position has a target, the sum of the
    inputs up to it modulo modulus.
    """

    modulus: Annotated[int, Ge(2), Le(2**16)] = 5
    """The number of states."""

    @property
    def vocab_size(self) -> int:  # pyright: ignore
        """The residues."""
        return self.modulus

    def draw(self, draws: Draws) -> Examples:
        """Return one block of examples."""
        inputs = draws.columns(self.length, self.modulus)
        return Examples(inputs, np.cumsum(inputs, axis=1) % self.modulus)
