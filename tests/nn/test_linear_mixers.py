"""Mixers with outer-product states: each against its paper's equations, and as a part of models, runs and compilers."""

import pytest
import torch
from torch import nn

from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.models.cost import cost
from hgrn2.nn.mixers import Context, find_mixer
from hgrn2.nn.mixers.outer_product import bounded_log_sigmoid, mix_outer_products, read_before_writing
from hgrn2.nn.mixers.squared_attention import squared_attention
from hgrn2.nn.parameters import InitialValues
from hgrn2.nn.token_shift import token_shift
from hgrn2.ops import linear_scan
from tests.models.cases import UNTIED, config_of, make_model, tokens
from tests.models.test_cost import config, saved_bytes
from tests.nn import mixer_transcriptions
from tests.numerics import FLOAT64_RMS, relative_error
from tests.refusals import refuses

WIDTH = 16
# a mixer, and options that fit the width
MIXERS = {
    "gla": ("gla", {"num_heads": 2, "gate_rank": 3}),
    "gla, one norm": ("gla", {"num_heads": 2, "gate_rank": 3, "norm_heads": False, "key_ratio": 1.5}),
    "gla, untied": ("gla", {"num_heads": 4} | UNTIED),
    "gla, untied without a bound": ("gla", {"num_heads": 4, "use_lower_bound": False} | UNTIED),
    "rwkv5": ("rwkv5", {"head_size": 4}),
    "rwkv6": ("rwkv6", {"head_size": 4, "mix_rank": 3, "decay_rank": 5}),
    "rebased": ("rebased", {"num_heads": 2, "feature_dim": 3}),
}
CASES = pytest.mark.parametrize("case", MIXERS)


def build(case, layer=1):
    """A mixer in float64, some way from its initial values; its options."""
    name, options = MIXERS[case]
    found = find_mixer(name)
    options = found.options(**options)
    mixer = found.build(WIDTH, options).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mixer.reset_parameters(InitialValues(0.3, layer, 3, generator))
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return mixer, options


def bound_of(mixer, options):
    generator = torch.Generator().manual_seed(4)
    bounded = type(mixer).is_bounded(options)
    return torch.rand(WIDTH, generator=generator, dtype=torch.float64).requires_grad_() if bounded else None


@CASES
@pytest.mark.parametrize("carried", [False, True])
def test_outputs_states_and_gradients_are_those_of_the_equations(case, carried):
    mixer, options = build(case)
    transcription = getattr(mixer_transcriptions, MIXERS[case][0])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 70, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    state = mixer.init_state(2)
    if carried:
        state = {k: torch.randn(s.shape, generator=generator, dtype=s.dtype).requires_grad_() for k, s in state.items()}
    bound = bound_of(mixer, options)
    parameters = dict(mixer.named_parameters())
    inputs = {"x": x, "bound": bound, **(state if carried else {}), **parameters}
    inputs = {name: value for name, value in inputs.items() if value is not None}

    def results(y, end):
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
        loss = (y * weights).sum() + sum((s * s.detach().cos()).sum() for s in end.values())
        gradients = torch.autograd.grad(loss, list(inputs.values()))
        return {"y": y, **end, **{f"d_{k}": g for k, g in zip(inputs, gradients, strict=True)}}

    found = results(*mixer(x, state if carried else None, Context(lower_bound=bound)))
    wanted = results(*transcription(options, parameters, x, state, bound))
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert bool(exact.abs().max() > 0), name
        assert relative_error(found[name], exact).rms < FLOAT64_RMS, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_recurrences_are_flash_linear_attentions():
    gla = pytest.importorskip("fla.ops.gla.naive").naive_recurrent_gla
    rwkv = pytest.importorskip("fla.ops.rwkv6.recurrent_naive").naive_recurrent_rwkv6
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 40, 3, 8, generator=generator).unbind(0)
    log_f, before = torch.nn.functional.logsigmoid(2 * v), torch.randn(2, 3, 8, 8, generator=generator)
    wanted = gla(q, k, v, log_f, initial_state=before, output_final_state=True)
    found = mix_outer_products(q, k, v, log_f, before, Context(), scale=8**-0.5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    bonus = torch.randn(3, 8, generator=generator)
    parts = [x.transpose(1, 2) for x in (q, k, v, log_f)]
    wanted = rwkv(*parts, bonus, 1.0, initial_state=before, output_final_state=True)
    y, end = read_before_writing(q, k, v, log_f, before, Context())
    y = y + (q * bonus * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close((y.transpose(1, 2), end), wanted, rtol=1e-5, atol=1e-5)
    rebased = pytest.importorskip("fla.ops.rebased.naive").naive_parallel_rebased
    wanted = rebased(*(x.transpose(1, 2) for x in (q, k, v)), use_norm=False)
    found, _ = squared_attention(q * 8**-0.5, k, v, None, None)
    torch.testing.assert_close(found.transpose(1, 2), wanted, rtol=1e-4, atol=1e-4)


class _TiedKey(nn.Module):
    """The key 1 - f in place of a projection, for HGRN2 with a key that happens to be tied."""

    def __init__(self, f_proj, bound):
        super().__init__()
        self.f_proj, self.bound = f_proj, bound

    def forward(self, x):
        return (1 - self.bound) * torch.sigmoid(-self.f_proj(x))


@pytest.mark.parametrize("bounded", [True, False])
def test_without_the_tie_gla_is_hgrn2_in_all_else(bounded):
    """Given the tied key, the ablation computes HGRN2, with the same weights, to the last digits."""
    torch.manual_seed(0)
    tied = find_mixer("hgrn2").build(WIDTH, find_mixer("hgrn2").options(expand_ratio=4)).double()
    options = find_mixer("gla").options(num_heads=4, use_lower_bound=bounded, **UNTIED)
    free = find_mixer("gla").build(WIDTH, options).double()
    bound = torch.rand(WIDTH, dtype=torch.float64) if bounded else None
    weights = tied.state_dict()
    names = {"q_proj": "q_proj", "f_proj.0": "f_proj", "v_proj": "i_proj", "g_norm": "g_norm", "o_proj": "o_proj"}
    own = {f"{name}.weight": weights[f"{theirs}.weight"] for name, theirs in names.items()}
    assert own.keys() | {"k_proj.weight"} == free.state_dict().keys()
    free.load_state_dict(own, strict=False)
    free.k_proj = _TiedKey(free.f_proj, torch.zeros(()).double() if bound is None else bound)
    x, context = torch.randn(2, 70, WIDTH, dtype=torch.float64), Context(lower_bound=bound)
    torch.testing.assert_close(free(x, None, context)[0], tied(x, None, context)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_recurrence_of_hgrn1_is_flash_linear_attentions():
    naive = pytest.importorskip("fla.ops.hgrn.naive").naive_recurrent_hgrn
    generator = torch.Generator().manual_seed(0)
    z, c, before = (torch.randn(2, *shape, generator=generator) for shape in ((40, WIDTH), (40, WIDTH), (WIDTH,)))
    write = torch.sigmoid(-z) * torch.nn.functional.silu(c)
    wanted = naive(write, torch.nn.functional.logsigmoid(z), before, True)
    torch.testing.assert_close(linear_scan(z.sigmoid(), write, initial_state=before), wanted, rtol=1e-5, atol=1e-6)


def test_log_decays_with_a_bound_keep_their_digits():
    z = torch.linspace(-200, 30, 461, dtype=torch.float64).unsqueeze(1).requires_grad_()
    bound = torch.tensor([0.0, 1e-6, 0.5, 0.999], dtype=torch.float64, requires_grad=True)
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 2e-5)):
        found = bounded_log_sigmoid(z.to(dtype), bound.to(dtype))
        lost = (1 - bound.to(dtype).double()) * torch.sigmoid(-z)
        wanted = torch.where(lost < 0.5, torch.log1p(-lost), torch.log(bound + (1 - bound) * torch.sigmoid(z)))
        seen = (z > -80).expand_as(wanted)
        assert bool(((found - wanted) / wanted).abs()[seen].max() < limit)
        assert found.max() <= 0
        gradients = torch.autograd.grad(found.sum(), [z, bound])
        assert all(bool(g.isfinite().all()) for g in gradients)


@CASES
def test_vectors_are_neither_decayed_nor_given_to_muon(case):
    mixer, _ = build(case)
    linear = {f"{n}.weight" for n, module in mixer.named_modules() if isinstance(module, nn.Linear)}
    roles = mixer.parameter_roles()
    assert roles.keys() == dict(mixer.named_parameters()).keys()
    assert {name for name, role in roles.items() if role == "matrix"} == linear
    assert {role for name, role in roles.items() if name not in linear} <= {"vector"}


@CASES
def test_activations_are_what_torch_saves(case):
    name, options = MIXERS[case]
    changes = {"layers": name, "mixers": {name: options}}
    length, model = 256, HGRN2LM(config(**changes)).train()
    found = cost(config(**changes), length)
    assert found.activation_bytes_per_token == pytest.approx(saved_bytes(model, length) / length, rel=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        measured = (saved_bytes(model, 2 * length) - saved_bytes(model, length)) / length
    assert found.activation_bytes_per_token_bfloat16 == pytest.approx(measured, rel=0.05)


def test_operations_by_hand():
    def scan(heads, k, v):
        return heads * (65 * k + 2 * 64 * v + 4 * k * v + 6 * k)

    wanted = {"gla": scan(2, 4, 8), "gla, one norm": scan(2, 12, 8), "gla, untied": scan(4, 4, 4)}
    wanted |= {"rebased": 2 * (2 * 64 * (3 + 9) + 4 * 6 * 9)}
    wanted |= {"rwkv5": scan(4, 4, 4), "rwkv6": scan(4, 4, 4) + 2 * 2 * 16 * (5 * 3 + 5)}
    for case, flops in wanted.items():
        assert build(case)[0].flops(100) == flops, case


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("gla", {"num_heads": 3}, ["num_heads", 3, 16]),
        ("gla", {"num_heads": 4, "key_ratio": 0.3}, ["key_ratio", 0.3]),
        ("rebased", {"num_heads": 3}, ["num_heads", 3, 16]),
        ("rwkv5", {"head_size": 3}, ["head_size", 3, 16]),
        ("gla", {"num_heads": 4, "gate": "sigmoid"}, ["key_ratio", 0.5, "use_lower_bound"]),
    ],
    ids=str,
)
def test_widths_that_do_not_fit_are_refused(name, options, names):
    settings = {"vocab_size": 11, "hidden_size": WIDTH, "num_hidden_layers": 2}
    with refuses("contradiction", *names):
        HGRN2Config.from_dict(settings | {"layers": name, "mixers": {name: options}})


def test_a_lower_bound_belongs_to_the_options():
    settings = {"vocab_size": 11, "hidden_size": WIDTH, "num_hidden_layers": 2, "layers": "gla"}

    def bounded(**options):
        return HGRN2Config.from_dict(settings | {"mixers": {"gla": options}}).bounded_layers

    assert bounded() == bounded(**UNTIED, use_lower_bound=False) == ()
    assert bounded(**UNTIED) == (0, 1)


@pytest.mark.parametrize("name", ["rwkv5", "rwkv6"])
def test_initial_values_are_those_of_the_authors(name):
    """Numbers worked out by hand from the authors' formulas, for channel 1 of 4 and layer 1 of 3."""
    found = find_mixer(name)
    mixer = found.build(4, found.options(head_size=2))
    mixer.reset_parameters(InitialValues(0.02, 1, 3, torch.Generator().manual_seed(0)))
    places = {"w": 2 / 3, "k": 2 / 3, "v": 2 / 3, "r": 1 / 3, "g": 1 / 3}
    letters = "rkvg" if name == "rwkv5" else "wkvrg"
    wanted = torch.tensor([1 - 0.25 ** places[letter] - 0.15 * (letter == "v") for letter in letters])
    torch.testing.assert_close(mixer.mix[:, 1].detach(), wanted)
    torch.testing.assert_close(mixer.decay[1].item(), -6 + 5 * (1 / 3) ** 1.35, rtol=1e-6, atol=0)
    torch.testing.assert_close(mixer.bonus.detach(), torch.tensor([0.5, 1 / 3 + 0.1, 1 / 6 - 0.1, 0.0]))
    assert torch.equal(mixer.norm_weight.detach(), torch.full((4,), (2 / 3) ** 0.7))
    assert not mixer.o_proj.weight.any()
    for module, gain in ((mixer.r_proj, 1), (mixer.v_proj, 1), (mixer.k_proj, 0.1), (mixer.g_proj, 0.1)):
        torch.testing.assert_close(module.weight @ module.weight.T, gain**2 * torch.eye(4), rtol=0, atol=1e-6)
    if name == "rwkv6":
        torch.testing.assert_close(mixer.mix_x[1].item(), 1 - 0.25 ** (2 / 3))
        assert not mixer.mix_down.any()
        assert not mixer.decay_down.any()
        assert 0.005 < mixer.mix_up.abs().max() <= 0.01
        assert (found.options().mix_rank, found.options().decay_rank) == (32, 64)
    # one layer alone has no depth
    mixer.reset_parameters(InitialValues(0.02, 0, 1))
    assert all(bool(p.isfinite().all()) for p in mixer.parameters())


def test_a_token_sees_the_one_before_in_its_own_sequence():
    x, state = torch.arange(1.0, 7).view(1, 6, 1), torch.tensor([[70.0], [80.0], [90.0]])
    shifted, last = token_shift(x, state, torch.tensor([0, 2, 2, 6]))
    assert shifted.flatten().tolist() == [70, 1, 90, 3, 4, 5]
    assert last.flatten().tolist() == [2, 80, 6]
    shifted, last = token_shift(x, state[:1], mask=torch.tensor([[False, True, False, True, True, False]]))
    assert shifted[0, [1, 3, 4], 0].tolist() == [70, 2, 4]
    assert last.tolist() == [[5]]
    for length in (0, 1):
        shifted, last = token_shift(x[:, :length], None)
        assert shifted.flatten().tolist() == [0][:length]
        assert last.tolist() == [[float(length)]]
    shifted, last = token_shift(x[:, :0], state[:2], torch.tensor([0, 0, 0]))
    assert shifted.shape == (1, 0, 1)
    assert torch.equal(last, state[:2])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
def test_squared_weights_are_not_negative(dtype, packed):
    """Then an output lies between the least and the largest value, though few keys match the first queries."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 4096, 8, 16, generator=generator).to(dtype)
    v = torch.stack([torch.rand(1, 4096, 8, generator=generator), torch.ones(1, 4096, 8)], -1).to(dtype)
    bounds = torch.arange(0, 4097, 2) if packed else None
    y, _ = squared_attention(q, k, v, None, bounds)
    ratio = (y[..., 0] / y[..., 1]).double()
    assert ratio.min() > -0.01
    assert ratio.max() < 1.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gla", "gla-untied", "rwkv5", "rwkv6", "rebased"])
def test_one_exported_program_for_every_length(name):
    model = make_model(config_of(name))
    length = torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(model, (tokens(2, 12),), dynamic_shapes=({0: torch.export.Dim("B"), 1: length},))
    with torch.no_grad():
        for batch, count in ((1, 2), (3, 64), (2, 150)):
            ids = tokens(batch, count)
            found, wanted = program.module()(ids), model(ids)
            torch.testing.assert_close(found[0], wanted[0], rtol=1e-9, atol=1e-10)
            for one, two in zip(found[1].tensors().values(), wanted[1].tensors().values(), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)
