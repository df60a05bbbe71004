"""Products of permutations: state tracking in groups that are not commutative (arXiv 2404.08819)."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hgrn2.tasks.generators.base import Examples, SyntheticOptions, register_generator
from hgrn2.tasks.generators.draws import Draws, Ints


@register_generator("permutations")
@dataclass(frozen=True)
class PermutationsOptions(SyntheticOptions):
    """Predict at every position the product of the permutations so far: the word problem of a group.

    Distribution. Inputs are independent and uniform over the elements of the group, numbered in lexicographic order.
    Every position has a target: the permutation that follows from applying the inputs up to it, one after the other.
    S5 and A5 are not solvable: no circuit of constant depth tracks them, if TC0 is not NC1.
    """

    group: Literal["S3", "S4", "S5", "A5"] = "S5"
    """All permutations of 3, 4 or 5 things, or the even ones of 5."""

    @property
    def vocab_size(self) -> int:  # pyright: ignore
        """The elements of the group."""
        return len(_elements(self.group))

    def draw(self, draws: Draws) -> Examples:
        """Return one block of examples."""
        inputs = draws.columns(self.length, self.vocab_size)
        products, targets = _products(self.group), np.empty_like(inputs)
        targets[:, 0] = inputs[:, 0]
        for t in range(1, self.length):
            targets[:, t] = products[inputs[:, t], targets[:, t - 1]]
        return Examples(inputs, targets)

    def word(self, token: int) -> str:
        """Return the images of 1, 2, ..., such as 213."""
        return "".join(str(image + 1) for image in _elements(self.group)[token])


@functools.cache
def _elements(group: str) -> list[tuple[int, ...]]:
    elements = list(itertools.permutations(range(int(group[1]))))
    if group[0] == "S":
        return elements
    # even permutations have an even number of inversions
    return [p for p in elements if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0]


@functools.cache
def _products(group: str) -> Ints:
    """Return the table of products [n, n]: entry (a, b) is b followed by a."""
    elements = _elements(group)
    numbers = {element: number for number, element in enumerate(elements)}
    return np.array([[numbers[tuple(a[i] for i in b)] for b in elements] for a in elements])
