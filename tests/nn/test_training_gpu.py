"""Forms that only training on a GPU uses: the loss in one kernel, padded widths, compiled blocks, no waiting."""

# pyright: reportOptionalMemberAccess=false

import math

import pytest
import torch
from torch.nn import functional as F

from hgrn2 import HGRN2LM, presets
from hgrn2.nn import loss as loss_module
from hgrn2.nn.loss import linear_cross_entropy
from hgrn2.nn.mlp import GatedMLP
from tests.numerics import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("vocab", [2, 11, 4096, 4097, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_and_its_gradients(vocab, dtype, monkeypatch):
    torch.manual_seed(0)
    # three blocks of rows, the last one short
    monkeypatch.setattr(loss_module, "ROWS", 100)
    monkeypatch.setattr(loss_module, "_BLOCK_BYTES", 100)
    x = torch.randn(230, 64, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(vocab, 64, device="cuda").to(dtype).requires_grad_()
    targets = torch.randint(vocab, (230,), device="cuda")
    targets[::3] = -100
    found = linear_cross_entropy(x, weight, targets)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    honest = [t.detach().requires_grad_() for t in (x, weight)]
    torch_loss = F.cross_entropy((honest[0] @ honest[1].T).float(), targets, reduction="sum")
    assert found.item() == pytest.approx(wanted.item(), rel=max(1e-6, 2 * abs(torch_loss.item() / wanted.item() - 1)))
    exact = torch.autograd.grad(3 * wanted, wide)
    for ours, theirs, right in zip(
        torch.autograd.grad(3 * found, (x, weight)), torch.autograd.grad(3 * torch_loss, honest), exact, strict=True
    ):
        assert ours.dtype == dtype
        assert relative_error(ours, right).rms <= 3 * relative_error(theirs, right).rms + 1e-6


def test_a_row_without_a_target_and_logits_that_are_not_finite():
    x = torch.randn(4, 16, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(33, 16, device="cuda", dtype=torch.bfloat16)
    none = linear_cross_entropy(x, weight, torch.full((4,), -100, device="cuda"))
    none.backward()
    assert none.item() == 0
    assert not x.grad.any()
    spoilt = x.detach().clone()
    spoilt[2] = math.nan
    assert linear_cross_entropy(spoilt, weight, torch.tensor([1, 2, 3, 4], device="cuda")).isnan()


@pytest.mark.parametrize("activation", ["silu", "sigmoid", "gelu", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_an_odd_width_is_padded_and_nothing_else_changes(activation, bias):
    torch.manual_seed(0)
    mlp = GatedMLP(64, 171, activation, bias).cuda()
    x = torch.randn(3, 50, 64, device="cuda").requires_grad_()
    y = mlp(x)
    wanted = mlp.double().cpu()(x.detach().double().cpu())
    assert relative_error(y.cpu(), wanted).rms < 1e-5
    mlp.float().cuda()
    y = mlp(x)
    y.square().sum().backward()
    found = [p.grad.clone() for p in mlp.parameters()]
    assert [g.shape for g in found] == [p.shape for p in mlp.parameters()]
    twin = mlp.double().cpu()
    twin.zero_grad()
    twin(x.detach().double().cpu()).square().sum().backward()
    for ours, right in zip(found, (p.grad for p in twin.parameters()), strict=True):
        assert relative_error(ours.cpu(), right).rms < 1e-5


def test_a_hook_on_a_projection_is_called():
    mlp = GatedMLP(64, 171, "silu", False).cuda()
    called = []
    mlp.up_proj.register_forward_hook(lambda *_: called.append(1))
    mlp(torch.randn(2, 64, device="cuda"))
    assert called


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_compute_the_same_and_are_traced_once():
    torch.compiler.reset()
    torch.manual_seed(0)
    config = presets.tiny(vocab_size=300, num_hidden_layers=5)
    model = HGRN2LM(config).cuda().train()
    ids = torch.randint(300, (1, 200), device="cuda")
    cuts = torch.tensor([0, 80, 200], device="cuda", dtype=torch.int32)
    before = model.loss(ids, ids, cu_seqlens=cuts, keep_state=False)[0]
    model.model.compile_blocks()
    torch._dynamo.utils.counters.clear()
    after = model.loss(ids, ids, cu_seqlens=cuts, keep_state=False)[0]
    assert after.item() == pytest.approx(before.item(), rel=1e-5)
    # the first layer's bound needs no gradient: a graph of its own
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 2
    more_cuts = torch.tensor([0, 30, 80, 110, 200], device="cuda", dtype=torch.int32)
    model.loss(ids, ids, cu_seqlens=more_cuts, keep_state=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_compiled_training_keeps_the_states_of_the_forward_pass():
    torch.compiler.reset()
    config = presets.tiny(vocab_size=300, hidden_size=256, num_hidden_layers=2, expand_ratio=128)
    model = HGRN2LM(config).cuda().train()
    model.model.compile_blocks()
    ids = torch.randint(300, (2, 200), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(ids, ids, keep_state=False)[0]
        loss.backward()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = {event.name for event in profile.events()}
    # of Triton's backward pass, which computes the states again
    assert not [name for name in names if name.startswith("chunk_")]
    assert [name for name in names if name.startswith("forward_outputs")]
    torch.compiler.reset()
