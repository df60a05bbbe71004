"""fla's layout (flash-linear-attention, any version up to 0.6.0): conversion of settings and tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hgrn2.errors import UserError
from hgrn2.formats.keys import check_keys, refuse, require, warn_of_training_keys
from hgrn2.formats.tables import Table
from hgrn2.models import AttentionConfig, HGRN2Config
from hgrn2.models.config import MODEL_TYPE

_WHAT = "fla config"

# eps of the norm after the scan: fla does not pass norm_eps to it, so its default applies
MIXER_NORM_EPS = 1e-5

# keys with the same meaning and default in both layouts
_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "intermediate_size", "use_lower_bound",
    "use_short_conv", "conv_size", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
# keys that only fla's files have
SIGNATURE = (
    "attn_mode", "hidden_act", "rms_norm_eps", "share_conv_kernel", "attnres_block_size", "fuse_norm", "fuse_swiglu",
    "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp",
)  # fmt: skip
# those of them that affect speed or the form of the loss, not the results
_INERT = ("fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")
_KNOWN = (
    *_SHARED, "expand_ratio", "hidden_ratio", "norm_eps", "rms_norm_eps", "elementwise_affine", "attn", "attn_mode",
    "hidden_act", "attnres_block_size", "share_conv_kernel",
)  # fmt: skip
_ATTN_KEYS = ("layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta", "qk_norm")
# three implementations of the same function
_ATTN_MODES = ("chunk", "fused_chunk", "fused_recurrent")


def read_config(values: Mapping[str, Any]) -> HGRN2Config:
    """Convert fla's config.json to our configuration.

    Reads old spellings too (`rms_norm_eps`, `attn_mode = "fused_chunk"`, `num_heads` null or given, `expand_ratio` null
    with num_heads). In fla, `elementwise_affine` applies only to the norm after the scan, because block norms always
    have a weight, and the eps of that norm is 1e-5 whatever `norm_eps` says: `mixer_norm_eps` is set to it.

    Args:
        values: the content of the file; keys of transformers and keys that only affect speed are ignored.

    Raises:
        UserError: an unknown key, a setting that our model does not implement, or contradicting values, such as head
            counts.

    Example:
        >>> read_config({"model_type": "hgrn2", "hidden_size": 256, "attn_mode": "chunk"}).num_heads
        2
    """
    values = check_keys(values, _WHAT, _KNOWN, _INERT)
    keys = {key: values[key] for key in _SHARED if key in values}
    if values.get("attn_mode", "chunk") not in _ATTN_MODES:
        refuse(_WHAT, "attn_mode", values["attn_mode"], f"one of {', '.join(_ATTN_MODES)}")
    if values.get("hidden_act", "swish") not in ("swish", "silu"):
        refuse(_WHAT, "hidden_act", values["hidden_act"], "'swish'")
    if values.get("attnres_block_size") is not None:
        refuse(
            _WHAT, "attnres_block_size", values["attnres_block_size"], "null (attention over residuals is not there)"
        )
    if values.get("share_conv_kernel") and values.get("use_short_conv"):
        refuse(
            _WHAT, "share_conv_kernel", values["share_conv_kernel"], "false (each projection has its own convolution)"
        )
    if values.get("hidden_ratio") is not None:
        keys["hidden_ratio"] = values["hidden_ratio"]
    keys["expand_ratio"] = _expand_ratio(values)
    keys["norm_eps"] = _norm_eps(values)
    affine = values.get("elementwise_affine", True)
    keys["mixer_norm_affine"] = False if affine is None else affine
    keys["attn"] = _read_attention(values.get("attn"))
    return HGRN2Config.from_dict({**keys, "mixer_norm_eps": MIXER_NORM_EPS})


def _expand_ratio(values: Mapping[str, Any]) -> Any:
    """Return the width of a head, which a file may give through the number of heads."""
    ratio, heads = values.get("expand_ratio", 128), values.get("num_heads")
    if ratio is not None:
        return ratio
    if heads is None:
        raise UserError(f"{_WHAT}: expand_ratio and num_heads are both null; one of them must be given", "incomplete")
    hidden_size = values.get("hidden_size", HGRN2Config.hidden_size)
    if type(heads) is not int or type(hidden_size) is not int or heads < 1 or hidden_size % heads:
        raise UserError(
            f"{_WHAT}: num_heads is {heads!r}, which does not divide hidden_size = {hidden_size!r}", "contradiction"
        )
    return hidden_size // heads


def _norm_eps(values: Mapping[str, Any]) -> Any:
    new, old = values.get("norm_eps"), values.get("rms_norm_eps")
    if new is not None and old is not None and new != old:
        raise UserError(
            f"{_WHAT}: norm_eps = {new!r} contradicts rms_norm_eps = {old!r}; leave one of them out", "contradiction"
        )
    return next((eps for eps in (new, old) if eps is not None), HGRN2Config.norm_eps)


def _read_attention(attn: Any) -> dict[str, Any] | None:
    """Convert the attention layers, which fla stores as one table or a list of tables."""
    if attn is None:
        return None
    tables = [attn] if isinstance(attn, Mapping) else attn
    if not isinstance(tables, Sequence) or not all(isinstance(table, Mapping) for table in tables):
        raise UserError(f"{_WHAT}: attn is {attn!r}; wanted a table, a list of tables or null")
    read = [_read_attention_table(table) for table in tables]
    read = [table for table in read if table["layers"]]
    if not read:
        return None
    first = read[0]
    for table in read[1:]:
        for key in first.keys() - {"layers"}:
            if table[key] != first[key]:
                raise UserError(
                    f"{_WHAT}: attn.{key} is {first[key]!r} at layers {first['layers']} and {table[key]!r} at layers "
                    f"{table['layers']}; our model has one kind of attention",
                    "unsupported",
                )
    return first | {"layers": [layer for table in read for layer in table["layers"]]}


def _read_attention_table(table: Mapping[str, Any]) -> dict[str, Any]:
    for key in table:
        if key not in _ATTN_KEYS:
            raise UserError(f"{_WHAT}: unknown key attn.{key}; known keys: {', '.join(_ATTN_KEYS)}", "unknown-name")
    for key in ("layers", "num_heads"):
        if key not in table:
            raise UserError(f"{_WHAT}: no attn.{key}; wanted layers and num_heads", "incomplete")
    if not isinstance(table["layers"], list | tuple):
        raise UserError(f"{_WHAT}: attn.layers is {table['layers']!r}; wanted a list")
    if table.get("qk_norm"):
        refuse(_WHAT, "attn.qk_norm", table["qk_norm"], "false (fla's HGRN2 hybrids have none)")
    theta = table.get("rope_theta", 10000.0)
    if theta is None:
        refuse(_WHAT, "attn.rope_theta", theta, "a base above 0 (fla always rotates)")
    kv_heads = table.get("num_kv_heads")
    return {
        "layers": list(table["layers"]),
        "num_heads": table["num_heads"],
        "num_kv_heads": table["num_heads"] if kv_heads is None else kv_heads,
        "qkv_bias": table.get("qkv_bias", False),
        "window_size": table.get("window_size"),
        "rope_theta": theta,
    }


def write_config(config: HGRN2Config) -> dict[str, Any]:
    """Invert `read_config`: return the keys that fla 0.6.0 reads, as JSON values.

    fla has no settings for `dropout` and `min_log_decay`, which only affect training; they are dropped with a warning.

    Raises:
        UserError: a setting that fla's layout cannot express.
    """
    wanted: dict[str, Any] = {
        "layers": None, "gate_range": "positive", "dense_state": 0,
        "q_activation": "silu", "v_activation": "none", "mixer_norm": "rmsnorm", "mixer_norm_eps": MIXER_NORM_EPS,
        "block_norm": "rmsnorm", "elementwise_affine": True, "glu_activation": "silu", "use_bias": False,
        "scale_embedding": False, "head_scale": config.expand_ratio**-0.5,
    }  # fmt: skip
    if config.use_lower_bound:
        wanted["lower_bound"] = "inclusive"
    require(config, "fla", wanted)
    if config.attn is not None and config.attn.rope_theta is None:
        raise UserError(
            "fla's layout cannot express attn.rope_theta = None; there attention always has positions", "unsupported"
        )
    warn_of_training_keys(config, "fla", {"dropout": (0,), "min_log_decay": (None,)})
    return {
        "model_type": MODEL_TYPE,
        **{key: getattr(config, key) for key in _SHARED},
        "expand_ratio": config.expand_ratio,
        "hidden_ratio": config.hidden_ratio,
        "elementwise_affine": config.mixer_norm_affine,
        "norm_eps": config.norm_eps,
        "attn": None if config.attn is None else _write_attention(config.attn),
        "attn_mode": "chunk",
        "hidden_act": "swish",
        "max_position_embeddings": 2048,
        "use_cache": True,
        "fuse_norm": True,
        "fuse_swiglu": True,
        "fuse_cross_entropy": True,
        "fuse_linear_cross_entropy": False,
        "use_l2warp": False,
    }


def tables(config: HGRN2Config, names: Sequence[str]) -> tuple[Table, ...]:
    """Return the tables of today's files and of those from before February 2025.

    Our names are fla's. Older files stack the two inner matrices of a channel mixer, the gate's rows first.

    Args:
        config: configuration of the model; not used.
        names: names of our tensors.
    """
    del config
    merged = {}
    for name in names:
        if ".up_proj." not in name:
            merged[name] = (name, name.replace(".gate_proj.", ".up_proj.")) if ".gate_proj." in name else (name,)
    return {name: (name,) for name in names}, merged


def _write_attention(attn: AttentionConfig) -> dict[str, Any]:
    return dataclasses.asdict(attn) | {"layers": list(attn.layers)}
