"""Mixers with outer-product states: each against its paper's equations, and as a part of models, runs and compilers."""

import json
import math

import pytest
import torch
from torch import nn

from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.models.cost import cost
from hgrn2.nn.mixers import Context, find_mixer
from hgrn2.nn.mixers.outer_product import bounded_log_sigmoid, mix_outer_products
from hgrn2.nn.parameters import InitialValues
from hgrn2.train.metrics import read_metrics
from tests.formats.command_line import run_cli
from tests.models.cases import UNTIED
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
}
CASES = pytest.mark.parametrize("case", MIXERS)
# one of each class
EACH = pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in MIXERS.values()))


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
def test_the_recurrence_is_flash_linear_attentions():
    naive = pytest.importorskip("fla.ops.gla.naive").naive_recurrent_gla
    q, k, v = torch.randn(3, 2, 40, 3, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    log_f = torch.nn.functional.logsigmoid(2 * v)
    wanted, end = naive(q, k, v, log_f, output_final_state=True)
    found, state = mix_outer_products(q, k, v, log_f, None, Context(), scale=8**-0.5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)


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
    for case, flops in wanted.items():
        assert build(case)[0].flops(100) == flops, case


@EACH
def test_a_block_compiles_whole(name):
    case = next(case for case, found in MIXERS.items() if found[0] == name)
    settings = {"vocab_size": 11, "hidden_size": WIDTH, "num_hidden_layers": 1, "intermediate_size": 24}
    model = HGRN2LM(HGRN2Config.from_dict(settings | {"layers": name, "mixers": {name: MIXERS[case][1]}}))
    block = model.model.layers[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 21, WIDTH)
    for context in (
        Context(),
        Context(cu_seqlens=torch.tensor([0, 9, 9, 21])),
        Context(mask=torch.arange(21)[None] > 3),
    ):
        results = []
        for run in (block, compiled):
            model.zero_grad()
            y, state, _ = run(x, None, context)
            y.square().sum().backward()
            results.append([y, *state.values(), *(p.grad for p in block.parameters())])
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@EACH
def test_it_trains_from_the_command_line_and_appears_in_info(name, tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(6):
        (text / f"{i}.txt").write_text("".join(f"def f{k}(x):\n    return x + {i * k}\n" for k in range(12)))
    options = next(options for found, options in MIXERS.values() if found == name)
    settings = {"hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": 24, "expand_ratio": 16}
    settings |= {"layers": [name], "mixers": {name: options}}
    chosen = [f"{k}={json.dumps(v)}" for k, v in settings.items()]
    assert name in run_cli(capsys, "info", "tiny", "--set", *chosen)
    run = tmp_path / "run"
    run_cli(
        capsys, "train", "--data", text, "--prepared", tmp_path / "prepared", "--tokenizer", "bytes", "--device", "cpu",
        "--num-threads", "1", "--batch-size", "2", "--seq-len", "32", "--validation-tokens", "300", "--max-steps", "20",
        "--learning-rate", "0.02", "--out", run, "--set", *chosen,
    )  # fmt: skip
    losses = [m["loss"] for m in read_metrics(run) if "loss" in m]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("gla", {"num_heads": 3}, ["num_heads", 3, 16]),
        ("gla", {"num_heads": 4, "key_ratio": 0.3}, ["key_ratio", 0.3]),
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
