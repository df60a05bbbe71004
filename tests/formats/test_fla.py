"""fla's layout: settings, tensors, and that the model computes what the equations say of such a checkpoint."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from hgrn2.formats.fla import read_config, write_config
from hgrn2.formats.opening import open_folder
from hgrn2.formats.tables import model_shapes
from hgrn2.models import HGRN2LM, HGRN2Config, presets
from tests.formats.published import FLA_CONFIG, HYBRID, D, L, draw, fla_shapes, merged, write
from tests.models import transcription
from tests.refusals import refuses

# what a checkpoint of fla computes, in the words of the transcription; nothing here is read from its config.json
EQUATIONS = {
    "hidden_size": D, "num_hidden_layers": L, "expand_ratio": 4, "lower_bound": "inclusive", "use_lower_bound": True,
    "q_activation": "silu", "v_activation": "none", "scale": 4**-0.5, "mixer_norm": "rmsnorm", "mixer_norm_eps": 1e-5,
    "block_norm": "rmsnorm", "norm_eps": 0.01, "glu_activation": "silu", "use_short_conv": False,
    "scale_embedding": False, "min_log_decay": None, "attn": None, "gate_range": "positive", "dense_state": 0,
}  # fmt: skip
KINDS = {
    "plain": ({}, {}, {}),
    "short convolutions": ({"use_short_conv": True}, {"convolutions": True}, {"use_short_conv": True}),
    "tied": ({"tie_word_embeddings": True}, {"tied": True}, {}),
    "no lower bound": ({"use_lower_bound": False}, {"lower_bound": False}, {"use_lower_bound": False}),
    "hybrid": ({"attn": HYBRID}, {"hybrid": True}, {"attn": SimpleNamespace(**HYBRID)}),
}


def load(folder):
    opened = open_folder(folder)
    model = HGRN2LM(opened.config).double().eval()
    opened.load_into(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_computes_what_the_equations_say(kind, tmp_path):
    keys, shapes, equations = KINDS[kind]
    tensors = draw(fla_shapes(**shapes), torch.float64)
    model = load(write(tmp_path / "fla", FLA_CONFIG | keys, tensors))
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    if kind == "tied":
        tensors |= {"lm_head.weight": tensors["model.embeddings.weight"]}
    wanted = transcription.logits(SimpleNamespace(**EQUATIONS | equations), tensors, ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], wanted, rtol=1e-10, atol=1e-10)


def test_merged_gate_and_up_are_taken_apart(tmp_path):
    tensors = draw(fla_shapes())
    opened = open_folder(write(tmp_path / "old", FLA_CONFIG, merged(tensors)))
    assert list(opened.places) == list(model_shapes(opened.config))
    for name, x in tensors.items():
        assert torch.equal(opened.read(name), x), name
    # one layer of the old form among those of the new
    mixed = tensors | {name: x for name, x in merged(tensors).items() if "layers.1.mlp.gate" in name}
    del mixed["model.layers.1.mlp.up_proj.weight"]
    with refuses("mismatch", "1 missing: model.layers.1.mlp.up_proj.weight", "1 misshapen", "[48, 16]"):
        open_folder(write(tmp_path / "mixed", FLA_CONFIG, mixed))


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, {"mixer_norm_eps": 1e-5, "norm_eps": 0.01, "mixer_norm_affine": True, "scale": None}),
        ({"elementwise_affine": False}, {"mixer_norm_affine": False, "elementwise_affine": True}),
        ({"elementwise_affine": None}, {"mixer_norm_affine": False, "elementwise_affine": True}),
        ({"attn_mode": "fused_chunk"}, {}),
        ({"attn_mode": "fused_recurrent", "hidden_act": "silu"}, {"glu_activation": "silu"}),
        ({"norm_eps": None, "rms_norm_eps": 0.5}, {"norm_eps": 0.5}),
        ({"norm_eps": 0.5, "rms_norm_eps": 0.5}, {"norm_eps": 0.5}),
        ({"num_heads": None}, {"num_heads": 4}),
        ({"expand_ratio": None, "num_heads": 2}, {"expand_ratio": 8}),
        ({"intermediate_size": None, "hidden_ratio": None}, {"intermediate_size": 256}),
        ({"intermediate_size": None, "hidden_ratio": 30}, {"intermediate_size": 512}),
        ({"attnres_block_size": None, "share_conv_kernel": True, "fuse_linear_cross_entropy": True}, {}),
        ({"pad_token_id": 3, "id2label": {"0": "a"}, "dtype": "bfloat16", "torch_dtype": "bfloat16"}, {}),
        ({"attn": {"layers": [], "num_heads": 4}}, {"attn": None}),
    ],
)
def test_settings_are_read(keys, wanted):
    config = read_config(FLA_CONFIG | keys)
    assert {key: getattr(config, key) for key in wanted} == wanted


def test_attention_of_hybrids_is_read():
    old = read_config(FLA_CONFIG | {"attn": {"layers": [0, 2], "num_heads": 4}}).attn
    assert dataclasses.astuple(old) == ((0, 2), 4, 4, None, 10000.0, False)  # type: ignore[arg-type]
    alike = {"num_heads": 4, "num_kv_heads": 2, "qk_norm": False}
    lists = read_config(FLA_CONFIG | {"attn": [alike | {"layers": [2]}, alike | {"layers": (0,)}]}).attn
    assert dataclasses.astuple(lists) == ((2, 0), 4, 2, None, 10000.0, False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "code", "names"),
    [
        ({"hiden_size": 16}, "unknown-name", ["'hiden_size'", "'hidden_size'"]),
        ({"use_rope": True}, "unknown-name", ["'use_rope'"]),
        ({"quantization_config": {}}, "unknown-name", ["'quantization_config'"]),
        ({"model_type": "gla"}, "unsupported", ["model_type", "'gla'", "'hgrn2'"]),
        ({"hidden_act": "powlu"}, "unsupported", ["hidden_act", "'powlu'", "'swish'"]),
        ({"attn_mode": "parallel"}, "unsupported", ["attn_mode", "'parallel'", "chunk"]),
        ({"attnres_block_size": 2}, "unsupported", ["attnres_block_size is 2"]),
        ({"use_short_conv": True, "share_conv_kernel": True}, "unsupported", ["share_conv_kernel is True"]),
        ({"num_heads": 2}, "contradiction", ["num_heads = 2", "expand_ratio = 4"]),
        ({"num_heads": None, "expand_ratio": None}, "incomplete", ["expand_ratio", "num_heads"]),
        ({"num_heads": 3, "expand_ratio": None}, "contradiction", ["num_heads is 3", "hidden_size = 16"]),
        ({"num_heads": "4", "expand_ratio": None}, "contradiction", ["num_heads is '4'"]),
        ({"rms_norm_eps": 0.1}, "contradiction", ["norm_eps = 0.01", "rms_norm_eps = 0.1"]),
        ({"attn": 3}, "invalid-value", ["attn is 3"]),
        ({"attn": "no"}, "invalid-value", ["attn is 'no'"]),
        ({"attn": {"num_heads": 4}}, "incomplete", ["attn.layers"]),
        ({"attn": {"layers": 1, "num_heads": 4}}, "invalid-value", ["attn.layers is 1"]),
        ({"attn": {"layers": [9], "num_heads": 4}}, "contradiction", ["attn.layers", "[9]"]),
        ({"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 3}}, "contradiction", ["num_kv_heads is 3"]),
        ({"attn": {"layers": [1], "num_heads": 4, "rope_theta": None}}, "unsupported", ["attn.rope_theta is None"]),
        ({"attn": {"layers": [1], "num_heads": 4, "qk_norm": True}}, "unsupported", ["attn.qk_norm is True"]),
        ({"attn": {"layers": [1], "num_heads": 4, "softcap": 5}}, "unknown-name", ["attn.softcap"]),
        (
            {"attn": [{"layers": [0], "num_heads": 4}, {"layers": [1], "num_heads": 4, "window_size": 8}]},
            "unsupported",
            ["attn.window_size", "None", "[0]", "8", "[1]"],
        ),
    ],
)
def test_settings_that_are_not_ours_are_refused_by_name(keys, code, names):
    with refuses(code, *names):
        read_config(FLA_CONFIG | keys)


def test_no_table_of_settings():
    with refuses("invalid-value", "list"):
        read_config([])  # type: ignore[arg-type]


@pytest.mark.parametrize("keys", [keys for keys, _, _ in KINDS.values()] + [{"elementwise_affine": False}])
def test_settings_there_and_back(keys):
    config = read_config(FLA_CONFIG | keys)
    written = json.loads(json.dumps(write_config(config)))
    assert read_config(written) == config
    # nothing of the file is lost, but what transformers writes and how it is computed
    for key in write_config(HGRN2Config()).keys() & FLA_CONFIG.keys():
        assert written[key] == (FLA_CONFIG | keys)[key], key


def test_defaults_are_those_of_fla():
    assert read_config({"attn_mode": "chunk"}) == HGRN2Config()
    written = write_config(HGRN2Config())
    wanted = {
        "hidden_size": 2048, "num_hidden_layers": 24, "expand_ratio": 128, "use_short_conv": False, "conv_size": 4,
        "use_lower_bound": True, "hidden_ratio": 4, "hidden_act": "swish", "elementwise_affine": True,
        "norm_eps": 1e-6, "attn": None, "tie_word_embeddings": False, "initializer_range": 0.02, "vocab_size": 32000,
        "attn_mode": "chunk",
    }  # fmt: skip
    assert {key: written[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"scale": 1.0}, "scale"),
        ({"lower_bound": "exclusive"}, "lower_bound"),
        ({"mixer_norm": "layernorm"}, "mixer_norm"),
        ({"mixer_norm_eps": 1e-6}, "mixer_norm_eps"),
        ({"block_norm": "layernorm"}, "block_norm"),
        ({"elementwise_affine": False}, "elementwise_affine"),
        ({"glu_activation": "none"}, "glu_activation"),
        ({"q_activation": "sigmoid"}, "q_activation"),
        ({"v_activation": "silu"}, "v_activation"),
        ({"use_bias": True}, "use_bias"),
        ({"scale_embedding": True}, "scale_embedding"),
        ({"attn": {"layers": [0], "num_heads": 4, "rope_theta": None}}, "attn.rope_theta"),
    ],
)
def test_what_fla_cannot_say_is_refused_by_name(keys, name):
    with refuses("unsupported", "fla", f"{name} = "):
        write_config(HGRN2Config(**keys))


def test_what_matters_in_training_alone_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match=r"no dropout; 0\.1 is left out"):
        written = write_config(HGRN2Config(dropout=0.1))
    assert read_config(written) == HGRN2Config()
    with pytest.warns(UserWarning, match="no min_log_decay"):
        write_config(HGRN2Config(min_log_decay=-3.0))
    # without bounds it does not matter how they would follow from their parameters
    assert not read_config(write_config(HGRN2Config(use_lower_bound=False, lower_bound="exclusive"))).use_lower_bound


@pytest.mark.parametrize(
    ("hidden_size", "layers", "intermediate_size", "count", "parameters", "preset"),
    [(2048, 24, 5632, 244, 1_364_396_032, "1.3b"), (2560, 32, 6912, 324, 2_701_724_160, "2.7b")],
)
def test_published_models_from_their_settings_alone(hidden_size, layers, intermediate_size, count, parameters, preset):
    config = read_config(
        FLA_CONFIG
        | {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_heads": None, "expand_ratio": 128,
           "intermediate_size": None, "vocab_size": 32000, "norm_eps": 1e-6, "attn_mode": "fused_chunk"}
    )  # fmt: skip
    assert config == presets.preset(preset)
    wide, square = [intermediate_size, hidden_size], [hidden_size, hidden_size]
    vocabulary, vector = [32000, hidden_size], [hidden_size]
    layer = {
        "attn_norm.weight": vector, "attn.q_proj.weight": square, "attn.f_proj.weight": square,
        "attn.i_proj.weight": square, "attn.g_norm.weight": vector, "attn.o_proj.weight": square,
        "mlp_norm.weight": vector, "mlp.gate_proj.weight": wide, "mlp.up_proj.weight": wide,
        "mlp.down_proj.weight": wide[::-1],
    }  # fmt: skip
    wanted = {"model.embeddings.weight": vocabulary, "model.lower_bounds": [layers, hidden_size],
              "model.norm.weight": vector, "lm_head.weight": vocabulary}  # fmt: skip
    wanted |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    found = {name: list(shape) for name, shape in model_shapes(config).items()}
    assert found == wanted
    assert len(found) == count
    assert sum(torch.Size(shape).numel() for shape in found.values()) == parameters
