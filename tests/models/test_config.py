import dataclasses
import json
from typing import Any

import pytest

from hgrn2.errors import UserError
from hgrn2.models import AttentionConfig, HGRN2Config, presets

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
    with pytest.raises(UserError, match="unknown key 'droput'; did you mean 'dropout'"):
        config.replace(droput=0.1)


def test_the_width_of_a_head_follows_from_the_number_of_heads():
    assert HGRN2Config(hidden_size=64, num_heads=4).expand_ratio == 16
    assert HGRN2Config.from_dict({"hidden_size": 64, "num_heads": 4}) == HGRN2Config(hidden_size=64, expand_ratio=16)
    assert HGRN2Config(hidden_size=256).expand_ratio == HGRN2Config(hidden_size=256, expand_ratio=None).expand_ratio
    assert HGRN2Config(hidden_size=64, num_heads=4).replace(num_heads=2).expand_ratio == 32
    assert presets.tiny(num_heads=8).expand_ratio == 32
    assert presets.tiny(num_heads=4, expand_ratio=64) == presets.tiny()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HGRN2Config(hidden_size=64), r"hidden_size = 64 is not .* expand_ratio = 128 \(the default\)"),
        (lambda: HGRN2Config(expand_ratio=96), r"hidden_size = 2048 \(the default\) is not .* expand_ratio = 96;"),
        (lambda: HGRN2Config(num_heads=3), r"num_heads is 3; .* divides hidden_size = 2048 \(the default\)"),
        (lambda: HGRN2Config(hidden_size=64, num_heads=0), r"num_heads is 0; .* divides hidden_size = 64$"),
        (lambda: HGRN2Config(hidden_size="64", num_heads=4), "hidden_size is '64'; wanted a whole number"),
        (lambda: HGRN2Config(hidden_size=64, num_heads=4, expand_ratio=8), "num_heads = 4 contradicts"),
        (lambda: presets.tiny(hidden_size=96), r"hidden_size = 96 is not .* expand_ratio = 64 \(the preset's\)"),
        (lambda: presets.b1_3(num_heads=3), r"num_heads is 3; .* divides hidden_size = 2048 \(the preset's\)$"),
    ],
)
def test_messages_say_which_values_were_not_given(make, message):
    with pytest.raises(UserError, match=message):
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
    ("keys", "message"),
    [
        ({"hiden_size": 16}, r"unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"zzz": 1}, r"unknown key 'zzz'; known keys: attn, block_norm"),
        ({"hidden_size": "abc"}, r"hidden_size is 'abc'; wanted a whole number"),
        ({"hidden_size": 16.0}, r"hidden_size is 16.0; wanted a whole number"),
        ({"hidden_size": 0}, r"hidden_size is 0; wanted at least 1"),
        ({"num_hidden_layers": 2**24}, "num_hidden_layers is 16777216; wanted at most 4096"),
        ({"hidden_size": 10**21}, r"hidden_size is 10{21}; wanted at most 16777216"),
        ({"vocab_size": 10**18}, r"vocab_size is 10{18}; wanted at most"),
        ({"hidden_ratio": 1e300}, r"hidden_ratio is 1e\+300; wanted less"),
        ({"vocab_size": -1}, r"vocab_size is -1"),
        ({"vocab_size": None}, r"vocab_size is None; wanted a whole number"),
        ({"expand_ratio": True}, r"expand_ratio is True"),
        ({"expand_ratio": 5}, r"hidden_size = 16 is not a multiple of expand_ratio = 5"),
        ({"num_heads": 3}, r"num_heads = 3 contradicts hidden_size / expand_ratio = 4; leave one of them out"),
        ({"intermediate_size": 0}, r"intermediate_size is 0"),
        ({"intermediate_size": "7"}, r"intermediate_size is '7'; wanted a whole number or null"),
        ({"hidden_ratio": -1}, r"hidden_ratio is -1; wanted above 0"),
        ({"hidden_ratio": 0, "intermediate_size": 24}, r"hidden_ratio is 0; wanted above 0"),
        ({"hidden_ratio": float("nan")}, r"hidden_ratio is nan; wanted a finite number"),
        ({"dropout": True}, r"dropout is True; wanted a finite number"),
        ({"dropout": 1}, r"dropout is 1; wanted in \[0, 1\)"),
        ({"dropout": "x"}, r"dropout is 'x'"),
        ({"scale": "x"}, r"scale is 'x'; wanted a finite number or null"),
        ({"scale": 0}, r"scale is 0; wanted above 0, or null"),
        ({"scale": -1.5}, r"scale is -1.5; wanted above 0, or null"),
        ({"norm_eps": -1e-6}, r"norm_eps is -1e-06"),
        ({"norm_eps": [1]}, r"norm_eps is \[1\]"),
        ({"initializer_range": 0}, r"initializer_range is 0"),
        ({"initializer_range": float("inf")}, r"initializer_range is inf"),
        ({"tie_word_embeddings": "abc"}, r"tie_word_embeddings is 'abc'; wanted true or false"),
        ({"use_bias": 1}, r"use_bias is 1; wanted true or false"),
        ({"use_short_conv": True, "conv_size": 1}, r"conv_size is 1; wanted at least 2"),
        ({"conv_size": -5}, r"conv_size is -5; wanted at least 2"),
        ({"conv_size": 2.5}, r"conv_size is 2.5"),
        ({"min_log_decay": 0.0}, r"min_log_decay is 0.0; wanted in \[-69, 0\), or null"),
        ({"lower_bound": "both"}, r"lower_bound is 'both'; wanted one of 'inclusive', 'exclusive'"),
        ({"q_activation": "relu"}, r"q_activation is 'relu'"),
        ({"v_activation": "sigmoid"}, r"v_activation"),
        ({"glu_activation": None}, r"glu_activation is None; wanted a word"),
        ({"mixer_norm": "batchnorm"}, r"mixer_norm is 'batchnorm'"),
        ({"block_norm": ""}, r"block_norm is ''"),
        ({"model_type": "hgrn"}, r"model_type is 'hgrn'; wanted 'hgrn2'"),
        ({"attn": 3}, r"attn is 3; wanted a table"),
        ({"attn": {}}, r"attn: no layers; wanted layers and num_heads"),
        ({"attn": {"layers": [0]}}, r"attn: no num_heads"),
        ({"attn": {"layers": 0, "num_heads": 2}}, r"attn.layers is 0; wanted a list"),
        ({"attn": {"layers": [], "num_heads": 2}}, r"attn.layers is \[\]; wanted a list of one or more"),
        ({"attn": {"layers": ["0"], "num_heads": 2}}, r"attn.layers is \['0'\]"),
        ({"attn": {"layers": [0, 0], "num_heads": 2}}, r"attn.layers is \[0, 0\]; wanted a list of one or more"),
        ({"attn": {"layers": [2], "num_heads": 2}}, r"attn.layers holds \[2\]; the model has layers 0 to 1"),
        ({"attn": {"layers": [0], "num_heads": 0}}, r"attn.num_heads is 0"),
        ({"attn": {"layers": [0], "num_heads": 2.0}}, r"attn.num_heads is 2.0; wanted a whole number"),
        ({"attn": {"layers": [0], "num_heads": 4, "num_kv_heads": 3}}, r"num_kv_heads is 3, which does not divide"),
        ({"attn": {"layers": [0], "num_heads": 16}}, r"no heads of even width"),
        ({"attn": {"layers": [0], "num_heads": 2, "window_size": 0}}, r"attn.window_size is 0"),
        ({"attn": {"layers": [0], "num_heads": 2, "rope_theta": -1}}, r"attn.rope_theta is -1"),
        ({"attn": {"layers": [0], "num_heads": 2, "windw_size": 3}}, r"attn: unknown key 'windw_size'; did you mean"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        HGRN2Config.from_dict(SMALL | keys)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model config")


def test_not_even_a_table():
    with pytest.raises(UserError, match="model config: found list; wanted a table"):
        HGRN2Config.from_dict([1])  # type: ignore[arg-type]


def test_presets_take_changes():
    assert presets.preset("tiny", vocab_size=300).vocab_size == 300
    assert presets.preset("1.3b") == presets.b1_3() == HGRN2Config(intermediate_size=5632)
    with pytest.raises(UserError, match=r"presets: unknown key '1.4b'; did you mean '1.3b'"):
        presets.preset("1.4b")
    with pytest.raises(UserError, match="unknown key 'name'"):
        presets.preset("tiny", name="x")
    with pytest.raises(UserError, match="variants: unknown key 'flaa'; did you mean 'fla'"):
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
