"""The layout of LLaMA-family Transformers: to us, a model whose layers all attend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hgrn2.errors import UserError
from hgrn2.formats.keys import check_keys, refuse
from hgrn2.formats.tables import EMBEDDINGS, Table
from hgrn2.models import AttentionConfig, HGRN2Config

NAME = "transformer"
# the model types that are read, with the window that a file means which says nothing of one
_WINDOWS = {"llama": None, "mistral": 4096, "qwen2": 4096}
# told apart to be refused by what they have
_BEYOND = {"qwen3": "a norm on queries and keys (q_norm, k_norm)"}
READ = tuple(_WINDOWS)
MODEL_TYPES = (*READ, *_BEYOND)
# tensors that older files hold, although they follow from the settings
DERIVED = (".self_attn.rotary_emb.inv_freq",)

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# where a layer looks and how it tells positions apart: nothing that a weight's shape or place depends on
_POSITIONS = (
    "rope_theta", "rope_scaling", "rope_parameters", "rope_interleaved", "partial_rotary_factor", "use_mrope",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
)  # fmt: skip
_KNOWN = (
    *_REQUIRED, *_POSITIONS, "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "initializer_range",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "quantization_config",
)  # fmt: skip
# about training, or about other programs
_INERT = (
    "attention_dropout", "is_llama_config", "transformers.js_config", "_model_name_or_path", "unk_token_id",
    "max_sequence_length",
)  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu"}
# what our model always has; anything else computes something that it does not
_ALWAYS = {
    "attention_bias": (False,), "mlp_bias": (False,), "rope_interleaved": (False,), "partial_rotary_factor": (1, 1.0),
    "use_mrope": (False,), "quantization_config": (None,),
}  # fmt: skip


def read_config(values: Mapping[str, Any]) -> HGRN2Config:
    """The config.json of a Transformer, as the configuration of a model without recurrent layers.

    Args:
        values: the file's keys; `model_type` is llama, mistral or qwen2.

    Raises:
        UserError: an unknown or a missing key, or a setting whose computation our attention and channel mixers do not
            have; it is named.

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
        # of no layer, but a mixer that replaces attention may keep the width of its heads
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
    """A config.json without the settings that attention alone reads, for a model that puts other layers in its place.

    Args:
        values: the file's keys.
    """
    return {key: value for key, value in values.items() if key not in _POSITIONS}


def _head_size(what: str, known: Mapping[str, Any]) -> int:
    """The width of a head; the heads together must be as wide as the model."""
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
    """The base of the rotary positions, which transformers 5 writes into a table of its own."""
    table = known.get("rope_parameters")
    table = {} if table is None else table
    scaling = known.get("rope_scaling")
    scaling = {} if scaling is None else scaling
    for name, settings in (("rope_parameters", table), ("rope_scaling", scaling)):
        if not isinstance(settings, Mapping):
            refuse(what, name, settings, "a table or null")
        # said before the numbers that go with it
        for kind in (settings.get("rope_type"), settings.get("type")):
            if kind not in (None, "default"):
                raise UserError(
                    f"{what}: {name} of type {kind!r}; wanted none, for our attention scales no positions. A start by "
                    "hgrn2 convert --from-transformer that keeps no attention does without them",
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
    """The sliding window of every layer; one kind of attention is what our model has."""
    window = known.get("sliding_window", _WINDOWS[kind])
    # as transformers computes them: a llama never slides, a mistral always does, whatever their further keys say
    if kind != "qwen2":
        return None if kind == "llama" else window
    if not known.get("use_sliding_window", False):
        window = None
    kinds = known.get("layer_types")
    if kinds is None:
        # it slides above the layers that it names the number of
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
    """Every tensor of ours under the name that transformers gives it.

    Args:
        config: of the model, which does not matter here.
        names: of our tensors.
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
