"""Files of comparisons: accepted and refused content."""

from __future__ import annotations

import tomllib

import pytest

from hgrn2.compare.config import Comparison
from hgrn2.compare.default import default_comparison
from hgrn2.compare.plan import make_plan
from hgrn2.nn.mixers import find_mixer, mixer_names
from tests.compare.tiny import MODEL, MODELS, comparison
from tests.guides import FENCE, ROOT
from tests.refusals import refuses


def test_tables_come_back_as_they_were():
    found = comparison(models={**MODELS, "conv": {"use_short_conv": True, "learning_rates": [1e-3, 2e-3]}})
    assert Comparison.from_tables(found.to_tables()) == found
    assert found.rates_of(found.models[0]) == (1e-2,)
    assert found.rates_of(found.models[2]) == (1e-3, 2e-3)
    assert found.num_runs == 4


def test_a_model_may_have_seeds_of_its_own(tmp_path):
    found = comparison(models={"hgrn2": {"seeds": [0, 3]}, "attention": MODELS["attention"]})
    assert Comparison.from_tables(found.to_tables()) == found
    plan = make_plan(found, tmp_path)
    assert [(run.model, run.seed) for run in plan.runs] == [("hgrn2", 0), ("attention", 0), ("hgrn2", 3)]
    assert found.num_runs == 3


def test_a_model_named_like_a_mixer_has_it_in_every_layer():
    found = comparison()
    config = found.model_config(found.models[1], {"vocab_size": 16})
    assert config.layer_mixers == ("attention", "attention")
    assert found.model_config(found.models[0], {"vocab_size": 16}).layer_mixers == ("hgrn2", "hgrn2")


def test_shared_options_of_a_mixer_reach_the_models_that_have_it():
    shared = {**MODEL, "mixers": {"attention": {"num_heads": 4}}}
    found = comparison(model=shared, models={"hgrn2": {}, "both": {"layers": "hgrn2,attention"}})
    assert found.model_config(found.models[0], {"vocab_size": 16}).layer_mixers == ("hgrn2", "hgrn2")
    assert found.model_config(found.models[1], {"vocab_size": 16}).attn.num_heads == 4


@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"seed": [1]}, "unknown-name", ["'seed'", "'seeds'"]),
        ({"models": None}, "incomplete", ["models"]),
        ({"tasks": {}}, "incomplete", ["tasks"]),
        ({"models": {"hgrn": {}}}, "unknown-name", ["'hgrn'", "'hgrn2'"]),
        ({"models": {"a": {"hiden_size": 8}}}, "unknown-name", ["models.a", "hiden_size", "hidden_size"]),
        ({"models": {"a/b": {"layers": "hgrn2"}}}, "invalid-value", ["a/b"]),
        ({"models": {"a": 3}}, "invalid-value", ["models.a", "3"]),
        ({"models": {"a": {"mixers": 3}}}, "invalid-value", ["models.a.mixers", "3"]),
        ({"model": {"hiden_size": 8}}, "unknown-name", ["hiden_size", "hidden_size"]),
        ({"tasks": {"recall": {"task": "mqr"}}}, "unknown-name", ["tasks.recall", "'mqr'", "'mqar'"]),
        ({"tasks": {"mqar": {"num_pair": 3}}}, "unknown-name", ["tasks.mqar", "num_pair", "num_pairs"]),
        ({"tasks": {"mqar": {"data": {"data": ["x"]}}}}, "contradiction", ["mqar", "data"]),
        ({"tasks": {"text": {"task": 3}}}, "invalid-value", ["tasks.text", "3"]),
        ({"train": {"seed": 3}}, "contradiction", ["seed", "seeds"]),
        ({"train": {"batch_sizee": 3}}, "unknown-name", ["batch_sizee", "batch_size"]),
        ({"tasks": {"mqar": {"learning_rate": 3}}}, "contradiction", ["learning_rate", "learning_rates"]),
        ({"seeds": [1, 1]}, "invalid-value", ["[1, 1]"]),
        ({"seeds": [True]}, "invalid-value", ["seeds"]),
        ({"models": {"hgrn2": {"seeds": [-1]}}}, "invalid-value", ["models.hgrn2", "[-1]"]),
        ({"learning_rates": []}, "invalid-value", ["learning_rates"]),
        ({"learning_rates": [0.0]}, "invalid-value", ["learning_rates"]),
        ({"models": {"hgrn2": {"learning_rates": ["fast"]}}}, "invalid-value", ["models.hgrn2", "fast"]),
        ({"match": "params"}, "invalid-value", ["'params'", "'first'"]),
        ({"match": 0}, "invalid-value", ["match"]),
    ],
)
def test_what_is_refused(changes, code, names):
    with refuses(code, *names):
        comparison(**changes)


def test_files_that_cannot_be_read(tmp_path):
    with refuses("unreadable", "none.toml"):
        Comparison.read(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_text("seeds = [")
    with refuses("unreadable", "a.toml"):
        Comparison.read(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text("seeds = 3\n[models.hgrn2]\n[tasks.mqar]\nmax_steps = 3\n")
    assert Comparison.read(tmp_path / "b.toml").seeds == (3,)


def test_the_default_has_every_mixer_that_packs_and_two_tasks():
    found, notes = default_comparison()
    wanted = [name for name in mixer_names() if find_mixer(name).mixer.can_pack]
    assert len(found.models) + len(notes) >= len(wanted)
    assert found.models[0].name == "hgrn2"
    assert "attention" in {model.name for model in found.models}
    assert [task.task for task in found.tasks] == ["language", "mqar"]
    assert Comparison.from_tables(found.to_tables()) == found
    # all runs together, two at a time, with five seconds around each, take less than ten minutes
    assert found.num_runs * (found.train["max_time_s"] + 5) / 2 <= 600


def test_the_files_of_the_documentation_are_whole():
    example = Comparison.read(ROOT / "examples" / "compare.toml")
    assert [model.name for model in example.models] == ["hgrn2", "attention", "hybrid"]
    guide = (ROOT / "docs" / "guide" / "comparing.md").read_text(encoding="utf-8")
    # others show single settings
    (block,) = [text for language, text in FENCE.findall(guide) if language == "toml" and "[models." in text]
    printed = Comparison.from_tables(tomllib.loads(block))
    assert printed.num_runs == 2 * 2 * (2 + 2 + 1)
    for found in (example, printed):
        for model in found.models:
            found.model_config(model, {"vocab_size": 64})
