"""Models of the other mixers: each trains from the command line, appears in `info`, compiles, and runs in bfloat16."""

import json
import math

import pytest
import torch

from hgrn2 import cli
from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.train.metrics import read_metrics
from tests.formats.command_line import run_cli
from tests.models.cases import SIZE, UNTIED, config_of, make_model, tokens

MIXERS = {
    "hgrn1": {},
    "hgrn1-real": {"form": "real"},
    "mamba": {},
    "griffin": {"num_blocks": 4},
    "gla": {"num_heads": 2},
    "gla-untied": UNTIED | {"num_heads": 2},
    "rwkv5": {"head_size": 8},
    "rwkv6": {"head_size": 8},
    "rebased": {"num_heads": 2},
}
# a norm over a head of four or eight channels enlarges the errors of its inputs
ROUGH = {"gla": 0.2, "rwkv5": 0.2, "rwkv6": 0.2}
# options of HGRN2, which are keys of the model
VARIANTS = {"signed": {"gate_range": "signed"}, "dense": {"dense_state": 2}}
mixers = pytest.mark.parametrize("name", [*MIXERS, *VARIANTS])
TRAIN = [
    "--tokenizer", "bytes", "--device", "cpu", "--num-threads", "1", "--batch-size", "4", "--seq-len", "32",
    "--validation-tokens", "300", "--max-steps", "20", "--learning-rate", "1e-2", "--warmup-steps", "2",
]  # fmt: skip


def settings(name):
    mixer = name.split("-")[0]
    values = {"hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8, "intermediate_size": 24}
    values |= VARIANTS[name] if name in VARIANTS else {"layers": [mixer], "mixers": {mixer: MIXERS[name]}}
    return ["--set", *(f"{key}={json.dumps(value)}" for key, value in values.items())]


@pytest.mark.slow
@mixers
def test_it_trains_from_the_command_line(tmp_path, name):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(6):
        (text / f"{i}.txt").write_text("".join(f"def f{k}(x):\n    return x + {i * k}\n" for k in range(12)))
    run = tmp_path / "run"
    paths = ["--data", str(text), "--prepared", str(tmp_path / "prepared"), "--out", str(run)]
    assert cli.main(["train", *paths, *TRAIN, *settings(name)]) == 0
    losses = [m["loss"] for m in read_metrics(run) if "loss" in m]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 1


@mixers
def test_it_appears_in_info(capsys, name):
    assert name.split("-")[0] in run_cli(capsys, "info", "tiny", *settings(name))


@mixers
def test_a_fresh_model_is_ready_to_be_trained(nan_filled_memory, name):
    model = HGRN2LM(config_of(name))
    ids = tokens(2, 20)
    found = model.loss(ids, ids)
    # nothing is known yet
    assert abs(found.mean.item() - math.log(SIZE["vocab_size"])) < 0.1
    found.mean.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# torch's own tracer
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@mixers
@pytest.mark.parametrize("packed", [False, True])
def test_whole_blocks_compile(name, packed):
    torch._dynamo.reset()
    model = make_model(config_of(name), torch.float32).train()
    ids = tokens(1, 24)
    settings = {"cu_seqlens": torch.tensor([0, 5, 5, 24])} if packed else {}

    def results():
        model.zero_grad()
        found = model.loss(ids, ids, **settings)
        found.mean.backward()
        return [found.sum.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    wanted = results()
    model.model.compile_blocks(fullgraph=True, backend="aot_eager")
    for one, two in zip(results(), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@mixers
def test_low_precision_is_near_float32(name):
    exact = make_model(config_of(name), torch.float32)
    ids = tokens(2, 20)
    with torch.no_grad():
        wanted, _ = exact(ids)
        with torch.autocast("cpu", torch.bfloat16):
            mixed, state = exact(ids)
        low = make_model(config_of(name), torch.bfloat16)
        found, low_state = low(ids)
    assert (found.dtype, mixed.dtype) == (torch.bfloat16, torch.bfloat16)
    for layer in (*state.layers, *low_state.layers):
        assert layer["ssm" if "ssm" in layer else "recurrent"].dtype == torch.float32
    scale = float(wanted.square().mean().sqrt())
    for y in (mixed, found):
        assert float((y.float() - wanted).square().mean().sqrt()) < ROUGH.get(name, 0.05) * scale


@mixers
def test_a_step_after_another_allocates_one_state(name):
    model = make_model(config_of(name), torch.float32)
    with torch.no_grad():
        _, state = model(tokens(2, 50))
        _, state = model.step(tokens(2), state)
    for x in state.tensors().values():
        assert x.untyped_storage().nbytes() <= 2 * x.nbytes


def test_mixers_stand_side_by_side():
    layers = list(dict.fromkeys(name.split("-")[0] for name in MIXERS))
    options = {name: MIXERS[name] for name in layers}
    pattern = {"num_hidden_layers": len(layers) + 1, "layers": ["hgrn2", *layers], "mixers": options}
    config = HGRN2Config.from_dict(SIZE | pattern)
    assert config.bounded_layers[:2] == (0, 1)
    model, ids = make_model(config), tokens(2, 9)
    with torch.no_grad():
        wanted, _ = model(ids)
        first, state = model(ids[:, :4])
        rest, _ = model(ids[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), wanted, rtol=1e-9, atol=1e-10)


# inductor does not write code for complex numbers, and says so
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["hgrn1", "mamba"])
def test_compiled_code_gives_the_same_losses_and_gradients(name):
    torch._dynamo.reset()
    model, ids = make_model(config_of(name), torch.float32).train(), tokens(2, 24)
    found = []
    for is_compiled in (False, True):
        if is_compiled:
            model.model.compile_blocks(fullgraph=True)
        model.zero_grad()
        loss = model.loss(ids, ids)
        loss.mean.backward()
        found.append([loss.sum.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
