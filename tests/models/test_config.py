import dataclasses
import json
from typing import Any

import pytest

from hgrn2.models import AttentionConfig, HGRN2Config, presets
from tests.refusals import refuses

SMALL: dict[str, Any] = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 4}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"num_heads": 4, "intermediate_size": 20, "scale": 0.5},
        {"attn": {"layers": [1], "num_heads": 2, "window_size": 8}},
        {"attn": AttentionConfig((0,), 2)},
    ],
)
def test_there_and_back_through_json(keys):
    config = HGRN2Config(**SMALL, **keys)
    assert HGRN2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["model_type"] == "hgrn2"
    assert config.num_heads == 4
    hash(config)


def test_a_config_cannot_be_changed():
    config = HGRN2Config(**SMALL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 32  # type: ignore[misc]


@pytest.mark.parametrize(
    ("hidden_size", "hidden_ratio", "wanted"), [(2048, 4, 5632), (2560, 4, 6912), (1024, 4, 2816), (64, 1.5, 256)]
)
def test_intermediate_size_is_derived(hidden_size, hidden_ratio, wanted):
    assert HGRN2Config(hidden_size=hidden_size, hidden_ratio=hidden_ratio, expand_ratio=8).intermediate_size == wanted


def test_replacing_derives_anew():
    config = HGRN2Config(hidden_size=1024)
    wider = config.replace(hidden_size=2048)
    assert (wider.num_heads, wider.intermediate_size) == (16, 5632)
    assert config.replace(expand_ratio=64).num_heads == 16
    assert config.replace(dropout=0.5).intermediate_size == config.intermediate_size
    assert config.replace(hidden_size=512, intermediate_size=7).intermediate_size == 7
    with refuses("unknown-name", "'droput'", "'dropout'"):
        config.replace(droput=0.1)


def test_the_width_of_a_head_follows_from_the_number_of_heads():
    assert HGRN2Config(hidden_size=64, num_heads=4).expand_ratio == 16
    assert HGRN2Config.from_dict({"hidden_size": 64, "num_heads": 4}) == HGRN2Config(hidden_size=64, expand_ratio=16)
    assert HGRN2Config(hidden_size=256).expand_ratio == HGRN2Config(hidden_size=256, expand_ratio=None).expand_ratio
    assert HGRN2Config(hidden_size=64, num_heads=4).replace(num_heads=2).expand_ratio == 32
    assert presets.tiny(num_heads=8).expand_ratio == 32
    assert presets.tiny(num_heads=4, expand_ratio=64) == presets.tiny()


@pytest.mark.parametrize(
    ("make", "code", "names"),
    [
        (lambda: HGRN2Config(hidden_size=64), "contradiction", ["hidden_size", "expand_ratio", "128 (the default)"]),
        (
            lambda: HGRN2Config(expand_ratio=96),
            "contradiction",
            ["hidden_size = 2048 (the default)", "expand_ratio = 96"],
        ),
        (lambda: HGRN2Config(num_heads=3), "contradiction", ["num_heads", "3", "hidden_size", "2048 (the default)"]),
        (lambda: HGRN2Config(hidden_size=64, num_heads=0), "contradiction", ["num_heads", "0", "hidden_size", "64"]),
        (lambda: HGRN2Config(hidden_size="64", num_heads=4), "invalid-value", ["hidden_size", "'64'"]),
        (
            lambda: HGRN2Config(hidden_size=64, num_heads=4, expand_ratio=8),
            "contradiction",
            ["num_heads = 4", "expand_ratio"],
        ),
        (lambda: presets.tiny(hidden_size=96), "contradiction", ["hidden_size = 96", "64 (the preset's)"]),
        (lambda: presets.b1_3(num_heads=3), "contradiction", ["num_heads is 3", "2048 (the preset's)"]),
    ],
)
def test_messages_say_which_values_were_not_given(make, code, names):
    with refuses(code, *names):
        make()


def test_a_short_representation_makes_the_config_again():
    config = HGRN2Config(hidden_size=64, num_heads=4, attn={"layers": [1], "num_heads": 2}, dropout=0.5)  # type: ignore[arg-type]
    assert "norm_eps" not in repr(config)
    assert eval(repr(config)) == config
    assert config.summary == "24 layers (1 with attention), width 64, 4 heads of 16 x 16, vocabulary 32,000"
    assert HGRN2Config(hidden_size=128, num_hidden_layers=1).summary.startswith("1 layer, width 128, 1 head of 128 x")


def test_scale_of_the_heads():
    assert HGRN2Config(**SMALL).head_scale == 0.5
    assert HGRN2Config(**SMALL, scale=1.0).head_scale == 1


@pytest.mark.parametrize(
    ("keys", "code", "names"),
    [
        ({"hiden_size": 16}, "unknown-name", ["'hiden_size'", "'hidden_size'"]),
        ({"zzz": 1}, "unknown-name", ["'zzz'", "block_norm"]),
        ({"hidden_size": "abc"}, "invalid-value", ["hidden_size", "'abc'"]),
        ({"hidden_size": 16.0}, "invalid-value", ["hidden_size", "16.0"]),
        ({"hidden_size": 0}, "invalid-value", ["hidden_size", "0"]),
        ({"num_hidden_layers": 2**24}, "invalid-value", ["num_hidden_layers", "16777216"]),
        ({"hidden_size": 10**21}, "invalid-value", ["hidden_size"]),
        ({"vocab_size": 10**18}, "invalid-value", ["vocab_size"]),
        ({"hidden_ratio": 1e300}, "invalid-value", ["hidden_ratio", "1e+300"]),
        ({"vocab_size": -1}, "invalid-value", ["vocab_size", "-1"]),
        ({"vocab_size": None}, "invalid-value", ["vocab_size", "None"]),
        ({"expand_ratio": True}, "invalid-value", ["expand_ratio", "True"]),
        ({"expand_ratio": 5}, "contradiction", ["expand_ratio", "5", "hidden_size"]),
        ({"num_heads": 3}, "contradiction", ["expand_ratio", "4", "num_heads", "hidden_size"]),
        ({"intermediate_size": -1}, "invalid-value", ["intermediate_size", "-1"]),
        ({"intermediate_size": "7"}, "invalid-value", ["intermediate_size", "'7'"]),
        ({"hidden_ratio": -1}, "invalid-value", ["hidden_ratio", "-1"]),
        ({"hidden_ratio": 0, "intermediate_size": 24}, "invalid-value", ["hidden_ratio", "0"]),
        ({"hidden_ratio": float("nan")}, "invalid-value", ["hidden_ratio", "nan"]),
        ({"dropout": True}, "invalid-value", ["dropout", "True"]),
        ({"dropout": 1}, "invalid-value", ["dropout", "1"]),
        ({"dropout": "x"}, "invalid-value", ["dropout", "'x'"]),
        ({"scale": "x"}, "invalid-value", ["scale", "'x'"]),
        ({"scale": 0}, "invalid-value", ["scale", "0"]),
        ({"scale": -1.5}, "invalid-value", ["scale", "-1.5"]),
        ({"norm_eps": -1e-6}, "invalid-value", ["norm_eps", "-1e-06"]),
        ({"norm_eps": [1]}, "invalid-value", ["norm_eps", "[1]"]),
        ({"initializer_range": 0}, "invalid-value", ["initializer_range", "0"]),
        ({"initializer_range": float("inf")}, "invalid-value", ["initializer_range", "inf"]),
        ({"tie_word_embeddings": "abc"}, "invalid-value", ["tie_word_embeddings", "'abc'"]),
        ({"use_bias": 1}, "invalid-value", ["use_bias", "1"]),
        ({"use_short_conv": True, "conv_size": 1}, "invalid-value", ["conv_size", "1"]),
        ({"conv_size": -5}, "invalid-value", ["conv_size", "-5"]),
        ({"conv_size": 2.5}, "invalid-value", ["conv_size", "2.5"]),
        ({"min_log_decay": 0.0}, "invalid-value", ["min_log_decay", "0.0"]),
        ({"lower_bound": "both"}, "invalid-value", ["lower_bound", "'both'", "'inclusive'", "'exclusive'"]),
        ({"q_activation": "relu"}, "invalid-value", ["q_activation", "'relu'"]),
        ({"v_activation": "sigmoid"}, "invalid-value", ["v_activation"]),
        ({"glu_activation": None}, "invalid-value", ["glu_activation", "None"]),
        ({"mixer_norm": "batchnorm"}, "invalid-value", ["mixer_norm", "'batchnorm'"]),
        ({"block_norm": ""}, "invalid-value", ["block_norm", "''"]),
        ({"model_type": "hgrn"}, "unsupported", ["model_type", "'hgrn'", "'hgrn2'"]),
        ({"attn": 3}, "invalid-value", ["attn", "3"]),
        ({"attn": {}}, "incomplete", ["attn", "layers"]),
        ({"attn": {"layers": [0]}}, "incomplete", ["num_heads"]),
        ({"attn": {"layers": 0, "num_heads": 2}}, "invalid-value", ["attn.layers is 0"]),
        ({"attn": {"layers": [], "num_heads": 2}}, "invalid-value", ["attn.layers is []"]),
        ({"attn": {"layers": ["0"], "num_heads": 2}}, "invalid-value", ["attn.layers is ['0']"]),
        ({"attn": {"layers": [0, 0], "num_heads": 2}}, "invalid-value", ["attn.layers is [0, 0]"]),
        ({"attn": {"layers": [2], "num_heads": 2}}, "contradiction", ["attn.layers", "[2]"]),
        ({"attn": {"layers": [0], "num_heads": 0}}, "invalid-value", ["attn.num_heads is 0"]),
        ({"attn": {"layers": [0], "num_heads": 2.0}}, "invalid-value", ["attn.num_heads is 2.0"]),
        ({"attn": {"layers": [0], "num_heads": 4, "num_kv_heads": 3}}, "contradiction", ["num_kv_heads is 3"]),
        ({"attn": {"layers": [0], "num_heads": 16}}, "contradiction", ["attn.num_heads is 16", "hidden_size = 16"]),
        (
            {"attn": {"layers": [0], "num_heads": 2, "window_size": 0}},
            "invalid-value",
            ["attn.window_size is 0"],
        ),
        (
            {"attn": {"layers": [0], "num_heads": 2, "rope_theta": -1}},
            "invalid-value",
            ["attn.rope_theta is -1"],
        ),
        ({"attn": {"layers": [0], "num_heads": 2, "windw_size": 3}}, "unknown-name", ["'windw_size'"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(keys, code, names):
    with refuses(code, *names) as caught:
        HGRN2Config.from_dict(SMALL | keys)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model config")


def test_not_even_a_table():
    with refuses("invalid-value", "model config", "list"):
        HGRN2Config.from_dict([1])  # type: ignore[arg-type]


def test_presets_take_changes():
    assert presets.preset("tiny", vocab_size=300).vocab_size == 300
    assert presets.preset("1.3b") == presets.b1_3() == HGRN2Config(intermediate_size=5632)
    with refuses("unknown-name", "'1.4b'", "'1.3b'"):
        presets.preset("1.4b")
    with refuses("unknown-name", "'name'"):
        presets.preset("tiny", name="x")
    with refuses("unknown-name", "'flaa'", "'fla'"):
        presets.variant("flaa")


def test_published_variants():
    fla, paper = presets.variant("fla"), presets.variant("paper")
    assert (fla.lower_bound, fla.head_scale, fla.mixer_norm, fla.mixer_norm_eps) == (
        "inclusive", 128**-0.5, "rmsnorm", 1e-5
    )  # fmt: skip
    assert (paper.lower_bound, paper.head_scale, paper.mixer_norm, paper.q_activation) == (
        "exclusive", 1, "layernorm", "silu"
    )  # fmt: skip
    lm, lra = presets.variant("official-lm"), presets.variant("official-lra")
    assert (lm.lower_bound, lm.mixer_norm_affine, lm.elementwise_affine, lm.norm_eps, lm.glu_activation) == (
        "inclusive", False, False, 1e-6, "none"
    )  # fmt: skip
    assert (lra.lower_bound, lra.q_activation, lra.v_activation, lra.mixer_norm, lra.block_norm, lra.use_bias) == (
        "exclusive", "sigmoid", "silu", "layernorm", "layernorm", True
    )  # fmt: skip
    assert lm.min_log_decay == lra.min_log_decay == -3
    assert fla.min_log_decay is paper.min_log_decay is None
