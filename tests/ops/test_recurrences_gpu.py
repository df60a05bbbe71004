"""The kernels of element-wise and selective recurrences compiled: every dtype, shape and way to call them."""

from functools import partial

import pytest
import torch

from hgrn2.nn.mixers import Context, find_mixer
from hgrn2.nn.mixers.squared_attention import squared_attention
from hgrn2.nn.parameters import InitialValues
from hgrn2.ops import gated_scan, linear_scan, selective_scan
from hgrn2.ops.triton.installed import choose_kernels
from tests.numerics import EXTREME_RMS, assert_close, assert_equal, relative_error, run
from tests.ops import test_linear_scan, test_selective_scan
from tests.ops.scan_cases import spread

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch calls its search for hidden waits a prototype
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),
    # compiled mixers multiply in float32 as eager ones do
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]

RMS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
OUTPUTS = test_linear_scan.OUTPUTS
RAGGED = [0, 0, 1, 65, 65, 129, 135, 1000, 1000]
dtypes = pytest.mark.parametrize("dtype", RMS, ids=str)
numbers = pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
both_ways = pytest.mark.parametrize("reverse", [False, True])


def on_gpu(given):
    return {name: x if x is None else x.cuda() for name, x in given.items()}


def linear_inputs(*shape, **settings):
    return on_gpu(test_linear_scan.inputs(*shape, **settings))


def selective_inputs(*shape, **settings):
    return on_gpu(test_selective_scan.inputs(*shape, **settings))


def check_linear(given, rms=RMS[torch.float32], **settings):
    op = test_linear_scan.ours
    exact = run(op, given, outputs=OUTPUTS, dtype=torch.float64, backend="halving", **settings)
    found = run(op, given, outputs=OUTPUTS, backend="triton", **settings)
    assert_close(found, exact, rms)
    # twice the same bits, and what "auto" means
    assert_equal(run(op, given, outputs=OUTPUTS, **settings), found)


def check_selective(given, rms=RMS[torch.float32], **settings):
    exact = run(selective_scan, given, dtype=torch.float64, backend="tiles", **settings)
    found = run(selective_scan, given, backend="triton", **settings)
    assert_close(found, exact, rms)
    assert_equal(run(selective_scan, given, **settings), found)


@dtypes
@both_ways
@numbers
@pytest.mark.parametrize("length", [1, 15, 17, 64, 200, 1000])
def test_every_length(length, is_complex, reverse, dtype):
    if is_complex and dtype != torch.float32:
        pytest.skip("complex numbers of 16 bits are no dtype of torch's")
    given = linear_inputs(2, length, (48,), dtype=dtype, is_complex=is_complex)
    check_linear(given, RMS[dtype], is_complex=is_complex, reverse=reverse)


@numbers
@both_ways
@pytest.mark.parametrize(
    "shape", [(0, 5, (3,)), (3, 70, (1,)), (1, 70, (33,)), (1, 4, (2, 3)), (1, 9, (129,))], ids=str
)
def test_every_width(shape, is_complex, reverse):
    check_linear(linear_inputs(*shape, is_complex=is_complex), is_complex=is_complex, reverse=reverse)


@numbers
@both_ways
@pytest.mark.parametrize("bounds", [RAGGED, [0, 0], [0, 700]], ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
def test_packed_sequences(bounds, state, reverse, is_complex):
    given = linear_inputs(1, bounds[-1], (40,), is_complex=is_complex, cu_seqlens=bounds, state=state)
    check_linear(given, is_complex=is_complex, reverse=reverse)


@numbers
def test_decays_of_every_size(is_complex):
    shape = (2, 300, 40)
    log_a = spread(shape, (-1e-6, -1e-4, -0.5, -20.0, -200.0, float("-inf"), 0.0))
    check_linear(linear_inputs(2, 300, (40,), log_a=log_a, is_complex=is_complex), EXTREME_RMS, is_complex=is_complex)


@both_ways
@pytest.mark.parametrize("bounds", [None, [0, 300, 4000]], ids=["batch", "packed"])
def test_a_rotation_of_channels(bounds, reverse):
    generator = torch.Generator("cuda").manual_seed(0)
    normal = partial(torch.randn, device="cuda", generator=generator)
    a, b = normal(1, 4000, 64).sigmoid(), normal(1, 4000, 64, 2)
    state, turn = normal(1 if bounds is None else 2, 64, 2), torch.polar(torch.ones(64), torch.linspace(-3, 3, 64))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device="cuda")
    given = {"a": a, "b": b, "state": state, "turn": torch.view_as_real(turn).cuda(), "cu_seqlens": cu_seqlens}

    def op(a, b, state, turn, cu_seqlens, backend):
        b, state, turn = map(torch.view_as_complex, (b, state, turn))
        settings = {"initial_state": state, "cu_seqlens": cu_seqlens, "reverse": reverse, "backend": backend}
        return tuple(map(torch.view_as_real, linear_scan(a, b, rotation=turn, **settings)))

    exact = run(op, given, outputs=OUTPUTS, dtype=torch.float64, backend="halving")
    assert_close(run(op, given, outputs=OUTPUTS, backend="triton"), exact, 3e-6)


@numbers
@pytest.mark.parametrize("shape", [(8, 2048, (2048,)), (1, 30000, (65,)), (64, 512, (512,))], ids=str)
def test_large_shapes(shape, is_complex):
    if is_complex:
        shape = (*shape[:2], (shape[2][0] // 4,))
    given = linear_inputs(*shape, is_complex=is_complex)
    found = run(test_linear_scan.ours, given, outputs=OUTPUTS, is_complex=is_complex)
    # a few channels of the exact result
    some = {
        n: x if x is None or n == "cu_seqlens" else x[..., :5, :] if is_complex else x[..., :5]
        for n, x in given.items()
    }
    exact = run(
        test_linear_scan.ours, some, outputs=OUTPUTS, gradients=False, dtype=torch.float64, is_complex=is_complex,
        backend="halving",
    )  # fmt: skip
    for name, wanted in exact.items():
        part = found[name][..., :5, :] if is_complex else found[name][..., :5]
        assert relative_error(part, wanted).rms < 2e-6
    assert all(x.isfinite().all() for x in found.values())


@dtypes
@both_ways
@pytest.mark.parametrize("length", [2, 15, 16, 17, 64, 200])
def test_selective_lengths(length, reverse, dtype):
    given = selective_inputs(2, length, 70, 16, dtype=dtype)
    check_selective(given, RMS[dtype], reverse=reverse)


@both_ways
@pytest.mark.parametrize(
    "size", [(0, 5, 3, 2), (3, 70, 1, 1), (1, 70, 33, 3), (1, 40, 40, 32), (2, 40, 64, 16)], ids=str
)
def test_selective_widths(size, reverse):
    given = selective_inputs(*size)
    exact = run(selective_scan, given, dtype=torch.float64, backend="tiles", reverse=reverse)
    found = run(selective_scan, given, backend="triton", reverse=reverse)
    assert_equal(run(selective_scan, given, reverse=reverse), found)
    # d_a is a sum over tokens, which may nearly cancel: its error counts beside the root of the sum of squared terms
    steps = given | {"a": given["a"].expand(*size[:2], *given["a"].shape)}
    terms = run(test_selective_scan.at_once, steps, dtype=torch.float64, reverse=reverse)["d_a"]
    error, limit = found.pop("d_a").double() - exact.pop("d_a"), terms.square().sum((0, 1)).sqrt()
    assert error.square().mean().sqrt() <= RMS[torch.float32] * limit.square().mean().sqrt()
    assert_close(found, exact, RMS[torch.float32])


@both_ways
@pytest.mark.parametrize("bounds", [RAGGED, [0, 0], [0, 700]], ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
def test_selective_packed_sequences(bounds, state, reverse):
    check_selective(selective_inputs(1, bounds[-1], 40, 16, cu_seqlens=bounds, state=state), reverse=reverse)


@pytest.mark.parametrize("step", [-12.0, -4.0, 4.0, 30.0])
def test_selective_steps_of_every_size(step):
    check_selective(selective_inputs(1, 600, 20, 16, step=step), EXTREME_RMS)


@pytest.mark.large
def test_a_large_selective_shape():
    given = selective_inputs(4, 2048, 4096, 16, dtype=torch.bfloat16, state=False)
    found = run(selective_scan, given)
    some = {n: x if x is None or n in "bc" else x[:64] if n == "a" else x[..., :64] for n, x in given.items()}
    exact = run(selective_scan, some, gradients=False, dtype=torch.float64, backend="tiles")
    assert relative_error(found["y"][..., :64], exact["y"]).rms < 5e-6
    assert all(x.isfinite().all() for x in found.values())


LINEAR = {
    "real": (linear_scan, lambda: [linear_inputs(2, 500, (96,))[n] for n in ("a", "b")]),
    "complex": (
        lambda a, b, turn: torch.view_as_real(
            linear_scan(a, torch.view_as_complex(b), rotation=torch.view_as_complex(turn))[0]
        ),
        lambda: [torch.rand(2, 500, 96).cuda(), torch.randn(2, 500, 96, 2).cuda(), torch.randn(96, 2).cuda() * 0.5],
    ),
    "segments": (linear_scan, lambda: [linear_inputs(1, 9000, (64,))[n] for n in ("a", "b")]),
    "selective": (selective_scan, lambda: list(selective_inputs(2, 100, 64, 16).values())[:5]),
}
operators = pytest.mark.parametrize("name", LINEAR)


def gradients(op, given):
    leaves = [x.detach().requires_grad_() for x in given]
    y = op(*leaves)
    y = y if isinstance(y, torch.Tensor) else y[0]
    return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))


@operators
def test_compiled_equals_eager(name):
    op, make = LINEAR[name]
    given = make()

    def wrapped(first, *rest):
        found = op(first * 0.9, *rest)
        return (found if isinstance(found, torch.Tensor) else found[0]) * 2

    torch.compiler.reset()
    found, wanted = gradients(torch.compile(wrapped, fullgraph=True), given), gradients(wrapped, given)
    torch.compiler.reset()
    for one, two in zip(found, wanted, strict=True):
        assert relative_error(one, two.double()).rms < 1e-6


@operators
def test_captured_in_a_graph_without_a_wait(name):
    op, make = LINEAR[name]
    given = make()
    wanted = gradients(op, given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(op, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(op, given)
    graph.replay()
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_packed_without_a_wait():
    linear = linear_inputs(1, 1000, (64,), cu_seqlens=RAGGED)
    selective = selective_inputs(1, 1000, 64, 16, cu_seqlens=RAGGED)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            linear_scan(**linear)
            selective_scan(**selective)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["hgrn1", "hgrn1-real", "griffin", "mamba"])
def test_mixers_use_the_kernels(name):
    torch.manual_seed(0)
    found = find_mixer(name.removesuffix("-real"))
    mixer = found.build(256, found.options(**({"form": "real"} if name == "hgrn1-real" else {})))
    mixer.reset_parameters(InitialValues(0.02, 0, 12))
    mixer.cuda()
    x = torch.randn(2, 300, 256, device="cuda", requires_grad=True)
    context = Context(lower_bound=torch.full((256,), 0.3, device="cuda") if mixer.uses_lower_bound else None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        y, _ = mixer(x, None, context)
        y.sum().backward()
    launched = {event.name for event in profiler.events()}
    kernels = {"forward_kernel", "backward_kernel"} if name == "mamba" else {"scan_kernel", "gradient_kernel"}
    assert kernels <= launched
    torch.compiler.reset()
    found = torch.compile(mixer, fullgraph=True)(x, None, context)[0]
    torch.compiler.reset()
    # torch's matrix products may round differently
    assert relative_error(found, y.double()).rms < 1e-4


@pytest.mark.parametrize("shape", [(2, 300, 4, 256, 512), (1, 100, 2, 64, 1000)], ids=str)
def test_wide_values_take_kernels(shape):
    *rows, k_width, v_width = shape
    q, k, log_f = torch.randn(3, *rows, k_width, device="cuda").unbind(0)
    given = {"q": q * 0.1, "k": k * 0.1, "v": torch.randn(*rows, v_width, device="cuda"), "log_f": -log_f.square()}
    found = run(gated_scan, given, backend="triton")
    assert_close(found, run(gated_scan, given, dtype=torch.float64, backend="chunked"), 5e-6)
    low = {n: x if n == "log_f" else x.bfloat16() for n, x in given.items()}
    found = run(gated_scan, low, backend="triton")
    assert_close(found, run(gated_scan, low, dtype=torch.float64, backend="chunked"), 1e-2)


@pytest.mark.parametrize("packed", [False, True])
def test_rebased_in_long_chunks(packed):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k = torch.randn(2, 1, 600, 3, 16, device="cuda", generator=generator).unbind(0)
    v, state = torch.randn(1, 600, 3, 17, device="cuda"), torch.rand(1, 3, 136, 17, device="cuda")
    given = {"q": q, "k": k, "v": v, "state": state.repeat(2 if packed else 1, 1, 1, 1)}
    given["cu_seqlens"] = torch.tensor([0, 70, 600], device="cuda") if packed else None
    found, exact = run(squared_attention, given), run(squared_attention, given, dtype=torch.float64)
    assert_close(found, exact, 1e-5)


def test_auto_on_a_gpu():
    device, low = torch.device("cuda"), torch.bfloat16
    assert choose_kernels("auto", device, torch.float32, low, low)
    assert choose_kernels("auto", device, torch.complex64, torch.float32, torch.complex64)
    assert not choose_kernels("auto", device, torch.float64, torch.float64)
