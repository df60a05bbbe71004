"""Recognise settings of other models' configurations, and name ours."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from hgrn2.errors import UserError
from hgrn2.formats.layout import LAYOUTS

_POSITIONS = "the rope_theta of attn, where layers attend"
_OUR_NAMES = {
    "activation_function": "glu_activation",
    "attention_bias": "the qkv_bias of attn, where layers attend",
    "d_model": "hidden_size",
    "embd_pdrop": "dropout",
    "ffn_dim": "intermediate_size",
    "hidden_act": "glu_activation",
    "hidden_dropout": "dropout",
    "hidden_dropout_prob": "dropout",
    "layer_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps",
    "mlp_bias": "use_bias",
    "n_embd": "hidden_size",
    "n_head": "num_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "resid_pdrop": "dropout",
    "rms_norm_eps": "norm_eps",
    "rope_parameters": _POSITIONS,
    "rope_theta": _POSITIONS,
}
# features that no model of this package has
_NOT_THERE = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
# turning these off changes nothing
_MAY_BE_OFF = (*_NOT_THERE, "rope_parameters")
_OTHER_LAYOUTS = ("fla", "official")
# high, so that names with another meaning pass
_MISSPELT = 0.85


def check_settable(key: str, value: Any, fields: Collection[str]) -> bool:
    """Refuse to set an attribute that looks like a setting of the model but is not read.

    Other names are allowed: tools store their own data in a configuration.

    Args:
        key: name of the attribute, which is not one of transformers.
        value: the new value.
        fields: names of the model's settings.

    Returns:
        Whether to set the attribute; false if it disables something that no model here has.

    Raises:
        UserError: the key is a setting of another layout or kind of model, or a misspelt setting of this model.
    """
    if key in fields:
        return True
    if key in _MAY_BE_OFF and not value:
        # the file could not be read back with this key
        return False
    if key in _NOT_THERE:
        raise UserError(f"{key} cannot be set to {value!r}: no model here has it; leave it out", "unsupported")
    other = next((LAYOUTS[name] for name in _OTHER_LAYOUTS if key in LAYOUTS[name].signature), None)
    if other is not None and other.name == "fla":
        # the layout's reader refuses the values that it refuses in files
        other.read_config({key: value})
    if key in _OUR_NAMES:
        raise UserError(
            f"{key} cannot be set to {value!r}: the model does not read it; set {_OUR_NAMES[key]}", "unknown-name"
        )
    if other is not None:
        raise UserError(
            f"{key} cannot be set to {value!r}: it is a setting of {other.title}'s files; leave it out", "unknown-name"
        )
    near = difflib.get_close_matches(key, fields, n=1, cutoff=_MISSPELT)
    if near:
        raise UserError(
            f"{key} cannot be set to {value!r}: the model does not read it; did you mean {near[0]!r}?", "unknown-name"
        )
    return True
