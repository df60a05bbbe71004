"""The model's configuration as a configuration of transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from hgrn2.errors import UserError
from hgrn2.formats.keys import TRANSFORMERS_KEYS
from hgrn2.formats.layout import LAYOUTS, recognise
from hgrn2.hf.foreign import check_settable
from hgrn2.models import config as own
from hgrn2.models.pattern import ATTENTION, complete, read_options
from hgrn2.nn.mixers import find_mixer

_FIELDS = [field.name for field in dataclasses.fields(own.HGRN2Config)]
# keys allowed beside the model's settings: those in files, and arguments of PreTrainedConfig
_LIBRARY_KEYS = TRANSFORMERS_KEYS | {
    "attn_implementation", "experts_implementation", "name_or_path", "per_layer_config", "quantization_config",
    "tie_last_hidden_states",
}  # fmt: skip


class HGRN2Config(PreTrainedConfig):
    """Configuration with every key of `hgrn2.models.HGRN2Config` and those of transformers.

    It reads a config.json written by `save_pretrained`, by `hgrn2 train` or flash-linear-attention, recognised by its
    keys (`hgrn2.formats.layout.recognise`), and writes the first kind.

    Args:
        use_cache: whether the model returns its state.
        pad_token_id: the padding token.
        bos_token_id: the token before the first of a text; models of `hgrn2 train` start after an end-of-text token.
        eos_token_id: the token after the last of a text.
        **kwargs: keys of `hgrn2.models.HGRN2Config` and of `PreTrainedConfig`.

    Raises:
        UserError: a key is unknown, values contradict each other, or keys are of two layouts.

    Example:
        >>> HGRN2Config(hidden_size=256, expand_ratio=64, num_hidden_layers=3).layer_types
        ['linear_attention', 'linear_attention', 'linear_attention']
    """

    model_type = own.MODEL_TYPE
    # names of the state before and since transformers 5.24
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_heads"}
    # set only in models that have them
    layers = mixers = None
    gate_range, dense_state, initial_bound = "positive", 0, None
    # TRL reads it for classes outside of transformers; read-only, because all configurations share it
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(
        self,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        found = kwargs.pop("model_type", own.MODEL_TYPE)
        if found != own.MODEL_TYPE:
            raise UserError(f"model config: model_type is {found!r}; wanted {own.MODEL_TYPE!r}", "unsupported")
        layer_types = kwargs.pop("layer_types", None)
        model, rest = _read(kwargs)
        for name, value in model.to_dict().items():
            if name != "model_type":
                # JSON types, so that a configuration equals the one read back
                setattr(self, name, json.loads(json.dumps(value)))
        self.use_cache = use_cache
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        if layer_types not in (None, self.layer_types):
            raise UserError(
                f"model config: layer_types is {layer_types}; attn says {self.layer_types}, leave one out",
                "contradiction",
            )
        super().__init__(**rest)

    def __setattr__(self, key: str, value: Any) -> None:
        """Set an attribute; refuse settings under names that the model does not read.

        Raises:
            UserError: the model does not read the attribute (`hgrn2.hf.foreign.check_settable`).
        """
        is_known = key.startswith("_") or key in _LIBRARY_KEYS or key in self.attribute_map or hasattr(type(self), key)
        if is_known or check_settable(key, value, _FIELDS):
            super().__setattr__(key, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of the content of a config.json, whose keys must identify the layout.

        Raises:
            UserError: the layout is unknown, a key is unknown, or values contradict each other.
        """
        if not isinstance(config_dict, dict):
            raise UserError(f"config.json: found {type(config_dict).__name__}, wanted a table of settings")
        recognise({key: value for key, value in config_dict.items() if key not in _LIBRARY_KEYS})
        return super().from_dict(config_dict, **kwargs)

    @property
    def model_config(self) -> own.HGRN2Config:
        """The settings as `hgrn2.models.HGRN2Config`, checked again.

        Raises:
            UserError: values contradict each other.
        """
        return own.HGRN2Config.from_dict({name: getattr(self, name) for name in _FIELDS})

    @property
    def layer_types(self) -> list[str]:
        """Kind of each layer's state: "linear_attention" (a state), "full_attention" or "sliding_attention"."""
        layers: Any = self.layers
        if layers is not None:
            mixers: Any = self.mixers
            kinds = {name: _kind(name, mixers.get(name)) for name in layers}
            return [kinds[name] for name in complete(tuple(layers), self.num_hidden_layers)]
        attn = self.attn or {"layers": ()}
        attending = "full_attention" if self.sliding_window is None else "sliding_attention"
        return [attending if i in attn["layers"] else "linear_attention" for i in range(self.num_hidden_layers)]

    @layer_types.setter
    def layer_types(self, value: list[str]) -> None:
        self._refuse_unless_equal("layer_types", value, "attn")

    @property
    def sliding_window(self) -> int | None:
        """Number of tokens an attention query sees, itself included; None for all, or without attention."""
        mixers: Any = self.mixers or {}
        attn: Any = self.attn or mixers.get(ATTENTION)
        return attn["window_size"] if attn else None

    @sliding_window.setter
    def sliding_window(self, value: int | None) -> None:
        if self.attn:
            self.attn = {**self.attn, "window_size": value}
        elif self.mixers and ATTENTION in self.mixers:
            self.mixers = {**self.mixers, ATTENTION: {**self.mixers[ATTENTION], "window_size": value}}
        elif value is not None:
            raise UserError(
                f"sliding_window cannot be set to {value}: no layer attends (attn is null)", "contradiction"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head of the recurrent layers."""
        return self.expand_ratio

    @head_dim.setter
    def head_dim(self, value: int) -> None:
        self._refuse_unless_equal("head_dim", value, "expand_ratio")

    def _refuse_unless_equal(self, name: str, value: Any, source: str) -> None:
        found = getattr(self, name)
        if value != found:
            raise UserError(
                f"{name} cannot be set to {value}: it is {found}, which follows from {source}; set that",
                "contradiction",
            )


def _kind(mixer: str, options: dict[str, Any] | None) -> str:
    """Return transformers' name for what a mixer stores."""
    memory = "state" if options is None else find_mixer(mixer).mixer.memory(read_options(mixer, options))
    return {"state": "linear_attention", "tokens": "full_attention", "window": "sliding_attention"}[memory]


def _read(values: dict[str, Any]) -> tuple[own.HGRN2Config, dict[str, Any]]:
    """Split keys into the model's settings and those of transformers."""
    kept = {key: value for key, value in values.items() if key in _LIBRARY_KEYS or key.startswith("_")}
    # readers of layouts know the keys of files, not those that the library adds
    settings = {key: value for key, value in values.items() if key not in kept}
    told = any(key in settings for layout in LAYOUTS.values() for key in layout.signature)
    # settings from Python may lack identifying keys; they are ours
    layout = recognise(settings) if told else LAYOUTS["hf"]
    if layout.name == "official":
        raise UserError(
            "a config.json of hgru2-pytorch, whose tensors have other names; use hgrn2 convert first", "unsupported"
        )
    return layout.read_config(settings), kept
