"""The chunked operators against the oracle in float64: outputs, final states and every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad

from hgrn2.ops import gated_scan, hgrn2_scan, hgrn2_step
from tests.numerics import (
    EXTREME_RMS,
    FLOAT64_RMS,
    ORDINARY_RMS,
    assert_close,
    assert_equal,
    assert_no_worse,
    run,
)
from tests.ops.scan_cases import (
    LENGTHS,
    decays,
    free_inputs,
    honest_gated_scan,
    honest_scan,
    slow,
    spread,
    tied_inputs,
)

INPUTS = {hgrn2_scan: tied_inputs, gated_scan: free_inputs}
both_operators = pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.__name__)


def exact(op, inputs, **settings):
    return run(op, inputs, dtype=torch.float64, backend="reference", **settings)


@both_operators
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(op, length, reverse):
    inputs = INPUTS[op](length=length)
    wanted = exact(op, inputs, reverse=reverse, scale=0.3)
    assert_close(run(op, inputs, reverse=reverse, scale=0.3), wanted, ORDINARY_RMS)
    double = run(op, inputs, dtype=torch.float64, reverse=reverse, scale=0.3)
    assert_close(double, wanted, FLOAT64_RMS)


@both_operators
@pytest.mark.parametrize(
    ("batch", "heads", "k_width", "v_width"),
    [
        (1, 1, 1, 1),
        (1, 1, 1, 9),
        (3, 2, 9, 1),
        (2, 3, 33, 7),
        (1, 2, 24, 64),
        (0, 2, 3, 4),
        (1, 8, 2, 2),
        (1, 4, 4, 4),
        (2, 2, 8, 8),
    ],
)
def test_every_width(op, batch, heads, k_width, v_width):
    inputs = INPUTS[op](batch, 70, heads, k_width, v_width)
    assert_close(run(op, inputs), exact(op, inputs), ORDINARY_RMS)


@pytest.mark.slow
@both_operators
@pytest.mark.parametrize("reverse", [False, True])
def test_many_tiles_of_time_and_batch(op, reverse):
    # more than one tile along time and along the batch, the last of each not full
    inputs = INPUTS[op](batch=5, length=1100, heads=1, k_width=64, v_width=32)
    assert_close(run(op, inputs, reverse=reverse), exact(op, inputs, reverse=reverse), ORDINARY_RMS)


@pytest.mark.parametrize("q_activation", ["silu", "sigmoid", "none"])
@pytest.mark.parametrize("v_activation", ["none", "silu"])
@pytest.mark.parametrize("bound", [None, 0.0, 0.9])
def test_activations_and_bounds(q_activation, v_activation, bound):
    inputs = tied_inputs(length=70, bound=bound)
    settings = {"q_activation": q_activation, "v_activation": v_activation, "scale": -1.7}
    assert_close(run(hgrn2_scan, inputs, **settings), exact(hgrn2_scan, inputs, **settings), ORDINARY_RMS)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bound", [None, 0.5])
@pytest.mark.parametrize("z", ["ordinary", "wild", -20.0, 9.0])
@pytest.mark.parametrize("min_log_decay", [-1e-3, -0.5, -3, -69.0])
def test_a_floor_under_the_decay(min_log_decay, z, bound, reverse):
    inputs = tied_inputs(1, 150, 2, 8, 8, bound=bound)
    if z != "ordinary":
        inputs["f"] = inputs["f"] * 0.1 + (spread(inputs["f"].shape, (-30.0, 0.0, 8.0)) if z == "wild" else z)
    settings = {"min_log_decay": min_log_decay, "reverse": reverse}
    wanted = exact(hgrn2_scan, inputs, **settings)
    assert_close(run(hgrn2_scan, inputs, **settings), wanted, ORDINARY_RMS if z == "ordinary" else EXTREME_RMS)
    assert_close(run(hgrn2_scan, inputs, dtype=torch.float64, **settings), wanted, FLOAT64_RMS)


def test_equal_gates_at_a_floor_near_1_keep_their_digits():
    inputs = tied_inputs(1, 8192, 1, 4, 4, bound=None)
    inputs |= {"f": torch.full_like(inputs["f"], -5.0), "v": torch.zeros_like(inputs["v"])}
    for floor in (-1e-3, -1e-5, -1e-7):
        settings = {"min_log_decay": floor, "gradients": False}
        assert_close(run(hgrn2_scan, inputs, **settings), exact(hgrn2_scan, inputs, **settings), EXTREME_RMS)


def test_a_gate_equal_to_the_floor_has_its_gradient_by_the_key():
    inputs = tied_inputs(1, 20, 1, 3, 3, bound=None, dtype=torch.float64)
    inputs["f"] = torch.zeros_like(inputs["f"])
    at, above = (run(hgrn2_scan, inputs, min_log_decay=math.log(0.5) + d) for d in (0, 1e-12))
    assert_close(at, above, 1e-9)
    assert_close(exact(hgrn2_scan, inputs, min_log_decay=math.log(0.5)), at, FLOAT64_RMS)


def test_a_floor_without_a_gradient_and_over_packed_sequences():
    inputs = tied_inputs(1, 150, cu_seqlens=[0, 0, 40, 41, 150])
    wanted = exact(hgrn2_scan, inputs, min_log_decay=-0.5)
    assert_close(run(hgrn2_scan, inputs, min_log_decay=-0.5), wanted, ORDINARY_RMS)
    with torch.no_grad():
        y, state = hgrn2_scan(**inputs, min_log_decay=-0.5)
    assert_close({"y": y, "final_state": state}, {name: wanted[name] for name in ("y", "final_state")}, ORDINARY_RMS)


@pytest.mark.parametrize("op", [hgrn2_scan, gated_scan], ids=["hgrn2_scan", "gated_scan"])
def test_without_initial_state(op):
    inputs = INPUTS[op](length=70, state=False)
    assert_close(run(op, inputs), exact(op, inputs), ORDINARY_RMS)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bound", [0.0, 0.5, 0.999, 0.9999])
@pytest.mark.parametrize("z", ["ordinary", "wild", -200.0, -88.0, -20.0, -5.0, 0.0, 5.0, 9.0, 14.0, 20.0, 80.0])
def test_extreme_tied_gates(z, bound, reverse):
    inputs = tied_inputs(1, 200, 2, 8, 8)
    inputs["lower_bound"] = torch.full((2, 8), bound)
    if z == "wild":
        inputs["f"] = 40 * inputs["f"]
    elif z != "ordinary":
        inputs["f"] = torch.full_like(inputs["f"], z)
    assert_close(run(hgrn2_scan, inputs, reverse=reverse), exact(hgrn2_scan, inputs, reverse=reverse), EXTREME_RMS)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        "log-uniform", "per channel", "wild", "seldom reset",
        0.0, -1e-6, -1e-5, -1e-4, -1e-3, -1e-2, -0.1, -1.0, -5.0, -20.0, -50.0, -87.0, -200.0, -math.inf,
    ],
)  # fmt: skip
def test_extreme_decays(kind, reverse):
    inputs = free_inputs(1, 200, 2, 8, 8)
    inputs["log_f"] = decays(kind, inputs["log_f"].shape)
    assert_close(run(gated_scan, inputs, reverse=reverse), exact(gated_scan, inputs, reverse=reverse), EXTREME_RMS)


@pytest.mark.slow
@both_operators
@pytest.mark.parametrize("reverse", [False, True])
def test_slow_decay_over_a_long_sequence(op, reverse):
    inputs = slow(INPUTS[op](1, 20_000, 1, 16, 2))
    found = run(op, inputs, gradients=False, reverse=reverse)
    assert_close(found, exact(op, inputs, gradients=False, reverse=reverse), ORDINARY_RMS)


def test_equal_gates_close_to_one_keep_their_digits_within_a_chunk():
    # products of up to 64 equal gates, each rounded the same way: 5e-6 unless their complement decides
    inputs = tied_inputs(1, 1000, 2, 16, 8, bound=None)
    inputs["f"] = torch.full_like(inputs["f"], 13.8)
    assert_close(run(hgrn2_scan, inputs), exact(hgrn2_scan, inputs), ORDINARY_RMS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("gates", ["ordinary", "slow", "fast", "wild"])
@pytest.mark.parametrize("length", [17, 64, 200])
def test_low_precision_is_honest(dtype, gates, length):
    shape = (2, length, 4, 64, 64)
    tied, free = tied_inputs(*shape, dtype=dtype), free_inputs(*shape, dtype=dtype)
    factors = {"ordinary": 1.0, "slow": 0.01, "fast": 10.0, "wild": spread(shape[:-1], (1e-4, 1.0, 30.0))}
    shifts = {"ordinary": 0.0, "slow": 5.0, "fast": -5.0, "wild": spread(shape[:-1], (-30.0, 0.0, 8.0))}
    tied["f"] = (tied["f"] + shifts[gates]).to(dtype)
    free["log_f"] = free["log_f"] * factors[gates]
    for op, honest, inputs in ((hgrn2_scan, honest_scan, tied), (gated_scan, honest_gated_scan, free)):
        found = run(op, inputs)
        assert {x.dtype for x in found.values()} == {dtype, torch.float32}
        assert_no_worse(found, run(honest, inputs), exact(op, inputs))


@pytest.mark.slow
@both_operators
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(op, packed, reverse):
    cu_seqlens = [0, 4, 4, 5, 9] if packed else None
    inputs = INPUTS[op](1 if packed else 2, 9, 1, 2, 2, dtype=torch.float64, cu_seqlens=cu_seqlens)
    if op is hgrn2_scan:
        # away from 0: finite differences must not leave the range
        inputs["lower_bound"] = inputs["lower_bound"] * 0.5 + 0.1
    names = [name for name, x in inputs.items() if x is not None and x.is_floating_point()]
    fixed = {name: x for name, x in inputs.items() if name not in names}

    def function(*leaves):
        return op(**dict(zip(names, leaves, strict=True)), **fixed, reverse=reverse, scale=0.5)

    assert torch.autograd.gradcheck(function, tuple(inputs[name].requires_grad_() for name in names))


def test_gradcheck_across_chunks():
    inputs = tied_inputs(1, 70, 1, 1, 1, dtype=torch.float64, bound=None, state=False)
    leaves = tuple(inputs[name].requires_grad_() for name in ("q", "f", "v"))
    assert torch.autograd.gradcheck(hgrn2_scan, leaves)


@both_operators
def test_same_bits_twice(op):
    inputs = INPUTS[op](3, 300, 2, 32, 16)
    assert_equal(run(op, inputs), run(op, inputs))


@both_operators
@pytest.mark.parametrize("cu_seqlens", [None, [0, 70, 70, 71, 192]], ids=["batch", "packed"])
def test_inputs_are_not_modified(op, cu_seqlens):
    # one head and whole chunks: what is read may be a view of the input
    inputs = INPUTS[op](1, 192, 1, cu_seqlens=cu_seqlens)
    copies = {name: x.clone() for name, x in inputs.items() if x is not None}
    run(op, inputs, reverse=True, scale=0.5)
    run(op, inputs)
    assert_equal({name: inputs[name] for name in copies}, copies)


@both_operators
def test_outputs_do_not_share_memory_with_inputs(op):
    # T = 0: the final state has the values of the initial one, in memory of its own
    inputs = INPUTS[op](2, 0)
    _, state = op(**inputs)
    assert torch.equal(state, inputs["initial_state"])
    assert state.data_ptr() != inputs["initial_state"].data_ptr()


@both_operators
def test_only_what_needs_a_gradient_gets_one(op):
    inputs = INPUTS[op](length=20)
    inputs["v"].requires_grad_()
    y, state = op(**inputs)
    (y.sum() + state.sum()).backward()
    wanted = INPUTS[op](length=20)
    wanted["v"].requires_grad_()
    reference, reference_state = op(**wanted, backend="reference")
    (reference.sum() + reference_state.sum()).backward()
    torch.testing.assert_close(inputs["v"].grad, wanted["v"].grad, rtol=1e-5, atol=1e-6)
    assert all(x is None or x.grad is None for name, x in inputs.items() if name != "v")
    with torch.no_grad():
        assert not op(**inputs)[0].requires_grad


# torch's own derivatives in forward mode are written in what it no longer recommends
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@both_operators
@pytest.mark.parametrize("name", ["q", "v", "initial_state"])
def test_forward_mode_is_the_reference_s(op, name):
    inputs = INPUTS[op](1, 5, 1)
    others = {key: x for key, x in inputs.items() if key != name}

    def outputs(x, backend):
        return op(**others, **{name: x}, backend=backend)

    x, tangent = inputs[name], torch.ones_like(inputs[name])
    _, (dy, _) = torch.func.jvp(lambda x: outputs(x, "reference"), (x,), (tangent,))
    assert dy.abs().max() > 0
    # torch would say zero
    with pytest.raises(NotImplementedError, match=r"'chunked' has no derivative in forward mode.*reference"):
        torch.func.jvp(lambda x: outputs(x, "auto"), (x,), (tangent,))
    with forward_ad.dual_level():
        outputs(x, "auto")
        with pytest.raises(NotImplementedError, match="forward mode"):
            outputs(forward_ad.make_dual(x, tangent), "auto")


def test_a_step_of_shapes_alone():
    q = torch.empty(2, 3, 16, device="meta")
    y, state = hgrn2_step(q, q, q, torch.empty(2, 3, 16, 16, device="meta"))
    assert y.shape == (2, 3, 16)
    assert state.shape == (2, 3, 16, 16)


@both_operators
def test_a_second_derivative_is_refused(op):
    inputs = INPUTS[op](length=5)
    inputs["q"].requires_grad_()
    y, _ = op(**inputs)
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="backend 'chunked' has no second derivative"):
        gradient.sum().backward()


@both_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_autocast_changes_nothing(op, dtype):
    inputs = INPUTS[op](2, 130, 2, 16, 16, dtype=dtype)
    wanted = run(op, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(run(op, inputs), wanted)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("op", "name"),
    [(hgrn2_scan, "q"), (hgrn2_scan, "f"), (hgrn2_scan, "v"), (gated_scan, "k")],
    ids=["q", "f", "v", "k"],
)
def test_bad_values_stay_in_their_rows_and_head(op, name, value, dtype, reverse):
    for at in (0, 20, 63, 64, 149):
        inputs = (tied_inputs if op is hgrn2_scan else free_inputs)(1, 150, 2, dtype=dtype)
        inputs[name][0, at, 1, 2] = value
        y, state = op(**inputs, reverse=reverse)
        wanted, wanted_state = op(**inputs, reverse=reverse, backend="reference")
        assert torch.equal(y.isfinite(), wanted.isfinite())
        assert torch.equal(state.isfinite(), wanted_state.isfinite())


def test_large_values_are_not_bad_ones():
    inputs = tied_inputs(1, 150, 1, state=False)
    # their sum is not finite, they are
    inputs["v"] = torch.full_like(inputs["v"], 3e37)
    exact = hgrn2_scan(**{k: None if x is None else x.double() for k, x in inputs.items()}, backend="reference")
    for found, wanted in zip(hgrn2_scan(**inputs), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e30)
