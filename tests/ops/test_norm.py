"""RMSNorm between dtypes against float64: torch's way, and the kernels in Triton's interpreter."""

import pytest
import torch

from hgrn2.ops import norm
from hgrn2.ops.norm import rms_norm
from tests.numerics import assert_close, relative_error, run
from tests.ops.test_triton import PROBLEM

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

    monkeypatch.setattr(launches, "_multiprocessors", lambda device: 2)
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
