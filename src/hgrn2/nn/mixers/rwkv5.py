"""The token mixer of RWKV-5 (Eagle)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hgrn2.nn.mixers.base import wide_dtype
from hgrn2.nn.mixers.registry import register_mixer
from hgrn2.nn.mixers.rwkv import RWKV, RWKVOptions, initial_mixes
from hgrn2.nn.parameters import InitialValues
from hgrn2.shapes import BTD


@register_mixer("rwkv5", RWKVOptions)
class RWKV5(RWKV):
    """Eagle (arXiv 2404.05892, section 4.1): learned shares of the token before, and a decay that is a parameter.

        x_a = x + (x_{t-1} - x) mix_a    for a in r, k, v, g        w = exp(-exp(decay))

    The rest is that of `hgrn2.nn.mixers.rwkv.RWKV`. Initial values are those of the authors' code; its larger learning
    rate for the decay is not.

    Args:
        hidden_size: D.
        head_size: K = V.
    """

    def __init__(self, hidden_size: int, head_size: int):
        super().__init__(hidden_size, head_size)
        self.mix = nn.Parameter(torch.empty(4, hidden_size))

    def mix_inputs(self, x: BTD, change: BTD) -> tuple[tuple[Tensor, ...], Tensor]:
        """Mix x with the token before; arguments and results of `RWKV.mix_inputs`."""
        inputs = tuple(torch.addcmul(x, change, share) for share in self.mix.to(x.dtype))
        log_w = -self.decay.to(wide_dtype(x.dtype)).exp()
        return inputs, log_w.expand(*x.shape)

    @torch.no_grad()
    def reset_parameters(self, init: InitialValues) -> None:
        """Set the initial values of the authors' code."""
        super().reset_parameters(init)
        self.mix.copy_(initial_mixes("rkvg", len(self.decay), init))
