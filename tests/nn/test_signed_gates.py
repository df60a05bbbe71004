"""Gates in (-1, 1): the scan with signs against a loop in float64, and what such gates can do."""

from itertools import pairwise

import pytest
import torch

from hgrn2 import HGRN2Config, HGRN2Mixer
from hgrn2.models import HGRN2LM
from hgrn2.nn.mixers import HGRN2, Context
from hgrn2.nn.mixers.signed_gates import Operands, scan_with_signs, signed_gate
from tests.numerics import FLOAT64_RMS, relative_error
from tests.refusals import refuses

H, K, V = 2, 3, 4


def inputs(dtype=torch.float64, length=70, batch=2, sequences=2):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    q, v = normal(batch, length, H, K), normal(batch, length, H, V)
    z = normal(batch, length, H, K)
    bound = (0.6 * torch.rand(H, K, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    return {"q": q, "z": z, "v": v, "bound": bound, "state": normal(sequences, H, K, V)}


def loop(x, bounds=None, reverse=False):
    """The recurrence token by token, of each sequence alone."""
    gate = x["bound"] + (1 - x["bound"]) * torch.sigmoid(x["z"])
    f = 2 * gate - 1
    if bounds is None:
        sequences = [(b, 0, f.shape[1]) for b in range(len(f))]
    else:
        sequences = [(0, *pair) for pair in pairwise(bounds)]
    y, ends = torch.zeros_like(x["v"]).clone(), []
    for n, (b, start, end) in enumerate(sequences):
        state = x["state"][n]
        for t in reversed(range(start, end)) if reverse else range(start, end):
            state = f[b, t, :, :, None] * state + (1 - f[b, t])[..., None] * x["v"][b, t, :, None]
            row = torch.zeros_like(y)
            row[b, t] = 1
            y = y + row * 0.5 * (x["q"][b, t, :, None] @ state).squeeze(1)
        ends.append(state)
    return y, torch.stack(ends)


def scan(x, bounds=None, reverse=False, backend="auto"):
    k, decays = signed_gate(x["z"], x["bound"])
    context = Context(None if bounds is None else torch.tensor(bounds))
    return scan_with_signs(
        Operands(x["q"], k.to(x["q"].dtype), x["v"], decays), x["state"], context, scale=0.5, backend=backend,
        reverse=reverse,
    )  # fmt: skip


def results(function, x, *args, **settings):
    y, end = function(x, *args, **settings)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    gradients = torch.autograd.grad((y * weights).sum() + (end * end.detach().cos()).sum(), list(x.values()))
    return {"y": y, "end": end, **{f"d_{name}": g for name, g in zip(x, gradients, strict=True)}}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 20, 20, 33, 70]])
@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_outputs_states_and_gradients_are_those_of_the_loop(backend, bounds, reverse):
    x = inputs() if bounds is None else inputs(batch=1, sequences=4)
    negative = signed_gate(x["z"], x["bound"])[1].negative
    assert 0.1 < negative.double().mean() < 0.9
    found, wanted = results(scan, x, bounds, reverse, backend), results(loop, x, bounds, reverse)
    for name, exact in wanted.items():
        assert relative_error(found[name], exact).rms < FLOAT64_RMS, name


def test_single_precision_keeps_its_digits():
    """Gates near 0 too, whose logarithms are far from 0."""
    x = inputs(torch.float32)
    found = results(scan, x)
    wanted = results(loop, {name: value.detach().double().requires_grad_() for name, value in x.items()})
    for name, exact in wanted.items():
        assert relative_error(found[name].double(), exact).rms < 2e-5, name


def test_gates_of_every_size_are_finite():
    z = torch.tensor([-200.0, -30, -1e-3, 0, 1e-3, 30, 200, 1e4]).requires_grad_()
    k, (log_size, negative) = signed_gate(z, None)
    f = torch.where(negative, -1, 1) * log_size.exp()
    torch.testing.assert_close(f, torch.tanh(z / 2), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(k, 1 - torch.tanh(z / 2), rtol=1e-5, atol=1e-7)
    # padding: the state is kept exactly, and nothing is written
    assert (k[-1].item(), log_size[-1].item(), negative[-1].item()) == (0, 0, False)
    (gradient,) = torch.autograd.grad(log_size.sum() + k.sum(), z)
    assert bool(gradient.isfinite().all())


def test_a_half_as_bound_leaves_positive_gates():
    z = torch.linspace(-50, 50, 101)
    assert not signed_gate(z, torch.full((1,), 0.5))[1].negative.any()
    assert bool(signed_gate(z, torch.full((1,), 0.49))[1].negative.any())


def test_one_channel_tracks_parity():
    """The state changes its sign with every 1, as no state with positive gates can."""
    bits = torch.randint(2, (1, 300), generator=torch.Generator().manual_seed(0))
    z = torch.where(bits == 1, -30.0, 30.0).double().reshape(1, 300, 1, 1)
    k, decays = signed_gate(z, None)
    one = torch.ones(1, 300, 1, 1, dtype=torch.float64)
    y, _ = scan_with_signs(Operands(one, k, 0 * one, decays), one[:, :1], Context())
    assert torch.equal(y.flatten() < 0, bits[0].cumsum(0) % 2 == 1)


def test_the_mixer_alone_takes_signed_gates_but_no_earlier_layers():
    torch.manual_seed(0)
    mixer = HGRN2Mixer(16, 8, gate_range="signed")
    x = torch.randn(2, 9, 16)
    whole, _ = mixer(x)
    first, state = mixer(x[:, :5])
    rows = [first]
    for t in range(5, 9):
        y, state = mixer(x[:, t : t + 1], state=state)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-4, atol=1e-5)
    with refuses("unsupported", "dense_state", 2):
        HGRN2Mixer(16, 8, dense_state=2)


def test_every_direction_takes_signed_gates(monkeypatch):
    torch.manual_seed(0)
    x, bound = torch.randn(2, 12, 16), 0.4 * torch.rand(16)
    causal = HGRN2Mixer(16, 8, gate_range="signed")

    def run(direction, x):
        mixer = HGRN2Mixer(16, 8, gate_range="signed", direction=direction)
        mixer.load_state_dict(causal.state_dict())
        return mixer(x, bound, grid=(3, 4))[0]

    torch.testing.assert_close(run("reverse", x), causal(x.flip(1), bound)[0].flip(1))
    folded = run("2d", x)
    monkeypatch.setattr(HGRN2Mixer, "folds_columns", False)
    torch.testing.assert_close(folded, run("2d", x), rtol=1e-4, atol=1e-5)
    with refuses("unsupported", "dense_state", 1, "reverse"):
        HGRN2(16, 8, dense_state=1, direction="reverse")


@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"gate_range": "negative"}, "invalid-value", ["gate_range", "negative", "signed"]),
        ({"gate_range": "signed", "min_log_decay": -3.0}, "contradiction", ["min_log_decay", "signed"]),
        ({"dense_state": -1}, "invalid-value", ["dense_state", -1]),
        ({"dense_state": 1.5}, "invalid-value", ["dense_state", 1.5]),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, code, names):
    with refuses(code, *names):
        HGRN2Config(**changes)


def test_layers_have_gates_for_the_features_that_are_there():
    config = HGRN2Config(
        vocab_size=9, hidden_size=16, expand_ratio=8, num_hidden_layers=4, intermediate_size=8, dense_state=2,
        layers="hgrn2,attention,hgrn2,hgrn2", mixers={"attention": {"num_heads": 2}},
    )  # fmt: skip
    mixers = [layer.attn for layer in HGRN2LM(config).model.layers]
    assert [mixer.num_earlier for mixer in mixers] == [0, 0, 1, 2]
    assert [hasattr(mixer, "dense") for mixer in mixers] == [False, False, True, True]


def test_keys_of_before_are_written_as_before():
    assert not {"gate_range", "dense_state"} & HGRN2Config().to_dict().keys()
    config = HGRN2Config(gate_range="signed", dense_state=1)
    assert HGRN2Config.from_dict(config.to_dict()) == config
