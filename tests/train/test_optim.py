import math

import pytest
import torch
from safetensors.torch import load_file

from hgrn2.storage.hashed import write_safetensors
from hgrn2.train.config import TrainConfig
from hgrn2.train.optim import NamedOptimizer
from tests.refusals import refuses
from tests.train.tiny_run import ROLES, TinyModel


def make(optimizer="adamw", **settings):
    torch.manual_seed(0)
    model = TinyModel(dropout=0.0)
    return model, NamedOptimizer(model, ROLES, TrainConfig(max_steps=10, optimizer=optimizer, **settings))


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_only_where_it_belongs(name):
    model, optimizer = make(name, weight_decay=0.25)
    decayed = {"embedding.weight", "hidden.weight", "head.weight"}
    # with a gradient of zero, AdamW's only effect is the decay
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.set_lr_fraction(1.0)
    optimizer.step()
    for n, p in model.named_parameters():
        factor = 1 - 1e-3 * 0.25 if n in decayed else 1.0
        torch.testing.assert_close(p.detach(), before[n] * factor)


def test_first_adamw_step_by_hand():
    model, optimizer = make(weight_decay=0.5, learning_rate=0.1)
    fill_gradients(model, 1)
    before = model.head.weight.detach().clone()
    sign = model.head.weight.grad.sign()
    assert optimizer.set_lr_fraction(0.5) == pytest.approx(0.05)
    optimizer.step()
    # after one step the bias-corrected moments are g and g^2, so the update is the gradient's sign
    torch.testing.assert_close(model.head.weight.detach(), before * (1 - 0.05 * 0.5) - 0.05 * sign)


def test_muon_takes_the_hidden_matrices_and_nothing_else():
    model, optimizer = make("muon", weight_decay=0.0, learning_rate=0.1, muon_learning_rate=0.2)
    fill_gradients(model, 1)
    before = model.hidden.weight.detach().clone()
    optimizer.set_lr_fraction(1.0)
    optimizer.step()
    keys = {name.partition("/")[0]: set() for name in optimizer.state_tensors()}
    for name in optimizer.state_tensors():
        keys[name.partition("/")[0]].add(name.partition("/")[2])
    assert keys.pop("hidden.weight") == {"momentum_buffer"}
    assert all(found == {"step", "exp_avg", "exp_avg_sq"} for found in keys.values())
    # an orthogonal 8 x 8 update scaled by 0.2 sqrt(8): singular values near 1 before the scale
    update = (before - model.hidden.weight.detach()) / (0.2 * 0.2 * math.sqrt(8))
    singular = torch.linalg.svdvals(update)
    assert 0.5 < singular.min() <= singular.max() < 1.4


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_by_name_survives_the_file(name, tmp_path):
    model, optimizer = make(name)
    for seed in range(3):
        fill_gradients(model, seed)
        optimizer.step()
    write_safetensors(tmp_path / "state", optimizer.state_tensors())
    other_model, other = make(name)
    other_model.load_state_dict(model.state_dict())
    other.load_state_tensors(load_file(tmp_path / "state"))
    for m, o in ((model, optimizer), (other_model, other)):
        fill_gradients(m, 7)
        o.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, other_model.get_parameter(n)), n


def test_state_of_another_model_is_refused():
    _, optimizer = make()
    with refuses("invalid-value", "'stranger.weight'"):
        optimizer.load_state_tensors({"stranger.weight/exp_avg": torch.zeros(1)})


def test_muon_without_torch_support(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with refuses("invalid-value", "muon"):
        make("muon")


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_state_of_another_optimizer_is_refused(before, after):
    model, optimizer = make(before)
    fill_gradients(model, 0)
    optimizer.step()
    with refuses("invalid-value", after):
        make(after)[1].load_state_tensors(optimizer.state_tensors())
