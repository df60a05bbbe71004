"""config.json: three kinds of it, told apart by their keys."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hgrn2.hf
from hgrn2.hf import HGRN2Config
from tests.hf.cases import KINDS, hf_config
from tests.models.cases import NAMES, SIZE, config_of
from tests.refusals import refuses


@pytest.mark.parametrize("name", NAMES)
def test_our_settings_survive_a_file(name, tmp_path):
    config = hf_config(name, bos_token_id=3, eos_token_id=[4, 5], num_labels=4)
    assert config.model_config == config_of(name)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is HGRN2Config
    assert again.model_config == config_of(name)
    again.name_or_path = config.name_or_path
    assert again.to_dict() == config.to_dict()
    assert (again.bos_token_id, again.eos_token_id, again.num_labels) == (3, [4, 5], 4)


def test_the_tables_of_a_training_run_are_read(tmp_path):
    table = config_of("short-conv").to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"model": table, "train": {"max_steps": 3}, "data": {}}))
    assert HGRN2Config.from_pretrained(tmp_path).model_config == config_of("short-conv")
    (tmp_path / "config.json").write_text(json.dumps({"model": table, "model_type": "hgrn2", "bos_token_id": 7}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.bos_token_id == 7
    # what is written has no tables any more
    assert "model" not in config.to_dict()


def test_the_settings_of_fla_are_read(tmp_path):
    keys = {
        "model_type": "hgrn2", "attn_mode": "fused_chunk", "rms_norm_eps": 1e-4, "hidden_size": 32,
        "num_hidden_layers": 4, "expand_ratio": 8, "num_heads": None, "hidden_act": "swish", "vocab_size": 29,
        "max_position_embeddings": 99,
        "attn": {"layers": [1, 3], "num_heads": 2, "window_size": 7}, "fuse_cross_entropy": True, "bos_token_id": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.norm_eps, config.num_heads, config.lower_bound, config.bos_token_id) == (1e-4, 4, "inclusive", 1)
    assert config.layer_types == ["linear_attention", "sliding_attention"] * 2
    # what is written is ours
    config.save_pretrained(tmp_path)
    assert "attn_mode" not in json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).model_config == config.model_config


def test_a_run_has_no_further_tables():
    with refuses("unknown-name", "'dat'", "'data'"):
        HGRN2Config(model=config_of("fla").to_dict(), dat={})


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("fla", ["linear_attention"] * 3),
        ("full-attention", ["linear_attention", "full_attention", "linear_attention"]),
        ("window-attention", ["sliding_attention", "linear_attention", "sliding_attention"]),
    ],
)
def test_layer_types_follow_from_attn(name, kinds):
    config = hf_config(name)
    assert config.layer_types == kinds
    assert hf_config(name, layer_types=kinds).layer_types == kinds
    with refuses("contradiction", "layer_types"):
        hf_config(name, layer_types=kinds[1:] + kinds[:2])


def test_what_follows_from_other_settings_is_set_or_refused():
    config = hf_config("fla")
    for name in ("head_dim", "layer_types", "sliding_window", "num_key_value_heads"):
        setattr(config, name, getattr(config, name))
    assert config.model_config == config_of("fla")
    with refuses("contradiction", "head_dim", "8", "expand_ratio"):
        config.head_dim = 8
    with refuses("contradiction", "layer_types"):
        config.layer_types = ["full_attention"] * 3
    with refuses("contradiction", "sliding_window", "5", "attn"):
        config.sliding_window = 5
    hybrid = hf_config("full-attention")
    hybrid.sliding_window = 5
    assert hybrid.layer_types == ["linear_attention", "sliding_attention", "linear_attention"]
    assert hgrn2.hf.HGRN2Model(hybrid).layers[1].attn.window_size == 5
    # another configuration of the same settings is left alone
    assert hf_config("full-attention").sliding_window is None


def test_a_file_s_own_auto_map_goes_before_the_empty_one(tmp_path):
    config = hf_config("fla")
    assert config.auto_map == {}
    assert "auto_map" not in config.to_dict()
    hf_config("fla", auto_map={"AutoModel": "theirs.Model"}).save_pretrained(tmp_path)
    assert HGRN2Config.from_pretrained(tmp_path).auto_map == {"AutoModel": "theirs.Model"}
    assert hf_config("fla").auto_map == {}


@pytest.mark.parametrize(
    ("keys", "code", "names"),
    [
        ({"num_heads": 3}, "contradiction", ["hidden_size", "expand_ratio"]),
        ({"lower_bonud": "exclusive"}, "unknown-name", ["'lower_bound'"]),
        ({"attn_mode": "chunk", "glu_activation": "none"}, "contradiction", ["glu_activation"]),
        ({"model": {"hidden_size": 16}}, "contradiction", ["'model'"]),
        ({"problem": 3}, "unknown-name", ["'problem'"]),
        ({"attn_mode": "chunk", "attnres_block_size": 4}, "unsupported", ["attnres_block_size"]),
        ({"decoder_embed_dim": 16}, "unsupported", ["hgru2-pytorch", "hgrn2 convert"]),
        ({"model_type": "llama"}, "unsupported", ["model_type", "'llama'"]),
    ],
)
def test_contradictions_and_unknown_keys_are_refused(keys, code, names):
    with refuses(code, *names):
        HGRN2Config(**SIZE, **keys)


@pytest.mark.parametrize(
    ("key", "value", "code", "names"),
    [
        ("hidden_act", "gelu", "unsupported", ["hidden_act", "'gelu'", "'swish'"]),
        ("hidden_act", "silu", "unknown-name", ["'silu'", "hidden_act", "glu_activation"]),
        ("rope_theta", 5.0, "unknown-name", ["rope_theta", "5.0"]),
        ("rope_parameters", {"rope_theta": 5.0}, "unknown-name", ["rope_theta"]),
        ("num_layers", 5, "unknown-name", ["num_hidden_layers"]),
        ("attention_dropout", 0.1, "unsupported", ["attention_dropout", "0.1"]),
        ("fuse_norm", True, "unknown-name", ["fuse_norm", "fla"]),
        ("decoder_layers", 5, "unknown-name", ["decoder_layers", "hgru2-pytorch"]),
        ("lower_bonud", "exclusive", "unknown-name", ["'lower_bound'"]),
    ],
)
@pytest.mark.parametrize("name", ["fla", "full-attention"])
def test_a_setting_that_the_model_would_not_read_cannot_be_set(name, key, value, code, names):
    config = hf_config(name)
    with refuses(code, *names):
        setattr(config, key, value)
    assert not hasattr(config, key)


def test_attributes_that_change_nothing_may_be_set(tmp_path):
    config = hf_config("fla")
    config.max_position_embeddings = 5
    config.attention_dropout = 0.0
    config.rope_parameters = None
    config.torch_dtype = "float32"
    config.num_attention_heads = config.num_heads
    config.save_pretrained(tmp_path)
    again = HGRN2Config.from_pretrained(tmp_path)
    assert again.max_position_embeddings == 5
    assert again.model_config == config_of("fla")
    # what a tool notes for itself
    config.note = "mine"
    assert config.note == "mine"
    # a model reads more than so many tokens
    assert hgrn2.hf.HGRN2Model(config)(torch.arange(9)[None]).last_hidden_state.shape[1] == 9


def test_a_later_contradiction_is_refused_when_the_model_is_made():
    config = hf_config("fla")
    config.expand_ratio = 5
    with refuses("contradiction", "hidden_size = 16", "expand_ratio = 5"):
        hgrn2.hf.HGRN2Model(config)


@pytest.mark.parametrize("name", KINDS)
def test_auto_classes_make_our_models(name):
    config = hf_config(name)
    assert type(AutoModel.from_config(config)) is hgrn2.hf.HGRN2Model
    assert type(AutoModelForCausalLM.from_config(config)) is hgrn2.hf.HGRN2ForCausalLM
    assert type(AutoModelForSequenceClassification.from_config(config)) is hgrn2.hf.HGRN2ForSequenceClassification


def test_whoever_registers_last_has_the_model_type():
    class Other(transformers.PreTrainedConfig):
        model_type = "hgrn2"

    try:
        AutoConfig.register("hgrn2", Other, exist_ok=True)
        assert type(AutoConfig.for_model("hgrn2")) is Other
    finally:
        hgrn2.hf.register()
    assert type(AutoConfig.for_model("hgrn2")) is HGRN2Config


def test_the_window_of_attention_in_a_pattern_is_the_librarys():
    config = hf_config("griffin-hybrid")
    assert config.layer_types == ["linear_attention"] * 2 + ["sliding_attention"]
    assert config.sliding_window == 5
    config.sliding_window = 7
    assert config.model_config.mixers["attention"].window_size == 7
    assert hf_config("griffin").sliding_window is None
