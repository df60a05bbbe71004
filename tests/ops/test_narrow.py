"""The kernels for narrow heads in Triton's interpreter, on the CPU; `test_narrow_gpu.py` compiles them."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from hgrn2.nn import HGRN2Mixer
from hgrn2.ops import gated_scan, hgrn2_scan, hgrn2_step
from hgrn2.ops.backends import find
from hgrn2.ops.backends.narrow import launch, tiles
from hgrn2.ops.call import ScanCall, ScanSettings
from tests.numerics import EXTREME_RMS, ORDINARY_RMS, assert_close, assert_equal, relative_error, run
from tests.ops import scan_cases, test_triton
from tests.ops.scan_cases import decays, spread, unchecked
from tests.ops.test_triton import turned
from tests.refusals import refuses

pytestmark = test_triton.pytestmark


def tied_inputs(batch=1, length=17, heads=2, k_width=2, v_width=3, **settings):
    return scan_cases.tied_inputs(batch, length, heads, k_width, v_width, **settings)


def free_inputs(batch=1, length=17, heads=2, k_width=2, v_width=3, **settings):
    return scan_cases.free_inputs(batch, length, heads, k_width, v_width, **settings)


INPUTS = {hgrn2_scan: tied_inputs, gated_scan: free_inputs}
both_operators = pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.__name__)
both_ways = pytest.mark.parametrize("reverse", [False, True])
# empty ones first, in the middle and last; a single token, more than a segment
CU_SEQLENS = [0, 0, 1, 67, 67, 72, 72]


def check(op, inputs, rms=ORDINARY_RMS, **settings):
    """Outputs, final state and all gradients against the float64 recurrence."""
    exact = run(op, inputs, dtype=torch.float64, backend="reference", **settings)
    found = run(op, inputs, backend="narrow", **settings)
    assert_close(found, exact, rms)
    return found


WIDTHS = [(1, 1), (2, 2), (1, 15), (3, 8), (4, 4), (4, 3), (8, 8), (8, 1), (15, 2), (15, 15), (2, 16), (16, 4)]


@pytest.mark.slow
@pytest.mark.parametrize(("k_width", "v_width"), WIDTHS)
def test_every_width(k_width, v_width):
    # three blocks of the narrowest heads and many of the widest; the operators take turns
    for op, heads in ((hgrn2_scan, 3), (gated_scan, 1)) if k_width == v_width else ((hgrn2_scan, 3),):
        check(op, INPUTS[op](1, 5, heads, k_width, v_width))


LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65)


@pytest.mark.slow
@both_operators
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(op, length):
    reverse = (LENGTHS.index(length) + (op is gated_scan)) % 2 == 1
    check(op, INPUTS[op](1, length), reverse=reverse, scale=0.3)


@pytest.mark.slow
def test_a_longer_sequence():
    check(hgrn2_scan, tied_inputs(1, 200))


@both_ways
def test_packed(reverse):
    bounds = [0, 0, 1, 6, 6, 17]
    check(hgrn2_scan, tied_inputs(cu_seqlens=bounds), reverse=reverse)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "reverse"), [(hgrn2_scan, True), (gated_scan, False)], ids=["tied", "free"])
def test_packed_over_segments(op, reverse):
    inputs = INPUTS[op](1, 72, cu_seqlens=CU_SEQLENS)
    found = check(op, inputs, reverse=reverse)
    for n, (start, stop) in enumerate(pairwise(CU_SEQLENS)):
        if start == stop:
            assert torch.equal(found["final_state"][n], inputs["initial_state"][n])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "is_whole", "reverse"),
    [(hgrn2_scan, False, False), (gated_scan, False, True), (hgrn2_scan, True, True)],
    ids=["tied-cut", "free-cut", "tied-whole"],
)
def test_sequences_in_segments_and_whole(op, is_whole, reverse, monkeypatch):
    # programs enough without a cut
    monkeypatch.setattr(tiles, "FEWEST_PROGRAMS", 1 if is_whole else 6)
    inputs = INPUTS[op](1, 70)
    call = ScanCall(inputs["q"], inputs["q"], None, inputs["v"], None, None, None, ScanSettings())
    assert launch.Launcher(call, tiles.FORWARD).is_whole == is_whole
    check(op, inputs, reverse=reverse)


@both_operators
def test_without_initial_state_and_without_sequences(op):
    check(op, INPUTS[op](2, 5, state=False))
    found = check(op, INPUTS[op](1, 0, cu_seqlens=[0]))
    assert found["final_state"].shape == (0, 2, 2, 3)
    check(op, INPUTS[op](0, 5))


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [[-100, 17], [0, 1000], [0, 17, 5], [17, 0]])
def test_boundaries_that_do_not_fit_give_numbers(bounds):
    inputs = tied_inputs(cu_seqlens=[0, 17] if len(bounds) == 2 else [0, 5, 17])
    wrong = torch.tensor(bounds, dtype=torch.int32)
    found = run(unchecked(hgrn2_scan, "narrow"), inputs | {"cu_seqlens": wrong})
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("bound", [None, 0.9])
@pytest.mark.parametrize(
    ("q_activation", "v_activation"), [("silu", "silu"), ("sigmoid", "none"), ("none", "silu"), ("none", "none")]
)
def test_activations_and_bounds(q_activation, v_activation, bound):
    inputs = tied_inputs(1, 9, bound=bound)
    check(hgrn2_scan, inputs, q_activation=q_activation, v_activation=v_activation, scale=-1.7)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [None, 0.5])
@pytest.mark.parametrize(("min_log_decay", "shift"), [(-1e-4, 8.0), (-0.5, 0.0), (-3.0, -3.0), (-69, -95.0)])
def test_a_floor_under_the_decay(min_log_decay, shift, bound):
    inputs = tied_inputs(1, 9, bound=bound)
    inputs["f"] += shift
    check(hgrn2_scan, inputs, EXTREME_RMS if shift else ORDINARY_RMS, min_log_decay=min_log_decay)


# 66 tokens: a state carried into another segment
@pytest.mark.slow
@pytest.mark.parametrize("bound", [0.0, 0.9999])
@pytest.mark.parametrize("z", ["wild", -1e4, -5.0, 9.0, 14.0, 80.0])
def test_extreme_tied_gates(z, bound):
    check_extreme(hgrn2_scan, extreme_tied(z, bound, 66 if z == "wild" and bound else 9))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["log-uniform", "per channel", "wild", 0.0, -1e-6, -1e-2, -50.0, -math.inf])
def test_extreme_decays(kind):
    inputs = free_inputs(1, 66 if kind == "wild" else 9)
    inputs["log_f"] = decays(kind, inputs["log_f"].shape)
    check_extreme(gated_scan, inputs)


@pytest.mark.parametrize("z", ["wild", 14.0])
def test_extreme_gates_of_a_short_sequence_in_reverse(z):
    check_extreme(hgrn2_scan, extreme_tied(z, 0.0, 10), reverse=True)


def extreme_tied(z, bound, length):
    inputs = tied_inputs(1, length)
    inputs["lower_bound"] = torch.full((2, 2), bound)
    inputs["f"] = spread(inputs["f"].shape, (-1e4, -30.0, 0.0, 8.0, 1e4)) if z == "wild" else inputs["f"] * 0 + z
    return inputs


def check_extreme(op, inputs, **settings):
    """As `check`, but below 1e-27 nothing is promised."""
    exact = run(op, inputs, dtype=torch.float64, backend="reference", **settings)
    found = run(op, inputs, backend="narrow", **settings)
    for name in [name for name, x in exact.items() if x.numel() and x.abs().max() < 1e-27]:
        assert found.pop(name).abs().max() < 1e-27, name
        del exact[name]
    assert_close(found, exact, EXTREME_RMS)


@pytest.mark.slow
def test_gates_close_to_one_keep_their_rate():
    # every gate loses the same share, less than one rounding of the gate; the state forgets nothing else
    inputs = tied_inputs(1, 100, 1, 2, 2, bound=None)
    inputs["f"], inputs["v"] = torch.full_like(inputs["f"], 14.3), torch.zeros_like(inputs["v"])
    _, state = hgrn2_scan(**inputs, backend="narrow")
    _, exact = hgrn2_scan(**{n: x if x is None else x.double() for n, x in inputs.items()}, backend="reference")
    lost, wanted = (1 - x.double() / inputs["initial_state"] for x in (state, exact))
    assert relative_error(lost, wanted).max < 0.02


@pytest.mark.slow
@both_ways
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("op", "name"),
    [(hgrn2_scan, "q"), (hgrn2_scan, "f"), (hgrn2_scan, "v"), (gated_scan, "k")],
    ids=["q", "f", "v", "k"],
)
def test_bad_values_stay_in_their_rows_and_head(op, name, value, reverse):
    inputs, at = INPUTS[op](1, 18), 5
    inputs[name][0, at, 1, 1] = value
    y, state = op(**inputs, reverse=reverse, backend="narrow")
    wanted, wanted_state = op(**inputs, reverse=reverse, backend="reference")
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert torch.equal(state.isfinite(), wanted_state.isfinite())


@pytest.mark.slow
@both_operators
def test_any_strides(op):
    inputs = INPUTS[op](2, 5)
    wanted = run(op, inputs, backend="narrow")
    for how in range(3):
        strided = {name: None if x is None else turned(x, how + i) for i, (name, x) in enumerate(inputs.items())}
        assert_equal(run(op, strided, backend="narrow"), wanted)


def test_one_query_for_many_heads_and_slices_of_one_projection():
    projection = torch.randn(2, 5, 3 * 4, generator=torch.Generator().manual_seed(0))
    parts = [x.unflatten(-1, (2, 2)) for x in projection.chunk(3, -1)]
    inputs = dict(zip("qfv", parts, strict=True)) | {"lower_bound": torch.full((2, 2), 0.5)}
    inputs["q"] = inputs["q"][:1, :, :1].expand(inputs["f"].shape)
    whole = {name: x.contiguous() for name, x in inputs.items()}
    assert_equal(run(hgrn2_scan, inputs, backend="narrow"), run(hgrn2_scan, whole, backend="narrow"))


def test_bfloat16_inputs_are_rounded_once():
    inputs = tied_inputs(dtype=torch.bfloat16)
    found = run(hgrn2_scan, inputs, backend="narrow")
    wanted = run(hgrn2_scan, inputs, dtype=torch.float64, backend="reference")
    low = {name for name, x in found.items() if x.dtype == torch.bfloat16}
    assert low == {"y", "d_q", "d_f", "d_v"}
    # the interpreter cuts digits off where a GPU rounds
    assert_close({n: found[n] for n in low}, {n: wanted[n] for n in low}, 5e-3)
    high = found.keys() - low
    # dy is rounded, as everywhere
    assert_close({n: found[n] for n in high}, {n: wanted[n] for n in high}, ORDINARY_RMS)


@both_operators
def test_gradients_of_expanded_and_missing_outputs(op):
    inputs = INPUTS[op](1, 5)
    for use in (lambda y, state: y.sum(), lambda y, state: state.sum()):
        grads = []
        for backend in ("narrow", "reference"):
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if x is not None}
            loss = use(*op(**leaves, backend=backend))
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
            grads.append(dict(zip(leaves, found, strict=True)))
        assert_close(grads[0], grads[1], ORDINARY_RMS)


def test_a_program_that_keeps_nothing_computes_states_again():
    inputs = tied_inputs(1, 20)
    bound, state = inputs["lower_bound"], inputs["initial_state"]
    call = ScanCall(inputs["q"], inputs["f"], None, inputs["v"], bound, state, None, ScanSettings())
    backend = find("narrow")
    call, plan = backend.plan(call, True)
    assert plan
    _, _, kept = backend.forward(call, plan)
    assert kept.shape == backend.kept_shape(call, plan) == (-(-20 // plan), 3, 2, 2)
    assert backend.forward(call, 0)[2] is None
    dy = torch.ones_like(inputs["v"])
    wanted = backend.backward(call, plan, kept, dy, None, True)
    found = backend.backward(call, 0, kept.new_empty(0), dy, None, True)
    assert_equal(*({n: x for n, x in d._asdict().items() if x is not None} for d in (found, wanted)))


def test_nothing_is_kept_without_gradients():
    inputs = tied_inputs(1, 20)
    with torch.no_grad():
        call, plan = find("narrow").plan(
            ScanCall(inputs["q"], inputs["f"], None, inputs["v"], None, None, None, ScanSettings()), False
        )
    assert plan == 0
    assert find("narrow").kept_shape(call, plan) == (0,)


def test_a_sequence_beyond_the_last_kept_state_has_room():
    # each sequence may begin and end inside a block
    inputs = tied_inputs(1, 12, cu_seqlens=[0, 1, 2, 11, 12])
    check(hgrn2_scan, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 17]], ids=["batch", "packed"])
def test_traced_whole_graph_equals_eager(bounds):
    inputs = tied_inputs(cu_seqlens=bounds)
    op = partial(hgrn2_scan, backend="narrow")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, inputs), run(op, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 9]], ids=["batch", "packed"])
def test_registered_as_torch_wants_it(bounds):
    inputs = tied_inputs(1, 9, cu_seqlens=bounds)
    leaves = {n: x.requires_grad_() if x is not None and x.is_floating_point() else x for n, x in inputs.items()}
    call = ScanCall(
        leaves["q"], leaves["f"], None, leaves["v"], leaves["lower_bound"], leaves["initial_state"],
        leaves["cu_seqlens"], ScanSettings(q_activation="silu"),
    )  # fmt: skip
    _, plan = find("narrow").plan(call, True)
    torch.library.opcheck(torch.ops.hgrn2.scan.default, ("narrow", plan, *call.flat()))
    with torch.no_grad():
        _, _, kept = torch.ops.hgrn2.scan("narrow", 0, *call.flat())
        assert not kept.numel()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_equals_a_loop():
    inputs = tied_inputs(1, 5, bound=None, state=False)
    pairs = [torch.stack([inputs[name], inputs[name] * 0.5]) for name in "qfv"]
    op = partial(hgrn2_scan, backend="narrow")
    found = torch.vmap(op)(*pairs)
    wanted = [torch.stack(parts) for parts in zip(*(op(*(x[i] for x in pairs)) for i in range(2)), strict=True)]
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["bidirectional", "2d"])
def test_a_mixer_that_reads_in_several_directions(direction):
    torch.manual_seed(0)
    layers = [
        HGRN2Mixer(8, expand_ratio=2, direction=direction, backend=backend) for backend in ("narrow", "reference")
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].double()
    x, bound = torch.randn(2, 12, 8), torch.full((8,), 0.3)
    grid = (3, 4) if direction == "2d" else None
    results = []
    for layer, dtype in zip(layers, (torch.float32, torch.float64), strict=True):
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = layer(leaf, bound.to(dtype), grid=grid)[0]
        y.square().sum().backward()
        grads = {f"d_{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "d_x": leaf.grad} | grads)
    assert_close(results[0], results[1], 1e-5)


def test_what_it_does_not_take():
    inputs = tied_inputs()
    with refuses("unsupported", "'narrow'", 17, 3):
        hgrn2_scan(**tied_inputs(1, 3, 1, 17, 3), backend="narrow")
    with refuses("unsupported", "'narrow'", "float64"):
        hgrn2_scan(**{n: x if x is None else x.double() for n, x in inputs.items()}, backend="narrow")
    # a step is that of plain torch
    q, f, v = (inputs[name][:, 0] for name in "qfv")
    found = hgrn2_step(q, f, v, inputs["initial_state"], inputs["lower_bound"], backend="narrow")
    wanted = hgrn2_step(q, f, v, inputs["initial_state"], inputs["lower_bound"], backend="chunked")
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_tiles_fill_a_warp():
    for table in (tiles.FORWARD, tiles.BACKWARD):
        for k_width in range(1, tiles.WIDEST + 1):
            for v_width in range(1, tiles.WIDEST + 1):
                blocks = tiles.blocks_for(table, k_width, v_width)
                # with fewer numbers than lanes, tokens would lie in several lanes
                assert blocks.heads * blocks.k * blocks.v >= tiles.LANES
                assert tiles.SEGMENT_STEP % blocks.tokens == 0
                assert k_width <= blocks.k < 2 * k_width
                assert v_width <= blocks.v < 2 * v_width


def test_segments_fill_the_chip():
    assert tiles.segment_size(64, 1024, 16, False, 100) == 1024
    # one long sequence is cut; packed ones always are
    assert tiles.segment_size(1, 65536, 1, False, 132) == 64
    assert tiles.segment_size(4, 4096, 16, False, 132) == 192
    assert tiles.segment_size(1, 4096, 4096, True, 132) == 4096
    assert tiles.segment_size(0, 0, 1, False, 132) == 64
