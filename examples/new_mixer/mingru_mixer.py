"""A mixer of your own in one file: minGRU (arXiv 2410.01201, section 3.1), registered under the name "mingru".

    z_t = sigmoid(W_z x_t)        h_t = (1 - z_t) h_{t-1} + z_t W_h x_t        y_t = W_o h_t

Install it with `pip install -e .` in this folder. Its name then works wherever hgrn2 takes one:

    hgrn2 info tiny --set layers=mingru
    hgrn2 train --data TEXT --out runs/mingru --set layers=mingru,hgrn2 'mixers={"mingru": {"slowest": 0.99}}'
    hgrn2 generate runs/mingru --prompt "Once upon"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from hgrn2.constraints import Ge, Lt
from hgrn2.nn.mixers import Context, Mixer, MixerOptions, MixerState, StateSpec, register_mixer, wide_dtype
from hgrn2.nn.parameters import InitialValues
from hgrn2.ops import linear_scan


@dataclass(frozen=True)
class MinGRUOptions(MixerOptions):
    """Options in the table `mixers.mingru` of a configuration; the fields are arguments of the constructor."""

    slowest: Annotated[float, Ge(0), Lt(1)] = 0.95


@register_mixer("mingru", MinGRUOptions)
class MinGRU(Mixer):
    """A gated average of the tokens read, channel by channel.

    Args:
        hidden_size: D.
        slowest: share of the state that the slowest channel keeps at the start of training; the fastest keeps half.
    """

    # it follows cu_seqlens of packed documents, and the mask of padded ones
    can_pack = can_pad = True

    def __init__(self, hidden_size: int, slowest: float):
        super().__init__()
        self.hidden_size, self.slowest = hidden_size, slowest
        self.z_proj = nn.Linear(hidden_size, hidden_size)
        self.h_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, state: MixerState | None, context: Context) -> tuple[Tensor, MixerState]:
        """Mix x [B, T, D]; the state is a value, read from `state` and returned."""
        # states are float32, or float64 if x is
        z, h = self.z_proj(x).to(wide_dtype(x.dtype)), self.h_proj(x)
        keep, write = torch.sigmoid(-z), torch.sigmoid(z) * h
        if context.mask is not None:
            # padding keeps the state and writes nothing
            padding = ~context.mask.unsqueeze(-1)
            keep, write = keep.masked_fill(padding, 1), write.masked_fill(padding, 0)
        before = None if state is None else state["average"]
        y, after = linear_scan(keep, write, initial_state=before, cu_seqlens=context.cu_seqlens)
        return self.o_proj(y.to(x.dtype)), {"average": after} if context.keep_state else {}

    def state_spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Describe the state; saving, decoding, costs and caches of other libraries follow from it."""
        return {"average": StateSpec((self.hidden_size,), wide_dtype(dtype))}

    @torch.no_grad()
    def reset_parameters(self, init: InitialValues) -> None:
        """Set every parameter; the last projection of the branch is smaller in deeper models."""
        init.draw(self.z_proj, self.h_proj)
        init.draw_end(self.o_proj)
        shares = torch.linspace(0.5, max(self.slowest, 0.5), self.hidden_size, device=self.z_proj.bias.device)
        self.z_proj.bias.copy_(torch.log((1 - shares) / shares))

    def flops(self, seq_len: int) -> int:
        """Count operations per token without those of the projections."""
        return 2 * self.hidden_size

    def activation_bytes(self, seq_len: int, low: int) -> int:
        """Count bytes per token that are saved for the backward pass; `low` are those of a number under autocast."""
        return (3 * 4 + low) * self.hidden_size
