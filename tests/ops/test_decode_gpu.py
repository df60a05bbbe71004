"""Kernels of the decode step on a GPU, at widths of the 1.3B model, whose rows are read in several pieces."""

import pytest
import torch
from torch.nn import functional

from tests.numerics import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EPS = 1e-5
# one rounding of the result, or sums of thousands of products in float32
RMS = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
dtypes = pytest.mark.parametrize("dtype", RMS, ids=str)


def random(*shape, dtype, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def normed(x, weight):
    return functional.rms_norm(x.double(), x.shape[-1:], weight.double(), EPS)


@dtypes
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(("inner", "columns"), [(2048, 6144), (2048, 2048), (5632, 2048), (6144, 100)])
def test_products(inner, columns, rows, dtype):
    from hgrn2.ops.triton.decode import row_product

    x, norm = random(rows, inner, dtype=dtype, seed=0), random(inner, dtype=dtype, seed=1)
    weight = random(columns, inner, dtype=dtype, seed=2) / inner**0.5
    bias, residual = random(columns, dtype=dtype, seed=3), random(rows, columns, dtype=dtype, seed=4)
    wide = weight.double()
    exact = residual.double() + x.double() @ wide.T
    assert relative_error(row_product(x, weight, residual=residual), exact).rms <= RMS[dtype]
    exact = functional.linear(normed(x, norm), wide, bias.double())
    assert relative_error(row_product(x, weight, bias, norm=(norm, EPS)), exact).rms <= RMS[dtype]


@dtypes
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("inner", "columns"), [(2048, 5632), (6144, 50)])
def test_gated_units(inner, columns, rows, dtype):
    from hgrn2.ops.triton.decode import gated, row_product

    x, norm = random(rows, inner, dtype=dtype, seed=0), random(inner, dtype=dtype, seed=1)
    weight = random(2 * columns, inner, dtype=dtype, seed=2) / inner**0.5
    gate, up = (normed(x, norm) @ weight.double().T).chunk(2, -1)
    found = row_product(x, weight, norm=(norm, EPS), activation="silu")
    assert relative_error(found, functional.silu(gate) * up).rms <= 2 * RMS[dtype]
    branches = random(rows, 2 * columns, dtype=dtype, seed=3)
    gate, up = branches.double().chunk(2, -1)
    assert relative_error(gated(branches, "silu"), functional.silu(gate) * up).rms <= RMS[dtype]


@dtypes
@pytest.mark.parametrize("width", [2048, 5632, 6144])
def test_sums_with_their_norm(width, dtype):
    from hgrn2.ops.triton.decode import add_norm

    x, y = (random(7, width, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = random(width, dtype=dtype, seed=2)
    total, found = add_norm(x, y, weight, EPS)
    assert relative_error(total, x.double() + y.double()).rms <= RMS[dtype]
    assert relative_error(found, normed(total, weight)).rms <= RMS[dtype]
