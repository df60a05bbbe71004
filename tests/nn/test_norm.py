"""The dtypes of norms, with and without autocast."""

import pytest
import torch

from hgrn2.nn.loss import linear_cross_entropy
from hgrn2.nn.norm import NORMS, Norm
from tests.numerics import relative_error

LOW = torch.bfloat16


def make(kind, affine, dtype):
    module = Norm(kind, 16, 1e-5, affine).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(16, generator=torch.Generator().manual_seed(1)))
    return module


def exact(module, x):
    x = x.double()
    if module.kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt()
    y = y if module.weight is None else y * module.weight.double()
    return y if module.bias is None else y + module.bias.double()


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(
    ("x", "weight", "plain", "autocast"),
    [
        # of the input, of the weight, of the result, of the result under autocast
        (torch.float32, torch.float32, torch.float32, LOW),
        (LOW, torch.float32, torch.float32, LOW),
        (LOW, LOW, LOW, LOW),
        (torch.float64, torch.float64, torch.float64, torch.float64),
        (torch.float32, None, torch.float32, LOW),
        (LOW, None, LOW, LOW),
        (torch.float64, None, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtypes(kind, x, weight, plain, autocast):
    module = make(kind, weight is not None, weight or torch.float32)
    given = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(x)
    for dtype, context in ((plain, torch.autocast("cpu", LOW, enabled=False)), (autocast, torch.autocast("cpu", LOW))):
        with context:
            y = module(given)
        assert y.dtype == dtype
        # where anything is wider than the result, the result alone is rounded
        widest = max((x, weight or x), key=lambda t: torch.finfo(t).bits)
        rounding = {torch.float64: 1e-15, torch.float32: 1e-6, LOW: 2.5e-3 if widest != LOW else 6e-3}
        assert relative_error(y, exact(module, given)).rms < rounding[dtype]


@pytest.mark.parametrize("kind", NORMS)
def test_shapes_alone_know_no_autocast(kind):
    module = make(kind, True, torch.float32).to("meta")
    with torch.autocast("cpu", LOW):
        assert module(torch.empty(3, 16, device="meta")).shape == (3, 16)


def test_autocast_leaves_a_loss_in_float64_alone():
    x, weight = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    targets = torch.tensor([0, 1, 2, 3, 4])
    wanted = linear_cross_entropy(x, weight, targets)
    with torch.autocast("cpu", LOW):
        assert torch.equal(linear_cross_entropy(x, weight, targets), wanted)
