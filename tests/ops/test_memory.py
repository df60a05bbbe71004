"""Memory: linear in T, a small multiple of the inputs, and no [T, K, V] anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hgrn2.ops import gated_scan, hgrn2_scan
from tests.ops.scan_cases import free_inputs, tied_inputs

INPUTS = {hgrn2_scan: tied_inputs, gated_scan: free_inputs}
both_operators = pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.__name__)
HEADS, WIDTH = 2, 64


@pytest.fixture(autouse=True)
def plain_memory(hostile_memory):
    # filling fresh memory allocates
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def peak_bytes(function) -> int:
    """Most bytes of tensors alive at once that function allocated."""
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        result = function()
    del result
    assert profile.profiler is not None
    kineto: Any = profile.profiler.kineto_results
    now = peak = 0
    for event in kineto.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_peak_bytes_counts_what_lives_at_once():
    def two_then_one():
        for _ in range(3):
            a = torch.ones(1000)
            b = a + 1
            del a, b
        return torch.ones(10)

    assert 8000 <= peak_bytes(two_then_one) < 8600


def measure(op, length: int, gradients: bool, **changes) -> tuple[int, int]:
    inputs = INPUTS[op](1, length, HEADS, WIDTH, WIDTH) | changes
    leaves = {}
    for name, x in inputs.items():
        leaves[name] = x if x is None or not x.is_floating_point() else x.detach().requires_grad_(gradients)

    def work():
        y, state = op(**leaves)
        if not gradients:
            return y, state
        wanted = [x for x in leaves.values() if x is not None and x.requires_grad]
        return torch.autograd.grad(y.mean() + state.mean(), wanted)

    return peak_bytes(work), length * HEADS * WIDTH * 4


@pytest.mark.slow
@both_operators
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])
def test_linear_with_a_small_constant(op, gradients):
    (short, one), (long, two) = (measure(op, length, gradients) for length in (8192, 16384))
    # per token: y and, backwards, dy, the gradients and coarse states; [T, K, V] would be 64 times one tensor
    tensors_per_token = (long - short) / (two - one)
    assert tensors_per_token <= (7 if gradients else 1.1)
    # and what does not grow: the temporaries of one tile, independent of T
    assert long - tensors_per_token * two <= 24 * 2**20


def test_slices_of_a_projection_are_not_copied():
    length = 16384
    projection = torch.randn(1, length, 3 * HEADS * WIDTH)
    parts = dict(zip("qfv", (x.unflatten(-1, (HEADS, WIDTH)) for x in projection.chunk(3, -1)), strict=True))
    sliced, one = measure(hgrn2_scan, length, False, **parts)
    contiguous, _ = measure(hgrn2_scan, length, False)
    assert sliced <= contiguous + one // 8
