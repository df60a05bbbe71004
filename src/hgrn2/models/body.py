"""The model without its head: embeddings, blocks with their lower bounds, and a norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hgrn2.models.backbone import build_block, embed, hand_out_bounds, run_layers
from hgrn2.models.block_stack import BlockStack
from hgrn2.models.config import HGRN2Config
from hgrn2.models.state import ModelState
from hgrn2.nn.block import Block
from hgrn2.nn.gates import bounds_of_layers, set_initial_bounds
from hgrn2.nn.mixers.base import Context
from hgrn2.nn.norm import Norm
from hgrn2.nn.parameters import InitialValues, draw, parameter_roles


class HGRN2Model(BlockStack):
    """Token ids to hidden states.

    Args:
        config: configuration of the model.
        backend: name of the operators' backend ("triton", "chunked", ...), or "auto" to choose one per call.
    """

    def __init__(self, config: HGRN2Config, backend: str = "auto"):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        bounds = torch.empty(config.num_hidden_layers, config.hidden_size) if config.has_lower_bounds else None
        self.lower_bounds = None if bounds is None else nn.Parameter(bounds)
        self._bounded_layers = config.bounded_layers
        self.layers = nn.ModuleList(build_block(config, i, backend) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.block_norm, config.hidden_size, config.norm_eps, config.elementwise_affine)

    def bounds(self) -> list[Tensor] | list[None]:
        """Return the lower bound of each layer, [D] in [0, 1), or None for a model without bounds."""
        if self.lower_bounds is None:
            return [None] * len(self.layers)
        return bounds_of_layers(self.lower_bounds, self.config.lower_bound, self._bounded_layers)

    def forward(self, input_ids: Tensor, state: ModelState | None, context: Context) -> tuple[Tensor, ModelState]:
        """Run the layers.

        Args:
            input_ids: [B, T] int64.
            state: state after the tokens before; None at the start of a sequence.
            context: further inputs of the pass.

        Returns:
            Hidden states [B, T, D] after the last norm, and the new state.
        """
        x = embed(self.embeddings(input_ids), self.config, self.training)
        if self.is_compiled and context.cu_seqlens is not None:
            # every batch packs another number of sequences; without the mark, the second one compiles again
            torch._dynamo.maybe_mark_dynamic(context.cu_seqlens, 0)
        x, bounds = hand_out_bounds(
            x, self.lower_bounds, self.config.lower_bound, self._bounded_layers, len(self.layers),
            detach_first=not self.is_compiled,
        )  # fmt: skip
        states: list[Any] = [None] * len(self.layers) if state is None else list(state.layers)
        x = run_layers(self.layers, x, states, context, bounds, call=self.call_layer)
        return self.norm(x), ModelState(tuple(states))

    @property
    def drop_rate_of_blocks(self) -> float:
        """Probability of dropout inside the blocks."""
        return self.config.dropout

    def reset_parameters(self, std: float, generator: torch.Generator | None) -> None:
        """Set every parameter to its initial value, as `HGRN2LM.initialize` describes."""
        draw(self.embeddings, std, generator)
        if self.lower_bounds is not None:
            set_initial_bounds(self.lower_bounds, self.config.lower_bound, self.config.initial_bound)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            layer.reset_parameters(InitialValues(std, i, len(self.layers), generator))
        draw(self.norm, std, generator)

    def parameter_roles(self) -> dict[str, str]:
        """Return the role of each parameter by name, as `HGRN2LM.parameter_roles` describes."""
        roles = parameter_roles(self)
        return roles if self.lower_bounds is None else roles | {"lower_bounds": "lower_bounds"}
