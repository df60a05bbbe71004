"""The Triton kernels in Triton's interpreter, on the CPU: the same numbers, slowly. `test_gpu.py` compiles them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import platform
from itertools import pairwise

import pytest
import torch

from hgrn2.ops import gated_scan, hgrn2_scan, hgrn2_step
from hgrn2.ops.call import ScanCall, ScanSettings
from hgrn2.ops.triton import installed
from tests.numerics import EXTREME_RMS, ORDINARY_RMS, assert_close, assert_equal, run
from tests.ops import scan_cases
from tests.ops.scan_cases import decays, spread, unchecked
from tests.refusals import refuses


def interpreter_problem() -> str | None:
    """Why the kernels cannot be interpreted here."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "Triton's wheels are for Linux on x86_64"
    if not installed.IS_INTERPRETED:
        return "TRITON_INTERPRET is not 1: with a GPU here test_gpu.py runs the kernels themselves"
    if installed.PROBLEM is not None:
        return installed.PROBLEM
    if importlib.util.find_spec("numpy") is None:
        return "Triton's interpreter needs NumPy"
    triton, numpy = (
        tuple(int(part) for part in importlib.metadata.version(name).split("+")[0].split(".")[:2])
        for name in ("triton", "numpy")
    )
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of Triton 3.6 does not run with NumPy 2.4"
    return None


PROBLEM = interpreter_problem()
pytestmark = [
    pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM)),
    # the interpreter is NumPy, which speaks of every infinity
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


# the narrowest head the kernels take, and one that does not fill its blocks
def tied_inputs(batch=2, length=100, heads=2, k_width=16, v_width=20, **settings):
    return scan_cases.tied_inputs(batch, length, heads, k_width, v_width, **settings)


def free_inputs(batch=2, length=100, heads=2, k_width=16, v_width=20, **settings):
    return scan_cases.free_inputs(batch, length, heads, k_width, v_width, **settings)


INPUTS = {hgrn2_scan: tied_inputs, gated_scan: free_inputs}
both_operators = pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.__name__)
# empty ones first, in the middle and last; single tokens, a whole chunk, more than a chunk
CU_SEQLENS = [0, 0, 1, 65, 65, 135, 140, 140]
BY_TOKEN = ("q", "f", "k", "v", "log_f")


def check(op, inputs, rms=ORDINARY_RMS, **settings):
    """Outputs, final state and all gradients against the float64 recurrence."""
    exact = run(op, inputs, dtype=torch.float64, backend="reference", **settings)
    found = run(op, inputs, backend="triton", **settings)
    assert_close(found, exact, rms)
    return found


# one chunk of each size, whole and not, and several of them
@pytest.mark.slow
@both_operators
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 63, 64, 65, 130])
def test_every_length(op, length, reverse):
    check(op, INPUTS[op](1, length, 1), reverse=reverse, scale=0.3)


@pytest.mark.slow
@both_operators
@pytest.mark.parametrize(
    ("batch", "heads", "k_width", "v_width"),
    [(2, 2, 16, 16), (1, 1, 17, 20), (1, 1, 32, 48), (1, 1, 70, 16), (1, 1, 16, 300), (0, 2, 16, 17)],
)
def test_every_width(op, batch, heads, k_width, v_width):
    check(op, INPUTS[op](batch, 10, heads, k_width, v_width))


@pytest.mark.slow
@both_operators
def test_heads_in_groups(op, monkeypatch):
    from hgrn2.ops.backends.triton import launch

    inputs = INPUTS[op](1, 10, 3)
    whole = run(op, inputs, backend="triton")
    # room for the chunk states of two heads: three heads are two groups
    monkeypatch.setattr(launch, "STATE_BYTES", 2 * 16 * 20 * 4)
    assert_equal(run(op, inputs, backend="triton"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [None, 0.5])
@pytest.mark.parametrize(("min_log_decay", "shift"), [(-1e-4, 8.0), (-0.5, 0.0), (-3.0, -3.0), (-69, -95.0)])
def test_a_floor_under_the_decay(min_log_decay, shift, bound):
    inputs = tied_inputs(1, 80, 1, bound=bound)
    inputs["f"] += shift
    check(hgrn2_scan, inputs, EXTREME_RMS if shift else ORDINARY_RMS, min_log_decay=min_log_decay)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [None, 0.9])
@pytest.mark.parametrize("v_activation", ["none", "silu"])
@pytest.mark.parametrize("q_activation", ["silu", "sigmoid", "none"])
def test_activations_and_bounds(q_activation, v_activation, bound):
    inputs = tied_inputs(1, 17, 1, bound=bound)
    check(hgrn2_scan, inputs, q_activation=q_activation, v_activation=v_activation, scale=-1.7)


@pytest.mark.slow
@both_operators
@pytest.mark.parametrize("reverse", [False, True])
def test_packed(op, reverse):
    inputs = INPUTS[op](1, 140, 1, cu_seqlens=CU_SEQLENS)
    found = check(op, inputs, reverse=reverse)
    for n, (start, stop) in enumerate(pairwise(CU_SEQLENS)):
        if start == stop:
            assert torch.equal(found["final_state"][n], inputs["initial_state"][n])


@pytest.mark.slow
@both_operators
def test_without_initial_state(op):
    check(op, INPUTS[op](2, 20, 1, state=False))
    packed = INPUTS[op](1, 140, 1, cu_seqlens=CU_SEQLENS, state=False)
    check(op, packed | {"cu_seqlens": packed["cu_seqlens"].long()})


@both_operators
def test_no_packed_sequence(op):
    found = check(op, INPUTS[op](1, 0, cu_seqlens=[0]))
    assert found["final_state"].shape == (0, 2, 16, 20)


@pytest.mark.slow
@both_operators
@pytest.mark.parametrize("bounds", [[-100, 40], [0, 1000], [0, 100, 20], [40, 0]])
def test_boundaries_that_do_not_fit_give_numbers(op, bounds):
    inputs = INPUTS[op](1, 40, 1, cu_seqlens=[0, 40] if len(bounds) == 2 else [0, 20, 40])
    wrong = torch.tensor(bounds, dtype=torch.int32)
    found = run(unchecked(op, "triton"), inputs | {"cu_seqlens": wrong})
    assert all(x.isfinite().all() for x in found.values())


def test_packed_bounds_of_any_stride():
    inputs = tied_inputs(1, 40, 1, cu_seqlens=[0, 10, 20, 40])
    strided = torch.stack((inputs["cu_seqlens"], torch.zeros(4, dtype=torch.int32)), 1)[:, 0]
    check(hgrn2_scan, inputs | {"cu_seqlens": strided})


@pytest.mark.slow
def test_slices_of_one_projection():
    heads, width = 2, 16
    projection = torch.randn(2, 10, 3 * heads * width, generator=torch.Generator().manual_seed(0))
    parts = [x.unflatten(-1, (heads, width)) for x in projection.chunk(3, -1)]
    assert not any(x.is_contiguous() for x in parts)
    inputs = dict(zip("qfv", parts, strict=True)) | {"lower_bound": torch.full((heads, width), 0.5)}
    whole = {name: x.contiguous() for name, x in inputs.items()}
    assert_equal(run(hgrn2_scan, inputs, backend="triton"), run(hgrn2_scan, whole, backend="triton"))


def turned(x: torch.Tensor, how: int) -> torch.Tensor:
    """Return the same values with other strides."""
    # the last axis outermost, every second element of a wider one, the first two axes exchanged
    return (
        x.movedim(-1, 0).contiguous().movedim(0, -1),
        torch.stack((x, x), -1).flatten(-2)[..., ::2],
        x.transpose(0, 1).contiguous().transpose(0, 1),
    )[how % 3]


@pytest.mark.slow
@both_operators
def test_any_strides(op):
    inputs = INPUTS[op](2, 5)
    wanted = run(op, inputs, backend="triton")
    for how in range(3):
        strided = {name: None if x is None else turned(x, how + i) for i, (name, x) in enumerate(inputs.items())}
        assert all(x is None or torch.equal(strided[name], x) for name, x in inputs.items())
        assert_equal(run(op, strided, backend="triton"), wanted)


@pytest.mark.slow
def test_one_tensor_for_many_heads():
    # stride 0 along heads and batch
    inputs = tied_inputs(2, 5)
    inputs["q"] = inputs["q"][:1, :, :1].expand(inputs["q"].shape)
    whole = inputs | {"q": inputs["q"].contiguous()}
    assert_equal(run(hgrn2_scan, inputs, backend="triton"), run(hgrn2_scan, whole, backend="triton"))


@pytest.mark.slow
@both_operators
def test_gradients_of_expanded_and_missing_outputs(op):
    inputs = INPUTS[op](1, 20)
    for use in (lambda y, state: y.sum(), lambda y, state: state.sum()):
        grads = []
        for backend in ("triton", "reference"):
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if x is not None}
            loss = use(*op(**leaves, backend=backend))
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
            grads.append(dict(zip(leaves, found, strict=True)))
        assert_close(grads[0], grads[1], ORDINARY_RMS)


@pytest.mark.slow
@both_operators
@pytest.mark.parametrize("reverse", [False, True])
def test_split_in_the_middle_of_a_chunk(op, reverse):
    inputs = INPUTS[op](1, 70, 1)

    def in_two(initial_state, **inputs):
        state, outputs = initial_state, []
        for rows in (slice(20, 70), slice(20)) if reverse else (slice(20), slice(20, 70)):
            part = {name: x[:, rows] if name in BY_TOKEN else x for name, x in inputs.items()}
            y, state = op(**part, initial_state=state, reverse=reverse, backend="triton")
            outputs.append(y)
        return torch.cat(outputs[::-1] if reverse else outputs, 1), state

    # gradients flow through the carried state
    assert_close(run(in_two, inputs), run(op, inputs, reverse=reverse, backend="triton"), ORDINARY_RMS)


# 66 tokens: a whole chunk and the state carried into another
@pytest.mark.slow
@pytest.mark.parametrize("bound", [0.0, 0.9999])
@pytest.mark.parametrize("z", ["wild", -1e4, -80.0, -5.0, 9.0, 14.0, 80.0, 1e4])
def test_extreme_tied_gates(z, bound):
    inputs = tied_inputs(1, 66, 1, 16, 16)
    inputs["lower_bound"] = torch.full((1, 16), bound)
    inputs["f"] = spread(inputs["f"].shape, (-1e4, -30.0, 0.0, 8.0, 1e4)) if z == "wild" else inputs["f"] * 0 + z
    check_extreme(hgrn2_scan, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["log-uniform", "per channel", "wild", 0.0, -1e-6, -1e-4, -1e-2, -1.0, -50.0, -math.inf],
)
def test_extreme_decays(kind):
    inputs = free_inputs(1, 66, 1, 16, 16)
    inputs["log_f"] = decays(kind, inputs["log_f"].shape)
    check_extreme(gated_scan, inputs)


@pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.__name__)
def test_extreme_gates_in_reverse(op):
    inputs = INPUTS[op](1, 66, 1, 16, 16)
    if op is hgrn2_scan:
        inputs["f"] = spread(inputs["f"].shape, (-1e4, -30.0, 0.0, 8.0, 1e4))
    else:
        inputs["log_f"] = decays("wild", inputs["log_f"].shape)
    check_extreme(op, inputs, reverse=True)


def check_extreme(op, inputs, **settings):
    """As `check`, but below 1e-27 nothing is promised of tied gates: a decay below 1e-30 counts as that."""
    if op is gated_scan:
        check(op, inputs, EXTREME_RMS, **settings)
        return
    exact = run(op, inputs, dtype=torch.float64, backend="reference", **settings)
    found = run(op, inputs, backend="triton", **settings)
    for name, x in exact.items():
        if x.abs().max() < 1e-27:
            assert found.pop(name).abs().max() < 1e-27, name
            exact = {key: value for key, value in exact.items() if key != name}
    assert_close(found, exact, EXTREME_RMS)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("op", "name"),
    [(hgrn2_scan, "q"), (hgrn2_scan, "f"), (hgrn2_scan, "v"), (gated_scan, "k")],
    ids=["q", "f", "v", "k"],
)
def test_bad_values_stay_in_their_rows_and_head(op, name, value, reverse):
    inputs, at = INPUTS[op](1, 70, 2), 20
    inputs[name][0, at, 1, 2] = value
    y, state = op(**inputs, reverse=reverse, backend="triton")
    wanted, wanted_state = op(**inputs, reverse=reverse, backend="reference")
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert torch.equal(state.isfinite(), wanted_state.isfinite())
    rows = torch.arange(70)
    untouched = rows > at if reverse else rows < at
    assert y[:, untouched].isfinite().all()
    assert y[:, :, 0].isfinite().all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("at", [0, 63, 64, 69])
def test_bad_values_at_the_edges_of_chunks(at, reverse):
    inputs = tied_inputs(1, 70, 1)
    inputs["v"][0, at, 0, 1] = math.nan
    y, state = hgrn2_scan(**inputs, reverse=reverse, backend="triton")
    wanted, _ = hgrn2_scan(**inputs, reverse=reverse, backend="reference")
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert state[..., 1].isnan().all()


@pytest.mark.slow
@both_operators
@pytest.mark.parametrize("reverse", [False, True])
def test_bad_values_stay_in_their_sequence(op, reverse):
    inputs = INPUTS[op](1, 140, 1, cu_seqlens=CU_SEQLENS)
    # the one token of the second sequence, and a row in the middle of the fifth
    inputs["v"][:, 0] = math.nan
    inputs["q" if op is hgrn2_scan else "k"][:, 100] = math.nan
    y, state = op(**inputs, reverse=reverse, backend="triton")
    wanted, wanted_state = op(**inputs, reverse=reverse, backend="reference")
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert torch.equal(state.isfinite(), wanted_state.isfinite())


def step_inputs(batch=3, heads=2, k_width=16, v_width=20, bound=0.9):
    inputs = tied_inputs(batch, 1, heads, k_width, v_width, bound=bound)
    return {name: inputs[name][:, 0] for name in "qfv"} | {
        "state": inputs["initial_state"],
        "lower_bound": inputs["lower_bound"],
    }


def exact_step(inputs, **settings):
    return run(hgrn2_step, inputs, dtype=torch.float64, backend="reference", **settings)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [None, 0.9])
@pytest.mark.parametrize(
    ("batch", "heads", "k_width", "v_width"),
    [(3, 2, 16, 20), (1, 1, 17, 20), (2, 1, 32, 48), (1, 1, 16, 16), (0, 2, 16, 20)],
)
def test_step(batch, heads, k_width, v_width, bound):
    inputs = step_inputs(batch, heads, k_width, v_width, bound)
    settings = {"scale": 0.7, "q_activation": "sigmoid", "v_activation": "silu"}
    exact = exact_step(inputs, **settings)
    before = inputs["state"].clone()
    # with gradients it is a scan of one token, without a kernel of its own
    assert_close(run(hgrn2_step, inputs, backend="triton", **settings), exact, ORDINARY_RMS)
    found = run(hgrn2_step, inputs, backend="triton", gradients=False, **settings)
    assert_close(found, {name: exact[name] for name in found}, ORDINARY_RMS)
    assert torch.equal(inputs["state"], before)
    with torch.no_grad():
        y, state = hgrn2_step(**inputs, backend="triton", inplace=True, **settings)
    assert state is inputs["state"]
    assert_equal({"y": y, "final_state": state}, found)


def test_step_of_any_strides():
    inputs = step_inputs(2, 2, 16, 16)
    wanted = run(hgrn2_step, inputs, backend="triton", gradients=False)
    other = {name: x.mT.contiguous().mT for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in other.values())
    assert_equal(run(hgrn2_step, other, backend="triton", gradients=False), wanted)
    with torch.no_grad():
        y, state = hgrn2_step(**other, backend="triton", inplace=True)
    assert state is other["state"]
    assert_equal({"y": y, "final_state": state}, wanted)


@pytest.mark.parametrize("z", [-1e4, -20.0, 0.0, 14.0, 1e4])
def test_step_at_extreme_gates(z):
    inputs = step_inputs(1, 1, 16, 16)
    inputs["f"] = torch.full_like(inputs["f"], z)
    for bound in (0.0, 0.9999):
        inputs["lower_bound"] = torch.full((1, 16), bound)
        exact = exact_step(inputs, gradients=False)
        assert_close(run(hgrn2_step, inputs, backend="triton", gradients=False), exact, EXTREME_RMS)


def test_steps_are_the_scan():
    inputs = tied_inputs(2, 20)
    y, end = hgrn2_scan(**inputs, backend="triton")
    state, rows = inputs["initial_state"], []
    for t in range(20):
        now = (inputs[name][:, t] for name in "qfv")
        row, state = hgrn2_step(*now, state, inputs["lower_bound"], backend="triton")
        rows.append(row)
    assert_close({"y": torch.stack(rows, 1), "end": state}, {"y": y, "end": end}, ORDINARY_RMS)


def test_a_step_in_place_records_no_gradient():
    inputs = step_inputs()
    inputs["q"].requires_grad_()
    with refuses("contradiction", "state"):
        hgrn2_step(**inputs, backend="triton", inplace=True)


@both_operators
def test_inputs_are_not_modified(op):
    inputs = INPUTS[op](1, 66, 1, cu_seqlens=[0, 30, 66])
    copies = {name: x.clone() for name, x in inputs.items() if x is not None}
    run(op, inputs, backend="triton", reverse=True, scale=0.5)
    assert_equal({name: inputs[name] for name in copies}, copies)
    # without a token the final state has the values of the initial one, in memory of its own
    empty = INPUTS[op](2, 0)
    _, state = op(**empty, backend="triton")
    assert torch.equal(state, empty["initial_state"])
    assert state.data_ptr() != empty["initial_state"].data_ptr()


@both_operators
def test_a_second_derivative_is_refused(op):
    inputs = INPUTS[op](1, 5, 1)
    inputs["q"].requires_grad_()
    y, _ = op(**inputs, backend="triton")
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="backend 'triton' has no second derivative"):
        gradient.sum().backward()


@both_operators
def test_autocast_and_inference_mode_change_nothing(op):
    inputs = INPUTS[op](1, 20, 1)
    wanted = run(op, inputs, backend="triton")
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(run(op, inputs, backend="triton"), wanted)
    with torch.inference_mode():
        assert torch.equal(op(**inputs, backend="triton")[0], wanted["y"])


def operator_call(op, packed: bool, state: bool) -> ScanCall:
    inputs = INPUTS[op](1, 5, 1, cu_seqlens=[0, 3, 3, 5] if packed else None, state=state)
    if state:
        # dense, in another order
        inputs["initial_state"] = inputs["initial_state"].mT.contiguous().mT
    if op is hgrn2_scan:
        tensors = (inputs["q"], inputs["f"], None, inputs["v"], inputs["lower_bound"].mT.contiguous().mT)
    else:
        tensors = (inputs["q"], inputs["log_f"], inputs["k"], inputs["v"], None)
    settings = ("silu", "silu", -0.5 if packed else None) if op is hgrn2_scan else ("none", "none", None)
    return ScanCall(*tensors, inputs["initial_state"], inputs["cu_seqlens"], ScanSettings(packed, 0.5, *settings))


@pytest.mark.slow
@both_operators
@pytest.mark.parametrize(("packed", "state"), [(False, False), (True, True)], ids=["batch", "packed with states"])
def test_opcheck(op, packed, state):
    call = operator_call(op, packed, state)
    # opcheck compares every element of every output, so nothing may be left unwritten
    torch.use_deterministic_algorithms(False)
    leaves = (x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in call[:-1])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    arguments = ("triton", 0, *ScanCall(*leaves, call.settings).flat())
    torch.library.opcheck(torch.ops.hgrn2.scan.default, arguments, test_utils=checks)
    y, final_state, kept = torch.ops.hgrn2.scan("triton", 0, *call.flat())
    dy = torch.randn_like(y).transpose(1, 2).contiguous().transpose(1, 2)
    d_state = torch.randn_like(final_state).mT.contiguous().mT
    torch.library.opcheck(
        torch.ops.hgrn2.scan_backward.default,
        ("triton", 0, dy, d_state, kept, True, *call.flat()),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("op", ["step", "step_in_place"])
@pytest.mark.parametrize("dense", [False, True], ids=["turned", "dense"])
def test_opcheck_of_steps(op, dense):
    inputs = step_inputs(2, 2, 16, 17)
    state = inputs["state"] if dense else inputs["state"].mT.contiguous().mT
    torch.use_deterministic_algorithms(False)
    settings = ScanSettings(scale=0.5, q_activation="silu")
    call = ScanCall(inputs["q"], inputs["f"], None, inputs["v"], inputs["lower_bound"], state, None, settings)
    torch.library.opcheck(
        getattr(torch.ops.hgrn2, op).default,
        ("triton", *call.flat()),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


@pytest.mark.slow
@both_operators
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_traced_whole_graph_equals_eager(op, packed):
    def function(q, initial_state, **inputs):
        y, state = op(q=2 * q, initial_state=initial_state.sin(), backend="triton", **inputs)
        return y * 0.5 + 1, state.cos()

    inputs = INPUTS[op](1, 5, 1, cu_seqlens=[0, 3, 3, 5] if packed else None)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, inputs), run(function, inputs), 1e-7)
    torch.compiler.reset()


@pytest.mark.slow
def test_traced_gradient_of_a_step():
    inputs = step_inputs()

    def function(**inputs):
        return hgrn2_step(backend="triton", **inputs)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = run(compiled, inputs)
    torch.compiler.reset()
    assert_close(found, run(function, inputs), 1e-7)


def test_traced_step_in_place():
    inputs = step_inputs()

    def function(state, **inputs):
        y, state = hgrn2_step(state=state, inplace=True, backend="triton", **inputs)
        return y + 1, state

    wanted, found = inputs["state"].clone(), inputs["state"].clone()
    torch.compiler.reset()
    with torch.no_grad():
        y, _ = function(**inputs | {"state": wanted})
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        compiled_y, _ = compiled(**inputs | {"state": found})
    torch.compiler.reset()
    assert torch.equal(compiled_y, y)
    assert torch.equal(found, wanted)


def test_block_sizes_come_from_the_table(tmp_path, monkeypatch):
    from hgrn2.ops.backends.triton import blocks
    from hgrn2.ops.backends.triton.blocks import Block, Blocks, blocks_for

    measured = Blocks(64, Block(16, 32, 4, 1), Block(32, 16, 8, 1), Block(16, 16, 4, 2))
    table = {"cpu": {blocks.key(torch.float16, 20, 128): dataclasses.asdict(measured)}}
    (tmp_path / "blocks.json").write_text(json.dumps(table))
    monkeypatch.setattr(blocks, "TABLE", tmp_path / "blocks.json")
    blocks._measured.cache_clear()
    try:
        cpu = torch.device("cpu")
        # bfloat16 has float16's sizes, and 20 channels those of 32
        assert blocks_for(cpu, torch.bfloat16, 1000, 32, 128) == measured
        assert blocks_for(cpu, torch.bfloat16, 5, 32, 128).chunk == 16
        for dtype, width in ((torch.float32, 32), (torch.bfloat16, 64)):
            assert blocks_for(cpu, dtype, 1000, width, 128).chunk == blocks.LOW.chunk != measured.chunk
        default = blocks.LOW.gradient
        assert blocks_for(cpu, torch.bfloat16, 1000, 16, 16).gradient == Block(16, 16, default.warps, default.stages)
    finally:
        blocks._measured.cache_clear()
