"""Recall and copying: examples read by rules of their own, and distributions."""

import numpy as np
import pytest

from hgrn2.tasks import generate
from hgrn2.tasks.generators import (
    AssociativeRecallOptions,
    CopyingOptions,
    InductionOptions,
    MQAROptions,
    NeedleOptions,
    SelectiveCopyingOptions,
)
from hgrn2.tasks.generators.base import IGNORE
from tests.refusals import refuses
from tests.tasks.examples import rows


@pytest.mark.parametrize("random_filler", [False, True])
def test_mqar(random_filler):
    options = MQAROptions(length=32, num_pairs=4, vocab_size=40, random_filler=random_filler)
    for inputs, targets in rows(options):
        pairs = dict(zip(inputs[0:8:2], inputs[1:8:2], strict=True))
        assert len(pairs) == len(set(pairs.values())) == 4
        assert all(1 <= key < 20 <= value < 40 for key, value in pairs.items())
        asked = [t for t, target in enumerate(targets) if target != IGNORE]
        assert all(t >= 8 and t % 2 == 0 for t in asked)
        assert {inputs[t] for t in asked} == set(pairs)
        assert all(targets[t] == pairs[inputs[t]] for t in asked)
        rest = [inputs[t] for t in range(8, 32) if t not in asked]
        assert any(rest) == random_filler


def test_mqar_queries_follow_the_power_law():
    # one pair: its place is drawn from the power law itself
    options = MQAROptions(length=12, num_pairs=1, power=0.01)
    num = 8000
    targets = generate(options, num).targets
    weights = np.arange(1.0, 6) ** -0.99
    wanted = num * weights / weights.sum()
    found = (targets != IGNORE).sum(axis=0)
    assert found[:2].sum() == found[3::2].sum() == 0
    assert (abs(found[2::2] - wanted) < 5 * wanted**0.5).all()


def test_mqar_that_just_fits():
    options = MQAROptions(length=16, num_pairs=4, vocab_size=10)
    inputs, targets = generate(options, 20)
    assert (np.sort(inputs[:, 0:8:2]) == [1, 2, 3, 4]).all()
    assert ((targets != IGNORE).sum(axis=0) == [0] * 8 + [20, 0] * 4).all()


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"length": 64, "num_pairs": 17}, ["num_pairs 17", 68, 64]),
        ({"num_pairs": 4, "vocab_size": 9}, ["num_pairs is 4", 9, 3]),
    ],
)
def test_more_pairs_than_fit(values, names):
    with refuses("contradiction", *names):
        MQAROptions(**values)


@pytest.mark.parametrize(("length", "key_length"), [(4, 1), (24, 1), (24, 2), (40, 3)])
def test_associative_recall(length, key_length):
    options = AssociativeRecallOptions(length=length, num_keys=3, num_values=4, key_length=key_length)
    step, asked = key_length + 1, []
    for inputs, targets in rows(options, 300):
        pairs = {}
        for at in range(0, length - step, step):
            key, value = tuple(inputs[at : at + key_length]), inputs[at + key_length]
            assert all(1 <= token <= 3 for token in key)
            assert 4 <= value < 8
            # a key that comes again has the same value
            assert pairs.setdefault(key, value) == value
        assert inputs[-step] == 0
        question = tuple(inputs[-key_length:])
        assert targets == [IGNORE] * (length - 1) + [pairs[question]]
        asked.append((list(pairs).index(question) + 0.5) / len(pairs))
    # uniform among the keys that have come, not always the first or the last
    assert abs(np.mean(asked) - 0.5) < 5 * (1 / 12 / 300) ** 0.5


def test_associative_recall_repeats_keys():
    keys = [inputs[0:22:2] for inputs, _ in rows(AssociativeRecallOptions(length=24, num_keys=5), 20)]
    assert any(len(set(found)) < len(found) for found in keys)


def test_copying():
    for inputs, targets in rows(CopyingOptions(length=20, num_copied=5, num_symbols=3)):
        assert all(2 <= token < 5 for token in inputs[:5])
        assert inputs[5:] == [0] * 10 + [1] + [0] * 4
        assert targets == [IGNORE] * 15 + inputs[:5]


def test_copying_that_just_fits():
    for inputs, targets in rows(CopyingOptions(length=10, num_copied=5)):
        assert inputs[5:] == [1, 0, 0, 0, 0]
        assert targets[5:] == inputs[:5]


@pytest.mark.parametrize("length", [8, 20])
def test_selective_copying(length):
    places = []
    for inputs, targets in rows(SelectiveCopyingOptions(length=length, num_copied=4, num_symbols=3), 400):
        before = inputs[: length - 4]
        symbols = [token for token in before if token]
        assert all(2 <= token < 5 for token in symbols)
        assert inputs[length - 4 :] == [1] * 4
        assert targets == [IGNORE] * (length - 4) + symbols
        places += [t for t, token in enumerate(before) if token]
    counts = np.bincount(places, minlength=length - 4)
    assert (abs(counts - 1600 / (length - 4)) <= 5 * 20).all()


@pytest.mark.parametrize(("length", "num_copied"), [(3, 1), (20, 1), (7, 3), (20, 4)])
def test_induction(length, num_copied):
    places = []
    for inputs, targets in rows(InductionOptions(length=length, num_symbols=4, num_copied=num_copied), 200):
        first, second = (t for t, token in enumerate(inputs) if token == 0)
        assert second == length - num_copied
        symbols = inputs[first + 1 : first + 1 + num_copied]
        assert inputs[second + 1 :] == symbols[:-1]
        assert targets == [IGNORE] * second + symbols
        places.append(first)
    assert (min(places), max(places)) == (0, length - 2 * num_copied - 1)


@pytest.mark.parametrize(("length", "num_needles"), [(4, 1), (21, 3), (12, 5)])
def test_needle(length, num_needles):
    options = NeedleOptions(length=length, num_needles=num_needles, num_words=5, num_keys=6, num_values=7)
    places = []
    for inputs, targets in rows(options, 200):
        haystack, (marker, question) = inputs[:-2], inputs[-2:]
        assert marker == 0
        keys = [t for t, token in enumerate(haystack) if 6 <= token < 12]
        needles = {haystack[t]: haystack[t + 1] for t in keys}
        assert len(needles) == len(keys) == num_needles
        assert all(t % 2 == 0 for t in keys)
        assert all(12 <= value < 19 for value in needles.values())
        assert targets == [IGNORE] * (length - 1) + [needles[question]]
        assert all(1 <= haystack[t] < 6 for t in range(length - 2) if t not in keys and t - 1 not in keys)
        places.append(haystack.index(question) // 2)
    assert set(places) == set(range((length - 2) // 2))


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 10), (1.0, 18)])
def test_needle_at_a_depth(depth, place):
    options = NeedleOptions(length=22, num_needles=3, depth=depth)
    others = set()
    for inputs, _ in rows(options, 200):
        assert inputs[place] == inputs[-1]
        others |= {t for t, token in enumerate(inputs[:-2]) if 65 <= token < 81 and t != place}
    assert others == set(range(0, 20, 2)) - {place}


@pytest.mark.parametrize(
    ("options", "values", "names"),
    [
        (AssociativeRecallOptions, {"length": 65}, [65, "key_length", 2]),
        (AssociativeRecallOptions, {"length": 3, "key_length": 2}, [3, 6]),
        (AssociativeRecallOptions, {"length": 80, "num_keys": 2**12, "key_length": 4}, [4096, 4]),
        (CopyingOptions, {"length": 19}, ["num_copied 10", 20, 19]),
        (SelectiveCopyingOptions, {"length": 31}, ["num_copied 16", 32, 31]),
        (InductionOptions, {"length": 6, "num_copied": 3}, ["num_copied 3", 7, 6]),
        (NeedleOptions, {"length": 7, "num_needles": 3}, ["num_needles 3", 8, 7]),
        (NeedleOptions, {"num_needles": 17}, ["num_needles is 17", "num_keys 16"]),
    ],
)
def test_what_does_not_fit(options, values, names):
    with refuses("contradiction", *names):
        options(**values)


def test_a_depth_outside_the_haystack():
    with refuses("invalid-value", "depth is 1.5", "0 to 1"):
        NeedleOptions(depth=1.5)
