"""Base of models that are a stack of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hgrn2.models.backbone import call_block


class BlockStack(nn.Module):
    """Base of models that are a stack of blocks: compiles the blocks, and recomputes their activations.

    Attributes:
        activation_checkpointing: recompute the activations of every layer in the backward pass instead of storing them:
            less memory, about a third more time, the same numbers.
    """

    activation_checkpointing: bool = False
    _compiled_call: Callable[..., Any] | None = None

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks with torch.compile, once for all layers of a kind; only training uses the result.

        Args:
            **options: options of `torch.compile`.
        """
        self._compiled_call = torch.compile(call_block, **options)

    def stop_compiling_blocks(self) -> None:
        """Undo `compile_blocks`."""
        self._compiled_call = None

    @property
    def is_compiled(self) -> bool:
        """Whether the present pass runs compiled blocks; evaluation has too many shapes to be worth compiling."""
        return self.training and self._compiled_call is not None

    def call_layer(self, *arguments: Any) -> Any:
        """Call a layer, compiled and with recomputed activations if that is set; arguments of `call_block`."""
        compiled = self._compiled_call if self.training else None
        call = call_block if compiled is None else compiled
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return call(*arguments)
        return checkpoint(
            call, *arguments, use_reentrant=False, preserve_rng_state=self.training and self.drop_rate_of_blocks > 0
        )

    @property
    def drop_rate_of_blocks(self) -> float:
        """Probability of dropout inside the blocks; if it is 0, they draw no random numbers."""
        raise NotImplementedError
