"""ListOps: nested expressions of MIN, MAX, MED and SM (arXiv 1804.06028), as in Long Range Arena (arXiv 2011.04006)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hgrn2.constraints import Ge, Le
from hgrn2.errors import UserError
from hgrn2.tasks.generators.base import IGNORE, MAX_TOKENS, Examples, SyntheticOptions, register_generator
from hgrn2.tasks.generators.draws import Draws, Ints

WORDS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]", "=", "_")
_OPERATORS, _CLOSE, _ASK, _PAD = 10, 14, 15, 16
# expressions that are tried for a block of examples
_MAX_TRIED = 2**20


@register_generator("listops")
@dataclass(frozen=True)
class ListOpsOptions(SyntheticOptions):
    """Predict the value, 0 to 9, of a nested expression such as [MAX 2 9 [MIN 4 7 ] 0 ].

    Distribution. A node is an operator with probability operator_share, otherwise a digit; at depth max_depth it is a
    digit. Operators are uniform among MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10), and have a
    uniform number of arguments, 2 to max_args; digits are uniform. Expressions shorter than min_length or longer than
    length - 1 are drawn again. After the expression comes "=", whose target is the value, and padding.

    Long Range Arena, without its parentheses, has length 2000, min_length 501, max_depth 10, max_args 10 and
    operator_share 0.25 (it also drops copies of an expression).
    """

    length: Annotated[int, Ge(5), Le(MAX_TOKENS)] = 128
    """Tokens of an example: the longest expression, and "="."""
    min_length: Annotated[int, Ge(1), Le(MAX_TOKENS)] = 16
    """Tokens of the shortest expression."""
    max_depth: Annotated[int, Ge(1), Le(100)] = 10
    """Depth of the deepest digits; one more than the deepest operators."""
    max_args: Annotated[int, Ge(2), Le(1000)] = 10
    """Largest number of arguments."""
    operator_share: Annotated[float, Ge(0), Le(1)] = 0.25
    """Probability that a node is an operator."""

    @property
    def vocab_size(self) -> int:  # pyright: ignore
        """Digits, operators, the closing bracket, the question and padding."""
        return len(WORDS)

    def check(self) -> None:
        """Refuse lengths that no expression has."""
        if self.min_length >= self.length:
            raise UserError(
                f"{self.what}: min_length is {self.min_length}, and length {self.length} has room for expressions of "
                f"{self.length - 1}; lower min_length or raise length",
                "contradiction",
            )
        longest = 1
        for _ in range(self.max_depth - 1):
            # stop in time: it grows exponentially
            if longest >= self.min_length or self.operator_share == 0:
                break
            longest = 2 + self.max_args * longest
        if longest < self.min_length:
            raise UserError(
                f"{self.what}: min_length is {self.min_length}, and with max_depth {self.max_depth}, max_args "
                f"{self.max_args} and operator_share {self.operator_share:g} an expression has at most {longest} "
                "tokens; lower min_length or raise the others",
                "contradiction",
            )

    def draw(self, draws: Draws) -> Examples:
        """Return one block of examples.

        Raises:
            UserError: hardly any expression has such a length.
        """
        inputs = np.full((draws.num_rows, self.length), _PAD)
        targets = np.full_like(inputs, IGNORE)
        filled = tried = 0
        while filled < draws.num_rows:
            if tried >= _MAX_TRIED:
                raise UserError(
                    f"{self.what}: of {tried} expressions, {filled} have a length of {self.min_length} (min_length) to "
                    f"{self.length - 1} (length - 1); widen the range, or change max_depth, max_args or operator_share",
                    "contradiction",
                )
            num = max(64, 2 * (draws.num_rows - filled))
            forest = _grow(self, draws, num)
            kept = np.flatnonzero(forest.is_accepted)[: draws.num_rows - filled]
            _write(forest, kept, inputs[filled:], targets[filled:])
            filled, tried = filled + len(kept), tried + num
        return Examples(inputs, targets)

    def word(self, token: int) -> str:
        """Return the symbol."""
        return WORDS[token]


class _Level(NamedTuple):
    """Nodes of one depth of all trees; those of one parent are neighbours, in its order.

    Attributes:
        tree: index of the tree of each node.
        tokens: digit or operator.
        num_args: number of arguments; 0 for digits.
    """

    tree: Ints
    tokens: Ints
    num_args: Ints


class _Forest(NamedTuple):
    """Random expressions.

    Attributes:
        levels: nodes by depth, the roots first.
        is_accepted: whether each tree has a length in range; trees that do not may be incomplete.
    """

    levels: list[_Level]
    is_accepted: NDArray[np.bool_]


def _grow(options: ListOpsOptions, draws: Draws, num: int) -> _Forest:
    """Draw trees level by level."""
    tree, lengths = np.arange(num), np.zeros(num, np.int64)
    fits = np.ones(num, bool)
    levels: list[_Level] = []
    for depth in range(1, options.max_depth + 1):
        size = len(tree)
        digits, operators = draws.integers(size, 10), draws.integers(size, 4) + _OPERATORS
        num_args = draws.integers(size, options.max_args - 1) + 2
        if depth == options.max_depth:
            num_args[:] = 0
        elif depth > 1 or options.min_length == 1:
            num_args[draws.integers(size, 2**31) >= options.operator_share * 2**31] = 0
        # otherwise a root is an operator: a digit alone would be drawn again
        lengths += np.bincount(tree, 1 + (num_args > 0) + num_args, minlength=num).astype(np.int64)
        # arguments were counted as one token each, and count at their own depth
        counted = np.bincount(tree, num_args, minlength=num).astype(np.int64)
        fits &= lengths < options.length
        lengths -= counted
        num_args[~fits[tree]] = 0
        levels.append(_Level(tree, np.where(num_args > 0, operators, digits), num_args))
        tree = np.repeat(tree, num_args)
        if not len(tree):
            break
    return _Forest(levels, fits & (lengths >= options.min_length))


def _write(forest: _Forest, kept: Ints, inputs: Ints, targets: Ints) -> None:
    """Write the kept trees and their values into the first rows."""
    row_of = np.full(len(forest.is_accepted), -1)
    row_of[kept] = np.arange(len(kept))
    levels = []
    for level in forest.levels:
        is_kept = row_of[level.tree] >= 0
        levels.append(_Level(row_of[level.tree[is_kept]], level.tokens[is_kept], level.num_args[is_kept]))
    values, sizes = _evaluate(levels)
    places = np.zeros(len(kept), np.int64)
    for depth, (level, size) in enumerate(zip(levels, sizes, strict=True)):
        parents = np.flatnonzero(level.num_args)
        inputs[level.tree, places] = level.tokens
        inputs[level.tree[parents], (places + size - 1)[parents]] = _CLOSE
        if depth + 1 < len(levels):
            # arguments begin after their operator, each after those before it
            num_args, before = level.num_args[parents], np.cumsum(sizes[depth + 1]) - sizes[depth + 1]
            starts = np.cumsum(num_args) - num_args
            places = before + np.repeat(places[parents] + 1 - before[starts], num_args)
    rows = np.arange(len(kept))
    inputs[rows, sizes[0]] = _ASK
    targets[rows, sizes[0]] = values


def _evaluate(levels: list[_Level]) -> tuple[Ints, list[Ints]]:
    """Return the values of the roots, and the number of tokens of every node by level."""
    below_values, below_sizes = np.zeros(0, np.int64), np.zeros(0, np.int64)
    all_sizes: list[Ints] = []
    for level in reversed(levels):
        values, sizes = level.tokens.copy(), np.ones_like(level.tokens)
        parents = np.flatnonzero(level.num_args)
        if len(parents):
            num_args = level.num_args[parents]
            starts = np.cumsum(num_args) - num_args
            sizes[parents] = 2 + np.add.reduceat(below_sizes, starts)
            # arguments of each operator in order of value
            ordered = np.repeat(np.arange(len(parents)) * 16, num_args) + below_values
            ordered.sort()
            ordered &= 15
            medians = (ordered[starts + (num_args - 1) // 2] + ordered[starts + num_args // 2]) // 2
            sums = np.add.reduceat(below_values, starts) % 10
            results = np.stack([ordered[starts], ordered[starts + num_args - 1], medians, sums])
            values[parents] = results[level.tokens[parents] - _OPERATORS, np.arange(len(parents))]
        below_values, below_sizes = values, sizes
        all_sizes.append(sizes)
    return below_values, all_sizes[::-1]
