"""Read a model's settings from a table, and describe them in one line."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.models.pattern import group_layers
from hgrn2.nn.mixers.registry import mixers_with_option
from hgrn2.quantities import plural

if TYPE_CHECKING:
    from hgrn2.models.config import HGRN2Config


def summarise(config: HGRN2Config) -> str:
    """Return sizes and kinds of layers, in one line."""
    if config.layers is not None:
        kinds = ", ".join(f"{len(found)} {name}" for name, found in group_layers(config.layer_mixers).items())
        layers = f"{plural(config.num_hidden_layers, 'layer')} ({kinds})"
        return f"{layers}, width {config.hidden_size:,}, vocabulary {config.vocab_size:,}"
    attending = len(config.attn.layers) if config.attn else 0
    layers = plural(config.num_hidden_layers, "layer") + (f" ({attending} with attention)" if attending else "")
    heads = f"{plural(config.num_heads or 0, 'head')} of {config.expand_ratio} x {config.expand_ratio}"
    if config.attn and attending == config.num_hidden_layers:
        heads = plural(config.attn.num_heads, "head")
    heads += ", signed gates" if config.gate_range == "signed" else ""
    heads += f", dense state of {plural(config.dense_state, 'layer')}" if config.dense_state else ""
    return f"{layers}, width {config.hidden_size:,}, {heads}, vocabulary {config.vocab_size:,}"


def build(cls: Any, values: dict[str, Any], what: str) -> Any:
    """Construct a dataclass of settings from a table.

    Args:
        cls: the class.
        values: settings by name.
        what: what the table is, for messages.

    Raises:
        UserError: a key is unknown (the message suggests similar ones, and mixers with such an option) or missing, or
            the class refuses a value.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            owners = mixers_with_option(key) if hasattr(cls, "mixer_options") else []
            hint = f", or the option {key} in the table mixers.{owners[0]}" if owners else ""
            raise UserError(unknown_key_message(what, key, known) + hint, "unknown-name")
    required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    for key in required:
        if key not in values:
            raise UserError(f"{what}: no {key}; wanted {' and '.join(required)}", "incomplete")
    return cls(**values)
