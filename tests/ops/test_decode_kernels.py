"""Kernels of the decode step against float64, in Triton's interpreter or on a GPU."""

import pytest
import torch
from torch.nn import functional

from tests.ops.test_triton import PROBLEM

pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def normed(x, weight, eps):
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize(("inner", "columns"), [(16, 5), (100, 40), (1300, 20)])
def test_products_of_few_rows(rows, inner, columns):
    from hgrn2.ops.triton.decode import row_product

    x, weight, bias = random(rows, inner, seed=0), random(columns, inner, seed=1) / inner**0.5, random(columns, seed=2)
    residual, norm = random(rows, columns, seed=3), random(inner, seed=4)
    wide = [t.double() for t in (x, weight, bias, residual, norm)]
    close(row_product(x, weight), wide[0] @ wide[1].T)
    found = row_product(x, weight, bias, norm=(norm, 0.3), residual=residual)
    close(found, wide[3] + functional.linear(normed(wide[0], wide[4], 0.3), wide[1], wide[2]))
    close(row_product(x, weight, norm=(None, 0.1)), normed(wide[0], None, 0.1) @ wide[1].T)


@pytest.mark.parametrize("activation", ["silu", "sigmoid", "none"])
def test_gated_units(activation):
    from hgrn2.ops.gates import activate
    from hgrn2.ops.triton.decode import gated, row_product

    x, weight, bias = random(2, 50, seed=0), random(60, 50, seed=1) / 7, random(60, seed=2)
    branches = functional.linear(normed(x.double(), None, 0.1), weight.double(), bias.double())
    wanted = activate(branches[:, :30], activation) * branches[:, 30:]
    close(row_product(x, weight, bias, norm=(None, 0.1), activation=activation), wanted)
    close(gated(branches.float(), activation), wanted)


@pytest.mark.parametrize("width", [16, 100, 3000])
def test_sums_with_their_norm(width):
    from hgrn2.ops.triton.decode import add_norm

    x, y, weight = random(3, width, seed=0), random(3, width, seed=1), random(width, seed=2)
    total, found = add_norm(x, y, weight, 0.2)
    close(total, x.double() + y.double())
    close(found, normed(x.double() + y.double(), weight.double(), 0.2))
    close(add_norm(x, y, None, 0.2)[1], normed(x.double() + y.double(), None, 0.2))
