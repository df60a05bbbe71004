import pytest
import torch

from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.nn.gates import bounds_of_layers, lower_bounds, set_initial_bounds
from tests.refusals import refuses

KINDS = ["inclusive", "exclusive"]


def gammas():
    generator = torch.Generator().manual_seed(0)
    for layers, width, size in ((1, 3, 1.0), (2, 5, 1.0), (24, 64, 1.0), (7, 16, 30.0), (5, 8, 1e4)):
        yield torch.randn(layers, width, generator=generator) * size
    yield torch.tensor([[0.0], [200.0], [0.0]])
    yield torch.tensor([[200.0], [0.0], [0.0]])
    yield torch.tensor([[0.0], [0.0], [200.0]])
    yield torch.full((12, 4), 3e38)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_are_bounds(kind, dtype):
    for gamma in gammas():
        found = lower_bounds(gamma.to(dtype), kind)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert found.shape == gamma.shape
        assert not found[0].any()
        assert bool(((found >= 0) & (found < 1)).all())
        assert bool((found.diff(dim=0) >= 0).all())
        # float32 holds them as well: the operator takes float32
        assert bool((found.float() < 1).all())


@pytest.mark.parametrize("value", [0.0, 1.0, -7.5])
@pytest.mark.parametrize("kind", KINDS)
def test_uniform_parameters_give_equal_steps(kind, value):
    found = lower_bounds(torch.full((8, 3), value, dtype=torch.float64), kind)
    torch.testing.assert_close(found, (torch.arange(8, dtype=torch.float64) / 8)[:, None].expand(8, 3))


def test_the_two_formulas():
    gamma = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64).log1p()
    # shares 1/6, 2/6, 3/6
    torch.testing.assert_close(lower_bounds(gamma, "inclusive"), torch.tensor([[0], [2 / 6], [5 / 6]]).double())
    torch.testing.assert_close(lower_bounds(gamma, "exclusive"), torch.tensor([[0], [1 / 6], [3 / 6]]).double())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    gamma = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lower_bounds(x, kind), (gamma,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_the_first_layer_asks_for_no_gradient(kind, num_layers):
    gamma = torch.randn(num_layers, 3, requires_grad=True)
    bounds = bounds_of_layers(gamma, kind, range(num_layers))
    assert torch.equal(torch.stack(bounds), lower_bounds(gamma, kind))
    # but a parameter has one, whatever there is of layers
    assert [b.requires_grad for b in bounds] == [num_layers == 1] + [True] * (num_layers - 1)
    sum(bounds[num_layers > 1 :]).sum().backward()
    assert gamma.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_layer_gives_the_gradient_where_no_other_uses_its_bound(kind):
    gamma = torch.randn(3, 2, requires_grad=True)
    bounds_of_layers(gamma, kind, [0])[0].sum().backward()
    assert torch.equal(gamma.grad, torch.zeros(3, 2))
    assert not bounds_of_layers(gamma, kind, [0, 2])[0].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_bound_that_stays_attached_changes_no_gradient(kind):
    gamma = torch.randn(4, 3, requires_grad=True)
    found = []
    for detach_first in (True, False):
        bounds = bounds_of_layers(gamma, kind, range(4), detach_first=detach_first)
        assert bounds[0].requires_grad != detach_first
        loss = sum((bound * (i + 2)).exp().sum() for i, bound in enumerate(bounds))
        found.append(torch.autograd.grad(loss, gamma)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", [0.1, 0.75, 0.999])
def test_initial_bounds_rise_in_equal_steps(kind, top):
    gamma = torch.randn(5, 3, dtype=torch.float64)
    set_initial_bounds(gamma, kind, top)
    wanted = torch.linspace(0, top, 5, dtype=torch.float64).unsqueeze(1).expand(5, 3)
    torch.testing.assert_close(lower_bounds(gamma, kind), wanted)
    set_initial_bounds(gamma, kind, None)
    assert not gamma.any()
    alone = torch.ones(1, 3)
    set_initial_bounds(alone, kind, top)
    assert not lower_bounds(alone, kind).any()


@pytest.mark.parametrize("kind", KINDS)
def test_models_start_at_the_initial_bound(kind):
    pytest.importorskip("transformers")
    from hgrn2.hf import HGRN2Config as Config
    from hgrn2.hf import HGRN2ForCausalLM

    keys = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 3, "expand_ratio": 8, "intermediate_size": 8}
    keys |= {"lower_bound": kind, "initial_bound": 0.9}
    for model in (HGRN2LM(HGRN2Config(**keys)), HGRN2ForCausalLM(Config(**keys))):
        found = lower_bounds(model.model.lower_bounds, kind)
        torch.testing.assert_close(found[:, 0], torch.tensor([0, 0.45, 0.9]))
    with refuses("invalid-value", "initial_bound", 1.0):
        HGRN2Config(**keys | {"initial_bound": 1.0})
