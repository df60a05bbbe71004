"""Griffin's recurrent block against transformers' with copied weights, and against its equations near decays of 1."""

import pytest
import torch
from torch.nn import functional as F

from hgrn2.nn.mixers import Context, Griffin
from hgrn2.nn.mixers.griffin import GriffinOptions
from hgrn2.nn.parameters import InitialValues
from hgrn2.train.optim import ROLES
from tests.numerics import relative_error
from tests.refusals import refuses

transformers = pytest.importorskip("transformers")

D, BLOCKS = 24, 3


def ours(width=None, bias=True, decay=None, seed=0):
    """A mixer with random parameters; decays are far from 1 unless given, where transformers loses digits."""
    mixer = Griffin(D, width, BLOCKS, 4, bias)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
        if decay is not None:
            mixer.decay.fill_(decay)
    return mixer


def theirs(mixer):
    """Transformers' block with the weights of ours."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    config = RecurrentGemmaConfig(
        hidden_size=D, lru_width=mixer.width, num_attention_heads=BLOCKS, conv1d_width=4, num_hidden_layers=1
    )
    found = RecurrentGemmaRecurrentBlock(config, 0)
    p = dict(mixer.state_dict())
    block = p["gate_weight"].shape[1]
    weights = {
        "conv_1d.weight": p["conv1d.weight"],
        "conv_1d.bias": p["conv_bias"],
        "rg_lru.recurrent_param": p["decay"],
    }
    for name, own in (("linear_y", "y_proj"), ("linear_x", "x_proj"), ("linear_out", "o_proj")):
        weights |= {f"{name}.weight": p[f"{own}.weight"], f"{name}.bias": p[f"{own}.bias"]}
    for name, part in (("recurrent", slice(0, block)), ("input", slice(block, None))):
        weights[f"rg_lru.{name}_gate_weight"] = p["gate_weight"][..., part]
        weights[f"rg_lru.{name}_gate_bias"] = p["gate_bias"][..., part]
    found.load_state_dict(weights)
    return found


def gradients_by_our_names(block):
    p = {name: x.grad for name, x in block.named_parameters()}
    names = {"conv_1d.weight": "conv1d.weight", "conv_1d.bias": "conv_bias", "rg_lru.recurrent_param": "decay"}
    names |= {f"linear_{theirs}.{kind}": f"{own}_proj.{kind}" for theirs, own in (("y", "y"), ("x", "x"), ("out", "o"))
              for kind in ("weight", "bias")}  # fmt: skip
    found = {own: p[name] for name, own in names.items()}
    for kind in ("weight", "bias"):
        parts = [p[f"rg_lru.{gate}_gate_{kind}"] for gate in ("recurrent", "input")]
        found[f"gate_{kind}"] = torch.cat(parts, -1)
    return found


def backward(y):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * weight).sum().backward()


@pytest.mark.parametrize("length", [2, 40])
@pytest.mark.parametrize("width", [None, 36])
def test_equals_transformers_block(length, width):
    mixer, x = ours(width), torch.randn(2, length, D, generator=torch.Generator().manual_seed(2))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, _ = mixer(one, None, Context())
    backward(y)
    block = theirs(mixer)
    wanted, _ = block(two, torch.arange(length).unsqueeze(0).expand(2, -1), None, use_cache=False)
    backward(wanted)
    found = {"y": y, "x": one.grad, **{name: p.grad for name, p in mixer.named_parameters()}}
    exact = {"y": wanted, "x": two.grad, **gradients_by_our_names(block)}
    assert found.keys() == exact.keys()
    errors = {name: relative_error(found[name], exact[name]).rms for name in exact}
    # theirs has 1 - exp(2 log a), which loses digits where a is near 1
    assert max(errors.values()) < 5e-6, errors
    assert all(x.abs().max() > 0 for x in exact.values())


def transcription(mixer, x):
    """The block's equations token by token."""
    p = dict(mixer.named_parameters())
    u = F.pad(F.linear(x, p["x_proj.weight"], p["x_proj.bias"]), (0, 0, 3, 0))
    u = sum(u[:, j : j + x.shape[1]] * p["conv1d.weight"][:, 0, j] for j in range(4)) + p["conv_bias"]
    dense = torch.stack([torch.block_diag(*w.unbind()) for w in p["gate_weight"].chunk(2, -1)])
    r, i = (torch.sigmoid(u @ w + b.flatten()) for w, b in zip(dense, p["gate_bias"].chunk(2, -1), strict=True))
    h, rows = 0, []
    for t in range(x.shape[1]):
        a = torch.exp(-8 * r[:, t] * F.softplus(p["decay"]))
        h = a * h + (torch.sqrt(1 - a**2) if t else 1) * i[:, t] * u[:, t]
        rows.append(h)
    y = F.gelu(F.linear(x, p["y_proj.weight"], p["y_proj.bias"]), approximate="tanh")
    return F.linear(torch.stack(rows, 1) * y, p["o_proj.weight"], p["o_proj.bias"])


@pytest.mark.parametrize("decay", [-12.0, -5.0, 0.0, 6.0])
def test_keeps_its_digits_for_every_decay(decay):
    mixer, exact = ours(decay=decay), ours(decay=decay).double()
    x = torch.randn(1, 60, D, generator=torch.Generator().manual_seed(2))
    y, _ = mixer(x, None, Context())
    backward(y)
    wanted = transcription(exact, x.double())
    backward(wanted)
    errors = {name: relative_error(p.grad, q.grad).rms for (name, p), q in
              zip(mixer.named_parameters(), exact.parameters(), strict=True)}  # fmt: skip
    errors["y"] = relative_error(y, wanted).rms
    assert max(errors.values()) < 3e-6, errors


def test_a_decay_of_exactly_one_has_finite_gradients():
    mixer = ours(decay=-200.0)
    y, state = mixer(torch.randn(1, 9, D), None, Context())
    backward(y)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    # nothing enters but the first token
    _, first = mixer(torch.randn(1, 1, D), None, Context())
    assert (state["recurrent"] != 0).all()
    assert bool(first["started"])


def test_only_the_first_token_enters_whole():
    """With or without a state from `init_state`, behind padding, and in packed sequences, some of them empty."""
    mixer = ours(bias=False)
    x = torch.randn(1, 7, D, generator=torch.Generator().manual_seed(3))
    wanted, _ = mixer(x, None, Context())
    fresh, _ = mixer(x, mixer.init_state(1), Context())
    padded, _ = mixer(F.pad(x, (0, 0, 4, 0)), None, Context(mask=torch.arange(11).unsqueeze(0) >= 4))
    rows = torch.cat([x, x], 1)
    packed, state = mixer(rows, None, Context(cu_seqlens=torch.tensor([0, 0, 7, 7, 14, 14])))
    for found in (fresh, padded[:, 4:], packed[:, :7], packed[:, 7:]):
        torch.testing.assert_close(found, wanted)
    assert state["started"].tolist() == [False, True, False, True, False]
    # carried on, the next token is not a first one
    carried, _ = mixer(x, mixer(x, None, Context())[1], Context())
    assert not torch.allclose(carried, wanted, atol=1e-3)


def test_initial_values_are_the_papers():
    mixer = Griffin(256, None, 4, 4, True)
    mixer.reset_parameters(InitialValues(0.2, 0, 1, torch.Generator().manual_seed(0)))
    decay = torch.exp(-8 * F.softplus(mixer.decay.detach().double()))
    assert 0.8999 < decay.min().item() < 0.902
    assert 0.997 < decay.max().item() < 0.9991
    assert abs(decay.mean().item() - 0.9495) < 0.01
    assert abs(mixer.gate_weight.std().item() - 64**-0.5) < 0.005
    assert abs(mixer.conv1d.weight.std().item() - 0.05) < 0.005
    assert not mixer.gate_bias.any()
    roles = mixer.parameter_roles()
    assert set(roles.values()) <= ROLES
    assert {name for name, role in roles.items() if role == "matrix"} == {f"{name}_proj.weight" for name in "yxo"}


def test_operations_by_hand():
    # a channel and token: 4 taps, two gates from a block of 8, a product and a sum
    assert ours().flops(100) == D * (2 * 4 + 2 * 2 * 8 + 2)


@pytest.mark.parametrize(
    ("options", "names"),
    [({"width": 0}, ["width", 0]), ({"num_blocks": 0}, ["num_blocks", 0]), ({"conv_size": 1}, ["conv_size", 1])],
)
def test_options_that_do_not_fit_are_refused(options, names):
    with refuses("invalid-value", *names):
        GriffinOptions(**options)


def test_blocks_that_do_not_fit_are_refused():
    with refuses("contradiction", "num_blocks", 5, 24):
        GriffinOptions(num_blocks=5).check_width(24)
    with refuses("contradiction", "num_blocks", 16, 24):
        GriffinOptions(width=24).check_width(32)
    GriffinOptions(width=32).check_width(24)
