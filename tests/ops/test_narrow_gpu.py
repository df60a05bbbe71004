"""The kernels for narrow heads compiled: every dtype, width and way to call them, and the sizes of Long Range Arena."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from hgrn2.nn import HGRN2Mixer
from hgrn2.ops import gated_scan, hgrn2_scan, resolve_backend
from hgrn2.ops.backends import base
from tests.numerics import EXTREME_RMS, assert_close, assert_equal, assert_no_worse, relative_error, run
from tests.ops.scan_cases import decays, free_inputs, honest, slow, spread, tied_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch calls its search for hidden waits a prototype
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
]

INPUTS = {hgrn2_scan: tied_inputs, gated_scan: free_inputs}
both_operators = pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.__name__)
both_ways = pytest.mark.parametrize("reverse", [False, True])
LOW = (torch.bfloat16, torch.float16)
RMS = 2e-6
CU_SEQLENS = [0, 0, 1, 65, 65, 65, 129, 135, 1000, 1000]


@pytest.fixture
def plain_memory(hostile_memory):
    """Inductor has no kernel to fill what it allocates."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(False)


def on_gpu(inputs):
    return {name: x.cuda() if torch.is_tensor(x) else x for name, x in inputs.items()}


@pytest.fixture(autouse=True)
def narrow_in_auto():
    """Let "auto" take the kernels, which it leaves out until they have run on a GPU."""
    before = base.auto_order()
    base.set_auto_order("cuda", "triton", "narrow", "chunked")
    yield
    base.set_auto_order(*before)


def check(op, inputs, rms=RMS, oracle="reference", **settings):
    """Compare with the oracle in float64, and "auto" with a second run, to the last bit."""
    exact = run(op, inputs, dtype=torch.float64, backend=oracle, **settings)
    found = run(op, inputs, backend="narrow", **settings)
    assert_close(found, exact, rms)
    assert_equal(run(op, inputs, **settings), found)


def test_auto_takes_them():
    for width in (1, 2, 4, 8, 15):
        for dtype in (torch.float32, *LOW):
            assert resolve_backend("auto", torch.device("cuda"), dtype, width, width) == "narrow"


@both_operators
@pytest.mark.parametrize(
    ("k_width", "v_width"),
    [(1, 1), (2, 2), (3, 3), (4, 4), (8, 8), (15, 15), (1, 16), (16, 1), (8, 3), (4, 15)],
)
def test_every_width(op, k_width, v_width):
    # a block of heads that is not full, and several blocks
    for heads in (5, 70):
        check(op, on_gpu(INPUTS[op](2, 70, heads, k_width, v_width)))


@both_operators
@both_ways
def test_every_length(op, reverse):
    for length in (0, 1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 200, 1000):
        check(op, on_gpu(INPUTS[op](2, length, 3, 2, 2)), reverse=reverse, scale=0.3)


@both_operators
@both_ways
@pytest.mark.parametrize("state", [True, False])
def test_packed(op, reverse, state):
    check(op, on_gpu(INPUTS[op](1, 1000, 3, 4, 8, cu_seqlens=CU_SEQLENS, state=state)), reverse=reverse)


@both_operators
@pytest.mark.parametrize(("k_width", "v_width"), [(2, 2), (8, 8), (15, 4)])
@pytest.mark.parametrize("dtype", LOW, ids=["bf16", "fp16"])
def test_low_precision_is_honest(op, dtype, k_width, v_width):
    reverse = dtype == torch.float16
    inputs = on_gpu(INPUTS[op](2, 300, 5, k_width, v_width, dtype=dtype))
    exact = run(op, inputs, dtype=torch.float64, backend="reference", reverse=reverse)
    assert_no_worse(run(op, inputs, reverse=reverse), honest(op, inputs, reverse), exact)


# programs enough for whole sequences, and sequences that are cut
@pytest.mark.parametrize(("batch", "heads", "width"), [(64, 256, 2), (128, 16, 8), (2, 3, 8), (1, 1, 1)])
@both_ways
def test_whole_sequences_and_segments(batch, heads, width, reverse):
    inputs = on_gpu(tied_inputs(batch, 513, heads, width, width))
    check(hgrn2_scan, inputs, oracle="chunked", reverse=reverse)


# sizes of Long Range Arena
@pytest.mark.parametrize(
    ("batch", "length", "heads", "width"),
    [(64, 1024, 256, 2), (128, 2048, 16, 8), (32, 4096, 16, 8), (16, 16384, 32, 1)],
)
@both_ways
def test_large_shapes(batch, length, heads, width, reverse):
    generator = torch.Generator("cuda").manual_seed(0)
    q, f, v, dy = (
        torch.randn(batch, length, heads, width, device="cuda", generator=generator).bfloat16() for _ in range(4)
    )
    bound = torch.full((heads, width), 0.5, device="cuda")
    leaves = [x.requires_grad_() for x in (q, f, v)]
    y, _ = hgrn2_scan(*leaves, bound, reverse=reverse)
    found = (y.detach(), *torch.autograd.grad(y, leaves, dy))
    # one sequence's first and last heads, in float64
    for heads_of in (slice(2), slice(heads - 2, heads)):
        part = [x[-1:, :, heads_of].detach().double().requires_grad_() for x in (q, f, v)]
        exact, _ = hgrn2_scan(*part, bound[heads_of].double(), reverse=reverse, backend="chunked")
        wanted = (exact.detach(), *torch.autograd.grad(exact, part, dy[-1:, :, heads_of].double()))
        for one, two in zip(found, wanted, strict=True):
            assert relative_error(one[-1:, :, heads_of], two).rms < 3e-3


@both_ways
@pytest.mark.parametrize("bound", [0.0, 0.9999])
def test_extreme_tied_gates(bound, reverse):
    for z in ("wild", -1e4, -88.0, -20.0, -5.0, 0.0, 9.0, 14.0, 20.0, 80.0, 1e4):
        inputs = tied_inputs(1, 200, 2, 4, 4)
        inputs["lower_bound"] = torch.full((2, 4), bound)
        inputs["f"] = spread(inputs["f"].shape, (-1e4, -30.0, 0.0, 8.0, 1e4)) if z == "wild" else inputs["f"] * 0 + z
        check_extreme(hgrn2_scan, on_gpu(inputs), reverse=reverse)


@both_ways
def test_extreme_decays(reverse):
    for kind in ("log-uniform", "per channel", "wild", "seldom reset", 0.0, -1e-6, -1e-2, -1.0, -50.0, -math.inf):
        inputs = free_inputs(1, 200, 2, 4, 4)
        inputs["log_f"] = decays(kind, inputs["log_f"].shape)
        check_extreme(gated_scan, on_gpu(inputs), reverse=reverse)


def check_extreme(op, inputs, **settings):
    exact = run(op, inputs, dtype=torch.float64, backend="reference", **settings)
    found = run(op, inputs, **settings)
    for name in [name for name, x in exact.items() if x.abs().max() < 1e-27]:
        assert found.pop(name).abs().max() < 1e-27, name
        del exact[name]
    assert_close(found, exact, EXTREME_RMS)


@both_operators
def test_slow_decay_over_a_long_sequence(op):
    inputs = on_gpu(slow(INPUTS[op](1, 20_000, 1, 16, 16)))
    narrow = {
        name: x[..., :8, :8] if name == "initial_state" else x if x is None or x.dim() < 2 else x[..., :8]
        for name, x in inputs.items()
    }
    exact = run(op, narrow, dtype=torch.float64, backend="chunked", gradients=False)
    assert_close(run(op, narrow, gradients=False), exact, 5e-6)


@pytest.mark.parametrize(("min_log_decay", "shift"), [(-1e-4, 8.0), (-0.5, 0.0), (-3.0, -3.0)])
def test_a_floor_under_the_decay(min_log_decay, shift):
    inputs = on_gpu(tied_inputs(1, 200, 3, 4, 4))
    inputs["f"] += shift
    check(hgrn2_scan, inputs, EXTREME_RMS, min_log_decay=min_log_decay, q_activation="sigmoid", v_activation="silu")


@pytest.mark.parametrize("bounds", [[0, 1000], [-100, 200], [0, 300, 100], [0, 50, 200], [200, 0]])
def test_boundaries_that_do_not_fit_touch_no_other_memory(bounds):
    inputs = on_gpu(tied_inputs(1, 200, 3, 4, 4, cu_seqlens=bounds))
    found = run(hgrn2_scan, inputs)
    torch.cuda.synchronize()
    assert all(x.isfinite().all() for x in found.values())


@both_ways
@pytest.mark.parametrize(("op", "name"), [(hgrn2_scan, "q"), (hgrn2_scan, "f"), (hgrn2_scan, "v"), (gated_scan, "k")])
def test_bad_values_stay_in_their_rows_and_head(op, name, reverse):
    inputs = on_gpu(INPUTS[op](2, 200, 3, 4, 4))
    for value in (float("nan"), float("inf")):
        for at in (0, 63, 64, 100, 199):
            bad = inputs | {name: inputs[name].clone()}
            bad[name][1, at, 1, 2] = value
            y, state = op(**bad, reverse=reverse)
            wanted, wanted_state = op(**bad, reverse=reverse, backend="reference")
            assert torch.equal(y.isfinite(), wanted.isfinite()), (value, at)
            assert torch.equal(state.isfinite(), wanted_state.isfinite()), (value, at)


@both_operators
def test_any_strides(op):
    inputs = on_gpu(INPUTS[op](2, 100, 6, 4, 4))
    wanted = run(op, inputs)
    for how in range(3):
        strided = {
            name: None
            if x is None
            else (
                x.movedim(-1, 0).contiguous().movedim(0, -1),
                torch.stack((x, x), -1).flatten(-2)[..., ::2],
                x.transpose(0, 1).contiguous().transpose(0, 1),
            )[(how + i) % 3]
            for i, (name, x) in enumerate(inputs.items())
        }
        # other strides are other code, which may fuse other products
        assert_close(run(op, strided), wanted, 1e-6)


@both_operators
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_compiled_whole(op, packed, plain_memory):
    inputs = on_gpu(INPUTS[op](1, 200, 6, 2, 2, cu_seqlens=[0, 50, 50, 200] if packed else None))
    wanted = run(op, inputs)
    torch.compiler.reset()
    found = run(torch.compile(partial(op, scale=1.0), fullgraph=True), inputs)
    torch.compiler.reset()
    assert_equal(found, wanted)


@both_operators
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_captured_without_a_wait(op, packed):
    inputs = on_gpu(INPUTS[op](1, 500, 16, 8, 8, dtype=torch.bfloat16, cu_seqlens=[0, 50, 50, 500] if packed else None))
    leaves = [x.requires_grad_() for x in inputs.values() if x is not None and x.is_floating_point()]
    dy = torch.randn_like(inputs["v"])

    def work():
        y, state = op(**inputs)
        grads = torch.autograd.grad((y, state), leaves, (dy, torch.ones_like(state)))
        return {str(i): x.detach() for i, x in enumerate((y, state, *grads))}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    if packed:
        # the bounds may move too: only their number is part of the graph
        inputs["cu_seqlens"].copy_(torch.tensor([0, 0, 330, 500], dtype=torch.int32))
    with torch.no_grad():
        inputs["v"].normal_()
    dy.normal_()
    graph.replay()
    assert_equal(found, work())


@pytest.mark.parametrize("direction", ["causal", "bidirectional", "2d"])
@pytest.mark.parametrize("width", [2, 8])
def test_mixers_read_with_them(direction, width):
    torch.manual_seed(0)
    layers = [HGRN2Mixer(64, expand_ratio=width, direction=direction, backend=name) for name in ("auto", "chunked")]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].double()
    x, bound = torch.randn(3, 192, 64, device="cuda"), torch.full((64,), 0.3, device="cuda")
    grid = (12, 16) if direction == "2d" else None
    results = []
    for layer, dtype in zip(layers, (torch.float32, torch.float64), strict=True):
        layer.cuda()
        leaf = x.to(dtype, copy=True).requires_grad_()
        # float32 products without TF32 are torch's default
        y = layer(leaf, bound.to(dtype), grid=grid)[0]
        y.square().sum().backward()
        grads = {f"d_{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "d_x": leaf.grad} | grads)
    assert_close(results[0], results[1], 1e-5)


def test_a_prompt_in_two_parts_without_gradients():
    inputs = on_gpu(tied_inputs(3, 700, 16, 8, 8, dtype=torch.bfloat16))
    with torch.no_grad():
        y, state = hgrn2_scan(**inputs)
        parts, now = [], inputs["initial_state"]
        for rows in (slice(333), slice(333, 700)):
            part = {name: inputs[name][:, rows] for name in "qfv"}
            one, now = hgrn2_scan(**part, lower_bound=inputs["lower_bound"], initial_state=now)
            parts.append(one)
    assert relative_error(torch.cat(parts, 1), y.double()).rms < 4e-3
    assert relative_error(now, state.double()).rms < 2e-6
