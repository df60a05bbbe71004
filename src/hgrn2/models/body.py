"""The model below its head, in reading order: embeddings, blocks under their lower bounds, norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hgrn2.models.backbone import build_block, call_block, embed, hand_out_bounds, run_layers
from hgrn2.models.config import HGRN2Config
from hgrn2.models.state import ModelState
from hgrn2.nn.block import Block
from hgrn2.nn.gates import bounds_of_layers
from hgrn2.nn.mixers.base import Context
from hgrn2.nn.norm import Norm
from hgrn2.nn.parameters import InitialValues, draw, parameter_roles


class HGRN2Model(nn.Module):
    """Token ids to hidden states.

    Args:
        config: what the model is made of.
        backend: "auto", or the name of one as for `hgrn2.ops.hgrn2_scan`.

    Attributes:
        activation_checkpointing: compute the activations of every layer again in the backward pass instead of keeping
            them: less memory for about a third more time, and the same numbers.
    """

    def __init__(self, config: HGRN2Config, backend: str = "auto"):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        bounds = torch.empty(config.num_hidden_layers, config.hidden_size) if config.has_lower_bounds else None
        self.lower_bounds = None if bounds is None else nn.Parameter(bounds)
        self._bounded_layers = config.bounded_layers
        self.layers = nn.ModuleList(build_block(config, i, backend) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.block_norm, config.hidden_size, config.norm_eps, config.elementwise_affine)
        self._compiled_call: Callable[..., Any] | None = None

    def compile_blocks(self, **options: Any) -> None:
        """Compiles a block with torch.compile, once for all layers of a kind. Only training uses it.

        Args:
            **options: of `torch.compile`.
        """
        self._compiled_call = torch.compile(call_block, **options)

    def bounds(self) -> list[Tensor] | list[None]:
        """Returns the lower bound of each layer, [D] in [0, 1), or None for a model without bounds."""
        if self.lower_bounds is None:
            return [None] * len(self.layers)
        return bounds_of_layers(self.lower_bounds, self.config.lower_bound, self._bounded_layers)

    def forward(self, input_ids: Tensor, state: ModelState | None, context: Context) -> tuple[Tensor, ModelState]:
        """Runs the layers.

        Args:
            input_ids: [B, T] int64.
            state: of the tokens before; None at a start.
            context: of the pass.

        Returns:
            Hidden states [B, T, D] after the last norm, and the new state.
        """
        x = embed(self.embeddings(input_ids), self.config, self.training)
        # evaluation has too many shapes to be worth compiling
        is_compiled = self.training and self._compiled_call is not None
        x, bounds = hand_out_bounds(
            x, self.lower_bounds, self.config.lower_bound, self._bounded_layers, len(self.layers),
            detach_first=not is_compiled,
        )  # fmt: skip
        states: list[Any] = [None] * len(self.layers) if state is None else list(state.layers)
        x = run_layers(self.layers, x, states, context, bounds, call=self._call)
        return self.norm(x), ModelState(tuple(states))

    def _call(self, *arguments: Any) -> Any:
        compiled = self._compiled_call if self.training else None
        call = call_block if compiled is None else compiled
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return call(*arguments)
        # only dropout draws random numbers
        draws = self.training and self.config.dropout > 0
        return checkpoint(call, *arguments, use_reentrant=False, preserve_rng_state=draws)

    def reset_parameters(self, std: float, generator: torch.Generator | None) -> None:
        """Sets every parameter to its initial value, see `HGRN2LM.initialize`."""
        draw(self.embeddings, std, generator)
        if self.lower_bounds is not None:
            nn.init.zeros_(self.lower_bounds)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            layer.reset_parameters(InitialValues(std, i, len(self.layers), generator))
        draw(self.norm, std, generator)

    def parameter_roles(self) -> dict[str, str]:
        """Says what each parameter is, see `HGRN2LM.parameter_roles`."""
        roles = parameter_roles(self)
        return roles if self.lower_bounds is None else roles | {"lower_bounds": "lower_bounds"}
