import inspect
import warnings

import pytest

from hgrn2.errors import UserError
from hgrn2.tasks.distillation import DistillationOptions
from hgrn2.tasks.language import LanguageOptions
from hgrn2.train.config import TrainConfig
from hgrn2.train.settings import RunSettings
from tests.refusals import refuses


def test_round_trip():
    config = TrainConfig(max_steps=10, optimizer="muon", muon_learning_rate=0.02)
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_unknown_key_names_the_near_one():
    with refuses("unknown-name", "'learnig_rate'", "'learning_rate'"):
        RunSettings.from_flat({"max_steps": 10, "learnig_rate": 1.0})


@pytest.mark.parametrize(
    ("settings", "code", "names"),
    [
        ({}, "incomplete", ["max_steps", "max_tokens", "max_time_s"]),
        ({"max_steps": 0}, "invalid-value", ["max_steps is 0"]),
        ({"max_steps": 10, "learning_rate": float("nan")}, "invalid-value", ["learning_rate is nan"]),
        ({"max_steps": 10, "batch_size": -1}, "invalid-value", ["batch_size is -1"]),
        ({"max_steps": 10, "beta2": 1.0}, "invalid-value", ["beta2 is 1.0"]),
        ({"max_steps": 10, "decay_fraction": 1.5, "schedule": "wsd"}, "invalid-value", ["decay_fraction is 1.5"]),
        ({"max_steps": 10, "schedule": "linear"}, "invalid-value", ["'linear'", "cosine", "wsd"]),
        (
            {"max_steps": 10, "schedule": "inverse-sqrt", "warmup_steps": 0},
            "contradiction",
            ["inverse-sqrt", "warmup_steps"],
        ),
        ({"max_tokens": 100, "batch_size": 4, "seq_len": 64}, "contradiction", ["max_tokens 100", "256"]),
        ({"max_steps": "10"}, "invalid-value", ["max_steps is '10'"]),
        ({"max_steps": 10, "batch_size": 10**11}, "invalid-value", ["batch_size", "102400000000000", "67108864"]),
        ({"max_steps": 10, "grad_accumulation": 10**11}, "invalid-value", ["grad_accumulation", "67108864"]),
        ({"max_steps": 10, "optimizer": "muon", "muon_learning_rate": 1e308}, "invalid-value", ["Muon", "1e+308"]),
        ({"max_steps": 10, "optimizer": "muon", "learning_rate": 1e308}, "invalid-value", ["Muon", "1e+308"]),
    ],
)
def test_contradictions_and_bad_values(settings, code, names):
    with refuses(code, *names):
        RunSettings.from_flat(settings)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("sample_prompt", 5, "a word"),
        ("keep_last", 0.5, "a whole number"),
        ("batch_size", 1.5, "a whole number"),
        ("batch_size", None, "a whole number"),
        ("batch_size", True, "a whole number"),
        ("seq_len", 32.5, "a whole number"),
        ("seed", 1.5, "a whole number"),
        ("seed", None, "a whole number"),
        ("seed", 10**30, "less than 2^64"),
        ("num_threads", 1.5, "a whole number or null"),
        ("num_threads", 10**11, "at most 4096"),
        ("sample_prompt", "a\udcff", "UTF-8 text"),
        ("max_steps", 2.5, "a whole number or null"),
        ("warmup_steps", 0.5, "a whole number or null"),
        ("grad_accumulation", 1.5, "a whole number"),
        ("beta1", "a", "a finite number"),
        ("decay_fraction", "x", "a finite number or null"),
        ("learning_rate", None, "a finite number"),
        ("learning_rate", 10**400, "a finite number"),
        ("stream", 1, "true or false"),
        ("device", None, "a word"),
        ("schedule", ["cosine"], "cosine or"),
    ],
)
def test_values_of_another_type(name, value, wanted):
    with pytest.raises(UserError) as caught:
        RunSettings.from_flat({"max_steps": 10} | {name: value})
    assert str(caught.value).startswith(f"train config: {name} is {value!r}; wanted {wanted}")


def test_whole_numbers_where_fractions_are_wanted():
    assert TrainConfig(max_steps=10, learning_rate=1, clip_norm=0, seed=2**64 - 1).learning_rate == 1


@pytest.mark.parametrize(
    "settings",
    [{"decay_fraction": 0.1}, {"muon_learning_rate": 0.1}, {"schedule": "constant", "min_lr_fraction": 0.1}],
)
def test_a_setting_without_effect_warns(settings):
    with pytest.warns(UserWarning, match="has no effect with"):
        TrainConfig(max_steps=10, **settings)


def test_the_same_settings_do_not_warn_where_they_have_an_effect():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainConfig(max_steps=10, schedule="wsd", decay_fraction=0.1, min_lr_fraction=0.0)
        TrainConfig(max_steps=10, optimizer="muon", muon_learning_rate=0.1)


@pytest.mark.parametrize("kind", [TrainConfig, LanguageOptions, DistillationOptions])
def test_every_field_has_a_docstring(kind):
    lines = [line.strip() for line in inspect.getsource(kind).splitlines()]
    for name in kind.__annotations__:
        position = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
        assert lines[position + 1].startswith('"""'), name


@pytest.mark.parametrize("other", [{"freeze": "*.mlp.*"}, {"grad_accumulation": 2}, {"optimizer": "muon"}])
def test_a_cuda_graph_goes_with_plain_steps_only(other):
    with refuses("contradiction", "cuda_graph", *other):
        TrainConfig(max_steps=1, cuda_graph=True, **other)
