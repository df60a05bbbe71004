"""The layout of LLaMA-family Transformers, read as models whose layers all attend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hgrn2.errors import UserError
from hgrn2.formats.keys import check_keys, refuse
from hgrn2.formats.tables import EMBEDDINGS, Table
from hgrn2.models import AttentionConfig, HGRN2Config

NAME = "transformer"
# supported model types, with the default of their sliding window
_WINDOWS = {"llama": None, "mistral": 4096, "qwen2": 4096}
# recognised only to be refused with the reason
_BEYOND = {"qwen3": "a norm on queries and keys (q_norm, k_norm)"}
READ = tuple(_WINDOWS)
MODEL_TYPES = (*READ, *_BEYOND)
# tensors in older files that follow from the settings
DERIVED = (".self_attn.rotary_emb.inv_freq",)

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# settings of windows and positions, which do not affect the shapes or locations of weights
_POSITIONS = (
    "rope_theta", "rope_scaling", "rope_parameters", "rope_interleaved", "partial_rotary_factor", "use_mrope",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
)  # fmt: skip
_KNOWN = (
    *_REQUIRED, *_POSITIONS, "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "initializer_range",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "quantization_config",
)  # fmt: skip
# settings of training or of other programs
_INERT = (
    "attention_dropout", "is_llama_config", "transformers.js_config", "_model_name_or_path", "unk_token_id",
    "max_sequence_length",
)  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu"}
# the only values that our model supports
_ALWAYS = {
    "attention_bias": (False,), "mlp_bias": (False,), "rope_interleaved": (False,), "partial_rotary_factor": (1, 1.0),
    "use_mrope": (False,), "quantization_config": (None,),
}  # fmt: skip


def read_config(values: Mapping[str, Any]) -> HGRN2Config:
    """Convert a Transformer's config.json to the configuration of a model without recurrent layers.

    Args:
        values: the content of the file; `model_type` is llama, mistral or qwen2.

    Raises:
        UserError: an unknown or missing key, or a setting that our attention or channel mixers do not implement.

    Example:
        >>> sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        >>> read_config({"model_type": "llama", "num_attention_heads": 4, **sizes}).attn.layers
        (0, 1)
    """
    kind = str(values.get("model_type"))
    if kind in _BEYOND:
        raise UserError(
            f"model_type is {kind!r}, which has {_BEYOND[kind]}; wanted one of {', '.join(_WINDOWS)}", "unsupported"
        )
    what = f"{kind} config"
    known = check_keys({key: x for key, x in values.items() if key != "model_type"}, what, _KNOWN, _INERT)
    missing = [key for key in _REQUIRED if key not in known]
    if missing:
        raise UserError(f"{what}: no {', '.join(missing)}; use the config.json of the model", "incomplete")
    for key, wanted in _ALWAYS.items():
        if known.get(key, wanted[0]) not in wanted:
            refuse(what, key, known[key], repr(wanted[0]))
    activation = known.get("hidden_act", "silu")
    if activation not in tuple(_ACTIVATIONS):
        refuse(what, "hidden_act", activation, " or ".join(map(repr, _ACTIVATIONS)))
    head_size = _head_size(what, known)
    layers = known["num_hidden_layers"]
    keys = {key: known[key] for key in ("initializer_range", "tie_word_embeddings") if key in known}
    config = HGRN2Config.from_dict({
        **keys,
        **{key: known[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        # no layer uses it, but recurrent layers that replace attention take its head width from here
        "expand_ratio": head_size,
        "norm_eps": known.get("rms_norm_eps", 1e-6),
        "glu_activation": _ACTIVATIONS[activation],
        "use_lower_bound": False,
    })  # fmt: skip
    attn = AttentionConfig(
        layers=tuple(range(layers)),
        num_heads=known["num_attention_heads"],
        num_kv_heads=known.get("num_key_value_heads"),
        window_size=_window(what, kind, known, layers),
        rope_theta=_rope_theta(what, known),
        qkv_bias=kind == "qwen2",
    )
    return config.replace(attn=attn)


def without_positions(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without the settings of positions and windows, which only attention reads.

    Args:
        values: the content of the file.
    """
    return {key: value for key, value in values.items() if key not in _POSITIONS}


def _head_size(what: str, known: Mapping[str, Any]) -> int:
    """Return the width of a head; all heads together must be as wide as the model."""
    heads, hidden_size = known["num_attention_heads"], known["hidden_size"]
    if type(heads) is not int or type(hidden_size) is not int or heads < 1 or hidden_size % heads:
        raise UserError(
            f"{what}: num_attention_heads is {heads!r}, which does not divide hidden_size = {hidden_size!r}",
            "contradiction",
        )
    head_size = hidden_size // heads
    if known.get("head_dim") not in (None, head_size):
        refuse(what, "head_dim", known["head_dim"], f"hidden_size / num_attention_heads = {head_size}")
    return head_size


def _rope_theta(what: str, known: Mapping[str, Any]) -> float:
    """Return the base of the rotary positions, which transformers 5 stores in a separate table."""
    table = known.get("rope_parameters")
    table = {} if table is None else table
    scaling = known.get("rope_scaling")
    scaling = {} if scaling is None else scaling
    for name, settings in (("rope_parameters", table), ("rope_scaling", scaling)):
        if not isinstance(settings, Mapping):
            refuse(what, name, settings, "a table or null")
        # report the type before its parameters
        for kind in (settings.get("rope_type"), settings.get("type")):
            if kind not in (None, "default"):
                raise UserError(
                    f"{what}: {name} of type {kind!r}; wanted none, as our attention does not scale positions. hgrn2 "
                    "convert --from-transformer needs none if it keeps no attention",
                    "unsupported",
                )
        for key, value in settings.items():
            if key in ("rope_type", "type"):
                continue
            if key == "partial_rotary_factor":
                if value not in (None, 1, 1.0):
                    refuse(what, f"{name}.{key}", value, "1")
            elif key != "rope_theta":
                refuse(what, f"{name}.{key}", value, "no such key (positions that are not scaled)")
    found = [x for x in (table.get("rope_theta"), known.get("rope_theta"), scaling.get("rope_theta")) if x is not None]
    if any(x != found[0] for x in found):
        raise UserError(
            f"{what}: rope_theta is {' and '.join(map(repr, found))}; leave one of them out", "contradiction"
        )
    return found[0] if found else 10000.0


def _window(what: str, kind: str, known: Mapping[str, Any], num_layers: int) -> int | None:
    """Return the sliding window, which must be the same in every layer."""
    window = known.get("sliding_window", _WINDOWS[kind])
    # as in transformers: llama never has a window, mistral always has one, whatever the other keys say
    if kind != "qwen2":
        return None if kind == "llama" else window
    if not known.get("use_sliding_window", False):
        window = None
    kinds = known.get("layer_types")
    if kinds is None:
        # layers from max_window_layers on have a window
        first = known.get("max_window_layers", 28)
        if type(first) is not int:
            raise UserError(f"{what}: max_window_layers is {first!r}; wanted a whole number")
        kinds = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(num_layers)]
    if kinds == ["sliding_attention"] * num_layers:
        if window is None:
            raise UserError(
                f"{what}: layer_types are all sliding_attention, but no sliding_window is in use", "contradiction"
            )
        return window
    if kinds != ["full_attention"] * num_layers:
        refuse(what, "layer_types", kinds, f"one kind for all {num_layers} layers, full_attention or sliding_attention")
    return None


def tables(config: HGRN2Config, names: Sequence[str]) -> tuple[Table, ...]:
    """Return the table of transformers' tensor names.

    Args:
        config: configuration of the model; not used.
        names: names of our tensors.
    """
    del config
    return ({_their_name(name): (name,) for name in names},)


def _their_name(name: str) -> str:
    if name == EMBEDDINGS:
        return "model.embed_tokens.weight"
    for ours, theirs in ((".attn.", ".self_attn."), (".attn_norm.", ".input_layernorm."),
                         (".mlp_norm.", ".post_attention_layernorm.")):  # fmt: skip
        name = name.replace(ours, theirs)
    return name
