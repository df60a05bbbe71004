"""The kernels of RMSNorm compiled: between dtypes, in every width, beside torch's."""

import pytest
import torch
from torch.nn import functional

from hgrn2.nn.norm import Norm
from hgrn2.ops.norm import LARGE, WIDEST, rms_norm
from tests.numerics import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gradients_of(norm, x, weight, dy):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = norm(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy.to(y.dtype))


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (300, 100), (2, 65, 576), (700, 2048), (130, 2560), (9, WIDEST)], ids=str)
def test_no_worse_than_one_rounding(shape, dtype, out):
    torch.manual_seed(0)
    x, dy = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    weight = torch.rand(shape[-1], device="cuda") + 0.5
    found = gradients_of(lambda x, w: rms_norm(x, w, 1e-5, out, backend="triton"), x, weight, dy)
    exact = gradients_of(lambda x, w: functional.rms_norm(x, shape[-1:], w, 1e-5), x.double(), weight.double(), dy)
    assert [t.dtype for t in found] == [out, dtype, torch.float32]
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.2e-3, torch.float16: 4e-4}
    # of what goes out, and of the gradient that comes back in its dtype
    for tensor, wanted, limit in zip(found, exact, (out, dtype, torch.float32), strict=True):
        allowed = rounding[limit] if limit == dtype == out else rounding[limit] + rounding[out]
        assert relative_error(tensor, wanted).rms < allowed
    again = gradients_of(lambda x, w: rms_norm(x, w, 1e-5, out, backend="triton"), x, weight, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.large
def test_rows_beyond_two_to_the_31_elements():
    x = torch.zeros((1 << 20) + 3, 2048, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.arange(2048, device="cuda")
    y = rms_norm(x, torch.ones(2048, device="cuda"), 1e-5, torch.bfloat16)
    expected = functional.rms_norm(x[-1].float(), (2048,)).bfloat16()
    torch.testing.assert_close(y[-1], expected)


def test_a_wider_row_is_torchs(monkeypatch):
    monkeypatch.setattr("hgrn2.ops.norm._RMSNorm.apply", None)
    x = torch.randn(2, WIDEST + 1, device="cuda").bfloat16()
    y = rms_norm(x, None, 1e-5, torch.float32)
    torch.testing.assert_close(y, functional.rms_norm(x.float(), x.shape[1:], None, 1e-5))


def test_where_it_pays(monkeypatch):
    taken = []
    monkeypatch.setattr("hgrn2.ops.norm._RMSNorm.apply", lambda rows, *rest: taken.append(rows.dtype) or rows)
    weight = torch.ones(1024, device="cuda")
    large = torch.ones(LARGE // 1024, 1024, device="cuda").bfloat16()
    rms_norm(large, weight.bfloat16(), 1e-5, torch.bfloat16)
    rms_norm(large[1:].requires_grad_(), weight.bfloat16(), 1e-5, torch.bfloat16)
    rms_norm(large.double(), weight, 1e-5, torch.float32)
    assert not taken
    rms_norm(large.requires_grad_(), weight.bfloat16(), 1e-5, torch.bfloat16)
    rms_norm(large[:1].detach(), weight, 1e-5, torch.bfloat16)
    assert len(taken) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_under_autocast(stream, monkeypatch):
    module = Norm("rmsnorm", 512, 1e-5, affine=True).cuda()
    torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(40, 512, device="cuda").to(stream)
    with torch.autocast("cuda", torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.bfloat16
    exact = functional.rms_norm(x.double(), (512,), module.weight.double(), 1e-5)
    assert relative_error(found, exact).rms < 2.2e-3
    # compiled, torch does it all
    torch.compiler.reset()
    monkeypatch.setattr("hgrn2.ops.norm._RMSNorm.apply", None)
    with torch.autocast("cuda", torch.bfloat16):
        compiled = torch.compile(module, fullgraph=True)(x)
    torch.compiler.reset()
    assert relative_error(compiled, exact).rms < 2.2e-3
