"""Named configurations: four published variants of the architecture, and sizes to train.

A variant is a choice of architecture details, a size a choice of dimensions; `wikitext_44m` and `m385` are sizes
published in one variant, which they keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.models.config import HGRN2Config
from hgrn2.shapes import describe

VARIANTS: dict[str, dict[str, Any]] = {
    # fla and the checkpoints published in its layout
    "fla": {},
    # figure 1 and section 3 of arXiv 2404.07904
    "paper": {
        "lower_bound": "exclusive",
        "scale": 1.0,
        "mixer_norm": "layernorm",
        "mixer_norm_eps": 1e-5,
    },
    # the authors' Hugging Face language model
    "official-lm": {
        "scale": 1.0,
        "mixer_norm_eps": 1e-6,
        "mixer_norm_affine": False,
        "elementwise_affine": False,
        "glu_activation": "none",
        "min_log_decay": -3.0,
    },
    # the authors' module for Long Range Arena and images
    "official-lra": {
        "lower_bound": "exclusive",
        "q_activation": "sigmoid",
        "v_activation": "silu",
        "scale": 1.0,
        "mixer_norm": "layernorm",
        "block_norm": "layernorm",
        "norm_eps": 1e-5,
        "use_bias": True,
        "min_log_decay": -3.0,
    },
}


def variant(name: str, /, **keys: Any) -> HGRN2Config:
    """Return a configuration of a published variant.

    Args:
        name: "fla", "paper", "official-lm" or "official-lra".
        **keys: keys of `HGRN2Config`, which override those of the variant.
    """
    _check_name("variants", name)
    if name not in VARIANTS:
        raise UserError(unknown_key_message("variants", name, VARIANTS), "unknown-name")
    return HGRN2Config.from_dict(VARIANTS[name] | keys)


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str):
        raise UserError(f"{what}: the name is {describe(name)}; wanted a word")


def _sized(name: str, size: dict[str, Any], keys: dict[str, Any]) -> HGRN2Config:
    """Return a size in a variant; keys override it, and num_heads replaces its expand_ratio."""
    if keys.get("num_heads") is not None and "expand_ratio" not in keys:
        size = size | {"expand_ratio": None}
    try:
        return variant(name, **size | keys)
    except UserError as error:
        message = str(error).replace(" (the default)", "")
        for key in size.keys() - keys.keys():
            message = message.replace(f"{key} = {size[key]}", f"{key} = {size[key]} (the preset's)")
        raise UserError(message, error.code) from None


def tiny(**keys: Any) -> HGRN2Config:
    """A few million parameters, for a laptop: the demo."""
    size = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "expand_ratio": 64,
        "intermediate_size": 704,
    }
    return _sized("fla", size | {"tie_word_embeddings": True}, keys)


def wikitext_44m(**keys: Any) -> HGRN2Config:
    """The 44.66 M model of the paper's WikiText-103 table: the official module's variant, GPT-2's vocabulary."""
    size = {"vocab_size": 50257, "hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1365}
    return _sized("official-lra", size | {"tie_word_embeddings": True, "dropout": 0.1}, keys)


def m150(**keys: Any) -> HGRN2Config:
    """About 150 M parameters; this package's choice of sizes, the official language model's variant."""
    size = {"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 16, "intermediate_size": 2048}
    return _sized("official-lm", size | {"tie_word_embeddings": True}, keys)


def m385(**keys: Any) -> HGRN2Config:
    """About 385 M parameters, the official language model's width and variant."""
    size = {"vocab_size": 50272, "hidden_size": 1024, "num_hidden_layers": 26, "intermediate_size": 2816}
    return _sized("official-lm", size | {"tie_word_embeddings": True}, keys)


def b1_3(**keys: Any) -> HGRN2Config:
    """fla-hub/hgrn2-1.3B-100B: 1,364,396,032 parameters."""
    size = {"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5632}
    return _sized("fla", size, keys)


def b2_7(**keys: Any) -> HGRN2Config:
    """fla-hub/hgrn2-2.7B-100B: 2,701,724,160 parameters."""
    size = {"vocab_size": 32000, "hidden_size": 2560, "num_hidden_layers": 32, "intermediate_size": 6912}
    return _sized("fla", size, keys)


PRESETS: dict[str, Callable[..., HGRN2Config]] = {
    "tiny": tiny,
    "wikitext-44m": wikitext_44m,
    "150m": m150,
    "385m": m385,
    "1.3b": b1_3,
    "2.7b": b2_7,
}


def preset(name: str, /, **keys: Any) -> HGRN2Config:
    """Return the configuration of a size by its name on the command line.

    Args:
        name: a key of `PRESETS`.
        **keys: keys of `HGRN2Config`, which override those of the preset.
    """
    _check_name("presets", name)
    if name not in PRESETS:
        raise UserError(unknown_key_message("presets", name, PRESETS), "unknown-name")
    return PRESETS[name](**keys)
