"""The decode step of a whole model: one token of each row of the state pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hgrn2.models import HGRN2LM
from hgrn2.models.backbone import embed
from hgrn2.nn.block import Block
from hgrn2.nn.mixers.base import Context, MixerState
from hgrn2.serve.fused import MOST_ROWS, FusedLayer, can_fuse, is_rms_norm, norm_values
from hgrn2.serve.mixer_steps import HGRN2Step, MixerStep, step_of
from hgrn2.serve.mlp_step import MLPStep, has_plain_branches
from hgrn2.serve.replay import ReplayStep, flush_rings
from hgrn2.serve.row_linear import project_rows


class LayerStep:
    """One layer of the model for one token of each row.

    Args:
        block: the layer.
        growing: names of the tensors of its state that grow.
        bound: the lower bound [D] of its gates, or None.
        ring: the largest batch, and after how many tokens the state is written; None for every token.
    """

    def __init__(self, block: Block, growing: frozenset[str], bound: Tensor | None, ring: tuple[int, int] | None):
        self.block = block
        self.mix: MixerStep = step_of(block.attn, growing)
        if ring is not None and type(self.mix) is HGRN2Step:
            self.mix = ReplayStep(self.mix.mixer, *ring)
        self.mlp: Any = MLPStep(block.mlp) if has_plain_branches(block.mlp) else block.mlp  # pyright: ignore
        self.bound = bound
        self.num_earlier = block.attn.num_earlier

    def __call__(
        self, x: Tensor, state: MixerState, earlier: tuple[MixerState, ...]
    ) -> tuple[Tensor, MixerState | None]:
        """Run the layer; arguments and results of `MixerStep`, for x [B, D] before the norm."""
        context = Context(is_step=True, lower_bound=self.bound, earlier=earlier)
        y, features = self.mix(self.block.attn_norm(x), state, context)
        return self.mix_channels(x + y), features

    def mix_channels(self, x: Tensor) -> Tensor:
        """Run the second half of the layer on rows x [B, D]; x itself if the layer has none."""
        norm = self.block.mlp_norm
        return x if self.mlp is None or norm is None else x + self.mlp(norm(x))


class DecodeStep:
    """One token of each row: ids to logits.

    Args:
        model: the model, in evaluation mode. The weights of joined projections become views of one tensor.
        growing: for each layer, names of the tensors of its state that grow.
        ring: the largest batch, and after how many tokens HGRN2 layers write their state; None for every token.
    """

    @torch.no_grad()
    def __init__(self, model: HGRN2LM, growing: Sequence[frozenset[str]], ring: tuple[int, int] | None = None):
        self.model = model
        self.config = model.config
        body = model.model
        bounded = set(model.config.bounded_layers)
        bounds = body.bounds()
        self.layers = [
            LayerStep(block, names, _detached(bounds[i]) if i in bounded else None, ring)  # pyright: ignore
            for i, (block, names) in enumerate(zip(body.layers, growing, strict=True))
        ]
        self.fused = None
        if all(can_fuse(layer) for layer in self.layers) and is_rms_norm(body.norm):
            self.fused = [FusedLayer(layer) for layer in self.layers]

    @torch.no_grad()
    def __call__(self, tokens: Tensor, states: Sequence[MixerState]) -> Tensor:
        """Read one token of each row.

        Args:
            tokens: [B] int64.
            states: for each layer the tensors [B, ...] of the rows, changed in place.

        Returns:
            Logits [B, vocab].
        """
        body = self.model.model
        x = embed(body.embeddings(tokens), self.config, False)
        if self.fused is not None:
            return self._run_fused(x, states, self.fused)
        earlier: tuple[MixerState, ...] = ()
        for layer, state in zip(self.layers, states, strict=True):
            wanted = layer.num_earlier
            x, features = layer(x, state, earlier[-wanted:] if wanted else ())
            if features is not None:
                earlier = (*earlier, features)
        return project_rows(self.model.lm_head, body.norm(x))

    def flush(self, states: Sequence[MixerState]) -> None:
        """Write the states of the rows of the last batch, before they are copied or the batch changes."""
        flush_rings([layer.mix for layer in self.layers], states)

    def _run_fused(self, x: Tensor, states: Sequence[MixerState], layers: Sequence[FusedLayer]) -> Tensor:
        norm, head = self.model.model.norm, self.model.lm_head
        if x.shape[0] <= MOST_ROWS:
            for layer, state in zip(layers, states, strict=True):
                x = layer.run_few(x, state)
            return head(norm(x))
        normed = self.layers[0].block.attn_norm(x)
        following = [layer.norm for layer in layers[1:]] + [norm_values(norm)]
        for layer, state, next_norm in zip(layers, states, following, strict=True):
            x, normed = layer.run_many(x, normed, state, next_norm)
        return head(normed)


def _detached(bound: Tensor | None) -> Tensor | None:
    return None if bound is None else bound.detach().contiguous()
