"""RMSNorm between dtypes against float64: torch's way, and the kernels in Triton's interpreter."""

from functools import partial

import pytest
import torch

from hgrn2.ops import norm
from hgrn2.ops.norm import rms_norm
from tests.numerics import assert_close, relative_error, run
from tests.ops.test_triton import PROBLEM
from tests.refusals import refuses

SHAPES = [(1, 3), (3, 7), (2, 5, 16), (17, 100), (40, 130), (2, 4096), (1, 5000)]
# of random numbers
TINY = 1e-6

backends = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("triton", marks=pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM)))]
)


def exact_norm(x, eps, weight=None):
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return (y if weight is None else y * weight,)


def inputs(shape, weighted=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3
    return {"x": x, "weight": torch.randn(shape[-1], generator=generator)} if weighted else {"x": x}


def ours(x, eps, backend, dtype=torch.float32, weight=None):
    return (rms_norm(x, weight, eps, dtype, backend),)


@backends
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_rows_and_gradients(shape, weighted, backend):
    given = inputs(shape, weighted)
    found = run(ours, given, outputs=("y",), eps=0.3, backend=backend)
    assert_close(found, run(exact_norm, given, outputs=("y",), dtype=torch.float64, eps=0.3), TINY)


@backends
@pytest.mark.parametrize("weighted", [True, False])
def test_second_derivatives(backend, weighted):
    given = inputs((3, 7), weighted)

    def penalty(x, norm, weight=None):
        # the gradient of a sum alone: nothing that comes in from above is differentiable
        wanted = [x] if weight is None else [x, weight]
        grads = torch.autograd.grad(norm(x, weight=weight).sum(), wanted, create_graph=True)
        return (sum(grad.square().sum() for grad in grads),)

    found = run(partial(penalty, norm=lambda x, weight: ours(x, 0.3, backend, weight=weight)[0]), given, outputs=("y",))
    wanted = run(
        partial(penalty, norm=lambda x, weight: exact_norm(x, 0.3, weight)[0]),
        given,
        outputs=("y",),
        dtype=torch.float64,
    )
    assert_close(found, wanted, 1e-5)


@backends
def test_any_strides_and_no_rows(backend):
    whole = torch.randn(6, 4, 20, generator=torch.Generator().manual_seed(1))
    for x in (whole[:, 1], whole.transpose(0, 1), whole[..., ::2], whole[:0]):
        given = {"x": x, "weight": torch.rand(x.shape[-1]) + 0.5}
        found = run(ours, given, outputs=("y",), eps=1e-5, backend=backend)
        assert_close(found, run(exact_norm, given, outputs=("y",), dtype=torch.float64, eps=1e-5), TINY)


@backends
def test_extreme_rows(backend):
    x = torch.tensor([[0.0, 0.0], [1e-15, -1e-15], [1e18, 1e18], [float("nan"), 1.0], [1.0, 2.0]])
    y = rms_norm(x, None, 1e-12, torch.float32, backend)
    expected = torch.tensor([[0.0, 0.0], [1e-9, -1e-9], [1.0, 1.0], [float("nan")] * 2, [0.4**0.5, 1.6**0.5]])
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-6, atol=0)


@backends
def test_a_gradient_of_any_strides_and_a_weight_of_any_strides(backend):
    generator = torch.Generator().manual_seed(2)
    x, dy = torch.randn(2, 20, 6, generator=generator)
    pair = torch.randn(20, 2, generator=generator)
    for weight in (pair[:, 0], torch.tensor(2.0).expand(20)):
        results = []
        for dtype, call in ((torch.float32, ours), (torch.float64, exact_norm)):
            leaf = x.T.to(dtype).requires_grad_()
            keys = {"backend": backend} if call is ours else {}
            (y,) = call(leaf, 1e-5, weight=weight.to(dtype) if call is exact_norm else weight, **keys)
            (grad,) = torch.autograd.grad(y, leaf, dy.T.to(dtype))
            results.append({"y": y.detach(), "d_x": grad})
        assert_close(*results, TINY)


@backends
def test_frozen_weights(backend):
    given = inputs((9, 20))
    weight = given["weight"]
    found = run(partial(ours, weight=weight), {"x": given["x"]}, outputs=("y",), eps=1e-5, backend=backend)
    exact = run(
        partial(exact_norm, weight=weight.double()), {"x": given["x"]}, outputs=("y",), dtype=torch.float64, eps=1e-5
    )
    assert_close(found, exact, TINY)


def test_bad_calls():
    x = torch.randn(3, 8)
    with refuses("invalid-value", "weight", [7], "W=8"):
        rms_norm(x, torch.ones(7), 1e-5, torch.float32)
    with refuses("unknown-name", "'tirton'", "'auto'", "'torch'", "'triton'"):
        rms_norm(x, None, 1e-5, torch.float32, backend="tirton")
    for dtypes in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        with refuses("unsupported", "torch.float64"):
            rms_norm(x.to(dtypes[0]), None, 1e-5, dtypes[1], backend="triton")
    with refuses("unsupported", 16384):
        rms_norm(torch.ones(1, norm.WIDEST + 1), None, 1e-5, torch.float32, backend="triton")


def test_float64_stays_exact():
    x, weight = (t.double() for t in inputs((5, 9)).values())
    for a, w in ((x, weight), (x.float(), weight)):
        y = rms_norm(a, w, 1e-5, torch.float64)
        assert relative_error(y, exact_norm(a.double(), 1e-5, weight)[0]).rms < 1e-15
    y = rms_norm(x.float(), None, 1e-5, torch.float64)
    assert relative_error(y, exact_norm(x.float().double(), 1e-5)[0]).rms < 1e-15


def test_written_in_another_dtype():
    x, weight = inputs((30, 64)).values()
    for x_dtype in (torch.float32, torch.bfloat16):
        y = rms_norm(x.to(x_dtype), weight, 1e-5, torch.bfloat16)
        assert y.dtype == torch.bfloat16
        # one rounding, of the result
        (exact,) = exact_norm(x.to(x_dtype).double(), 1e-5, weight.double())
        assert relative_error(y, exact).rms < 2e-3


@pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
def test_every_program_gives_its_part_of_the_weights_gradient(monkeypatch):
    from hgrn2.ops.triton import norm as launches

    monkeypatch.setattr(launches, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(launches, "BLOCK_ELEMENTS", 32)
    given = inputs((37, 16))
    found = run(ours, given, outputs=("y",), eps=1e-5, backend="triton")
    assert_close(found, run(exact_norm, given, outputs=("y",), dtype=torch.float64, eps=1e-5), TINY)


def test_where_the_kernels_run(monkeypatch):
    taken = []
    monkeypatch.setattr(norm._RMSNorm, "apply", lambda rows, *rest: taken.append(rows.dtype) or rows)
    x = torch.randn(2, 8)
    rms_norm(x.bfloat16(), x[0], 1e-5, torch.bfloat16)
    assert not taken, "the interpreter is for tests"
    rms_norm(x, x[0], 1e-5, torch.float32, backend="triton")
    assert taken == [torch.float32]
