"""The authors' language model: settings, tensors, and its equations once more, from its own tensors."""

import json

import pytest
import torch
from torch.nn import functional as F

from hgrn2.formats.official import read_config, write_config
from hgrn2.formats.opening import open_folder
from hgrn2.models import HGRN2LM, HGRN2Config, presets
from tests.formats.published import FF, OFFICIAL_CONFIG, VOCAB, D, L, draw, official_shapes, write
from tests.refusals import refuses

KINDS = {
    "published": {},
    "tied": {"tie_word_embeddings": True},
    "layernorm and biases": {"norm_type": "layernorm", "bias": True},
    "other activations": {"in_act": "silu", "out_act": "sigmoid", "glu_act": "gelu"},
    "scaled embeddings": {"no_scale_embedding": False, "expand_ratio": 8},
}


def official_logits(c, p, ids):
    """The authors' language model by its own names, one token at a time; sequences are its second axis."""
    acts = {"none": lambda x: x, "silu": F.silu, "sigmoid": torch.sigmoid, "gelu": F.gelu}

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def norm(x, name):
        if c["norm_type"] == "layernorm":
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            return x * p[f"{name}.weight"] + p[f"{name}.bias"]
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    width = c["decoder_embed_dim"]
    x = p["model.embed_tokens.weight"][ids.T] * (1 if c["no_scale_embedding"] else width**0.5)
    share = p["model.lower_bounds"].softmax(0)
    bounds = share.cumsum(0) - share[0]
    for layer in range(c["decoder_layers"]):
        at = f"model.layers.{layer}."
        v, q, z = linear(norm(x, f"{at}token_norm"), f"{at}token_mixer.in_proj").split(width, -1)
        v, q = acts[c["in_act"]](v), acts[c["out_act"]](q)
        keep = bounds[layer] + (1 - bounds[layer]) * torch.sigmoid(z)
        state, outputs = 0, []
        for t in range(x.shape[0]):
            q_t, f_t, v_t = (y[t].unflatten(-1, (-1, c["expand_ratio"])) for y in (q, keep, v))
            state = f_t.unsqueeze(-1) * state + torch.einsum("bhk,bhv->bhkv", 1 - f_t, v_t)
            outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, state).flatten(1))
        x = x + linear(norm(torch.stack(outputs), f"{at}token_mixer.norm"), f"{at}token_mixer.out_proj")
        y = norm(x, f"{at}channel_norm")
        y = acts[c["glu_act"]](linear(y, f"{at}channel_mixer.l1")) * linear(y, f"{at}channel_mixer.l2")
        x = x + linear(y, f"{at}channel_mixer.l3")
    head = p["model.embed_tokens.weight"] if c["tie_word_embeddings"] else p["lm_head.weight"]
    return F.linear(norm(x, "model.final_norm"), head).transpose(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_computes_what_the_equations_say(kind, tmp_path):
    config = OFFICIAL_CONFIG | KINDS[kind]
    tensors = draw(official_shapes(config["bias"], config["tie_word_embeddings"]), torch.float64)
    opened = open_folder(write(tmp_path / "official", config, tensors))
    model = HGRN2LM(opened.config).double().eval()
    opened.load_into(model)
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], official_logits(config, tensors, ids), rtol=1e-10, atol=1e-10)


def test_settings_are_those_of_the_preset():
    wanted = presets.variant(
        "official-lm", vocab_size=VOCAB, hidden_size=D, num_hidden_layers=L, expand_ratio=4, intermediate_size=FF
    )
    assert read_config(OFFICIAL_CONFIG) == wanted
    # their defaults; what transformers of that time left out is tied
    least = read_config({"decoder_embed_dim": 1024})
    assert (least.vocab_size, least.num_hidden_layers, least.expand_ratio) == (50272, 24, 2)
    assert (least.intermediate_size, least.tie_word_embeddings, least.initializer_range) == (2816, True, 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_there_and_back(kind):
    config = OFFICIAL_CONFIG | KINDS[kind]
    written = json.loads(json.dumps(write_config(read_config(config))))
    assert written == {key: value for key, value in config.items() if key in written}
    assert config.keys() - written.keys() == {
        "architectures", "transformers_version", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "code", "names"),
    [
        ({"decoder_embed_dims": 16}, "unknown-name", ["'decoder_embed_dims'", "'decoder_embed_dim'"]),
        ({"model_type": "hgrn"}, "unsupported", ["model_type is 'hgrn'"]),
        ({"causal": False}, "unsupported", ["causal is False"]),
        ({"norm_type": "rmsnorm"}, "unsupported", ["norm_type is 'rmsnorm'", "simplermsnorm"]),
        ({"norm_type": []}, "unsupported", ["norm_type is []"]),
        ({"no_scale_embedding": 1}, "invalid-value", ["no_scale_embedding is 1"]),
        ({"in_act": "relu"}, "invalid-value", ["v_activation is 'relu'"]),
        ({"out_act": "1+elu"}, "invalid-value", ["q_activation is '1+elu'"]),
        ({"glu_act": "relu"}, "invalid-value", ["glu_activation is 'relu'"]),
        ({"expand_ratio": 5}, "contradiction", ["expand_ratio = 5"]),
    ],
)
def test_settings_that_are_not_ours_are_refused_by_name(keys, code, names):
    with refuses(code, *names):
        read_config(OFFICIAL_CONFIG | keys)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"scale": None}, "scale"),
        ({"lower_bound": "exclusive"}, "lower_bound"),
        ({"use_lower_bound": False}, "use_lower_bound"),
        ({"use_short_conv": True}, "use_short_conv"),
        ({"mixer_norm_affine": True}, "mixer_norm_affine"),
        ({"norm_eps": 1e-5}, "norm_eps"),
        ({"attn": {"layers": [0], "num_heads": 4}}, "attn"),
    ],
)
def test_what_the_layout_cannot_say_is_refused_by_name(keys, name):
    with refuses("unsupported", "hgru2-pytorch", f"{name} = "):
        write_config(presets.variant("official-lm", **keys))


def test_another_floor_of_the_decay_is_left_out_with_a_warning():
    config = presets.variant("official-lm", min_log_decay=None)
    with pytest.warns(UserWarning, match="no min_log_decay; None is left out"):
        assert read_config(write_config(config)) == config.replace(min_log_decay=-3.0)
    with refuses("unsupported", "hgru2-pytorch"):
        write_config(HGRN2Config())
