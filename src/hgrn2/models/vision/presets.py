"""Named image models: the authors' classifier, modern ones for small images, and the same with other mixers."""

from __future__ import annotations

from typing import Any

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.models.vision.config import VisionConfig

# options of the authors' module for images and Long Range Arena
_OFFICIAL: dict[str, Any] = {
    "q_activation": "sigmoid",
    "v_activation": "silu",
    "scale": 1.0,
    "norm": "layernorm",
    "bias": True,
    "min_log_decay": -3.0,
}


def _official(embed_dim: int, **changes: Any) -> dict[str, Any]:
    """Return the authors' classifier: patches of 14, no positions, mean pooling, LayerNorm, biases."""
    return {
        "img_size": 224, "patch_size": 14, "embed_dim": embed_dim, "depth": 12, "mlp_ratio": 3.0,
        "mixers": {"hgrn2": {**_OFFICIAL, "expand_ratio": 64}}, "directions": "bidirectional",
        "lower_bound": "exclusive", "norm": "layernorm", "use_bias": True,
    } | changes  # fmt: skip


def _small_images(embed_dim: int, depth: int, patch_size: int, **changes: Any) -> dict[str, Any]:
    """Return a model for images of about 32 x 32: convolutional stem, weighted pooling, directions that alternate."""
    return {
        "img_size": 32, "patch_size": patch_size, "num_classes": 10, "embed_dim": embed_dim, "depth": depth,
        "mlp_ratio": 2.0, "mixers": {"hgrn2": {"expand_ratio": 64}}, "directions": "alternating-2d", "stem": "conv",
        "global_pool": "seq",
    } | changes  # fmt: skip


def _heads(embed_dim: int, **changes: Any) -> dict[str, Any]:
    return {"attention": {"num_heads": embed_dim // 64, "rope_theta": None, **changes}}


# HGRN1's mixer has 7 D^2 parameters, HGRN2's 4 D^2; a narrower channel mixer makes up for it
_HGRN1: dict[str, Any] = {
    "layers": ("hgrn1",), "mixers": {"hgrn1": {"norm": "layernorm", "bias": True}}, "mlp_ratio": 2.0,
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "hgrn2_vit_tiny": _official(192),
    "hgrn2_vit_small": _official(384),
    "hgrn2_cct_nano": _small_images(
        64, 2, 4, mixers={"hgrn2": {"expand_ratio": 32}}, directions="causal,columns-reverse"
    ),
    "hgrn2_cct_tiny": _small_images(128, 6, 4),
    "hgrn2_cct_small": _small_images(256, 8, 4),
    "hgrn1_vit_tiny": _official(192) | _HGRN1,
    "hgrn1_vit_small": _official(384) | _HGRN1,
    "hgrn1_cct_small": _small_images(256, 8, 4, layers=("hgrn1",), mixers={"hgrn1": {}}, mlp_ratio=1.0),
    "plain_vit_tiny": _official(192, layers=("attention",), mixers=_heads(192, qkv_bias=True), position="learned"),
    "plain_vit_small": _official(384, layers=("attention",), mixers=_heads(384, qkv_bias=True), position="learned"),
    "plain_cct_small": _small_images(
        256, 8, 4, layers=("attention",), mixers=_heads(256), directions="bidirectional", position="learned"
    ),
}


def preset(name: str, /, **changes: Any) -> VisionConfig:
    """Return the configuration of a preset.

    Args:
        name: one of `PRESETS`.
        **changes: keys of `VisionConfig`, which override those of the preset.

    Raises:
        UserError: no preset has this name (the message suggests similar ones), or a change is invalid.

    Example:
        >>> preset("hgrn2_cct_tiny", num_classes=100).grid
        (8, 8)
    """
    if name not in PRESETS:
        raise UserError(unknown_key_message("image presets", name, PRESETS), "unknown-name")
    keys = PRESETS[name] | changes
    if "layers" in changes and "mixers" not in changes:
        del keys["mixers"]
    return VisionConfig.from_dict(keys)
