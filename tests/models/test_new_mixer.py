"""A mixer that src/ knows nothing of, `toy_mixer.py`: by its name it trains, resumes, decodes and converts."""

# pyright: reportOptionalMemberAccess=false

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hgrn2
from hgrn2 import cli
from hgrn2.formats.opening import open_folder
from hgrn2.models import HGRN2LM, HGRN2Config, presets
from hgrn2.models.cost import cost, cost_table
from hgrn2.nn.parameters import ROLES
from hgrn2.train.metrics import read_metrics
from hgrn2.train.run import SavedRun
from hgrn2.train.specs import saved_model_config
from tests.formats.command_line import run_cli
from tests.models import toy_mixer
from tests.models.cases import SIZE, config_of, make_model, tokens
from tests.refusals import refuses

LAYERS = ["average", "hgrn2", "average", "attention"]
MIXERS = {"average": {"slowest": 0.2}, "attention": {"num_heads": 2}}
KEYS = SIZE | {"num_hidden_layers": 4, "layers": LAYERS, "mixers": MIXERS}
SETTINGS = {"hidden_size": 16, "num_hidden_layers": 4, "expand_ratio": 8, "intermediate_size": 24, "layers": LAYERS}
SET = [f"{key}={json.dumps(value)}" for key, value in (SETTINGS | {"mixers": MIXERS}).items()]
TRAIN = [
    "--tokenizer", "bytes", "--device", "cpu", "--num-threads", "1", "--batch-size", "2", "--seq-len", "32",
    "--validation-tokens", "300", "--checkpoint-every", "4", "--keep-last", "9", "--validation-every", "4",
]  # fmt: skip


def test_the_file_is_short_and_the_package_does_not_know_it():
    assert len(Path(toy_mixer.__file__).read_text().splitlines()) < 60
    package = Path(hgrn2.__file__).parent
    assert not any('"average"' in file.read_text() for file in package.rglob("*.py"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run of eight steps; and one stopped after four and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text"
    text.mkdir()
    for i in range(6):
        (text / f"{i}.txt").write_text("".join(f"def f{k}(x):\n    return x + {i * k}\n" for k in range(12)))
    common = [str(text), "--prepared", str(folder / "prepared"), *TRAIN]
    whole, parted = folder / "whole", folder / "parted"
    assert cli.main(["train", "--data", *common, "--out", str(whole), "--max-steps", "8", "--set", *SET]) == 0
    assert cli.main(["train", "--data", *common, "--out", str(parted), "--max-steps", "4", "--set", *SET]) == 0
    assert cli.main(["train", "--resume", str(parted), "--max-steps", "8"]) == 0
    return whole, parted


def losses(run):
    return {m["step"]: m["loss"] for m in read_metrics(run) if "loss" in m}


@pytest.mark.slow
def test_it_trains_and_resumes_with_equal_losses(runs):
    whole, parted = map(losses, runs)
    assert sorted(whole) == sorted(parted)
    assert all(math.isfinite(loss) for loss in whole.values())
    model = open_folder(runs[0] / "checkpoints" / "step-00000008").load(torch.device("cpu"))
    assert model.config.layers == tuple(LAYERS)
    assert model.config.mixers["average"].slowest == 0.2


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["native", "hf"])
def test_it_converts_and_opens_in_transformers(runs, tmp_path, capsys, layout):
    from hgrn2.hf import HGRN2ForCausalLM

    out = tmp_path / layout
    run_cli(capsys, "convert", runs[0], out, "--to", layout)
    own = open_folder(out).load(torch.device("cpu"))
    assert own.config == open_folder(runs[0] / "checkpoints" / "step-00000008").config
    theirs = HGRN2ForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(256, (2, 9))
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, own(ids)[0])
        found = theirs.generate(ids, max_new_tokens=5, do_sample=False)
        wanted = theirs.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(found, wanted)
    assert theirs.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    theirs.save_pretrained(tmp_path / "again")
    assert open_folder(tmp_path / "again").config == own.config


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fla", "official"])
def test_layouts_that_cannot_say_it_refuse(runs, tmp_path, layout):
    from hgrn2.formats.convert import convert

    folder = open_folder(runs[0] / "checkpoints" / "step-00000008")
    with refuses("unsupported", "layers"):
        convert(folder, tmp_path / "out", layout, tokenizer_dir=runs[0])


def test_it_appears_in_info(capsys):
    out = run_cli(capsys, "info", "tiny", "--set", *SET)
    assert "average" in out
    assert "0, 2" in out
    config = HGRN2Config.from_dict(KEYS)
    assert config.described_layers == {"average": "0, 2", "hgrn2": "1", "attention": "3"}
    assert "2 average, 1 hgrn2, 1 attention" in config.summary
    assert config.layer_memories == ("state", "state", "state", "tokens")


def test_costs_are_those_of_its_parts():
    config = HGRN2Config.from_dict(KEYS)
    model, found = HGRN2LM(config), cost(config)
    assert found.parameters == model.num_parameters()
    assert found.state_bytes == model.init_state(1).num_bytes == 4 * (2 * 16 + 16 * 4) + 8
    assert found.attention_bytes_per_token == 2 * 16 * 4 + 1
    assert any("cache" in line.label for line in cost_table(config))


def test_parameters_keep_the_values_and_roles_that_the_mixer_gives_them():
    model = HGRN2LM(HGRN2Config.from_dict(KEYS))
    wanted = torch.linspace(0.2, 1, 16).log().unsqueeze(1)
    roles = model.parameter_roles()
    assert set(roles.values()) <= ROLES
    for layer in (0, 2):
        assert torch.equal(model.model.layers[layer].attn.A_log, wanted)  # pyright: ignore
        # two axes, and yet no matrix for Muon or weight decay
        assert roles[f"model.layers.{layer}.attn.A_log"] == "vector"
        assert roles[f"model.layers.{layer}.attn.a_proj.weight"] == "matrix"


def test_transformers_draws_them_alike(tmp_path):
    from safetensors.torch import load_file, save_file

    from hgrn2.hf import HGRN2Config as Config
    from hgrn2.hf import HGRN2ForCausalLM

    wanted = torch.linspace(0.2, 1, 16).log().unsqueeze(1)
    model = HGRN2ForCausalLM(Config(**KEYS))
    assert torch.equal(model.model.layers[2].attn.A_log, wanted)
    with torch.no_grad():
        model.model.layers[2].attn.A_log.fill_(3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.attn.A_log"], tensors["model.layers.2.attn.a_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    again, _ = HGRN2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(again.model.layers[0].attn.A_log, wanted)
    # what the file holds stays, though a matrix beside it was drawn anew
    assert bool((again.model.layers[2].attn.A_log == 3).all())


def test_only_mixers_that_ask_for_a_bound_get_one():
    alone = HGRN2LM(HGRN2Config.from_dict(SIZE | {"layers": "average"}))
    assert alone.model.lower_bounds is None
    assert "model.lower_bounds" not in alone.state_dict()
    mixed = HGRN2Config.from_dict(KEYS)
    assert mixed.bounded_layers == (1,)
    assert HGRN2LM(mixed).model.lower_bounds.shape == (4, 16)


def test_a_pattern_of_old_mixers_is_a_config_of_old():
    config = HGRN2Config.from_dict(SIZE | {"num_hidden_layers": 4, "layers": ["hgrn2", "attention"],
                                           "mixers": {"attention": {"num_heads": 4, "num_kv_heads": 2}}})  # fmt: skip
    wanted = HGRN2Config.from_dict(
        SIZE | {"num_hidden_layers": 4, "attn": {"layers": [1, 3], "num_heads": 4, "num_kv_heads": 2}}
    )
    assert config == wanted
    assert "layers" not in config.to_dict()
    assert HGRN2Config.from_dict(SIZE | {"layers": "hgrn2"}) == config_of("fla")


def test_a_config_goes_through_json_and_can_be_changed():
    config = HGRN2Config.from_dict(KEYS)
    assert HGRN2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    hash(config)
    assert config.replace(dropout=0.5).layers == config.layers
    assert config.replace(num_hidden_layers=8).layer_mixers == tuple(LAYERS * 2)
    assert config.replace(layers=None) == HGRN2Config.from_dict(SIZE | {"num_hidden_layers": 4})
    assert config.replace(attn={"layers": [0], "num_heads": 2}).layers is None
    assert presets.tiny(layers="average,hgrn2").layer_mixers == ("average", "hgrn2") * 3
    assert eval(repr(config)) == config
    # heads of HGRN2 are nothing to a model without it
    assert HGRN2Config(hidden_size=40, num_hidden_layers=2, layers="average").layer_mixers == ("average",) * 2  # pyright: ignore


@pytest.mark.parametrize(
    ("keys", "code", "names"),
    [
        ({"layers": ["avrage"]}, "unknown-name", ["avrage", "average"]),
        ({"layers": []}, "invalid-value", ["layers"]),
        ({"layers": [3]}, "invalid-value", [3]),
        ({"layers": ["average", "hgrn2"]}, "contradiction", ["layers", 2, "num_hidden_layers = 3"]),
        ({"layers": ["average"] * 4}, "contradiction", [4, "num_hidden_layers = 3"]),
        ({"num_hidden_layers": 6, "layers": ["average"] * 4}, "contradiction", ["num_hidden_layers to 4 or 8"]),
        ({"mixers": {"average": {}}}, "contradiction", ["mixers is {'average': {}}", "layers"]),
        ({"mixers": "x"}, "invalid-value", ["mixers is 'x'"]),
        ({"layers": ["average"] * 6}, "contradiction", ["name 3 mixers", "num_hidden_layers to 6"]),
        ({"layers": "average", "mixers": {"attention": {"num_heads": 2}}}, "contradiction", ["attention", "average"]),
        ({"layers": "average", "mixers": {"averag": {}}}, "unknown-name", ["averag", "average"]),
        ({"layers": "average", "mixers": {"average": {"slowes": 1.0}}}, "unknown-name", ["slowes", "slowest"]),
        ({"layers": "average", "mixers": {"average": {"rope_theta": 2}}}, "unknown-name", ["attention has"]),
        ({"layers": "average", "mixers": {"average": {"slowest": "x"}}}, "invalid-value", ["mixers.average.slowest"]),
        ({"layers": "average", "mixers": {"average": 3}}, "invalid-value", ["mixers.average", 3]),
        ({"layers": "average", "mixers": 3}, "invalid-value", ["mixers", 3]),
        ({"layers": ["average", "hgrn2", "average"], "mixers": {"hgrn2": {"expand_ratio": 4}}}, "unsupported",
         ["mixers.hgrn2"]),
        ({"layers": ["average", "average", "attention"]}, "incomplete",
         ['mixers={"attention": {"num_heads": ...}}']),
        ({"layers": ["average", "average", "attention"], "mixers": {"attention": {"num_heads": 16}}}, "contradiction",
         ["mixers.attention.num_heads", 16]),
        ({"layers": "average", "attn": {"layers": [1], "num_heads": 2}}, "contradiction", ["attn", "average"]),
        ({"slowest": 0.5}, "unknown-name", ["slowest", "mixers.average"]),
    ],
    ids=str,
)  # fmt: skip
def test_patterns_and_options_that_do_not_fit_are_refused(keys, code, names):
    with refuses(code, *names) as caught:
        HGRN2Config.from_dict(SIZE | keys)
    assert str(caught.value).startswith("model config")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_whose_pattern_was_edited_is_not_its_checkpoint(runs):
    flat = HGRN2Config.from_dict(SIZE).to_dict()
    saved = replace(SavedRun.read(runs[0], runs[0] / "checkpoints" / "step-00000008"), config={"model": flat})
    with refuses("mismatch", "layers is None", "average"):
        saved_model_config(saved)


def test_decoding_gives_the_logits_of_the_whole():
    model = make_model(HGRN2Config.from_dict(KEYS))
    ids = tokens(2, 12)
    with torch.no_grad():
        wanted, _ = model(ids)
        state = model.init_state(2)
        for t in range(12):
            logits, state = model.step(ids[:, t], state)
            torch.testing.assert_close(logits, wanted[:, t], rtol=1e-9, atol=1e-10)
