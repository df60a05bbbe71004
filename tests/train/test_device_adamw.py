"""AdamW with float32 weights and bfloat16 copies, beside torch's; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math

import pytest
import torch

from hgrn2.train.device_adamw import BLOCK, DeviceAdamW

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# less than a block, several blocks, a whole number of blocks
SHAPES = ((37, 8), (3 * BLOCK + 40,), (2, BLOCK))


def make():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in SHAPES]
    groups = [{"params": [params[0], params[2]], "weight_decay": 0.1}, {"params": [params[1]], "weight_decay": 0.0}]
    return params, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def gradients(step):
    torch.manual_seed(step)
    return [torch.randn(shape, device=DEVICE).bfloat16().float() for shape in SHAPES]


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_updates_are_those_of_torch(clip_norm):
    (ours, optimizer), (theirs, wanted) = make(), make()
    mixed = DeviceAdamW(optimizer, [ours[0], ours[2]])
    for part in range(2):
        # the second part takes over what the first left, as a resumed run does
        with mixed.active():
            assert [p.dtype for p in ours] == [torch.bfloat16, torch.float32, torch.bfloat16]
            for step in range(4 * part, 4 * part + 4):
                found = gradients(step)
                if step == 2:
                    found[1][5] = math.inf
                for p, q, grad in zip(ours, theirs, found, strict=True):
                    p.grad, q.grad = grad.to(p.dtype), grad.clone()
                loss = torch.tensor(math.nan if step == 5 else 1.0, device=DEVICE)
                mixed.prepare()
                norm = mixed.step(loss, clip_norm)
                wanted_norm = torch.nn.utils.get_total_norm([p.grad for p in theirs])
                assert norm.item() == pytest.approx(wanted_norm.item(), rel=1e-5)
                if wanted_norm.isfinite() and loss.isfinite():
                    if clip_norm:
                        torch.nn.utils.clip_grads_with_norm_(theirs, clip_norm, wanted_norm)
                    wanted.step()
                for p, q in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(mixed.weight(p), q.data, rtol=2e-6, atol=2e-6)
                    # the interpreter truncates
                    assert torch.allclose(
                        p.detach().float(), mixed.weight(p), rtol=2**-8 if DEVICE == "cuda" else 2**-7
                    )
        assert all(p.dtype == torch.float32 for p in ours)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.data, q.data, rtol=2e-6, atol=2e-6)
        for key, value in wanted.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key].cpu(), value.cpu(), rtol=1e-5, atol=1e-6)


def test_a_parameter_without_a_gradient_stays():
    params, optimizer = make()
    mixed = DeviceAdamW(optimizer, [params[0]])
    before = [p.detach().clone() for p in params]
    with mixed.active():
        params[0].grad = torch.ones_like(params[0])
        mixed.prepare()
        mixed.step(torch.tensor(1.0, device=DEVICE), 0.0)
    assert not torch.equal(params[0].data, before[0])
    assert torch.equal(params[1].data, before[1])
    assert torch.equal(params[2].data, before[2])


def test_gradients_of_any_layout_are_read():
    params, optimizer = make()
    mixed = DeviceAdamW(optimizer, [params[0]])
    twins, wanted = make()
    with mixed.active():
        grad = torch.randn(8, 37, device=DEVICE).t()
        params[0].grad, twins[0].grad = grad.bfloat16(), grad.bfloat16().float()
        mixed.prepare()
        mixed.step(torch.tensor(1.0, device=DEVICE), 0.0)
    wanted.step()
    torch.testing.assert_close(params[0].data, twins[0].data, rtol=2e-6, atol=2e-6)
