# pyright: reportOptionalMemberAccess=false

import pytest
import torch
from torch.nn import functional as F

from hgrn2.nn import loss as loss_module
from hgrn2.nn.loss import linear_cross_entropy


def inputs(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(11, (rows,), generator=generator)
    targets[::3] = -100
    return x, weight, targets


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 13])
def test_in_pieces_of_rows(rows, monkeypatch):
    monkeypatch.setattr(loss_module, "ROWS", 4)
    x, weight, targets = inputs(rows)
    found = linear_cross_entropy(x, weight, targets)
    wanted = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(found, wanted)
    for one, two in zip(
        torch.autograd.grad(2.5 * found, (x, weight)), torch.autograd.grad(2.5 * wanted, (x, weight)), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_numerical_gradient():
    x, weight, targets = inputs(5)
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, targets), (x, weight))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_side_frozen(frozen):
    x, weight, targets = inputs(5)
    (x if frozen == "x" else weight).requires_grad_(False)
    linear_cross_entropy(x, weight, targets).backward()
    moving, still = (weight, x) if frozen == "x" else (x, weight)
    assert still.grad is None
    wanted = torch.autograd.grad(F.cross_entropy(x @ weight.T, targets, reduction="sum"), moving)[0]
    torch.testing.assert_close(moving.grad, wanted)


def test_no_gradient_is_made_where_none_is_wanted():
    x, weight, targets = inputs(5)
    with torch.no_grad():
        found = linear_cross_entropy(x, weight, targets)
    assert not found.requires_grad


def test_large_logits_stay_finite():
    x, weight, targets = inputs(5, torch.float32)
    found = linear_cross_entropy(1e4 * x, weight, targets)
    found.backward()
    assert found.isfinite()
    assert x.grad.isfinite().all()


def test_autocast_takes_its_dtype():
    x, weight, targets = inputs(50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, weight, targets)
    wanted = linear_cross_entropy(x.bfloat16().float(), weight.bfloat16().float(), targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=0.01)
    found.backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
