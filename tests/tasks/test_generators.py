"""Generators: the same examples everywhere, the documented distributions, and refusals of the impossible."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest

from hgrn2.tasks import GENERATORS, SyntheticOptions, generate, register_generator, show
from hgrn2.tasks.generators import Draws, MQAROptions
from hgrn2.tasks.generators.base import IGNORE, VALIDATION, block_size
from tests.refusals import refuses

# SHA-256 of the first thousand examples of seed 0 with the default options; a change makes earlier results
# incomparable
CHECKSUMS = {
    "associative_recall": "e652b3d2a968c2a5f3e66dceb108d3d948c58709d46108429e08b5b98edb0ade",
    "copying": "3f7fe53e8ef3d66972aa43404c7d3fbf3fd7bb9be6b0f1b88cd0191368dad8e7",
    "induction": "1bed8f134c684000b63fa0ba8e640cdd54d9cf2317d702b87349016779bafc95",
    "listops": "525539da5ab2f5a9899bd3187dc86daddead707a9d3e6f2d91b23626d95ce5ab",
    "modular_addition": "8906ccd9b7483ec571e3d1a61c5132c7b256d37960db630a5bfbccc382043a39",
    "mqar": "3f69c4d556e69d1ee381ac8b26cd63d2316058baeaae0de76c17677d9d19d99f",
    "needle": "e23b202193909c5441db3fa5b797b230b78718d67a991ae088f9bd4cb74c03b2",
    "parity": "1f0d59450166649727e45e2e841b531675c8ec6ead0e0eacdc48168cbffd61c9",
    "permutations": "d9a0061064e2b8f3e2453c355c535c972b0a0b9ea00e7795822ba691367bc078",
    "selective_copying": "4181a9822b3974416a7cc4ffeec9fed65d4df7acb9725b478af88107acdbb127",
}


@pytest.fixture(params=GENERATORS)
def options(request):
    return GENERATORS[request.param]()


def test_every_generator_has_a_checksum():
    assert set(CHECKSUMS) == set(GENERATORS)


def test_the_first_thousand_examples_never_change(options):
    assert generate(options, 1000).checksum() == CHECKSUMS[options.name]


def test_shapes_and_tokens(options):
    inputs, targets = generate(options, 30, seed=5)
    assert inputs.shape == targets.shape == (30, options.length)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.min() >= 0
    assert inputs.max() < options.vocab_size
    counted = targets != IGNORE
    assert targets[counted].min() >= 0
    assert targets[counted].max() < options.vocab_size
    # batches of equal shapes
    assert set(counted.sum(axis=1)) == {counted.sum() // 30}
    assert counted.any()


def test_an_example_depends_on_its_index_only(options):
    size = block_size(options)
    many = generate(options, size + 20, seed=1)
    for start, count in ((0, 1), (7, 3), (size - 2, 5)):
        some = generate(options, count, seed=1, start=start)
        for name in ("inputs", "targets"):
            assert np.array_equal(getattr(some, name), getattr(many, name)[start : start + count])


def test_seeds_and_streams_differ(options):
    first = generate(options, 20)
    others = [generate(options, 20, seed=1), generate(options, 20, stream=VALIDATION), generate(options, 20, start=20)]
    assert len({first.checksum(), *(x.checksum() for x in others)}) == 4


def test_a_sample_is_shown_whole(options):
    examples = generate(options, 2)
    words = show(options, examples, width=80)
    assert max(map(len, words.splitlines())) <= 80
    lines = [line.split() for line in words.split("\n\n")[1].splitlines()]
    above, below = ([word for line in lines[i::2] for word in line] for i in (0, 1))
    assert above == [options.word(int(token)) for token in examples.inputs[1]]
    assert [word != "." for word in below] == (examples.targets[1] != IGNORE).tolist()


def test_they_need_no_torch():
    code = "import sys, hgrn2.tasks as t; [t.generate(g(), 1) for g in t.GENERATORS.values()]; "
    code += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"count": -1}, ["count is -1"]),
        ({"count": True}, ["count is True"]),
        ({"count": 1, "seed": 2**64}, ["seed", 2**64]),
        ({"count": 1, "start": -2}, ["start is -2"]),
    ],
)
def test_numbers_out_of_range(arguments, names):
    with refuses("invalid-value", *names):
        generate(MQAROptions(), **arguments)


def test_options_of_other_validations():
    options = MQAROptions(eval_lengths=[128], eval_at=[{"length": 256, "num_pairs": 16}])
    wanted = {
        "length_128": dataclasses.replace(options, length=128, eval_lengths=(), eval_at=()),
        "length_256_num_pairs_16": MQAROptions(length=256, num_pairs=16),
    }
    assert options.evaluations() == wanted
    for code, names, values in (
        ("contradiction", ["num_pairs 4", "length is 12"], {"eval_lengths": [12]}),
        ("invalid-value", ["length is 1"], {"eval_lengths": [1]}),
        ("invalid-value", ["eval_lengths is '128'"], {"eval_lengths": "128"}),
        ("invalid-value", ["eval_at holds 128"], {"eval_at": [128]}),
        ("unknown-name", ["num_pair", "num_pairs"], {"eval_at": [{"num_pair": 2}]}),
        ("unknown-name", ["eval_lengths"], {"eval_at": [{"eval_lengths": [2]}]}),
        ("contradiction", ["100", "8192"], {"eval_at": [{"vocab_size": 100}]}),
    ):
        with refuses(code, *names):
            MQAROptions(**values)


def test_a_name_is_taken_once():
    with refuses("already-exists", "mqar", "MQAROptions"):
        register_generator("mqar")(SyntheticOptions)


# draws


def test_integers_are_uniform():
    found = Draws(0, 0, 0, 1000).columns(60, 7)
    counts = np.bincount(found.ravel(), minlength=7)
    # five standard deviations
    assert abs(counts - 60_000 / 7).max() < 5 * (60_000 * 6 / 49) ** 0.5


@pytest.mark.parametrize(("k", "high"), [(1, 1), (3, 3), (2, 5), (40, 60), (30, 40)])
def test_subsets_are_distinct_and_uniform(k, high):
    num = 4000
    for found in (Draws(1, 0, 0, num).subset(k, high), Draws(1, 0, 0, num).distinct(k, high)):
        assert found.min() >= 0
        assert found.max() < high
        assert (np.diff(np.sort(found, axis=1), axis=1) > 0).all()
        counts = np.bincount(found.ravel(), minlength=high)
        p = k / high
        assert abs(counts - num * p).max() <= 5 * (num * p * (1 - p)) ** 0.5


def test_distinct_draws_come_in_every_order():
    found = Draws(2, 0, 0, 6000).distinct(3, 3)
    counts = np.array([(found == order).all(axis=1).sum() for order in itertools.permutations(range(3))])
    assert abs(counts - 1000).max() < 5 * 1000**0.5


def test_weighted_draws_follow_successive_sampling():
    weights, num = np.array([5.0, 2.0, 1.0]), 16_000
    found = Draws(3, 0, 0, num).weighted(2, weights)
    for first, second in itertools.permutations(range(3), 2):
        p = weights[first] / 8 * weights[second] / (8 - weights[first])
        count = ((found[:, 0] == first) & (found[:, 1] == second)).sum()
        assert abs(count - num * p) < 5 * (num * p) ** 0.5
