"""Models with signed gates, features of earlier layers and narrow heads on a GPU, against float64 on the CPU."""

import copy

import pytest
import torch

from hgrn2.models import HGRN2LM, HGRN2Config
from tests.numerics import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]

VARIANTS = {
    "signed": {"gate_range": "signed", "expand_ratio": 32},
    "signed, wide heads": {"gate_range": "signed", "expand_ratio": 128},
    "dense": {"dense_state": 2, "expand_ratio": 64},
    "dense, signed": {"dense_state": 1, "gate_range": "signed", "expand_ratio": 16},
    **{f"head of {width}": {"expand_ratio": width} for width in (1, 2, 4, 8)},
    "hgrn1, kronecker": {
        "layers": "hgrn1", "mixers": {"hgrn1": {"form": "real", "expand_ratio": 4, "expansion": "kronecker"}},
    },
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_gradients_and_steps_are_those_of_the_cpu(name, packed):
    torch.manual_seed(0)
    keys = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 64}
    model = HGRN2LM(HGRN2Config.from_dict(keys | VARIANTS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    exact, model = copy.deepcopy(model).double(), model.cuda()
    ids = torch.randint(64, (1, 300))
    bounds = torch.tensor([0, 5, 5, 130, 300]) if packed else None

    def gradients(model, ids, bounds):
        loss = model.loss(ids, ids, cu_seqlens=bounds).mean
        found = torch.autograd.grad(loss, list(model.parameters()))
        return [loss.detach().cpu(), *(g.cpu() for g in found)]

    wanted = gradients(exact, ids, bounds)
    for one, two in zip(gradients(model, ids.cuda(), None if bounds is None else bounds.cuda()), wanted, strict=True):
        assert two.abs().max() == 0 or relative_error(one.double(), two).rms < 1e-2
    with torch.no_grad():
        logits, _ = exact(ids)
        _, state = model(ids[:, :290].cuda())
        for t in range(290, 300):
            y, state = model.step(ids[:, t].cuda(), state)
            assert relative_error(y.cpu().double(), logits[:, t]).rms < 1e-2
