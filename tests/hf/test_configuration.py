"""config.json: three kinds of it, told apart by their keys."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hgrn2.hf
from hgrn2.errors import UserError
from hgrn2.hf import HGRN2Config
from tests.hf.cases import KINDS, hf_config
from tests.models.cases import NAMES, SIZE, config_of


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
    with pytest.raises(UserError, match="unknown key 'dat'; did you mean 'data'"):
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
    with pytest.raises(UserError, match="layer_types"):
        hf_config(name, layer_types=kinds[1:] + kinds[:2])


def test_what_follows_from_other_settings_is_set_or_refused():
    config = hf_config("fla")
    for name in ("head_dim", "layer_types", "sliding_window", "num_key_value_heads"):
        setattr(config, name, getattr(config, name))
    assert config.model_config == config_of("fla")
    with pytest.raises(UserError, match="head_dim cannot be set to 8: it is 4, which follows from expand_ratio"):
        config.head_dim = 8
    with pytest.raises(UserError, match=r"layer_types cannot be set to .* follows from attn; set that"):
        config.layer_types = ["full_attention"] * 3
    with pytest.raises(UserError, match=r"sliding_window cannot be set to 5: no layer attends \(attn is null\)"):
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
    ("keys", "message"),
    [
        ({"num_heads": 3}, "contradicts hidden_size / expand_ratio"),
        ({"lower_bonud": "exclusive"}, "did you mean 'lower_bound'"),
        ({"attn_mode": "chunk", "glu_activation": "none"}, "glu_activation"),
        ({"model": {"hidden_size": 16}}, "beside the table 'model'"),
        ({"problem": 3}, "unknown key 'problem'"),
        ({"attn_mode": "chunk", "attnres_block_size": 4}, "attnres_block_size"),
        ({"decoder_embed_dim": 16}, "use hgrn2 convert first"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
    ],
)
def test_contradictions_and_unknown_keys_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        HGRN2Config(**SIZE, **keys)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "gelu", "hidden_act is 'gelu'; wanted 'swish'"),
        ("hidden_act", "silu", "hidden_act cannot be set to 'silu': .* set glu_activation"),
        ("rope_theta", 5.0, "rope_theta cannot be set to 5.0: .* set the rope_theta of attn"),
        ("rope_parameters", {"rope_theta": 5.0}, "set the rope_theta of attn"),
        ("num_layers", 5, "set num_hidden_layers"),
        ("attention_dropout", 0.1, "no model here has it"),
        ("fuse_norm", True, "a setting of fla's files"),
        ("decoder_layers", 5, "a setting of hgru2-pytorch's files"),
        ("lower_bonud", "exclusive", "did you mean 'lower_bound'"),
    ],
)
@pytest.mark.parametrize("name", ["fla", "full-attention"])
def test_a_setting_that_the_model_would_not_read_cannot_be_set(name, key, value, message):
    config = hf_config(name)
    with pytest.raises(UserError, match=message):
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
    with pytest.raises(UserError, match="not a multiple"):
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
