"""Read the pattern of layers: the mixer of each layer, and its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.nn.mixers import MixerOptions, find_mixer, mixer_names
from hgrn2.nn.mixers.attention import AttentionOptions
from hgrn2.nn.mixers.registry import mixers_with_option

Pattern = tuple[str, ...]

# the mixer whose options are keys of the model, and the mixer whose options are in the key `attn`
DEFAULT_MIXER, ATTENTION = "hgrn2", "attention"


class OptionTable(dict[str, Any]):
    """Options of mixers by name; hashable, so do not change it."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(tuple(self.items()))


def read_pattern(layers: Any, mixers: Any) -> tuple[Pattern, OptionTable]:
    """Read a pattern of layers and the options of its mixers.

    Args:
        layers: names of mixers, as a list or as one string separated by commas.
        mixers: options by mixer, or None.

    Returns:
        The names, and the options of every mixer but HGRN2.

    Raises:
        UserError: there are no names, a mixer or an option does not exist (the message suggests similar names), or
            options are given for a mixer that no layer uses.
    """
    what = "model config: layers"
    mixers = {} if mixers is None else mixers
    if not isinstance(mixers, Mapping):
        raise UserError(f"model config: mixers is {mixers!r}; wanted a table of options by mixer")
    if layers is None:
        raise UserError(
            f"model config: mixers is {dict(mixers)}, but layers is not set; set layers to the names of the mixers, or "
            "leave out mixers",
            "contradiction",
        )
    if isinstance(layers, str):
        layers = [name.strip() for name in layers.split(",")]
    if not isinstance(layers, list | tuple) or not layers or not all(isinstance(name, str) for name in layers):
        raise UserError(f"{what} is {layers!r}; wanted names of mixers, such as {mixer_names()}")
    for name in layers:
        find_mixer(name, what)
    for name in mixers:
        if name == DEFAULT_MIXER:
            raise UserError(
                f"model config: mixers.{name}: the options of {name} are keys of the model, beside hidden_size; set "
                "them there",
                "unsupported",
            )
        if name not in layers:
            find_mixer(name, "model config: mixers")
            raise UserError(
                f"model config: mixers.{name} has options, but layers = {list(layers)} names no such mixer",
                "contradiction",
            )
    options = {name: mixers.get(name, {}) for name in dict.fromkeys(layers) if name != DEFAULT_MIXER}
    return tuple(layers), OptionTable({name: read_options(name, table) for name, table in options.items()})


def read_options(name: str, table: Any, place: str | None = None) -> Any:
    """Read the options of one mixer.

    Args:
        name: name of the mixer.
        table: options of the mixer, as a dictionary or already read.
        place: where the options were found, for messages; by default "mixers.<name>".

    Raises:
        UserError: an option does not exist (the message suggests similar names, and mixers that have it) or is
            missing, or a value is invalid.
    """
    place = place or f"mixers.{name}"
    cls = find_mixer(name).options
    if isinstance(table, MixerOptions):
        table = dataclasses.asdict(table)
    if not isinstance(table, Mapping):
        raise UserError(f"model config: {place} is {table!r}; wanted a table of options")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in table:
        if key not in fields:
            owners = [owner for owner in mixers_with_option(key) if owner != name]
            hint = f"; {' and '.join(owners)} {'has' if len(owners) == 1 else 'have'} an option {key}" if owners else ""
            raise UserError(unknown_key_message(f"model config: {place}", key, fields) + hint, "unknown-name")
    required = [key for key, field in fields.items() if _is_required(field)]
    if missing := [key for key in required if key not in table]:
        shown = ", ".join(f'"{key}": ...' for key in missing)
        raise UserError(
            f'model config: {place}: no {" and no ".join(missing)}; set it, such as mixers={{"{name}": {{{shown}}}}}',
            "incomplete",
        )
    try:
        return cls(**table)
    except UserError as error:
        raise UserError(f"model config: {place}.{str(error).removeprefix('options: ')}", error.code) from None


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def complete(pattern: Pattern, num_layers: int) -> Pattern:
    """Return the pattern repeated over all layers of a model."""
    return pattern * (num_layers // len(pattern))


def group_layers(names: Sequence[str]) -> dict[str, list[int]]:
    """Return the layers of each mixer, in the order of their first layers."""
    found: dict[str, list[int]] = {}
    for layer, name in enumerate(names):
        found.setdefault(name, []).append(layer)
    return found


def describe_layers(names: Sequence[str]) -> dict[str, str]:
    """Return the layers of each mixer as text.

    Args:
        names: the mixer of each layer.

    Example:
        >>> describe_layers(["hgrn2", "hgrn2", "attention", "hgrn2"])
        {'hgrn2': '0-1, 3', 'attention': '2'}
    """
    described = {}
    for name, layers in group_layers(names).items():
        runs: list[list[int]] = []
        for layer in layers:
            if runs and layer == runs[-1][-1] + 1:
                runs[-1].append(layer)
            else:
                runs.append([layer])
        described[name] = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return described


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Attention at some layers of a hybrid model.

    Attributes:
        layers: indices of the layers with attention instead of HGRN2.
        num_heads: query heads.
        num_kv_heads: key and value heads; None means num_heads.
        window_size: tokens a query sees, itself included; None means all.
        rope_theta: base of the rotary positions; None means no positions.
        qkv_bias: biases in the q, k and v projections.
    """

    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int | None = None
    window_size: int | None = None
    rope_theta: float | None = 10000.0
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        layers = self.layers
        is_list = isinstance(layers, list | tuple) and len(layers) > 0 and all(type(i) is int for i in layers)
        if not is_list or len(set(layers)) < len(layers):
            raise UserError(f"model config: attn.layers is {layers!r}; wanted a list of one or more different layers")
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "num_kv_heads", self.options.num_kv_heads)

    @property
    def options(self) -> AttentionOptions:
        """Options of the mixer of these layers."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "layers"}
        return read_options("attention", values, "attn")
