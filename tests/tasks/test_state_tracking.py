"""State tracking and ListOps: examples read by rules of their own, and distributions."""

import itertools
import statistics

import numpy as np
import pytest

from hgrn2.tasks import generate
from hgrn2.tasks.generators import ListOpsOptions, ModularAdditionOptions, ParityOptions, PermutationsOptions
from hgrn2.tasks.generators.base import IGNORE
from tests.refusals import refuses
from tests.tasks.examples import rows


def test_parity():
    for inputs, targets in rows(ParityOptions(length=9)):
        assert targets == [sum(inputs[: t + 1]) % 2 for t in range(9)]


def test_modular_addition():
    for inputs, targets in rows(ModularAdditionOptions(length=9, modulus=7)):
        assert max(inputs) < 7
        assert targets == [sum(inputs[: t + 1]) % 7 for t in range(9)]


@pytest.mark.parametrize(("group", "order"), [("S3", 6), ("S4", 24), ("S5", 120), ("A5", 60)])
def test_permutations(group, order):
    options = PermutationsOptions(length=12, group=group)
    assert options.vocab_size == order
    words = [options.word(token) for token in range(order)]
    assert words == sorted(set(words))
    seen = set()
    for inputs, targets in rows(options, 400):
        things = list(range(1, int(group[1]) + 1))
        for token, target in zip(inputs, targets, strict=True):
            # each thing moves to its image
            things = [int(words[token][thing - 1]) for thing in things]
            assert words[target] == "".join(map(str, things))
        seen |= set(inputs)
    assert seen == set(range(order))


def test_even_permutations():
    options = PermutationsOptions(group="A5")
    for token in range(60):
        pairs = itertools.combinations(options.word(token), 2)
        assert sum(a > b for a, b in pairs) % 2 == 0


OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda arguments: int(statistics.median(arguments)),
    "[SM": lambda arguments: sum(arguments) % 10,
}


def evaluate(words, depth=1):
    """Return value, depth and largest number of arguments of an expression taken from the front of the words."""
    word = words.pop(0)
    if word.isdigit():
        return int(word), depth, 0
    arguments, deepest = [], depth
    largest = 0
    while words[0] != "]":
        value, below, most = evaluate(words, depth + 1)
        arguments.append(value)
        deepest, largest = max(deepest, below), max(largest, most)
    words.pop(0)
    return OPERATORS[word](arguments), deepest, max(largest, len(arguments))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"length": 30, "min_length": 1, "max_depth": 3, "max_args": 4},
        {"length": 5, "min_length": 2},
        {"length": 40, "min_length": 30, "max_depth": 12, "max_args": 2, "operator_share": 0.6},
    ],
)
def test_listops(settings):
    options = ListOpsOptions(**settings)
    depths, args, operators = set(), set(), set()
    for inputs, targets in rows(options, 300):
        words = [options.word(token) for token in inputs]
        end = words.index("=")
        assert options.min_length <= end < options.length
        assert words[end + 1 :] == ["_"] * (options.length - end - 1)
        operators |= set(words) & set(OPERATORS)
        expression = words[:end]
        value, depth, most = evaluate(expression)
        assert not expression
        assert targets == [value if t == end else IGNORE for t in range(options.length)]
        depths.add(depth)
        args.add(most)
    assert max(depths) <= options.max_depth
    assert max(args) <= options.max_args
    assert operators == set(OPERATORS)


def length_probabilities(options):
    """Return the probability of each length of an expression, from its generating function."""
    by_length = np.zeros(options.length)
    by_length[1] = 1
    for _ in range(options.max_depth - 1):
        arguments, several = by_length, np.zeros_like(by_length)
        for _ in range(2, options.max_args + 1):
            arguments = np.convolve(arguments, by_length)[: options.length]
            several += arguments / (options.max_args - 1)
        deeper = np.zeros_like(by_length)
        deeper[1] = 1 - options.operator_share
        deeper[2:] += options.operator_share * several[:-2]
        by_length = deeper
    by_length[: options.min_length] = 0
    return by_length / by_length.sum()


@pytest.mark.parametrize(("min_length", "max_depth"), [(1, 3), (16, 10)])
def test_listops_lengths_have_the_documented_distribution(min_length, max_depth):
    options, num = ListOpsOptions(length=64, min_length=min_length, max_depth=max_depth), 6000
    wanted = length_probabilities(options) * num
    found = np.bincount((generate(options, num).targets != IGNORE).argmax(axis=1), minlength=64)
    assert (abs(found - wanted) <= 5 * np.sqrt(wanted) + 1).all()
    assert abs(found @ np.arange(64) - wanted @ np.arange(64)) < 5 * 16 * num**0.5


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"min_length": 128}, ["min_length is 128", "length 128", 127]),
        ({"max_depth": 2, "max_args": 3}, ["min_length is 16", "max_depth 2", "max_args 3", "at most 5"]),
        ({"operator_share": 0}, ["min_length is 16", "operator_share 0", "at most 1"]),
        ({"max_depth": 1}, ["min_length is 16", "max_depth 1", "at most 1"]),
    ],
)
def test_lengths_that_no_expression_has(values, names):
    with refuses("contradiction", *names):
        ListOpsOptions(**values)


def test_lengths_that_hardly_any_expression_has():
    # with two arguments, lengths are 1, 4, 7, ...
    options = ListOpsOptions(length=7, min_length=5, max_args=2)
    with refuses("contradiction", "5 (min_length)", "6 (length - 1)", "max_args"):
        generate(options, 1)
