"""Invariants of the operators, over drawn shapes, cuts and gates."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hgrn2.ops import gated_scan, hgrn2_scan
from hgrn2.ops.tiles import chunk_size, chunks_per_tile, max_tiles, tiles
from tests.numerics import EXTREME_RMS, FLOAT64_RMS, ORDINARY_RMS, assert_close, run
from tests.ops.scan_cases import free_inputs, spread, tied_inputs

quick = settings(
    max_examples=40,
    derandomize=True,
    # the fixture that fills fresh memory may stay for all examples
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 140), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


@st.composite
def sequence_starts(draw, most: int = 8, longest: int = 90) -> list[int]:
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=most))
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@quick
@given(shape=shapes, reverse=st.booleans(), seed=st.integers(0, 1000))
def test_the_oracle_in_any_shape(shape, reverse, seed):
    inputs = tied_inputs(*shape, seed=seed)
    wanted = run(hgrn2_scan, inputs, dtype=torch.float64, backend="reference", reverse=reverse)
    assert_close(run(hgrn2_scan, inputs, reverse=reverse), wanted, EXTREME_RMS)
    assert_close(run(hgrn2_scan, inputs, dtype=torch.float64, reverse=reverse), wanted, 10 * FLOAT64_RMS)


@quick
@given(cu_seqlens=sequence_starts(), reverse=st.booleans(), seed=st.integers(0, 1000))
def test_packed_like_the_oracle(cu_seqlens, reverse, seed):
    inputs = free_inputs(1, cu_seqlens[-1], 1, 3, 2, cu_seqlens=cu_seqlens, seed=seed)
    wanted = run(gated_scan, inputs, dtype=torch.float64, backend="reference", reverse=reverse)
    assert_close(run(gated_scan, inputs, dtype=torch.float64, reverse=reverse), wanted, 10 * FLOAT64_RMS)


@quick
@given(
    choices=st.lists(st.floats(-60, 0), min_size=1, max_size=6),
    length=st.integers(1, 200),
    seed=st.integers(0, 1000),
)
def test_any_mixture_of_decays(choices, length, seed):
    inputs = free_inputs(1, length, 1, 4, 3, seed=seed)
    inputs["log_f"] = spread(inputs["log_f"].shape, tuple(choices), seed)
    wanted = run(gated_scan, inputs, dtype=torch.float64, backend="reference")
    assert_close(run(gated_scan, inputs), wanted, EXTREME_RMS)


@quick
@given(length=st.integers(2, 150), data=st.data())
def test_outputs_do_not_depend_on_the_future(length, data):
    at = data.draw(st.integers(1, length - 1))
    inputs = tied_inputs(1, length, 1, 4, 3)
    y, _ = hgrn2_scan(**inputs)
    changed = dict(inputs)
    for name in ("q", "f", "v"):
        changed[name] = torch.cat((inputs[name][:, :at], torch.randn_like(inputs[name][:, at:])), 1)
    later, _ = hgrn2_scan(**changed)
    assert torch.equal(later[:, :at], y[:, :at])
    assert not torch.equal(later[:, at:], y[:, at:])


@quick
@given(a=st.floats(-4, 4), b=st.floats(-4, 4), length=st.integers(1, 130), reverse=st.booleans())
def test_linear_in_value_and_state(a, b, length, reverse):
    first, second = (tied_inputs(1, length, 2, 4, 3, dtype=torch.float64, seed=seed) for seed in (0, 1))
    second |= {name: first[name] for name in ("q", "f", "lower_bound")}
    both = first | {name: a * first[name] + b * second[name] for name in ("v", "initial_state")}
    results = [hgrn2_scan(**inputs, reverse=reverse) for inputs in (first, second, both)]
    for one, two, found in zip(*results, strict=True):
        torch.testing.assert_close(found, a * one + b * two, rtol=1e-11, atol=1e-11)


@quick
@given(scale=st.floats(-3, 3), length=st.integers(1, 100))
def test_scale_multiplies_outputs_alone(scale, length):
    inputs = tied_inputs(1, length, 1, 4, 3)
    y, state = hgrn2_scan(**inputs)
    scaled, scaled_state = hgrn2_scan(**inputs, scale=scale)
    assert torch.equal(scaled_state, state)
    torch.testing.assert_close(scaled, scale * y, rtol=1e-5, atol=1e-6)


@quick
@given(length=st.integers(1, 130), bound=st.floats(0, 0.99))
def test_a_convex_mixture_stays_in_range(length, bound):
    # S[k, :] is a weighted mean of 0 and the values so far: f + k = 1
    inputs = tied_inputs(1, length, 1, 4, 3, state=False)
    inputs["lower_bound"] = torch.full((1, 4), bound)
    _, state = hgrn2_scan(**inputs)
    values = inputs["v"][0, :, 0]
    high, low = values.amax(0).clamp(min=0), values.amin(0).clamp(max=0)
    assert (state[0, 0] <= high * (1 + 1e-5)).all()
    assert (state[0, 0] >= low * (1 + 1e-5)).all()


@quick
@given(length=st.integers(1, 120), seed=st.integers(0, 1000))
def test_tied_is_free_with_key_and_decay_written_out(length, seed):
    inputs = tied_inputs(1, length, 2, 4, 3, dtype=torch.float64, seed=seed)
    z, bound = inputs["f"], inputs["lower_bound"]
    key = (1 - bound) * torch.sigmoid(-z)
    found = gated_scan(
        torch.nn.functional.silu(inputs["q"]),
        key,
        inputs["v"],
        torch.log1p(-key),
        initial_state=inputs["initial_state"],
    )
    for one, two in zip(found, hgrn2_scan(**inputs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@quick
@given(
    starts=sequence_starts(most=12, longest=300),
    heads=st.sampled_from([1, 8, 64]),
    width=st.sampled_from([1, 64, 256]),
)
def test_tiles_cover_every_row_once_and_in_order(starts, heads, width):
    length = starts[-1]
    device = torch.device("cpu")
    size, chunks_each = chunk_size(length), chunks_per_tile(heads, width, torch.float32, device)
    plan = tiles(starts, size, chunks_each, device)
    assert len(plan) <= max_tiles(length, len(starts) - 1, chunks_each)
    assert [tile.start for tile in plan] == [0, *(tile.stop for tile in plan)][: len(plan)]
    assert not plan or plan[-1].stop == length
    for tile in plan:
        assert tile.num_chunks <= chunks_each
        rows = tile.num_chunks * size
        places = torch.arange(rows) if tile.places is None else tile.places
        assert places.numel() == tile.stop - tile.start
        assert (places.diff() > 0).all()
        sequence_of_row = torch.searchsorted(torch.tensor(starts), torch.arange(tile.start, tile.stop), right=True) - 1
        assert torch.tensor(tile.sequences)[places // size].tolist() == sequence_of_row.tolist()
    # every sequence with a row begins and ends exactly once
    filled = [n for n in range(len(starts) - 1) if starts[n] < starts[n + 1]]
    for marks in ("begins", "ends"):
        marked = [n for tile in plan for n, mark in zip(tile.sequences, getattr(tile, marks), strict=True) if mark]
        assert marked == filled


def test_float32_is_ordinary_in_every_example_shape():
    for seed, shape in enumerate([(1, 140, 3, 9, 9), (3, 77, 1, 2, 8), (2, 129, 2, 5, 1)]):
        inputs = tied_inputs(*shape, seed=seed)
        wanted = run(hgrn2_scan, inputs, dtype=torch.float64, backend="reference")
        assert_close(run(hgrn2_scan, inputs), wanted, ORDINARY_RMS)
