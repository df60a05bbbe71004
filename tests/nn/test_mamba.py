"""Mamba against transformers' mixer with copied weights, and its initial values against the paper's."""

import math

import pytest
import torch
from torch.nn import functional as F

from hgrn2.nn.mixers import Context, Mamba
from hgrn2.nn.mixers.mamba import MambaOptions
from hgrn2.nn.parameters import InitialValues
from hgrn2.train.optim import ROLES
from tests.numerics import relative_error
from tests.refusals import refuses

transformers = pytest.importorskip("transformers")


def ours(hidden_size=48, state_size=16, conv_size=4, expand=2, dt_rank=None, bias=False):
    mixer = Mamba(hidden_size, state_size, conv_size, expand, dt_rank, bias)
    mixer.reset_parameters(InitialValues(0.2, 0, 1, torch.Generator().manual_seed(0)))
    return mixer


def theirs(mixer, hidden_size=48, dtype=torch.float32):
    """Transformers' mixer with the weights of ours."""
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    config = MambaConfig(
        hidden_size=hidden_size, state_size=mixer.state_size, conv_kernel=mixer.conv_size, num_hidden_layers=1,
        expand=mixer.width // hidden_size, time_step_rank=mixer.dt_rank, use_bias=mixer.in_proj.bias is not None,
    )  # fmt: skip
    found = MambaMixer(config, 0)
    weights = {name.replace("conv_bias", "conv1d.bias"): x for name, x in mixer.state_dict().items()}
    found.load_state_dict(weights)
    return found.to(dtype).eval()


def results(mixer, x, call):
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    y = call(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * weight).sum().backward()
    names = {"conv1d.bias": "conv_bias"}
    gradients = {names.get(name, name): p.grad for name, p in mixer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize(
    "options",
    [{}, {"state_size": 3, "conv_size": 2, "expand": 1, "dt_rank": 5, "bias": True}],
    ids=["paper", "other sizes"],
)
@pytest.mark.parametrize("length", [2, 40])
def test_equals_transformers_mixer(options, length):
    mixer = ours(**options)
    x = torch.randn(2, length, 48, generator=torch.Generator().manual_seed(2))
    found = results(mixer, x, lambda x: mixer(x, None, Context())[0])
    other = theirs(mixer)
    wanted = results(other, x, other)
    assert found.keys() == wanted.keys()
    errors = {name: relative_error(found[name], wanted[name]).rms for name in wanted}
    assert max(errors.values()) < 2e-6, errors
    assert all(x.abs().max() > 0 for x in wanted.values())


def test_initial_values_are_the_papers():
    mixer = ours(hidden_size=256)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).repeat(512, 1))
    assert bool((mixer.D == 1).all())
    step = F.softplus(mixer.dt_proj.bias.detach()).double().log()
    low, high = math.log(1e-3), math.log(1e-1)
    assert low <= step.min().item() < low + 0.05
    assert high - 0.05 < step.max().item() <= high + 1e-6
    # uniform in the logarithm
    assert abs(step.mean().item() - (low + high) / 2) < 0.2
    for x, bound in ((mixer.conv1d.weight, 0.5), (mixer.conv_bias, 0.5), (mixer.dt_proj.weight, 0.25)):
        assert 0.95 * bound < x.abs().max().item() <= bound
    assert 0.18 < mixer.in_proj.weight.std().item() < 0.22
    assert 0.12 < mixer.out_proj.weight.std().item() < 0.16
    assert ours(hidden_size=40).dt_rank == 3
    # the same from the same generator, and the constructor's values without one
    assert all(torch.equal(a, b) for a, b in zip(mixer.parameters(), ours(hidden_size=256).parameters(), strict=True))
    assert torch.equal(Mamba(256, 16, 4, 2, None, False).A_log, mixer.A_log)


def test_what_is_no_matrix_is_not_decayed():
    roles = ours().parameter_roles()
    assert set(roles.values()) <= ROLES
    assert {name for name, role in roles.items() if role == "vector"} == {
        "A_log", "D", "dt_proj.bias", "conv_bias", "conv1d.weight"
    }  # fmt: skip


def test_operations_by_hand():
    # a channel and token: 4 taps; 16 states, each decayed, added to, multiplied by C and summed
    assert ours(hidden_size=48).flops(100) == 96 * (2 * 4 + 16 * 4)


def test_small_steps_survive_low_precision():
    """A bias of dt that bfloat16 would round to -5 is added in float32."""
    mixer, x = ours(), torch.randn(1, 200, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixer.dt_proj.weight.zero_()
        mixer.dt_proj.bias.fill_(-5.0155)
        wanted = mixer(x, None, Context())[1]["ssm"]
        with torch.autocast("cpu", torch.bfloat16):
            _, state = mixer(x, None, Context())
    assert state["ssm"].dtype == torch.float32
    assert state["conv"].dtype == torch.bfloat16
    # steps of exp(-5) would make the state larger by 0.4 %
    share = (state["ssm"] * wanted).sum() / wanted.square().sum()
    assert abs(share.item() - 1) < 3e-3


@pytest.mark.parametrize(
    ("options", "names"),
    [({"state_size": 0}, ["state_size", 0]), ({"conv_size": 1}, ["conv_size", 1]), ({"expand": 1.5}, ["expand", 1.5]),
     ({"dt_rank": 0}, ["dt_rank", 0])],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, names):
    with refuses("invalid-value", *names):
        MambaOptions(**options)
