"""The token mixer of RWKV-6 (Finch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from hgrn2.constraints import Ge
from hgrn2.nn.mixers.base import wide_dtype
from hgrn2.nn.mixers.registry import register_mixer
from hgrn2.nn.mixers.rwkv import RWKV, RWKVOptions, initial_mixes
from hgrn2.nn.parameters import InitialValues
from hgrn2.shapes import BTD


@dataclass(frozen=True)
class RWKV6Options(RWKVOptions):
    """Options of `RWKV6`.

    Attributes:
        mix_rank: rank of the shares of the token before.
        decay_rank: rank of the decay.
    """

    mix_rank: Annotated[int, Ge(1)] = 32
    decay_rank: Annotated[int, Ge(1)] = 64


@register_mixer("rwkv6", RWKV6Options)
class RWKV6(RWKV):
    """Finch (arXiv 2404.05892, section 4.2): shares of the token before, and a decay, that depend on the tokens.

        s = x + (x_{t-1} - x) mix_x
        x_a = x + (x_{t-1} - x) (mix_a + tanh(s A_a) B_a)    for a in w, k, v, r, g
        w = exp(-exp(decay + tanh(x_w A_d) B_d))

    The rest is that of `hgrn2.nn.mixers.rwkv.RWKV`. Initial values are those of the authors' code; its larger learning
    rate for the decay is not. As there, the matrices of low rank have no weight decay.

    Args:
        hidden_size: D.
        head_size: K = V.
        mix_rank: rank of the shares of the token before.
        decay_rank: rank of the decay.
    """

    def __init__(self, hidden_size: int, head_size: int, mix_rank: int, decay_rank: int):
        super().__init__(hidden_size, head_size)
        self.mix_x = nn.Parameter(torch.empty(hidden_size))
        self.mix = nn.Parameter(torch.empty(5, hidden_size))
        self.mix_down = nn.Parameter(torch.empty(hidden_size, 5 * mix_rank))
        self.mix_up = nn.Parameter(torch.empty(5, mix_rank, hidden_size))
        self.decay_down = nn.Parameter(torch.empty(hidden_size, decay_rank))
        self.decay_up = nn.Parameter(torch.empty(decay_rank, hidden_size))

    def mix_inputs(self, x: BTD, change: BTD) -> tuple[tuple[Tensor, ...], Tensor]:
        """Mix x with the token before; arguments and results of `RWKV.mix_inputs`."""
        low = torch.tanh(torch.addcmul(x, change, self.mix_x.to(x.dtype)) @ self.mix_down)
        low = low.unflatten(-1, (5, -1)).flatten(0, 1).transpose(0, 1)
        shares = (low @ self.mix_up).unflatten(1, x.shape[:2]) + self.mix.to(x.dtype)[:, None, None]
        for_decay, for_k, for_v, for_r, for_g = (torch.addcmul(x, change, share) for share in shares)
        log_w = self.decay + torch.tanh(for_decay @ self.decay_down) @ self.decay_up
        return (for_r, for_k, for_v, for_g), -log_w.to(wide_dtype(log_w.dtype)).exp()

    @torch.no_grad()
    def reset_parameters(self, init: InitialValues) -> None:
        """Set the initial values of the authors' code."""
        super().reset_parameters(init)
        width = len(self.decay)
        self.mix_x.copy_(initial_mixes("w", width, init)[0])
        self.mix.copy_(initial_mixes("wkvrg", width, init))
        for parameter in (self.mix_down, self.decay_down):
            parameter.zero_()
        for parameter in (self.mix_up, self.decay_up):
            nn.init.uniform_(parameter, -0.01, 0.01, generator=init.generator)

    def flops(self, seq_len: int) -> int:
        """Count the scan and the products of low rank."""
        low_rank = (self.mix_down, self.mix_up, self.decay_down, self.decay_up)
        return super().flops(seq_len) + sum(2 * matrix.numel() for matrix in low_rank)

    def activation_bytes(self, seq_len: int, low: int) -> int:
        """Count what `RWKV` counts, the mixed shares, the decay and its input, and the rows of low rank."""
        ranks = self.mix_down.shape[1] + self.decay_down.shape[1]
        return super().activation_bytes(seq_len, low) + (7 * low + 2 * 4) * len(self.decay) + low * ranks
