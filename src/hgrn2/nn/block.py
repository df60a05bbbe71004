"""One layer of the model: a token mixer and a channel mixer, each with a norm before it and a residual connection."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from hgrn2.nn.mixers.base import Context, Mixer, MixerState
from hgrn2.nn.mlp import GatedMLP
from hgrn2.nn.norm import Norm
from hgrn2.nn.parameters import InitialValues


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Args:
        attn: the token mixer.
        mlp: the channel mixer, or None.
        attn_norm: norm before the token mixer.
        mlp_norm: norm before the channel mixer; None without one.
        dropout: probability, applied to both branches while training.
    """

    def __init__(self, attn: Mixer, mlp: GatedMLP | None, attn_norm: Norm, mlp_norm: Norm | None, dropout: float):
        super().__init__()
        self.attn_norm, self.attn = attn_norm, attn
        self.mlp_norm, self.mlp = mlp_norm, mlp
        self.dropout = dropout

    def forward(
        self, x: Tensor, state: MixerState | None, context: Context
    ) -> tuple[Tensor, MixerState, MixerState | None]:
        """Run the layer.

        Args:
            x: [B, T, D].
            state: state of the mixer; None at the start of a sequence.
            context: further inputs of the pass.

        Returns:
            x [B, T, D], the mixer's new state, and its features for later layers or None.
        """
        y, new_state, *features = self.attn(self.attn_norm(x), state, context)
        x = x + functional.dropout(y, self.dropout, self.training)
        if self.mlp is not None and self.mlp_norm is not None:
            y = self.mlp(self.mlp_norm(x))
            x = x + functional.dropout(y, self.dropout, self.training)
        return x, new_state, features[0] if features else None

    def reset_parameters(self, init: InitialValues) -> None:
        """Set every parameter to its initial value."""
        init.draw(self.attn_norm)
        self.attn.reset_parameters(init)
        if self.mlp is not None and self.mlp_norm is not None:
            init.draw(self.mlp_norm)
            self.mlp.reset_parameters(init)

    def activation_bytes(self, seq_len: int, low: int) -> int:
        """Return the bytes per token that are saved for the backward pass; arguments of `Mixer.activation_bytes`."""
        branches = [(self.attn_norm, self.attn.activation_bytes_in_direction(seq_len, low))]
        if self.mlp is not None and self.mlp_norm is not None:
            branches.append((self.mlp_norm, self.mlp.activation_bytes(low)))
        dropout = low * self.attn_norm.size if self.dropout else 0
        return sum(norm.activation_bytes(low) + dropout + branch for norm, branch in branches)
