"""The token mixer of ReBased."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn
from torch.nn import functional

from hgrn2.constraints import Ge
from hgrn2.errors import UserError
from hgrn2.nn.mixers.base import Context, Mixer, MixerOptions, MixerState, StateSpec, wide_dtype
from hgrn2.nn.mixers.registry import register_mixer
from hgrn2.nn.mixers.squared_attention import squared_attention
from hgrn2.nn.norm import Norm
from hgrn2.nn.parameters import InitialValues
from hgrn2.ops.tiles import CHUNK_SIZE
from hgrn2.shapes import BTD

# added to the sum of the weights, as in the authors' code
EPS = 1e-12


@dataclass(frozen=True)
class ReBasedOptions(MixerOptions):
    """Options of `ReBased`.

    Attributes:
        num_heads: H.
        feature_dim: K, the width of a head's query and key.
    """

    num_heads: Annotated[int, Ge(1)] = 16
    feature_dim: Annotated[int, Ge(1)] = 16

    def check_width(self, hidden_size: int) -> None:
        """Refuse heads of broken width."""
        if hidden_size % self.num_heads:
            raise UserError(
                f"num_heads is {self.num_heads}, with hidden_size = {hidden_size}; wanted a divisor of it",
                "contradiction",
            )


@register_mixer("rebased", ReBasedOptions)
class ReBased(Mixer):
    """Linear attention with a learned quadratic kernel (arXiv 2402.10644, section 4).

        q = LayerNorm(x W_q)    k = LayerNorm(x W_k)    v = x W_v    a_tj = (q_t . k_j)^2 / K
        y_t = sum_{j <= t} a_tj v_j / sum_{j <= t} a_tj              out = y W_o

    The weights and biases of the norms are the paper's gamma and beta. As in the authors' code, a norm runs over all
    heads together, and queries and keys have one each; fla normalises each head, with one gamma and beta for both.

    Args:
        hidden_size: D.
        num_heads: H.
        feature_dim: K.
    """

    can_pack = can_pad = True

    def __init__(self, hidden_size: int, num_heads: int, feature_dim: int):
        super().__init__()
        self.num_heads, self.k_width, self.v_width = num_heads, feature_dim, hidden_size // num_heads
        self.q_proj, self.k_proj = (nn.Linear(hidden_size, num_heads * feature_dim, bias=False) for _ in range(2))
        self.v_proj, self.o_proj = (nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = (Norm("layernorm", num_heads * feature_dim, 1e-5, True) for _ in range(2))

    def forward(self, x: BTD, state: MixerState | None, context: Context) -> tuple[BTD, MixerState]:
        """Mix tokens; arguments and results of `Mixer.forward`."""
        q, k, v = self.q_norm(self.q_proj(x)) * self.k_width**-0.5, self.k_norm(self.k_proj(x)), self.v_proj(x)
        if context.mask is not None:
            # a key of zeros has no weight
            k = k.masked_fill(~context.mask.unsqueeze(-1), 0)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))
        # a column of ones sums the weights
        v = functional.pad(v, (0, 1), value=1.0)
        before = None if state is None else state["recurrent"]
        sums, end = squared_attention(q, k, v, before, context.cu_seqlens)
        y = (sums[..., :-1] / (sums[..., -1:] + EPS)).flatten(2).to(x.dtype)
        return self.o_proj(y), {"recurrent": end} if context.keep_state else {}

    def state_spec(self, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Describe the state: "recurrent" [H, F, V + 1], weighted values and, last, the sum of the weights."""
        shape = (self.num_heads, self.num_pairs, self.v_width + 1)
        return {"recurrent": StateSpec(shape, wide_dtype(dtype))}

    @property
    def num_pairs(self) -> int:
        """F, the products of two features."""
        return self.k_width * (self.k_width + 1) // 2

    def reset_parameters(self, init: InitialValues) -> None:
        """Draw the projections; norms start at 1 and 0."""
        init.draw(self.q_proj, self.k_proj, self.v_proj, self.q_norm, self.k_norm)
        init.draw_end(self.o_proj)

    def flops(self, seq_len: int) -> int:
        """Count the weights inside a chunk with the sums they make, and the reads and updates of the state."""
        del seq_len
        columns = self.v_width + 1
        return self.num_heads * (2 * CHUNK_SIZE * (self.k_width + columns) + 4 * self.num_pairs * columns)

    def activation_bytes(self, seq_len: int, low: int) -> int:
        """Count q, k and v with the norms, the weights inside a chunk, and in float32 the products and the sums."""
        chunk, columns = min(CHUNK_SIZE, seq_len), self.v_width + 1
        low_kept = 2 * chunk + columns + self.v_width
        wide_kept = 2 * self.k_width + 2 * self.num_pairs + 2 * columns + self.num_pairs * columns / chunk
        norms = self.q_norm.activation_bytes(low) + self.k_norm.activation_bytes(low)
        return norms + self.num_heads * (low * low_kept + round(4 * wide_kept))
