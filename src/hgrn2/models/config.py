"""The configuration of a language model; it covers every published variant and refuses contradictions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from typing import Any

from hgrn2.constraints import check_fields
from hgrn2.errors import UserError
from hgrn2.models.config_io import build, summarise
from hgrn2.models.pattern import (
    ATTENTION,
    DEFAULT_MIXER,
    AttentionConfig,
    OptionTable,
    Pattern,
    complete,
    describe_layers,
    read_pattern,
)  # fmt: skip
from hgrn2.nn.gates import LOWER_BOUNDS
from hgrn2.nn.mixers.base import Memory, Mixer, MixerOptions
from hgrn2.nn.mixers.hgrn2 import DEFAULT_EXPAND_RATIO, GATE_RANGES, HGRN2Options
from hgrn2.nn.mixers.registry import find_mixer
from hgrn2.nn.mlp import GLU_ACTIVATIONS
from hgrn2.nn.norm import NORMS
from hgrn2.ops.checks import SMALLEST_FLOOR

MODEL_TYPE = "hgrn2"
# limit of sizes: the bytes of a matrix of two such sizes fit into 64 bits
_LARGEST = 2**24
# a layer takes memory even on the meta device
_MAX_LAYERS = 4096


def _check(condition: bool, message: str, code: str = "invalid-value") -> None:
    if not condition:
        raise UserError(f"model config: {message}", code)


@dataclass(frozen=True)
class HGRN2Config:
    """Settings of a language model; the defaults are those of fla and the published checkpoints.

    Attributes:
        vocab_size: tokens of the vocabulary.
        hidden_size: D, the model width.
        num_hidden_layers: L.
        expand_ratio: K = V, the width of a head; the state holds expand_ratio numbers per channel. None means
            hidden_size / num_heads, or 128 when num_heads is not given either.
        num_heads: heads of the mixer, hidden_size / expand_ratio. Give one of the two; both must agree.
        hidden_ratio: sets intermediate_size when that is not given.
        intermediate_size: width of the channel mixer; None means 256 * ceil(int(D * hidden_ratio * 2 / 3) / 256), and
            0 no channel mixer.
        glu_activation: activation of the channel mixer: "silu" (SwiGLU), "none" (bilinear), "sigmoid" or "gelu".
        use_lower_bound: whether the forget gates have learned lower bounds.
        lower_bound: how the bounds follow from the learned parameters: "inclusive" or "exclusive".
        initial_bound: bound of the last layer before training, in (0, 1); those below rise from 0 in equal steps. None
            means (L - 1) / L.
        q_activation: activation of the output gate: "silu", "sigmoid" or "none".
        v_activation: activation of the input: "none" or "silu".
        scale: factor of the mixer's outputs before its norm; None means expand_ratio^-0.5.
        mixer_norm: norm after the scan: "rmsnorm" or "layernorm".
        mixer_norm_eps: eps of this norm (fla uses 1e-5 for every norm_eps).
        mixer_norm_affine: whether this norm has parameters.
        block_norm: norm before the mixers and at the end: "rmsnorm" or "layernorm".
        norm_eps: eps of these norms.
        elementwise_affine: whether these norms have parameters.
        use_bias: whether the projections of both mixers have biases.
        use_short_conv: whether q, f and i pass through a short convolution before their activations.
        conv_size: taps of this convolution.
        scale_embedding: whether embeddings are multiplied by sqrt(D).
        min_log_decay: smallest log decay while training, or None (the official models train with -3).
        dropout: dropout probability on embeddings and residual branches while training.
        tie_word_embeddings: whether embeddings and head share one matrix.
        initializer_range: standard deviation of the initial weights.
        gate_range: range of the forget gates: "positive", or "signed" for gates in (-1, 1), which can track parity.
        dense_state: HGRN2 layers before a layer whose keys and values are added to its own (DenseSSM); 0 for none.
        attn: attention at chosen layers, or None.
        layers: names of mixers, repeated over the depth: ("mamba", "mamba", "attention"). None means HGRN2, except in
            the layers of `attn`. HGRN2's options are the keys above. A pattern of only HGRN2 and attention is stored
            as `attn`.
        mixers: options of the other mixers in `layers`, by name: {"attention": {"num_heads": 8}}.
    """

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    # an int after __post_init__
    expand_ratio: int = None  # pyright: ignore[reportAssignmentType]
    num_heads: int | None = None
    hidden_ratio: float = 4
    intermediate_size: int | None = None
    glu_activation: str = "silu"
    use_lower_bound: bool = True
    lower_bound: str = "inclusive"
    q_activation: str = "silu"
    v_activation: str = "none"
    scale: float | None = None
    mixer_norm: str = "rmsnorm"
    mixer_norm_eps: float = 1e-5
    mixer_norm_affine: bool = True
    block_norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    elementwise_affine: bool = True
    use_bias: bool = False
    use_short_conv: bool = False
    conv_size: int = 4
    scale_embedding: bool = False
    min_log_decay: float | None = None
    dropout: float = 0.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    initial_bound: float | None = None
    gate_range: str = "positive"
    dense_state: int = 0
    attn: AttentionConfig | None = None
    layers: Pattern | None = None
    mixers: OptionTable | None = None

    def __post_init__(self) -> None:
        if self.layers is not None or self.mixers is not None:
            self._read_layers()
        if self.expand_ratio is None:
            object.__setattr__(self, "expand_ratio", self._derived_expand_ratio())
        check_fields(self, "model config")
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "expand_ratio")
        for name in sizes:
            _check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; wanted at least 1")
        for name in (*sizes, "conv_size", "intermediate_size"):
            size = getattr(self, name) or 0
            _check(size <= _LARGEST, f"{name} is {size}; wanted at most {_LARGEST}")
        layers = self.num_hidden_layers
        _check(layers <= _MAX_LAYERS, f"num_hidden_layers is {layers}; wanted at most {_MAX_LAYERS}")
        _check(
            self.hidden_size % self.expand_ratio == 0,
            f"{self._named('hidden_size')} is not a multiple of {self._named('expand_ratio')}; change one of them, "
            "or give num_heads instead of expand_ratio",
            "contradiction",
        )
        heads = self.hidden_size // self.expand_ratio
        _check(
            self.num_heads in (None, heads),
            f"num_heads = {self.num_heads} contradicts hidden_size / expand_ratio = {heads}; leave one of them out",
            "contradiction",
        )
        _check(self.hidden_ratio > 0, f"hidden_ratio is {self.hidden_ratio}; wanted above 0")
        if self.intermediate_size is None:
            wanted = int(self.hidden_size * self.hidden_ratio * 2 / 3)
            _check(wanted <= _LARGEST, f"hidden_ratio is {self.hidden_ratio}; wanted less, or intermediate_size")
            object.__setattr__(self, "intermediate_size", 256 * -(-wanted // 256))
        object.__setattr__(self, "num_heads", heads)
        _check(
            (self.intermediate_size or 0) >= 0,
            f"intermediate_size is {self.intermediate_size}; wanted at least 1, or 0 for layers without channel mixers",
        )
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            _check(value in known, f"{name} is {value!r}; wanted one of {', '.join(map(repr, known))}")
        for name in ("mixer_norm_eps", "norm_eps"):
            _check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; wanted at least 0")
        _check(0 <= self.dropout < 1, f"dropout is {self.dropout}; wanted in [0, 1)")
        _check(self.initializer_range > 0, f"initializer_range is {self.initializer_range}; wanted above 0")
        _check(self.scale is None or self.scale > 0, f"scale is {self.scale}; wanted above 0, or null for the default")
        _check(self.conv_size > 1, f"conv_size is {self.conv_size}; wanted at least 2")
        _check(0 <= self.dense_state <= _MAX_LAYERS, f"dense_state is {self.dense_state}; wanted at least 0")
        top = self.initial_bound
        _check(top is None or 0 < top < 1, f"initial_bound is {top}; wanted in (0, 1), or null for (L - 1) / L")
        floor = self.min_log_decay
        _check(
            floor is None or self.gate_range == "positive",
            f"min_log_decay is {floor}, and gate_range {self.gate_range!r}; leave one of them out",
            "contradiction",
        )
        _check(
            floor is None or SMALLEST_FLOOR <= floor < 0,
            f"min_log_decay is {floor}; wanted in [{SMALLEST_FLOOR}, 0), or null for none",
        )
        _check(
            self.attn is None or isinstance(self.attn, dict | AttentionConfig),
            f"attn is {self.attn!r}; wanted a table with layers and num_heads, or null",
        )
        if isinstance(self.attn, dict):
            object.__setattr__(self, "attn", build(AttentionConfig, self.attn, "model config, attn"))
        if self.attn is not None:
            wrong = [i for i in self.attn.layers if not 0 <= i < self.num_hidden_layers]
            _check(
                not wrong,
                f"attn.layers holds {wrong}; the model has layers 0 to {self.num_hidden_layers - 1}",
                "contradiction",
            )
            self._check_width("attn", self.attn.options)
        if self.layers is not None:
            num = len(self.layers)
            remedy = f"name {layers} mixers, or set num_hidden_layers to {num}"
            if num < layers:
                below = layers // num * num
                remedy = f"set num_hidden_layers to {below} or {below + num}, or name a mixer for each layer"
            _check(
                layers % num == 0,
                f"layers has a pattern of {num} mixers, which does not fit num_hidden_layers = {layers}; {remedy}",
                "contradiction",
            )
            for name, options in (self.mixers or {}).items():
                self._check_width(f"mixers.{name}", options)
            self._prefer_flat_keys()

    def _check_width(self, place: str, options: MixerOptions) -> None:
        try:
            options.check_width(self.hidden_size)
        except UserError as error:
            raise UserError(f"model config: {place}.{error}", error.code) from None

    def _read_layers(self) -> None:
        _check(
            self.attn is None,
            f"attn and layers = {self.layers!r} both say where attention is; leave attn out, and put its num_heads and "
            "the rest into mixers.attention",
            "contradiction",
        )
        pattern, options = read_pattern(self.layers, self.mixers)
        object.__setattr__(self, "layers", pattern)
        object.__setattr__(self, "mixers", options)

    def _prefer_flat_keys(self) -> None:
        # use the flat keys where they suffice, so that older versions can open the model
        if self.layers is None or not set(self.layers) <= {DEFAULT_MIXER, ATTENTION}:
            return
        attending = [i for i, name in enumerate(self.layer_mixers) if name == ATTENTION]
        if attending:
            assert self.mixers is not None
            attn = AttentionConfig(layers=tuple(attending), **dataclasses.asdict(self.mixers[ATTENTION]))
            object.__setattr__(self, "attn", attn)
        object.__setattr__(self, "layers", None)
        object.__setattr__(self, "mixers", None)

    def _derived_expand_ratio(self) -> int:
        heads, width = self.num_heads, self.hidden_size
        # check_fields reports values of other types
        if type(width) is int and heads is None and self.layers is not None and DEFAULT_MIXER not in self.layers:
            # without HGRN2 layers every width is valid
            return DEFAULT_EXPAND_RATIO if width % DEFAULT_EXPAND_RATIO == 0 else max(width, 1)
        if type(heads) is not int or type(width) is not int:
            return DEFAULT_EXPAND_RATIO
        _check(
            heads > 0 and width % heads == 0,
            f"num_heads is {heads}; wanted a number that divides {self._named('hidden_size')}",
            "contradiction",
        )
        return max(width // heads, 1)

    def _named(self, name: str) -> str:
        """Return a setting with its value for a message, marked if it is the default."""
        value = getattr(self, name)
        default = DEFAULT_EXPAND_RATIO if name == "expand_ratio" else type(self).__dataclass_fields__[name].default
        return f"{name} = {value}" + (" (the default)" if value == default else "")

    def __repr__(self) -> str:
        """Return the call that constructs this config, with sizes and settings other than the defaults."""
        shown = ("vocab_size", "hidden_size", "num_hidden_layers", "expand_ratio", "intermediate_size")
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.mixers is not None:
            values["mixers"] = {name: dataclasses.asdict(options) for name, options in self.mixers.items()}
        defaults = {field.name: field.default for field in fields(self)} | {"num_heads": self.num_heads}
        parts = [f"{name}={v!r}" for name, v in values.items() if name in shown or v != defaults[name]]
        return f"HGRN2Config({', '.join(parts)})"

    @property
    def summary(self) -> str:
        """Sizes and kinds of layers, in one line."""
        return summarise(self)

    @property
    def head_scale(self) -> float:
        """The factor of the scan's outputs."""
        return self.expand_ratio**-0.5 if self.scale is None else self.scale

    @property
    def layer_mixers(self) -> Pattern:
        """Name of each layer's mixer."""
        if self.layers is not None:
            return complete(self.layers, self.num_hidden_layers)
        attending = () if self.attn is None else self.attn.layers
        return tuple(ATTENTION if i in attending else DEFAULT_MIXER for i in range(self.num_hidden_layers))

    @property
    def described_layers(self) -> dict[str, str]:
        """The layers of each mixer as text, such as {"hgrn2": "0-2, 4-6", "attention": "3, 7"}."""
        return describe_layers(self.layer_mixers)

    @property
    def layer_memories(self) -> tuple[Memory, ...]:
        """Contents of each layer's state: "state", "tokens" or "window", as in `Mixer.memory`."""
        return tuple(find_mixer(name).mixer.memory(self.mixer_options(name)) for name in self.layer_mixers)

    @property
    def bounded_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose gates have lower bounds."""
        if not self.use_lower_bound:
            return ()
        bounded = {
            name for name in set(self.layer_mixers) if find_mixer(name).mixer.is_bounded(self.mixer_options(name))
        }
        return tuple(i for i, name in enumerate(self.layer_mixers) if name in bounded)

    @property
    def has_lower_bounds(self) -> bool:
        """Whether the model has the parameter of lower bounds; without `layers` it does not depend on the mixers."""
        return self.use_lower_bound and (self.layers is None or bool(self.bounded_layers))

    def mixer_options(self, name: str) -> MixerOptions:
        """Return the options of a mixer in this model.

        Args:
            name: name of the mixer, one of `layer_mixers`.
        """
        if name == DEFAULT_MIXER:
            return HGRN2Options(
                expand_ratio=self.expand_ratio,
                q_activation=self.q_activation,
                v_activation=self.v_activation,
                scale=self.head_scale,
                norm=self.mixer_norm,
                norm_eps=self.mixer_norm_eps,
                norm_affine=self.mixer_norm_affine,
                bias=self.use_bias,
                conv_size=self.conv_size if self.use_short_conv else 0,
                min_log_decay=self.min_log_decay,
                gate_range=self.gate_range,
                dense_state=self.dense_state,
            )
        if self.attn is not None:
            return self.attn.options
        assert self.mixers is not None
        return self.mixers[name]

    def build_mixer(self, layer: int, backend: str = "auto") -> Mixer:
        """Construct the mixer of one layer.

        Args:
            layer: index of the layer, from 0.
            backend: name of the operators' backend ("triton", "chunked", ...), or "auto" to choose one per call.
        """
        name = self.layer_mixers[layer]
        options = self.mixer_options(name)
        if isinstance(options, HGRN2Options) and options.dense_state:
            options = dataclasses.replace(options, num_earlier=self.layer_mixers[:layer].count(DEFAULT_MIXER))
        return find_mixer(name).build(self.hidden_size, options, backend)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the model type; keys that older versions lack only if they are set."""
        values = dataclasses.asdict(self)
        added = {"initial_bound": None, "layers": None, "mixers": None, "gate_range": "positive", "dense_state": 0}
        kept = {key: value for key, value in values.items() if key not in added or value != added[key]}
        return {"model_type": MODEL_TYPE, **kept}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HGRN2Config:
        """Return the config of a dictionary from `to_dict`; missing keys take the defaults.

        Raises:
            UserError: a key is unknown (the message suggests similar ones), or values contradict each other.
        """
        _check(isinstance(values, dict), f"found {type(values).__name__}; wanted a table of settings")
        values = dict(values)
        found = values.pop("model_type", MODEL_TYPE)
        _check(found == MODEL_TYPE, f"model_type is {found!r}; wanted {MODEL_TYPE!r}", "unsupported")
        return build(cls, values, "model config")

    def replace(self, **changes: Any) -> HGRN2Config:
        """Return a copy with some fields changed; derived fields are computed again."""
        values = dataclasses.asdict(self)
        if "layers" in changes:
            values["mixers"] = None
        if changes.get("layers") is not None:
            values["attn"] = None
        if changes.get("attn") is not None:
            values["layers"] = values["mixers"] = None
        if {"hidden_size", "expand_ratio"} & changes.keys():
            values["num_heads"] = None
        if changes.get("num_heads") is not None and "expand_ratio" not in changes:
            values["expand_ratio"] = None
        if {"hidden_size", "hidden_ratio"} & changes.keys():
            values["intermediate_size"] = None
        return self.from_dict(values | changes)


_CHOICES = {
    "glu_activation": GLU_ACTIVATIONS,
    "lower_bound": LOWER_BOUNDS,
    "q_activation": ("silu", "sigmoid", "none"),
    "v_activation": ("none", "silu"),
    "gate_range": GATE_RANGES,
    "mixer_norm": NORMS,
    "block_norm": NORMS,
}
