"""Keep the model's states in transformers' cache."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from hgrn2.errors import UserError

# transformers 5.24 renamed this argument and output field
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

# cache layers of the library that a StateLayer can replace; others have features that it lacks
_STATIC = (StaticLayer, StaticSlidingWindowLayer)
_REPLACEABLE = (LinearAttentionLayer, DynamicLayer, DynamicSlidingWindowLayer, *_STATIC)


class StateLayer(CacheLayerMixin):
    """One layer of a cache: the tensors of a mixer by name, as `hgrn2.models.ModelState` has them.

    The library's own layers do not fit. Its linear attention layer does not count tokens, so `generate` could not
    continue from it, and has a previous state only if it has a convolution. Its attention layer keeps padding between
    keys; ours moves padding to the front.

    A state of fixed size stays at one address, as compiled steps require.

    Args:
        kind: "linear_attention", "full_attention" or "sliding_attention".
        size: for attention, fixed number of places, of which the unused ones come first, as padding; None: it grows.
        growing: names of the tensors that grow along their second axis.
    """

    # shapes are unknown before the first call
    supports_early_init = False
    # single tokens cannot be removed from a state
    is_croppable = False

    def __init__(self, kind: str, size: int | None = None, growing: Sequence[str] = ()) -> None:
        super().__init__()
        self.kind, self.size, self.growing = kind, size, growing
        self.state: dict[str, Tensor] = {}
        # a tensor, because a compiled step would treat a Python number as a constant
        self.num_tokens = torch.zeros((), dtype=torch.long)

    @property
    def is_compileable(self) -> bool:
        """Whether all shapes are the same for every token."""
        return self.kind == "linear_attention" or self.size is not None

    @property
    def is_sliding(self) -> bool:
        """Whether old keys and values are dropped."""
        return self.kind == "sliding_attention"

    @property
    def batch_size(self) -> int:
        """Number of sequences; -1 before the first call."""
        return next((x.shape[0] for x in self.state.values()), -1)

    def check_room(self, num_tokens: int) -> None:
        """Raise a UserError if num_tokens do not fit into the layer; do nothing while a call is traced."""
        if self.kind == "full_attention" and self.size is not None and not torch.compiler.is_compiling():
            count = self.get_seq_length() + num_tokens
            if count > self.size:
                raise UserError(f"cache has {self.size} places, but {count} are needed; make it larger")

    def before(self) -> dict[str, Tensor]:
        """Return the tensors in a new dictionary, for the mixer to read.

        Tensors made in inference mode are copied when read outside of it, where autograd could not record them.
        """
        if (
            not torch.compiler.is_compiling()
            and self.num_tokens.is_inference()
            and not torch.is_inference_mode_enabled()
        ):
            self._map(torch.clone)
            self.num_tokens = self.num_tokens.clone()
        return dict(self.state)

    def replace(self, state: dict[str, Tensor], num_tokens: int) -> None:
        """Store a new state.

        Args:
            state: as the mixer returned it.
            num_tokens: number of places read, padding included.
        """
        tracing = torch.compiler.is_compiling()
        for name, new in state.items():
            if self.size is not None and name in self.growing:
                new = _resized(new, self.size)
            old = self.state.get(name)
            in_place = old is not None and old.shape == new.shape and not (new.requires_grad or old.requires_grad)
            if in_place and self.is_compileable:
                old.copy_(new)  # pyright: ignore[reportOptionalMemberAccess]
                continue
            # a view would keep the whole storage of a longer tensor alive
            if not tracing and new.untyped_storage().nbytes() > new.nbytes:
                new = new.clone()
            self.state[name] = new
            if self.is_compileable and not tracing:
                torch._dynamo.mark_static_address(new)
        if not self.is_initialized:
            device = next(iter(state.values())).device
            self.num_tokens = self.num_tokens.to(device)
            self.is_initialized = True
        self.num_tokens.add_(num_tokens)

    def get_seq_length(self) -> int:
        """Return the number of places read, padding included."""
        return int(self.num_tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the width of an attention mask for query_length new places, and its offset, 0."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return the number of places; -1 if it is not limited."""
        return self.size if self.size is not None and self.kind == "full_attention" else -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the states of the chosen sequences."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the states of the chosen sequences."""
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the state of each sequence."""
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Reset to the state before the first token."""
        self.num_tokens.zero_()
        if not self.is_compileable:
            self.state = {}
        for x in self.state.values():
            x.zero_()

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Raises: tokens cannot be removed.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"cannot remove {abs(tokens_to_remove)} tokens from the cache: a recurrent state does not record what each "
            "token added; go back to a copy of the cache (copy.deepcopy), and generate without an assistant",
            "unsupported",
        )

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a UserError, as `update` does."""
        self.update()

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a UserError: only other models fill a cache this way.

        Raises:
            UserError: always.
        """
        raise UserError(
            "cache is of an HGRN2 model, whose states another model cannot use; give that one a new cache", "mismatch"
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.state = {name: function(x) for name, x in self.state.items()}


def _resized(x: Tensor, size: int) -> Tensor:
    """Return the last `size` places of x [N, places, ...], padded in front."""
    x = x[:, max(0, x.shape[1] - size) :]
    missing = size - x.shape[1]
    return functional.pad(x, (*[0, 0] * (x.dim() - 2), missing, 0)) if missing else x


class CacheStates(MutableSequence[Any]):
    """The states in a cache as a sequence, which `hgrn2.models.backbone.run_layers` reads and updates.

    Args:
        layers: layers of the cache.
        num_tokens: number of places that the pass reads.
    """

    def __init__(self, layers: Sequence[StateLayer], num_tokens: int) -> None:
        self._layers, self._num_tokens = layers, num_tokens

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        return self._layers[index].before() or None

    def __setitem__(self, index: Any, state: Any) -> None:
        self._layers[index].replace(state, self._num_tokens)

    def __delitem__(self, index: Any) -> NoReturn:
        raise TypeError("the number of layers is fixed")

    def insert(self, index: int, value: Any) -> NoReturn:
        """Raise a TypeError: the number of layers is fixed."""
        del index, value
        raise TypeError("the number of layers is fixed")


def state_layers(cache: Cache, kinds: Sequence[str], growing: Sequence[Sequence[str]]) -> list[StateLayer]:
    """Return the layers of a cache; replace them by `StateLayer` at the first call.

    Args:
        cache: a `DynamicCache` or a `StaticCache`, new or used by this model before.
        kinds: kind of each layer of the model, from `HGRN2Config.layer_types`.
        growing: names of the tensors of each layer's state that grow with the tokens read.

    Raises:
        UserError: the cache is of another kind, or was filled by another model.
    """
    if getattr(cache, "offloading", False):
        raise UserError(
            f"cache is an offloaded {type(cache).__name__}; wanted one that stays on the device", "unsupported"
        )
    layers: list[Any] = cache.layers
    if not layers:
        layers.extend(StateLayer(kind, None, names) for kind, names in zip(kinds, growing, strict=True))
    if len(layers) != len(kinds):
        raise UserError(
            f"cache has {len(layers)} layers, the model {len(kinds)}; it belongs to another model", "mismatch"
        )
    for i, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        if isinstance(layer, StateLayer):
            if layer.kind != kind:
                raise UserError(
                    f"cache: layer {i} is of kind {layer.kind}, the model's {kind}; it belongs to another model",
                    "mismatch",
                )
            continue
        if type(layer) not in _REPLACEABLE:
            raise UserError(
                f"cache: layer {i} is a {type(layer).__name__}; wanted a DynamicCache or a StaticCache", "unsupported"
            )
        # a static cache may have its tensors before anything is read
        read = getattr(layer, "is_initialized", False) and int(layer.get_seq_length()) > 0
        if read or any(getattr(layer, "has_previous_state", {}).values()):
            raise UserError(
                f"cache: layer {i} was filled by another model, or by prefix tuning, which puts keys and values where "
                "HGRN2 keeps states; give a new cache or one that this model returned, and use prompt tuning or LoRA",
                "mismatch",
            )
        layers[i] = StateLayer(kind, layer.max_cache_len if isinstance(layer, _STATIC) else None, growing[i])
    return layers
