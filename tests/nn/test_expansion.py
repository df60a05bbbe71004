"""State expansions of HGRN1: each structure as the whole matrix it stands for, and the mixer token by token."""

import pytest
import torch
from torch.nn import functional as F

from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.models.cost import cost
from hgrn2.nn.expansion import Expansion
from hgrn2.nn.mixers import Context, find_mixer
from hgrn2.nn.parameters import InitialValues
from tests.models.cases import SIZE
from tests.models.test_cost import config, saved_bytes
from tests.numerics import FLOAT64_RMS, relative_error
from tests.refusals import refuses

D, N, T = 12, 3, 9
KINDS = ["dense", "low-rank", "group-linear", "group-linear-interaction", "khatri-rao", "kronecker"]
kinds = pytest.mark.parametrize("kind", KINDS)


def draw(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def whole(expansion, kind):
    """The matrix [n D, D]."""
    weights = [part.weight for part in expansion.parts]
    if kind == "dense":
        return weights[0]
    if kind == "low-rank":
        return weights[1] @ weights[0]
    if kind == "khatri-rao":
        return torch.cat([weights[0] * row for row in expansion.factor])
    if kind == "kronecker":
        return torch.kron(weights[0], weights[1])
    blocks = torch.block_diag(*weights)
    if kind == "group-linear-interaction":
        return torch.stack([blocks[(row % N) * D + row // N] for row in range(N * D)])
    return blocks


@kinds
def test_each_structure_is_a_matrix(kind):
    expansion = draw(Expansion(kind, D, N, True).double())
    x = torch.randn(2, T, D, dtype=torch.float64)
    wanted = (x @ whole(expansion, kind).T).unflatten(-1, (N, D)) + expansion.bias
    torch.testing.assert_close(expansion(x), wanted)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("dense", N * D * D), ("low-rank", (N + 1) * D * 3), ("group-linear", D * D),
        ("group-linear-interaction", D * D), ("khatri-rao", D * D + N * D), ("kronecker", 3 * N * 3 + 4 * 4),
    ],
)  # fmt: skip
def test_parameters_by_hand(kind, wanted):
    assert sum(p.numel() for p in Expansion(kind, D, N, False).parameters()) == wanted


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("dense", 0), ("low-rank", 0), ("group-linear", 0), ("group-linear-interaction", 0),
        ("khatri-rao", 2 * D * D * (N - 1)), ("kronecker", 2 * (9 * 3 * 4 + 4 * 4 * 3) - 2 * (27 + 16)),
    ],
)  # fmt: skip
def test_operations_by_hand(kind, wanted):
    assert Expansion(kind, D, N, False).flops() == wanted


@kinds
def test_initial_matrices_have_the_size_that_is_asked_for(kind):
    expansion = Expansion(kind, 64, 4, True)
    expansion.reset_parameters(InitialValues(0.02, 0, 2, torch.Generator().manual_seed(0)))
    x = torch.randn(256, 1, 64, generator=torch.Generator().manual_seed(1))
    size = expansion(x).detach().std().item()
    # a block of group-linear has a quarter of the inputs
    assert 0.5 < size / (0.02 * (16 if "group" in kind else 64) ** 0.5) < 2
    rows = expansion(x).detach()
    assert not torch.allclose(rows[:, :, 0], rows[:, :, 1])


def loop(mixer, kind, x, bound):
    """The mixer from its equations, with whole matrices."""
    z, c, g = (
        (x @ whole(part, kind).T).unflatten(-1, (N, D)) + part.bias
        for part in (mixer.f_proj, mixer.i_proj, mixer.g_proj)
    )
    f = bound + (1 - bound) * torch.sigmoid(z)
    h, rows = torch.zeros(len(x), N, D, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = f[:, t] * h + (1 - f[:, t]) * F.silu(c[:, t])
        rows.append((F.silu(g[:, t]) * h).sum(1))
    y = torch.stack(rows, 1)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.g_norm.weight
    return F.linear(y, mixer.o_proj.weight, mixer.o_proj.bias), h.flatten(1)


@kinds
def test_outputs_states_and_gradients_are_those_of_the_equations(kind):
    found = find_mixer("hgrn1")
    mixer = draw(found.build(D, found.options(form="real", expand_ratio=N, expansion=kind, bias=True)).double())
    x = torch.randn(2, T, D, dtype=torch.float64).requires_grad_()
    bound = torch.linspace(0, 0.9, D, dtype=torch.float64).requires_grad_()

    def results(y, end):
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
        loss = (y * weights).sum() + (end * end.detach().cos()).sum()
        return [y, end, *torch.autograd.grad(loss, [x, bound, *mixer.parameters()])]

    y, state = mixer(x, None, Context(lower_bound=bound))
    for one, two in zip(results(y, state["recurrent"]), results(*loop(mixer, kind, x, bound)), strict=True):
        assert bool(two.abs().max() > 0)
        assert relative_error(one, two).rms < FLOAT64_RMS


@kinds
def test_costs_are_those_of_the_model(kind):
    options = {"form": "real", "expand_ratio": 4, "expansion": kind}
    changes = {"layers": "hgrn1", "mixers": {"hgrn1": options}}
    length, model = 256, HGRN2LM(config(**changes)).train()
    found = cost(config(**changes), length)
    assert found.parameters == model.num_parameters()
    assert found.state_bytes == model.init_state(1).num_bytes == 3 * 4 * 128 * 4
    assert found.activation_bytes_per_token == pytest.approx(saved_bytes(model, length) / length, rel=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        measured = (saved_bytes(model, 2 * length) - saved_bytes(model, length)) / length
    assert found.activation_bytes_per_token_bfloat16 == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("options", "code", "names"),
    [
        ({"expand_ratio": 2}, "contradiction", ["expand_ratio", 2, "complex", "real"]),
        ({"form": "real", "expand_ratio": 2, "norm_before_gate": True}, "contradiction", ["norm_before_gate", 2]),
        ({"form": "real", "expand_ratio": 3, "expansion": "group-linear"}, "contradiction", ["expand_ratio", 3, 16]),
        ({"expansion": "tucker"}, "invalid-value", ["expansion", "tucker", "kronecker"]),
        ({"expand_ratio": 0}, "invalid-value", ["expand_ratio", 0]),
    ],
)
def test_options_that_do_not_fit_are_refused(options, code, names):
    with refuses(code, *names):
        HGRN2Config.from_dict(SIZE | {"layers": "hgrn1", "mixers": {"hgrn1": options}})
