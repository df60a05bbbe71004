"""Attention to packed sequences in one kernel on a GPU, against each sequence alone in float64."""

import copy

import pytest
import torch

from hgrn2.nn.mixers import Context, attention
from hgrn2.nn.mixers.attention import Attention
from tests.numerics import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch calls its search for hidden waits a prototype
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    # what the first product of a backward pass may say
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]

CU_SEQLENS = [0, 0, 1, 65, 65, 200, 330]


def passes(module, x, dy, cu_seqlens):
    x = x.detach().requires_grad_()
    y, state = module(x, None, Context(cu_seqlens, keep_state=False))
    assert state == {}
    return y.detach(), *torch.autograd.grad(y, (x, *module.parameters()), dy)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("window_size", [None, 50])
def test_packed_sequences(num_kv_heads, window_size, monkeypatch):
    torch.manual_seed(0)
    module = Attention(256, 4, num_kv_heads, window_size, 10_000.0, qkv_bias=True).cuda()
    x, dy = torch.randn(2, 1, 330, 256, device="cuda").unbind(0)
    bounds = torch.tensor(CU_SEQLENS, device="cuda")
    exact = passes(copy.deepcopy(module).double(), x.double(), dy.double(), bounds)
    low = copy.deepcopy(module).bfloat16()
    given = (low, x.bfloat16(), dy.bfloat16(), bounds)
    taken = []
    attention.load_compiled_parts()
    kernel = attention._flash_ragged
    monkeypatch.setattr(attention, "_flash_ragged", lambda *a, **k: taken.append(1) or kernel(*a, **k))
    found = passes(*given)
    assert taken, "this torch has the kernel"
    monkeypatch.setattr(attention, "_flash_ragged", None)
    honest = passes(*given)
    assert len(taken) == 1
    for ours, theirs, wanted in zip(found, honest, exact, strict=True):
        assert relative_error(ours, wanted).rms < 1.3 * relative_error(theirs, wanted).rms + 1e-3


def test_nothing_is_waited_for():
    module = Attention(256, 4, 2, None, 10_000.0, qkv_bias=False).cuda().bfloat16()
    x = torch.randn(1, 100, 256, device="cuda").bfloat16().requires_grad_()
    bounds = torch.tensor([0, 30, 100], device="cuda")

    def work():
        y, _ = module(x, None, Context(bounds, keep_state=False))
        y.sum().backward()

    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
