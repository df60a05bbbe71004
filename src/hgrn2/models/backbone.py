"""The loop over layers, shared by our model and transformers' classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from hgrn2.models.config import HGRN2Config
from hgrn2.nn.block import Block
from hgrn2.nn.gates import bounds_of_layers, touch_unused_bounds
from hgrn2.nn.mixers.base import Context, MixerState
from hgrn2.nn.mlp import GatedMLP
from hgrn2.nn.norm import Norm

LayerOutput = tuple[Tensor, MixerState, MixerState | None]


def call_block(layer: nn.Module, x: Tensor, state: MixerState | None, context: Context) -> LayerOutput:
    """Call a layer; torch.compile compiles this function once for all layers of a kind."""
    return layer(x, state, context)


def run_layers(
    layers: Iterable[Any],
    x: Tensor,
    states: MutableSequence[Any],
    context: Context,
    bounds: Sequence[Tensor | None] | None = None,
    *,
    call: Callable[..., LayerOutput] = call_block,
    on_hidden: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Run the layers of a model in order.

    Args:
        layers: blocks.
        x: [B, T, D], the input of the first.
        states: the state of each layer, or None; replaced in place by the new state as soon as the layer has run.
        context: further inputs of the pass.
        bounds: the lower bound [D] of each layer's gates, None for a layer that does not use one; None for no bounds.
        call: calls a layer, as `call_block` does.
        on_hidden: called with the input of each layer.

    Returns:
        x [B, T, D] after the last layer.
    """
    earlier: tuple[MixerState, ...] = ()
    for i, layer in enumerate(layers):
        if on_hidden is not None:
            on_hidden(x)
        wanted = layer.attn.num_earlier
        own = context.for_layer(None if bounds is None else bounds[i], earlier[-wanted:] if wanted else ())
        x, states[i], features = call(layer, x, states[i], own)
        if features is not None:
            earlier = (*earlier, features)
    return x


def embed(x: Tensor, config: Any, training: bool) -> Tensor:
    """Return the input of the first layer.

    Args:
        x: [B, T, D] from the embeddings.
        config: configuration of the model, of which scale_embedding, hidden_size and dropout are used.
        training: whether dropout applies.
    """
    if config.scale_embedding:
        x = x * math.sqrt(config.hidden_size)
    return functional.dropout(x, config.dropout, training)


def hand_out_bounds(
    x: Tensor, gamma: Tensor | None, kind: str, layers: Sequence[int], num_layers: int, *, detach_first: bool = True
) -> tuple[Tensor, list[Tensor | None]]:
    """Compute the lower bounds of the layers that use them.

    Args:
        x: [B, T, D], the input of the first layer.
        gamma: [L, D], the learned parameters; None for a model without bounds.
        kind: "inclusive" or "exclusive", as in `hgrn2.nn.gates.lower_bounds`.
        layers: indices of the layers that use their bound.
        num_layers: L.
        detach_first: whether the bound of the first layer, which is always 0, gets no gradient.

    Returns:
        x, connected to gamma if no layer uses a bound, and the bound of each layer or None.
    """
    if gamma is None:
        return x, [None] * num_layers
    bounds = bounds_of_layers(gamma, kind, layers, detach_first=detach_first)
    x = touch_unused_bounds(x, bounds, layers)
    return x, [bound if i in layers else None for i, bound in enumerate(bounds)]


def build_block(config: HGRN2Config, layer: int, backend: str = "auto", kind: type[Block] = Block) -> Block:
    """Construct one layer of a model.

    Args:
        config: configuration of the model.
        layer: index of the layer, from 0.
        backend: name of the operators' backend ("triton", "chunked", ...), or "auto" to choose one per call.
        kind: class of the layer, `Block` or a class derived from it.
    """
    mixer = config.build_mixer(layer, backend)
    assert config.intermediate_size is not None
    width = config.intermediate_size
    mlp = GatedMLP(config.hidden_size, width, config.glu_activation, config.use_bias) if width else None
    norms = [
        Norm(config.block_norm, config.hidden_size, config.norm_eps, config.elementwise_affine)
        for _ in range(1 if mlp is None else 2)
    ]
    return kind(mixer, mlp, norms[0], None if mlp is None else norms[1], config.dropout)
