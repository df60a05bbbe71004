"""The layout of the authors' language model (hgru2-pytorch): conversion of settings and tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hgrn2.errors import UserError
from hgrn2.formats.keys import check_keys, require, warn_of_training_keys
from hgrn2.formats.tables import Table
from hgrn2.models import HGRN2Config, presets
from hgrn2.models.config import MODEL_TYPE

_WHAT = "hgru2-pytorch config"

# their key: our key and their default
_SETTINGS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 50272),
    "decoder_embed_dim": ("hidden_size", 1024),
    "decoder_layers": ("num_hidden_layers", 24),
    "expand_ratio": ("expand_ratio", 2),
    "glu_dim": ("intermediate_size", 2816),
    "glu_act": ("glu_activation", "none"),
    "in_act": ("v_activation", "none"),
    "out_act": ("q_activation", "silu"),
    "bias": ("use_bias", False),
    "init_std": ("initializer_range", 0.02),
    # old versions of transformers omit it if it is true
    "tie_word_embeddings": ("tie_word_embeddings", True),
}
_NORMS: dict[str, dict[str, Any]] = {
    "simplermsnorm": {
        "mixer_norm": "rmsnorm", "mixer_norm_eps": 1e-6, "mixer_norm_affine": False,
        "block_norm": "rmsnorm", "norm_eps": 1e-6, "elementwise_affine": False,
    },
    "layernorm": {
        "mixer_norm": "layernorm", "mixer_norm_eps": 1e-5, "mixer_norm_affine": True,
        "block_norm": "layernorm", "norm_eps": 1e-5, "elementwise_affine": True,
    },
}  # fmt: skip
_DECAY = presets.VARIANTS["official-lm"]["min_log_decay"]
# keys that only their files have
SIGNATURE = (
    "decoder_embed_dim", "decoder_layers", "glu_dim", "glu_act", "in_act", "out_act", "norm_type",
    "no_scale_embedding", "init_std", "add_bos_token", "causal",
)  # fmt: skip

# modules of a layer: those of ours whose rows they stack; V, Q and F share one matrix
_MODULES = {
    "token_norm": ("attn_norm",),
    "token_mixer.in_proj": ("attn.i_proj", "attn.q_proj", "attn.f_proj"),
    "token_mixer.norm": ("attn.g_norm",),
    "token_mixer.out_proj": ("attn.o_proj",),
    "channel_norm": ("mlp_norm",),
    "channel_mixer.l1": ("mlp.gate_proj",),
    "channel_mixer.l2": ("mlp.up_proj",),
    "channel_mixer.l3": ("mlp.down_proj",),
}


def read_config(values: Mapping[str, Any]) -> HGRN2Config:
    """Convert a config.json of the authors' language model to our configuration.

    As in `presets.variant("official-lm")`, bounds are inclusive, outputs are not scaled, and training has a floor of -3
    for the log decay.

    Raises:
        UserError: an unknown key, a setting that our model does not implement, or contradicting values.

    Example:
        >>> read_config({"decoder_embed_dim": 256, "expand_ratio": 128}).num_heads
        2
    """
    known = (*_SETTINGS, "norm_type", "no_scale_embedding", "causal")
    values = check_keys(values, _WHAT, known, ("add_bos_token",))
    if values.get("causal", True) is not True:
        raise UserError(
            f"{_WHAT}: causal is {values['causal']!r}; wanted true, as this is a language model", "unsupported"
        )
    norm = values.get("norm_type", "simplermsnorm")
    if not isinstance(norm, str) or norm not in _NORMS:
        raise UserError(f"{_WHAT}: norm_type is {norm!r}; wanted one of {', '.join(_NORMS)}", "unsupported")
    unscaled = values.get("no_scale_embedding", True)
    if not isinstance(unscaled, bool):
        raise UserError(f"{_WHAT}: no_scale_embedding is {unscaled!r}; wanted true or false")
    keys = {own: values.get(key, default) for key, (own, default) in _SETTINGS.items()}
    return presets.variant("official-lm", **keys, **_NORMS[norm], scale_embedding=not unscaled)


def write_config(config: HGRN2Config) -> dict[str, Any]:
    """Invert `read_config`.

    Raises:
        UserError: a setting that this layout cannot express.
    """
    require(
        config,
        "hgru2-pytorch",
        {
            "layers": None,
            "attn": None,
            "gate_range": "positive",
            "dense_state": 0,
            "use_short_conv": False,
            "use_lower_bound": True,
            "lower_bound": "inclusive",
            "head_scale": 1.0,
        },
    )
    norm = "layernorm" if config.block_norm == "layernorm" else "simplermsnorm"
    require(config, "hgru2-pytorch", _NORMS[norm])
    warn_of_training_keys(config, "hgru2-pytorch", {"dropout": (0,), "min_log_decay": (_DECAY,)})
    return {
        "model_type": MODEL_TYPE,
        **{key: getattr(config, own) for key, (own, _) in _SETTINGS.items()},
        "norm_type": norm,
        "no_scale_embedding": not config.scale_embedding,
        "causal": True,
        "add_bos_token": False,
        "use_cache": True,
    }


def tables(config: HGRN2Config, names: Sequence[str]) -> tuple[Table, ...]:
    """Return the table of a file's tensors.

    Args:
        config: configuration of the model.
        names: names of our tensors.
    """
    modules = {
        "model.embed_tokens": ("model.embeddings",),
        "model.final_norm": ("model.norm",),
        "lm_head": ("lm_head",),
    }
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        modules |= {at + module: tuple(at + part for part in own) for module, own in _MODULES.items()}
    table: Table = {"model.lower_bounds": ("model.lower_bounds",)}
    for module, own in modules.items():
        for kind in ("weight", "bias"):
            if f"{own[0]}.{kind}" in names:
                table[f"{module}.{kind}"] = tuple(f"{part}.{kind}" for part in own)
    return (table,)
