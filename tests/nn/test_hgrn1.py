"""HGRN1 against transcriptions of its equations: plain torch, token by token, nothing of the package's layers."""

import pytest
import torch
from torch.nn import functional as F

from hgrn2.nn.mixers import HGRN1, Context
from hgrn2.nn.mixers.hgrn1 import HGRN1Options
from hgrn2.nn.parameters import InitialValues
from tests.numerics import relative_error
from tests.refusals import refuses

D, T = 6, 11
BOUND = torch.linspace(0, 0.9, D)


def make(dtype=torch.float64, seed=0, **options):
    values = {"form": "complex", "norm_before_gate": None, "norm": "rmsnorm", "norm_eps": 1e-5, "norm_affine": True,
              "bias": False} | options  # fmt: skip
    mixer = HGRN1(D, **values).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return mixer


def results(function, mixer, x, bound):
    x, bound = x.clone().requires_grad_(), bound.to(x.dtype, copy=True).requires_grad_()
    mixer.zero_grad()
    y = function(x, bound)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    (y * weight).sum().backward()
    gradients = {name: p.grad for name, p in mixer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "bound": bound.grad, **gradients}


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def as_fla(mixer, x, bound):
    """The real form: fla's layer with its gated norm."""
    p = dict(mixer.named_parameters())
    gate = bound + (1 - bound) / (1 + torch.exp(-(x @ p["f_proj.weight"].T)))
    value = x @ p["i_proj.weight"].T
    value = value * torch.sigmoid(value) * (1 - gate)
    h, rows = torch.zeros(len(x), D, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = gate[:, t] * h + value[:, t]
        rows.append(h)
    g = x @ p["g_proj.weight"].T
    return (rms_norm(torch.stack(rows, 1), p["g_norm.weight"]) * g * torch.sigmoid(g)) @ p["o_proj.weight"].T


def as_in_the_paper(mixer, x, bound, norm_first=False):
    """The complex form, with its real and imaginary parts computed separately, LayerNorm and biases."""
    p = dict(mixer.named_parameters())
    linear = {name: F.linear(x, p[f"{name}_proj.weight"], p[f"{name}_proj.bias"]) for name in "fig"}
    forget = bound + (1 - bound) * torch.sigmoid(linear["f"])
    c = linear["i"] * torch.sigmoid(linear["i"])
    real, imag = torch.zeros(2, len(x), D, dtype=x.dtype)
    cos, sin, rows = torch.cos(p["theta"]), torch.sin(p["theta"]), []
    for t in range(x.shape[1]):
        real, imag = (
            forget[:, t] * (cos * real - sin * imag) + (1 - forget[:, t]) * c[:, t, 0::2],
            forget[:, t] * (sin * real + cos * imag) + (1 - forget[:, t]) * c[:, t, 1::2],
        )
        rows.append(torch.cat([real, imag], -1))
    h, gate = torch.stack(rows, 1), F.silu(linear["g"])
    norm = (p["g_norm.weight"], p["g_norm.bias"], 1e-5)
    y = F.layer_norm(h, (2 * D,), *norm) * gate if norm_first else F.layer_norm(h * gate, (2 * D,), *norm)
    return F.linear(y, p["o_proj.weight"], p["o_proj.bias"])


@pytest.mark.parametrize(
    ("options", "transcription"),
    [
        ({"form": "real"}, as_fla),
        ({"norm": "layernorm", "bias": True}, as_in_the_paper),
        ({"norm": "layernorm", "bias": True, "norm_before_gate": True}, lambda *a: as_in_the_paper(*a, True)),
    ],
    ids=["fla", "paper", "released code"],
)
@pytest.mark.parametrize(("dtype", "rms"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["f64", "f32"])
def test_equals_a_transcription(options, transcription, dtype, rms):
    mixer = make(dtype, **options)
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    found = results(lambda x, bound: mixer(x, None, Context(lower_bound=bound))[0], mixer, x, BOUND)
    exact = make(torch.float64, **options)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), mixer.parameters(), strict=True):
            p.copy_(q)
    wanted = results(lambda x, bound: transcription(exact, x, bound), exact, x.double(), BOUND)
    errors = {name: relative_error(found[name], wanted[name]).rms for name in wanted}
    assert max(errors.values()) < rms, errors
    assert all(gradient.abs().max() > 0 for gradient in wanted.values())


def test_orders_of_norm_and_gate():
    assert not make().norm_before_gate
    assert make(form="real").norm_before_gate
    for form in ("complex", "real"):
        x = torch.randn(1, T, D, dtype=torch.float64)
        one, two = (make(form=form, norm_before_gate=before)(x, None, Context())[0] for before in (False, True))
        assert not torch.allclose(one, two, atol=1e-3)


def test_initial_values_and_roles():
    mixer = make(bias=True)
    mixer.reset_parameters(InitialValues(0.5, 0, 8, torch.Generator().manual_seed(0)))
    assert mixer.theta is not None
    torch.testing.assert_close(mixer.theta.detach(), torch.tensor([10000 ** (-j / 3) for j in range(D)]).double())
    assert 0.4 < mixer.i_proj.weight.std().item() < 0.6
    assert 0.1 < mixer.o_proj.weight.std().item() < 0.15
    assert mixer.g_norm.weight.sum().item() == 2 * D  # pyright: ignore
    roles = mixer.parameter_roles()
    assert {name for name, role in roles.items() if role == "matrix"} == {f"{name}_proj.weight" for name in "ifgo"}
    assert roles["theta"] == "vector"
    assert make(form="real").theta is None


def test_operations_by_hand():
    # a complex product takes 4 products and 2 sums, a complex sum 2
    assert make().flops(100) == 8 * D
    assert make(form="real").flops(100) == 2 * D


@pytest.mark.parametrize(
    ("options", "names"),
    [({"form": "quaternion"}, ["form", "quaternion", "complex"]), ({"norm": "none"}, ["norm", "none"]),
     ({"norm_eps": -1.0}, ["norm_eps", -1]), ({"norm_before_gate": "yes"}, ["norm_before_gate", "yes"])],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, names):
    with refuses("invalid-value", *names):
        HGRN1Options(**options)
