"""The kernels of the element-wise recurrence in Triton's interpreter; `test_recurrences_gpu.py` compiles them."""

from functools import partial

import pytest
import torch

from hgrn2.ops import linear_scan
from tests.numerics import EXTREME_RMS, ORDINARY_RMS, assert_close, assert_equal, run
from tests.ops import test_triton
from tests.ops.scan_cases import log_uniform, spread
from tests.ops.test_linear_scan import OUTPUTS, RAGGED, inputs, ours
from tests.refusals import refuses

pytestmark = test_triton.pytestmark

numbers = pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
both_ways = pytest.mark.parametrize("reverse", [False, True])


def check(given, rms=ORDINARY_RMS, op=ours, **settings):
    """Outputs, final state and all gradients against the float64 recurrence."""
    exact = run(op, given, outputs=OUTPUTS, dtype=torch.float64, backend="reference", **settings)
    found = run(op, given, outputs=OUTPUTS, backend="triton", **settings)
    assert_close(found, exact, rms)
    return found


def turned(a, b, initial_state, cu_seqlens, rotation, **settings):
    """The operator with a rotation, complex numbers as pairs."""
    b, initial_state, rotation = map(torch.view_as_complex, (b, initial_state, rotation))
    found = linear_scan(a, b, rotation=rotation, initial_state=initial_state, cu_seqlens=cu_seqlens, **settings)
    return tuple(map(torch.view_as_real, found))


def turned_inputs(*shape, **settings):
    given = inputs(*shape, is_complex=True, **settings)
    angles = torch.linspace(-3, 3, given["a"].shape[2:-1].numel()).view(given["a"].shape[2:-1])
    given["a"] = torch.view_as_complex(given["a"]).abs()
    return given | {
        "rotation": torch.view_as_real(torch.polar(torch.linspace(0.9, 1, angles.numel()), angles.flatten()))
    }


@pytest.fixture
def in_segments(monkeypatch):
    """Cut sequences of any length."""
    from hgrn2.ops.triton import linear_launch

    monkeypatch.setattr(linear_launch, "SHORTEST_SEGMENT", 16)
    monkeypatch.setattr(linear_launch, "CUT_PROGRAMS", 100)
    monkeypatch.setattr(linear_launch, "FEWEST_PROGRAMS", 100)


# one block of each size, whole and not, and several of them
@pytest.mark.slow
@numbers
@both_ways
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 63, 64, 65, 200])
def test_every_length(length, reverse, is_complex):
    check(inputs(1, length, (3,), is_complex=is_complex), is_complex=is_complex, reverse=reverse)


@numbers
@pytest.mark.parametrize("shape", [(0, 5, (3,)), (2, 20, (0,)), (1, 5, (33,)), (1, 4, (2, 3))], ids=str)
def test_every_width(shape, is_complex):
    check(inputs(*shape, is_complex=is_complex), is_complex=is_complex)
    check(inputs(*shape, is_complex=is_complex, state=False), is_complex=is_complex)


@numbers
@both_ways
@pytest.mark.parametrize("bounds", [RAGGED, [0, 0], [0], [0, 0, 3, 3], [0, 41]], ids=str)
def test_packed_sequences(bounds, reverse, is_complex):
    given = inputs(1, bounds[-1], (3,), is_complex=is_complex, cu_seqlens=bounds)
    check(given, is_complex=is_complex, reverse=reverse)
    given["initial_state"] = None
    check(given, is_complex=is_complex, reverse=reverse)


@pytest.mark.slow
@both_ways
@pytest.mark.parametrize("bounds", [None, RAGGED, [0, 3, 3, 44, 60, 60]], ids=str)
def test_segments_equal_whole_sequences(bounds, reverse, in_segments):
    length = 70 if bounds is None else bounds[-1]
    shape = (2 if bounds is None else 1, length, (2,))
    check(inputs(*shape, cu_seqlens=bounds), reverse=reverse)
    check(inputs(*shape, cu_seqlens=bounds, is_complex=True), is_complex=True, reverse=reverse)
    check(turned_inputs(*shape, cu_seqlens=bounds), op=turned, reverse=reverse)


@both_ways
@pytest.mark.parametrize("bounds", [None, RAGGED], ids=["batch", "packed"])
def test_a_rotation_of_channels(bounds, reverse):
    given = turned_inputs(2 if bounds is None else 1, 20, (3,), cu_seqlens=bounds)
    check(given, op=turned, reverse=reverse)


def test_a_rotation_without_kernels():
    given = turned_inputs(2, 20, (3,))
    exact = run(turned, given, outputs=OUTPUTS, dtype=torch.float64, backend="reference")
    assert_close(run(turned, given, outputs=OUTPUTS, backend="halving"), exact, ORDINARY_RMS)


@pytest.mark.slow
@numbers
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
def test_decays_of_every_size(is_complex, segments, request):
    if segments:
        request.getfixturevalue("in_segments")
    for log_a in (-1e-4, -1.0, -20.0, 0.0, float("-inf")):
        given = inputs(1, 33, (2,), log_a=torch.full((1, 33, 2), log_a), is_complex=is_complex)
        check(given, EXTREME_RMS, is_complex=is_complex)
    shape = (1, 100, 2)
    wild = (-1e-6, -1e-4, -0.5, -20.0, -200.0, float("-inf"), 0.0)
    for log_a in (-log_uniform(shape, 1e-6, 50), spread(shape, wild)):
        check(inputs(1, 100, (2,), log_a=log_a, is_complex=is_complex), EXTREME_RMS, is_complex=is_complex)


def test_any_strides():
    given = inputs(2, 33, (4,))
    strided = {name: x if x is None else x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in given.items()}
    strided["b"] = torch.stack([given["b"]] * 2, -1)[..., 0]
    assert_equal(check(strided), check(given))


def test_low_precision_is_rounded_once():
    given = inputs(1, 40, (4,), dtype=torch.bfloat16)
    exact = run(ours, given, outputs=OUTPUTS, dtype=torch.float64, backend="reference")
    found = run(ours, given, outputs=OUTPUTS, backend="triton")
    assert (found["h"].dtype, found["d_a"].dtype, found["d_b"].dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    # the gradient of h is bfloat16, and so is that of the state's loss
    assert_close(found, exact, 4e-3)


def test_real_numbers_beside_complex_ones():
    a, b = torch.rand(1, 20, 3), torch.randn(1, 20, 3, dtype=torch.complex64)
    for one, two in ((a, b), (b * 0.3, a)):
        found, wanted = (linear_scan(one, two, backend=name)[0] for name in ("triton", "reference"))
        torch.testing.assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [None, RAGGED], ids=["batch", "packed"])
def test_registered_as_torch_wants_it(bounds):
    given = turned_inputs(1, 20, (3,), cu_seqlens=bounds)
    a, b, state, turn = (given[name].requires_grad_() for name in ("a", "b", "initial_state", "rotation"))
    for reverse in (False, True):
        call = (a, b, turn, state, given["cu_seqlens"], reverse)
        torch.library.opcheck(torch.ops.hgrn2.linear_scan_kernels.default, call)


def test_vmap_equals_a_loop():
    given = inputs(2, 17, (3,))
    a, b = (torch.stack([x, x * 0.5]) for x in (given["a"], given["b"]))
    op = partial(linear_scan, backend="triton")
    found = torch.vmap(op)(a, b)
    wanted = [torch.stack(parts) for parts in zip(*(op(*pair) for pair in zip(a, b, strict=True)), strict=True)]
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("bounds", [None, RAGGED], ids=["batch", "packed"])
def test_traced_whole_graph_equals_eager(bounds):
    given = inputs(2 if bounds is None else 1, 20, (3,), cu_seqlens=bounds)
    op = partial(ours, backend="triton")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, given, outputs=OUTPUTS), run(op, given, outputs=OUTPUTS), 1e-7)


def test_what_the_kernels_do_not_take():
    a = torch.rand(1, 4, 2)
    with refuses("unsupported", "triton", "float64"):
        linear_scan(a.double(), a.double(), backend="triton")
    with refuses("invalid-value", "rotation"):
        linear_scan(a, a, rotation=torch.ones(2))
    with refuses("invalid-value", "rotation", [3]):
        linear_scan(a, a, rotation=torch.ones(3, dtype=torch.complex64))
