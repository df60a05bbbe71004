"""Small models of every variant, with parameters far from their initial values so that every part shows."""

import torch

from hgrn2.models import HGRN2LM, HGRN2Config, presets
from tests.models import toy_mixer  # noqa: F401 (registers a mixer)

SIZE = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 3, "expand_ratio": 4, "intermediate_size": 24}

FULL = {"layers": [1], "num_heads": 4, "num_kv_heads": 2}
WINDOW = {"layers": [0, 2], "num_heads": 2, "num_kv_heads": 1, "window_size": 5, "qkv_bias": True}
# HGRN2 with a free key
UNTIED = {"gate": "sigmoid", "key_ratio": 1.0, "output_gate": False, "q_activation": "silu", "norm_heads": False}

CHANGES = {
    "fla": {},
    "exclusive": {"lower_bound": "exclusive"},
    "no-bound": {"use_lower_bound": False},
    "q-sigmoid": {"q_activation": "sigmoid"},
    "q-none": {"q_activation": "none"},
    "v-silu": {"v_activation": "silu"},
    "scale-1": {"scale": 1.0},
    "mixer-layernorm": {"mixer_norm": "layernorm", "mixer_norm_eps": 0.1},
    "mixer-layernorm-plain": {"mixer_norm": "layernorm", "mixer_norm_affine": False},
    "mixer-rmsnorm-plain": {"mixer_norm_affine": False},
    "block-layernorm": {"block_norm": "layernorm", "norm_eps": 0.1},
    "block-layernorm-plain": {"block_norm": "layernorm", "elementwise_affine": False},
    "block-rmsnorm-plain": {"elementwise_affine": False},
    "glu-none": {"glu_activation": "none"},
    "glu-sigmoid": {"glu_activation": "sigmoid"},
    "glu-gelu": {"glu_activation": "gelu"},
    "bias": {"use_bias": True},
    "short-conv": {"use_short_conv": True},
    "short-conv-2-bias": {"use_short_conv": True, "conv_size": 2, "use_bias": True},
    "scale-embedding": {"scale_embedding": True},
    "tied": {"tie_word_embeddings": True},
    "clamp": {"min_log_decay": -0.5},
    "signed": {"gate_range": "signed"},
    "signed-no-bound": {"gate_range": "signed", "use_lower_bound": False, "v_activation": "silu"},
    "dense": {"dense_state": 2},
    "dense-signed": {"dense_state": 1, "gate_range": "signed", "use_short_conv": True},
    "dense-clamp": {"dense_state": 1, "min_log_decay": -0.5, "use_bias": True},
    "one-head": {"expand_ratio": 16},
    "width-one": {"expand_ratio": 1},
    "width-two": {"expand_ratio": 2},
    "width-eight": {"expand_ratio": 8},
    "signed-width-one": {"expand_ratio": 1, "gate_range": "signed"},
    "full-attention": {"attn": FULL},
    "window-attention": {"attn": WINDOW, "use_short_conv": True},
    "attention-without-positions": {"attn": FULL | {"rope_theta": None, "num_kv_heads": None}},
    "gla": {"layers": "gla", "mixers": {"gla": {"num_heads": 2, "gate_rank": 3}}},
    "gla-untied": {"layers": "gla", "mixers": {"gla": {"num_heads": 4} | UNTIED}},
    "hgrn1": {"layers": "hgrn1"},
    "hgrn1-real": {"layers": "hgrn1", "mixers": {"hgrn1": {"form": "real", "bias": True}}},
    **{
        f"hgrn1-{kind}": {
            "layers": "hgrn1",
            "mixers": {"hgrn1": {"form": "real", "expand_ratio": 2, "expansion": kind}},
        }
        for kind in (
            "dense",
            "low-rank",
            "group-linear",
            "group-linear-interaction",
            "khatri-rao",
            "kronecker",
        )
    },
    "mamba": {"layers": "mamba", "mixers": {"mamba": {"state_size": 5, "conv_size": 3}}},
    "rwkv5": {"layers": "rwkv5", "mixers": {"rwkv5": {"head_size": 8}}},
    "rwkv6": {"layers": "rwkv6", "mixers": {"rwkv6": {"head_size": 4, "mix_rank": 3, "decay_rank": 5}}},
    "griffin": {"layers": "griffin", "mixers": {"griffin": {"num_blocks": 4}}},
    "griffin-hybrid": {
        "layers": "griffin,griffin,attention",
        "mixers": {
            "griffin": {"num_blocks": 3, "width": 12, "conv_size": 2, "bias": True},
            "attention": {"num_heads": 2, "num_kv_heads": 1, "window_size": 5},
        },
    },
    "rebased": {"layers": "rebased", "mixers": {"rebased": {"num_heads": 2, "feature_dim": 4}}},
    "average": {"layers": "average"},
    "average-hybrid": {"layers": "average,hgrn2,attention", "mixers": {"attention": {"num_heads": 2}}},
}


def config_of(name: str) -> HGRN2Config:
    """The config of a key of CHANGES, or of a published variant."""
    if name in CHANGES:
        return HGRN2Config.from_dict(SIZE | CHANGES[name])
    return presets.variant(name, **SIZE)


NAMES = [*CHANGES, "paper", "official-lm", "official-lra"]
# one of each kind of state
KINDS = [
    "fla", "signed", "signed-no-bound", "dense", "dense-signed",
    "official-lra", "short-conv", "short-conv-2-bias", "full-attention", "window-attention",
    "attention-without-positions", "average", "average-hybrid",
    "hgrn1", "hgrn1-real", "hgrn1-kronecker", "mamba", "griffin", "griffin-hybrid",
    "gla", "rwkv5", "rwkv6", "rebased",
]  # fmt: skip


def make_model(config: HGRN2Config, dtype: torch.dtype = torch.float64, seed: int = 0) -> HGRN2LM:
    """In evaluation mode."""
    model = HGRN2LM(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 0.5 + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(SIZE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))
