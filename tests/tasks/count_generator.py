"""A generator in one file, which no file of the package knows: count how often a letter has come so far."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hgrn2.constraints import Ge, Le
from hgrn2.tasks import Examples, SyntheticOptions, register_generator, register_synthetic_task


@register_synthetic_task
@register_generator("count")
@dataclass(frozen=True)
class CountOptions(SyntheticOptions):
    """Say the number of times that the letter at this position has come before, modulo num_letters."""

    length: Annotated[int, Ge(1), Le(64)] = 8
    """Tokens of an example."""
    num_letters: Annotated[int, Ge(2), Le(26)] = 3
    """Letters, uniform and independent."""

    @property
    def vocab_size(self):
        return self.num_letters

    def draw(self, draws):
        letters = draws.columns(self.length, self.num_letters)
        is_same = letters[:, :, None] == letters[:, None, :]
        return Examples(letters, np.tril(is_same, -1).sum(-1) % self.num_letters)

    def word(self, token):
        return "abcdefghijklmnopqrstuvwxyz"[token]
