"""The decode step of a whole model: one token of each row of the state pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hgrn2.models import HGRN2LM
from hgrn2.models.backbone import embed
from hgrn2.nn.block import Block
from hgrn2.nn.mixers.base import Context, MixerState
from hgrn2.nn.mlp import GatedMLP
from hgrn2.ops.device import ROW_ALIGNMENT
from hgrn2.serve.mixer_steps import MixerStep, can_join, join_projections, step_of


class MLPStep:
    """The channel mixer with one product for both branches.

    Args:
        mlp: a `GatedMLP` of plain projections.
    """

    def __init__(self, mlp: GatedMLP):
        self.mlp = mlp
        self.weight, self.bias = join_projections([mlp.gate_proj, mlp.up_proj])

    def __call__(self, x: Tensor) -> Tensor:
        """Mix the channels of rows x [B, D]."""
        gate, up = functional.linear(x, self.weight, self.bias).chunk(2, -1)
        return self.mlp.down_proj(self.mlp._activate(gate) * up)


class LayerStep:
    """One layer of the model for one token of each row.

    Args:
        block: the layer.
        growing: names of the tensors of its state that grow.
        bound: the lower bound [D] of its gates, or None.
    """

    def __init__(self, block: Block, growing: frozenset[str], bound: Tensor | None):
        self.block = block
        self.mix: MixerStep = step_of(block.attn, growing)
        self.mlp: Any = MLPStep(block.mlp) if _has_plain_branches(block.mlp) else block.mlp  # pyright: ignore
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
    """

    @torch.no_grad()
    def __init__(self, model: HGRN2LM, growing: Sequence[frozenset[str]]):
        self.model = model
        self.config = model.config
        body = model.model
        bounded = set(model.config.bounded_layers)
        bounds = body.bounds()
        self.layers = [
            LayerStep(block, names, _detached(bounds[i]) if i in bounded else None)  # pyright: ignore
            for i, (block, names) in enumerate(zip(body.layers, growing, strict=True))
        ]

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
        earlier: tuple[MixerState, ...] = ()
        for layer, state in zip(self.layers, states, strict=True):
            wanted = layer.num_earlier
            x, features = layer(x, state, earlier[-wanted:] if wanted else ())
            if features is not None:
                earlier = (*earlier, features)
        return self.model.lm_head(body.norm(x))


def _detached(bound: Tensor | None) -> Tensor | None:
    return None if bound is None else bound.detach().contiguous()


def _has_plain_branches(mlp: nn.Module | None) -> bool:
    if type(mlp) is not GatedMLP or not can_join([mlp.gate_proj, mlp.up_proj]):
        return False
    # the module pads widths that a GPU is slow at
    return not (mlp.gate_proj.weight.is_cuda and mlp.gate_proj.out_features % ROW_ALIGNMENT)
