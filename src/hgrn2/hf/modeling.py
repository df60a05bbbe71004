"""The model without a head, with the interface of transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from hgrn2.errors import UserError
from hgrn2.hf.cache import CACHE_NAME, CacheStates, StateLayer, state_layers
from hgrn2.hf.configuration import HGRN2Config
from hgrn2.hf.loading import check_loaded, classes_named_by
from hgrn2.models.backbone import LayerOutput, build_block, embed, hand_out_bounds, run_layers
from hgrn2.models.inputs import check_mixers
from hgrn2.nn.block import Block
from hgrn2.nn.gates import set_initial_bounds
from hgrn2.nn.mixers import Context, MixerState
from hgrn2.nn.norm import Norm
from hgrn2.nn.parameters import InitialValues, draw
from hgrn2.ops.export import is_exporting
from hgrn2.ops.tiles import boundaries
from hgrn2.ops.transforms import is_batched

_GIVE_BOUNDS = (
    "the places of tokens follow from attention_mask, one after the other; for packed sequences give cu_seq_lens_q, as "
    "DataCollatorWithFlattening(return_flash_attn_kwargs=True) does"
)


class HGRN2Layer(GradientCheckpointingLayer, Block):
    """A block with activation checkpointing."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        lower_bound: Tensor | None,
        state: MixerState | None,
        context: Context,
        names: tuple[tuple[str, ...], ...] = (),
        *features: Tensor,
    ) -> tuple[Any, ...]:
        """Run the layer as `Block.forward` does; reentrant checkpointing only tracks tensors that are not nested.

        Args:
            x: [B, T, D].
            lower_bound: that of the context.
            state: state of the mixer; None at the start of a sequence.
            context: the context, without its lower bound and features of earlier layers.
            names: names of the features of each earlier layer.
            *features: these features, one after the other.

        Returns:
            x, the new state, the names of this layer's features or None, and these features.
        """
        rest = iter(features)
        earlier = tuple({name: next(rest) for name in layer} for layer in names)
        x, new_state, own = super().forward(x, state, context.for_layer(lower_bound, earlier))
        return (x, new_state, None) if own is None else (x, new_state, tuple(own), *own.values())


def _call_layer(layer: nn.Module, x: Tensor, state: MixerState | None, context: Context) -> LayerOutput:
    names = tuple(tuple(features) for features in context.earlier)
    flat = [part for features in context.earlier for part in features.values()]
    plain = dataclasses.replace(context, lower_bound=None, earlier=())
    x, new_state, own, *features = layer(x, context.lower_bound, state, plain, names, *flat)
    return x, new_state, None if own is None else dict(zip(own, features, strict=True))


class HGRN2PreTrainedModel(PreTrainedModel):
    """Base of the classes: configuration, initial weights, and supported features of the library."""

    config_class = HGRN2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HGRN2Layer"]  # noqa: RUF012
    _input_embed_layer = "embeddings"
    # assisted decoding would have to remove tokens from the state
    _is_stateful = True
    # attention layers always use it
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; `loss_function` is a function or module, or None for the library's own."""
        if name != "loss_function":
            super().__setattr__(name, value)
            return
        if value is not None and not callable(value):
            raise UserError(f"loss_function is {value!r}; wanted a function, or None for the usual loss")
        self.__dict__.pop("_loss_function", None)
        if value is not None:
            # bypass torch, which would register a module as a part of the model and save it
            self.__dict__["_loss_function"] = value

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Open a model from a folder or the Hub; refuse to leave parameters at random values.

        Args:
            pretrained_model_name_or_path: folder, or name of a repository on the Hub; None with a `state_dict`.
            *args: passed to `transformers.PreTrainedModel.from_pretrained`.
            output_loading_info: return (model, report of missing, unexpected and mismatched tensors), and initialise
                missing tensors at random instead of refusing them.
            ignore_mismatched_sizes: initialise tensors with other shapes than the model's at random instead of
                refusing them.
            **kwargs: passed to `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            CheckpointError: tensors are missing or have other shapes.
            UserError: the settings in config.json are unknown or contradict each other.
        """
        name = pretrained_model_name_or_path
        # the library would raise about a shape without advice
        pair: Any = super().from_pretrained(
            name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model, found = pair
        body = "" if model.base_model is model else f"{cls.base_model_prefix}."
        check_loaded(
            "state_dict" if name is None else name,
            found,
            opened_by=[base.__name__ for base in cls.__mro__],
            written_by=classes_named_by(name, kwargs),
            body=body,
            any_missing=output_loading_info or name is None,
            any_size=ignore_mismatched_sizes,
        )
        return (model, found) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the model into a folder; refuse a model that could not be read back.

        Args:
            save_directory: the folder to write.
            *args: passed to `transformers.PreTrainedModel.save_pretrained`.
            **kwargs: passed to `transformers.PreTrainedModel.save_pretrained`.

        Raises:
            UserError: the model still contains adapters of PEFT, under which its tensors have other names.
        """
        # after add_adapter the library writes only the adapter
        if not getattr(self, "_hf_peft_config_loaded", False):
            left = [name for name, module in self.named_modules() if type(module).__module__.startswith("peft.")]
            if left:
                raise UserError(
                    f"{save_directory}: {len(left)} modules are still adapters of PEFT, the first is {left[0]}; use "
                    "save_pretrained of the PeftModel, or merge_and_unload() first (twice where target_parameters "
                    "names lower_bounds: the first call does not reach the layers below)",
                    "unsupported",
                )
        return super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        layers: Any = self.base_model.layers
        found = [i for i, layer in enumerate(layers) if any(module is inner for inner in layer.modules())]
        with init.guard_torch_init_functions():
            if found:
                _reset_block(layers[found[0]], InitialValues(self.config.initializer_range, found[0], len(layers)))
            elif isinstance(module, HGRN2Model) and module.lower_bounds is not None:
                # as the library's own functions, keep what was loaded
                if not getattr(module.lower_bounds, "_is_hf_initialized", False):
                    set_initial_bounds(module.lower_bounds, self.config.lower_bound, self.config.initial_bound)
            elif isinstance(module, nn.Linear | nn.Embedding | Norm):
                draw(module, self.config.initializer_range)


def _reset_block(block: Block, initial: InitialValues) -> None:
    """Draw the parameters of a block that were not read from a file.

    The library initialises module by module; marking the parameters prevents a second draw.
    """
    read = [p for p in block.parameters() if getattr(p, "_is_hf_initialized", False)]
    # restore them: the library guards only the functions of torch.nn.init
    values = [p.clone() for p in read]
    block.reset_parameters(initial)
    for parameter, value in zip(read, values, strict=True):
        parameter.copy_(value)
    for parameter in block.parameters():
        parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]


class HGRN2Model(HGRN2PreTrainedModel):
    """Token ids to hidden states: `hgrn2.models.HGRN2Model` with transformers' arguments and outputs.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: HGRN2Config) -> None:
        super().__init__(config)
        own = config.model_config
        self.embeddings = nn.Embedding(own.vocab_size, own.hidden_size)
        bounds = torch.empty(own.num_hidden_layers, own.hidden_size) if own.has_lower_bounds else None
        self.lower_bounds = None if bounds is None else nn.Parameter(bounds)
        self._bounded_layers = own.bounded_layers
        self.layers = nn.ModuleList(build_block(own, i, kind=HGRN2Layer) for i in range(own.num_hidden_layers))
        self.norm = Norm(own.block_norm, own.hidden_size, own.norm_eps, own.elementwise_affine)
        self._kinds = config.layer_types
        # names of the tensors of each layer's state that grow with the tokens read
        mixers: list[Any] = [layer.attn for layer in self.layers]
        self._growing = [
            tuple(name for name, spec in mixer.state_spec(torch.float32).items() if spec.grows) for mixer in mixers
        ]
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states of every place.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], or [B, S + T] after S places that the cache has read; 0 where a place is padding.
            cache: cache of the places before, as an earlier call returned it; updated in place.
            inputs_embeds: [B, T, D], outputs of the embeddings, instead of input_ids.
            use_cache: whether to return a cache; by default as the configuration says, and not in training or export.
            output_hidden_states: whether to return the input of every layer and the last layer's output, [B, T, D]
                each, the last behind the final norm.
            cu_seq_lens_q: [N + 1] starts of sequences packed end to end and the total length, B = 1.
            past_key_values: the cache by its name before transformers 5.24.
            **kwargs: further arguments of transformers; refused if they ask for something that the model does not have.

        Returns:
            last_hidden_state [B, T, D], the cache or None, and hidden_states or None.

        Raises:
            UserError: the arguments contradict each other, or the model does not support them.
        """
        _check_further(kwargs, packed=cu_seq_lens_q is not None)
        cache = _only_one(cache, past_key_values, ("cache", "past_key_values"))
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("input_ids and inputs_embeds: give one of them, not both or none", "contradiction")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if cu_seq_lens_q is not None:
            if cache is not None or use_cache or attention_mask is not None or x.shape[0] != 1:
                raise UserError(
                    "cu_seq_lens_q: packed sequences are one row, without a cache or an attention_mask", "contradiction"
                )
            if x.device.type == "cpu" and not torch.compiler.is_compiling():
                boundaries(cu_seq_lens_q, x.shape[1])
        if use_cache is None:
            # torch.export cannot return a cache
            is_wanted = self.config.use_cache and not self.training and not is_exporting()
            use_cache = is_wanted and cu_seq_lens_q is None
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        # check the cache first: otherwise the error would be about the width of the mask
        states = None if cache is None else self.state_layers(cache)
        mask = _padding(attention_mask, x, cache)
        if kwargs.get("position_ids") is not None and cu_seq_lens_q is None:
            _check_places(kwargs["position_ids"], mask, x)
        if states is not None and states[0].batch_size not in (-1, x.shape[0]):
            raise UserError(f"cache holds {states[0].batch_size} sequences; the input has {x.shape[0]}", "mismatch")
        # check before any layer has changed its state
        for state in states or ():
            state.check_room(x.shape[1])
        if output_hidden_states not in (None, True, False) or type(output_hidden_states) is int:
            raise UserError(f"output_hidden_states is {output_hidden_states!r}; wanted true for all of them, or false")
        keep_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states

        check_mixers(self.config.layers or (), cu_seq_lens_q, mask)

        x = embed(x, self.config, self.training)
        x, bounds = hand_out_bounds(
            x, self.lower_bounds, self.config.lower_bound, self._bounded_layers, len(self.layers)
        )
        # a dynamic length of an exported program is not a step
        is_step = states is not None and isinstance(x.shape[1], int) and x.shape[1] == 1
        context = Context(cu_seq_lens_q, mask, states is not None, is_step)
        hidden: list[Tensor] = []
        own_states: Any = [None] * len(self.layers) if states is None else CacheStates(states, x.shape[1])
        x = run_layers(
            self.layers,
            x,
            own_states,
            context,
            bounds,
            call=_call_layer,
            on_hidden=hidden.append if keep_hidden else None,
        )
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,  # pyright: ignore[reportArgumentType]
            hidden_states=(*hidden, x) if keep_hidden else None,  # pyright: ignore[reportArgumentType]
            **{CACHE_NAME: cache},  # pyright: ignore[reportArgumentType]
        )

    def state_layers(self, cache: Cache) -> list[StateLayer]:
        """Return the layers of a cache; replace them by `StateLayer` at the first call."""
        return state_layers(cache, self._kinds, self._growing)


def _only_one(a: Any, b: Any, names: tuple[str, str]) -> Any:
    if a is not None and b is not None:
        raise UserError(f"{names[0]} and {names[1]} are two names of one argument; give one of them", "contradiction")
    return b if a is None else a


def _padding(attention_mask: Tensor | None, x: Tensor, cache: Cache | None) -> Tensor | None:
    """Return a mask of the new places that are tokens, [B, T] bool; None if all are."""
    if attention_mask is None:
        return None
    batch, length = x.shape[:2]
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        found = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise UserError(f"attention_mask is {found}; wanted [B, T], 0 where a place is padding")
    width = attention_mask.shape[1]
    good = attention_mask.shape[0] == batch and width >= length
    if good and width > length and not torch.compiler.is_compiling():
        good = width == length + places_read(cache)
    if not good:
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)}; wanted [{batch}, {length}], or "
            f"[{batch}, {places_read(cache)} + {length}] with the places that the cache has read (generation does not "
            "read the last token that it writes)",
            "contradiction",
        )
    mask = attention_mask[:, attention_mask.shape[1] - length :].to(x.device).bool()
    # generation passes a mask of ones at every step; checking it is cheaper than applying it
    can_read = not torch.compiler.is_compiling() and not is_batched(mask)
    return None if can_read and bool(mask.all()) else mask


def places_read(cache: Cache | None) -> int:
    """Count the places of a cache that this model filled."""
    first = cache.layers[0] if cache is not None and cache.layers else None
    return first.get_seq_length() if isinstance(first, StateLayer) else 0


def _check_further(values: dict[str, Any], packed: bool) -> None:
    """Refuse arguments that would otherwise be ignored."""
    for name, value in values.items():
        if value is None:
            continue
        if name not in TransformersKwargs.__optional_keys__:
            raise UserError(f"unknown argument {name}", "unknown-name")
        if name == "output_attentions" and value:
            raise UserError("output_attentions: a recurrent layer has no attention matrix; leave it out", "unsupported")
        if name == "is_causal" and not value:
            raise UserError("is_causal=False: a recurrence reads from left to right; leave it out", "unsupported")
        if name == "seq_idx" and not packed:
            raise UserError(f"seq_idx: {_GIVE_BOUNDS}", "unsupported")


def _check_places(position_ids: Tensor, mask: Tensor | None, x: Tensor) -> None:
    """Refuse positions that are not consecutive: packed sequences without bounds, or gaps."""
    batch, length = x.shape[:2]
    # values are unknown in a trace and under vmap
    hidden = torch.compiler.is_compiling() or is_batched(position_ids) or (mask is not None and is_batched(mask))
    good = not hidden and position_ids.dim() == 2 and position_ids.shape[1] >= length
    if good:
        step = position_ids[:, position_ids.shape[1] - length :].to(x.device).diff(dim=1).expand(batch, -1)
        both = True if mask is None else mask[:, 1:] & mask[:, :-1]
        good = bool(((step == 1) | ~torch.as_tensor(both, device=x.device)).all())
    if not good:
        raise UserError(f"position_ids: {_GIVE_BOUNDS}", "unsupported")
