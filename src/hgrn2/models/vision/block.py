"""A layer of an image model: that of a language model, with stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor

from hgrn2.nn.block import Block
from hgrn2.nn.mixers.base import Context, Mixer, MixerState
from hgrn2.nn.mlp import GatedMLP
from hgrn2.nn.norm import Norm


class VisionBlock(Block):
    """A `Block` whose branches are dropped at random, by image, while training (arXiv 1603.09382).

    Args:
        attn: the token mixer.
        mlp: the channel mixer.
        attn_norm: norm before the token mixer.
        mlp_norm: norm before the channel mixer.
        drop_path: probability of dropping a branch; None for a model that drops none.
    """

    def __init__(self, attn: Mixer, mlp: GatedMLP, attn_norm: Norm, mlp_norm: Norm, drop_path: float | None):
        super().__init__(attn, mlp, attn_norm, mlp_norm, 0.0)
        # a tensor, so that one compiled block fits all layers
        self.drop_path: Tensor | None
        self.register_buffer("drop_path", None if drop_path is None else torch.tensor(drop_path), persistent=False)

    def forward(
        self, x: Tensor, state: MixerState | None, context: Context
    ) -> tuple[Tensor, MixerState, MixerState | None]:
        """Run the layer; arguments and results of `Block.forward`."""
        y, new_state, *features = self.attn(self.attn_norm(x), state, context)
        x = x + self._drop(y)
        assert self.mlp is not None
        assert self.mlp_norm is not None
        x = x + self._drop(self.mlp(self.mlp_norm(x)))
        return x, new_state, features[0] if features else None

    def _drop(self, y: Tensor) -> Tensor:
        if self.drop_path is None or not self.training:
            return y
        keep = 1 - self.drop_path
        kept = torch.rand(y.shape[0], 1, 1, device=y.device) < keep
        return y * (kept / keep).to(y.dtype)
