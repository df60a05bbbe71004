"""examples/new_mixer, installed: its mixer trains, decodes, is compared and runs in every way, by its name alone."""

import json
import os
import sys
import tomllib

import pytest
import torch

from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.models.cost import cost
from hgrn2.nn.mixers import Context, forget_mixer, mixer_names
from tests.formats.command_line import run_cli
from tests.guides import ROOT
from tests.models.cases import SIZE, make_model, tokens
from tests.models.test_cost import config, saved_bytes
from tests.models.test_ways_to_run import WAYS, assert_goes_on, assert_same
from tests.plug_ins import install
from tests.refusals import refuses

EXAMPLE = ROOT / "examples" / "new_mixer"
SOURCE = (EXAMPLE / "mingru_mixer.py").read_text(encoding="utf-8")
PROJECT = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))
SET = [
    "--set", "hidden_size=16", "num_hidden_layers=2", "expand_ratio=8", "intermediate_size=24", "layers=mingru,hgrn2",
]  # fmt: skip


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The folder that holds the package, as pip would have left it."""
    folder = tmp_path / "packages"
    folder.mkdir()
    ((name, module),) = PROJECT["project"]["entry-points"]["hgrn2.mixers"].items()
    install(folder, monkeypatch, "mixers", f"{name} = {module}", SOURCE)
    yield folder
    if name in mixer_names():
        forget_mixer(name)
    sys.modules.pop(module, None)


def test_it_is_one_short_file_that_the_package_does_not_know():
    assert len(SOURCE.splitlines()) < 100
    assert PROJECT["tool"]["setuptools"]["py-modules"] == ["mingru_mixer"]
    assert not any("mingru" in file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_run_it_agrees(installed, way):
    run, lengths = WAYS[way]
    with torch.no_grad():
        model = make_model(HGRN2Config.from_dict(SIZE | {"layers": "mingru"}))
        texts, more = list(tokens(sum(lengths)).split(lengths)), tokens(len(lengths), 4, seed=2)
        wanted = [model(torch.cat(pair)[None])[0][0] for pair in zip(texts, more, strict=True)]
        logits, state = run(model, texts)
        for found, alone, length in zip(logits, wanted, lengths, strict=True):
            assert_same(found, alone[:length])
        assert_goes_on(model, state, more, torch.stack([alone[-4:] for alone in wanted]))


def test_it_is_its_equation(installed):
    torch.manual_seed(0)
    model = HGRN2LM(HGRN2Config.from_dict(SIZE | {"layers": "mingru"})).double()
    mixer = model.model.layers[0].attn
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    h, rows = torch.zeros(2, 16, dtype=torch.float64), []
    for t in range(9):
        z = torch.sigmoid(mixer.z_proj(x[:, t]))
        h = (1 - z) * h + z * mixer.h_proj(x[:, t])
        rows.append(mixer.o_proj(h))
    torch.testing.assert_close(mixer(x, None, Context())[0], torch.stack(rows, 1))
    kept = torch.sigmoid(-mixer.z_proj.bias)
    torch.testing.assert_close(kept[[0, -1]], torch.tensor([0.5, 0.95]).double())


def test_its_costs_and_mistakes(installed):
    changes = {"layers": "mingru"}
    found, measured = cost(config(**changes), 256), saved_bytes(HGRN2LM(config(**changes)), 256)
    assert found.activation_bytes_per_token == pytest.approx(measured / 256, rel=0.05)
    with refuses("invalid-value", "mixers.mingru.slowest", 1.5):
        HGRN2Config.from_dict(SIZE | {"layers": "mingru", "mixers": {"mingru": {"slowest": 1.5}}})
    with refuses("unknown-name", "mingr", "mingru"):
        HGRN2Config.from_dict(SIZE | {"layers": "mingr"})


@pytest.mark.slow
def test_commands_take_it(installed, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(6):
        (text / f"{i}.txt").write_text("".join(f"line {k} of text {i}\n" for k in range(20)))
    # runs of a comparison are processes of their own
    paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    def run(*words):
        return run_cli(capsys, *words)

    assert "1 mingru" in run("info", "tiny", *SET)
    common = ["--device", "cpu", "--num-threads", "1", "--batch-size", "2", "--seq-len", "32", "--max-steps", "4"]
    run("train", "--data", text, "--prepared", tmp_path / "prepared", "--out", tmp_path / "run", "--tokenizer", "bytes",
        "--validation-tokens", "300", *common, *SET)  # fmt: skip
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["layers"] == ["mingru", "hgrn2"]
    assert run("generate", tmp_path / "run", "--prompt", "line", "--max-tokens", "5", "--device", "cpu")
    plan = tmp_path / "compare.toml"
    plan.write_text(
        "seeds = [0]\nlearning_rates = [0.01]\n[model]\nhidden_size = 16\nnum_hidden_layers = 2\nexpand_ratio = 8\n"
        'intermediate_size = 24\n[models.hgrn2]\n[models.mingru]\n[train]\ndevice = "cpu"\nnum_threads = 1\n'
        "warmup_steps = 1\n[tasks.mqar]\nlength = 16\nnum_pairs = 2\nvocab_size = 16\nvalidation_examples = 16\n"
        "batch_size = 4\nmax_steps = 4\n"
    )
    run("compare", plan, "--out", tmp_path / "compared")
    assert "mingru" in (tmp_path / "compared" / "report.md").read_text()
