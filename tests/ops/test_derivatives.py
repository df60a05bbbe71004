"""Derivatives beyond a backward pass: transforms of torch.func, and those that only one backend has."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hgrn2.nn.loss import linear_cross_entropy
from hgrn2.ops import gated_scan, hgrn2_scan, hgrn2_step
from hgrn2.ops.backends import triton_runs

BACKENDS = ["chunked", "triton"] if triton_runs() else ["chunked"]
pytestmark = [
    # vmap runs an operator once for every element, and says so
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    # torch's own, when forward mode is first used
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


def tied(q, f, v, backend):
    return hgrn2_scan(q, f, v, backend=backend)


def free(q, f, v, backend):
    return gated_scan(q, f, v, -f.abs(), backend=backend)


def step(q, f, v, backend):
    return hgrn2_step(q[:, 0], f[:, 0], v[:, 0], torch.zeros(q.shape[0], 1, 16, 16), backend=backend)


def operands():
    return torch.randn(3, 1, 5, 1, 16, generator=torch.Generator().manual_seed(0)).unbind(0)


def loss(function, backend, q, f, v):
    y, state = function(q, f, v, backend)
    return y.square().sum() + state.sum()


@pytest.mark.parametrize(
    ("function", "backend"),
    # a step of plain torch has every derivative
    [(function, backend) for backend in BACKENDS for function in (tied, free)] + [(step, "triton")] * triton_runs(),
)
def test_a_second_derivative_says_what_to_do(function, backend):
    q, f, v = (x.requires_grad_() for x in operands())
    (gradient,) = torch.autograd.grad(loss(function, backend, q, f, v), q, create_graph=True)
    with pytest.raises(RuntimeError, match=f"backend '{backend}' has no second derivative; use backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("function", [tied, free])
def test_the_reference_has_second_derivatives(function):
    inputs = [x[..., :3].double().requires_grad_() for x in operands()]
    assert torch.autograd.gradgradcheck(partial(loss, function, "reference"), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [tied, free])
def test_transforms_of_torch_func(function, backend):
    q, f, v = operands()
    value = partial(loss, function, backend)
    leaves = [x.clone().requires_grad_() for x in (q, f, v)]
    wanted = torch.autograd.grad(value(*leaves), leaves)
    found = torch.func.grad(value, argnums=(0, 1, 2))(q, f, v)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)
    # a gradient for every sample
    each = torch.func.vmap(torch.func.grad(value), in_dims=(0, None, None))(torch.stack([q, 2 * q]), f, v)
    torch.testing.assert_close(each[0], wanted[0])
    torch.testing.assert_close(each[1], torch.func.grad(value)(2 * q, f, v))
    with pytest.raises(RuntimeError, match=f"backend '{backend}' has no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(value)(x, f, v).square().sum())(q)
    with pytest.raises(NotImplementedError, match=f"backend '{backend}' has no derivative in forward mode"):
        torch.func.hessian(value)(q, f, v)


def test_the_loss_under_transforms_and_in_forward_mode():
    x, weight, targets = torch.randn(5, 4).double(), torch.randn(6, 4).double(), torch.tensor([1, 2, 3, -100, 0])

    def plain(x):
        return torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction="sum")

    def ours(x):
        return linear_cross_entropy(x, weight, targets)

    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(ours)(x), transform(plain)(x))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        found, wanted = (torch.autograd.forward_ad.unpack_dual(f(dual)).tangent for f in (ours, plain))
        torch.testing.assert_close(found, wanted)


def test_the_loss_has_no_second_derivative_and_says_so():
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    total = linear_cross_entropy(x, weight, torch.tensor([1, 2, 3, -100, 0]))
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, x, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="no second derivative; compute it from logits"):
        gradient.square().sum().backward()
