"""The configuration of an image model; its keys are timm's where timm has one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from hgrn2.constraints import Ge, Gt, Lt, check_fields
from hgrn2.errors import UserError
from hgrn2.models.config_io import build
from hgrn2.models.pattern import OptionTable, complete, read_options
from hgrn2.nn.gates import LOWER_BOUNDS
from hgrn2.nn.mixers import check_directions, find_mixer, mixer_names, read_directions
from hgrn2.nn.mlp import GLU_ACTIVATIONS
from hgrn2.nn.norm import NORMS

# sides of an image in pixels; the tokens of a larger one would not fit a GPU
_LARGEST_SIDE = 16384
Pool = Literal["avg", "seq", ""]


def _check(condition: bool, message: str, code: str = "invalid-value") -> None:
    if not condition:
        raise UserError(f"image model config: {message}", code)


@dataclass(frozen=True)
class VisionConfig:
    """Settings of an image model.

    Attributes:
        img_size: height and width of the images in pixels, or one number for both. A model without learned positions
            takes images of any size that patch_size divides.
        patch_size: side of a patch in pixels; a token is one patch.
        in_chans: channels of the images.
        num_classes: classes; 0 for a model without a classifier, which returns pooled features.
        embed_dim: D, the model width.
        depth: number of layers.
        layers: names of mixers, repeated over the depth, as a list or as text separated by commas.
        mixers: options of mixers by name: {"hgrn2": {"expand_ratio": 64}}.
        directions: direction of each layer, as `hgrn2.nn.mixers.directions.read_directions` reads it.
        mlp_ratio: width of the channel mixer as a multiple of embed_dim, rounded to a multiple of 8.
        glu_activation: activation of the channel mixer: "silu", "none", "sigmoid" or "gelu".
        use_lower_bound: whether the forget gates have learned lower bounds.
        lower_bound: how the bounds follow from the learned parameters: "inclusive" or "exclusive".
        norm: norm before the mixers and at the end: "rmsnorm" or "layernorm".
        norm_eps: eps of these norms.
        use_bias: whether the channel mixers have biases.
        stem: how patches become tokens: "patch" for one convolution with a stride of patch_size, or "conv" for 3 x 3
            convolutions with max pooling, for small images (patch_size must be a power of 2).
        position: positions added to the tokens: "none", "sincos" (any size) or "learned" (resized to other grids).
        global_pool: how tokens are pooled: "avg" for their mean, "seq" for a learned weighted mean (arXiv 2104.05704),
            or "" to keep them.
        drop_rate: dropout before the classifier.
        drop_path_rate: probability of dropping a branch of the last layer; it grows linearly with depth, from 0.
        initializer_range: standard deviation of the initial weights.
    """

    img_size: Any = (224, 224)
    patch_size: Annotated[int, Gt(0)] = 14
    in_chans: Annotated[int, Gt(0)] = 3
    num_classes: Annotated[int, Ge(0)] = 1000
    embed_dim: Annotated[int, Gt(0)] = 192
    depth: Annotated[int, Gt(0)] = 12
    layers: Any = ("hgrn2",)
    mixers: Any = None
    directions: Any = "bidirectional"
    mlp_ratio: Annotated[float, Gt(0)] = 3.0
    glu_activation: str = "silu"
    use_lower_bound: bool = True
    lower_bound: str = "exclusive"
    norm: str = "rmsnorm"
    norm_eps: Annotated[float, Ge(0)] = 1e-6
    use_bias: bool = False
    stem: Literal["patch", "conv"] = "patch"
    position: Literal["none", "sincos", "learned"] = "none"
    global_pool: Pool = "avg"
    drop_rate: Annotated[float, Ge(0), Lt(1)] = 0.0
    drop_path_rate: Annotated[float, Ge(0), Lt(1)] = 0.0
    initializer_range: Annotated[float, Gt(0)] = 0.02

    def __post_init__(self) -> None:
        check_fields(self, "image model config")
        self._set("img_size", _read_size(self.img_size))
        for key, known in (("glu_activation", GLU_ACTIVATIONS), ("lower_bound", LOWER_BOUNDS), ("norm", NORMS)):
            value = getattr(self, key)
            _check(value in known, f"{key} is {value!r}; wanted one of {', '.join(map(repr, known))}")
        height, width = self.img_size
        _check(
            height % self.patch_size == 0 and width % self.patch_size == 0,
            f"img_size is {height} x {width}; wanted multiples of patch_size = {self.patch_size}",
            "contradiction",
        )
        _check(
            self.stem == "patch" or self.patch_size & (self.patch_size - 1) == 0,
            f"patch_size is {self.patch_size}; wanted a power of 2 with stem = 'conv'",
            "contradiction",
        )
        _check(
            self.position != "sincos" or self.embed_dim % 4 == 0,
            f"embed_dim is {self.embed_dim}; wanted a multiple of 4 with position = 'sincos'",
            "contradiction",
        )
        self._read_layers()
        self._set("directions", read_directions(self.directions, self.depth))
        check_directions(self.directions, self.layer_mixers)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _read_layers(self) -> None:
        layers = self.layers
        if isinstance(layers, str):
            layers = [name.strip() for name in layers.split(",")]
        is_list = isinstance(layers, list | tuple) and len(layers) > 0
        _check(is_list, f"layers is {layers!r}; wanted names of mixers, such as {mixer_names()}")
        for name in layers:
            find_mixer(name, "image model config: layers")
        _check(
            self.depth % len(layers) == 0,
            f"layers has a pattern of {len(layers)} mixers, which does not fit depth = {self.depth}",
            "contradiction",
        )
        given = {} if self.mixers is None else self.mixers
        _check(isinstance(given, Mapping), f"mixers is {given!r}; wanted a table of options by mixer")
        for name in given:
            find_mixer(name, "image model config: mixers")
            _check(name in layers, f"mixers.{name} has options, but layers = {list(layers)} names no such mixer")
        options = OptionTable({name: read_options(name, given.get(name, {})) for name in dict.fromkeys(layers)})
        for name, found in options.items():
            try:
                found.check_width(self.embed_dim)
            except UserError as error:
                raise UserError(f"image model config: mixers.{name}.{error}", error.code) from None
        self._set("layers", tuple(layers))
        self._set("mixers", options)

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """Name of the mixer of each layer."""
        return complete(self.layers, self.depth)

    @property
    def bounded_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose gates have lower bounds."""
        if not self.use_lower_bound:
            return ()
        return tuple(i for i, x in enumerate(self.layer_mixers) if find_mixer(x).mixer.is_bounded(self.mixers[x]))

    @property
    def intermediate_size(self) -> int:
        """Width of the channel mixers."""
        return max(8, round(self.embed_dim * self.mlp_ratio / 8) * 8)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of an image of img_size."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    def replace(self, **changes: Any) -> VisionConfig:
        """Return the configuration with changes.

        Raises:
            UserError: a key does not exist, or a value is invalid.
        """
        if "layers" in changes and "mixers" not in changes:
            names = changes["layers"]
            names = [x.strip() for x in names.split(",")] if isinstance(names, str) else names
            kept = {name: options for name, options in self.mixers.items() if name in names}
            changes = {**changes, "mixers": kept}
        if "depth" in changes and "directions" not in changes:
            changes = {**changes, "directions": _shortest(self.directions)}
        return VisionConfig.from_dict({f.name: getattr(self, f.name) for f in fields(self)} | changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        mixers = {name: dataclasses.asdict(options) for name, options in self.mixers.items()}
        lists = {key: list(found[key]) for key in ("img_size", "layers", "directions")}
        return found | lists | {"mixers": mixers}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> VisionConfig:
        """Return the configuration with these settings, and defaults for the rest.

        Raises:
            UserError: a key does not exist (the message suggests similar names), or a value is invalid.
        """
        return build(cls, dict(settings), "image model config")


def _shortest(directions: tuple[str, ...]) -> tuple[str, ...]:
    """Return the shortest pattern that repeats to these directions."""
    for size in range(1, len(directions)):
        if all(x == directions[i % size] for i, x in enumerate(directions)):
            return directions[:size]
    return directions


def _read_size(size: Any) -> tuple[int, int]:
    """Return height and width from one number, or from two."""
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    is_whole = len(pair) == 2 and all(type(x) is int and 0 < x <= _LARGEST_SIDE for x in pair)
    _check(is_whole, f"img_size is {size!r}; wanted a height and a width of 1 to {_LARGEST_SIDE} pixels")
    return pair
