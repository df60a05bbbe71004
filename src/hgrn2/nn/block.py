"""One layer of the model: token mixer and channel mixer, each behind a norm and beside a residual."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Args:
        attn: the token mixer, called as `hgrn2.nn.mixers.hgrn2.HGRN2Mixer` is. The block does not ask which.
        mlp: the channel mixer.
        attn_norm: norm before the token mixer.
        mlp_norm: norm before the channel mixer.
        dropout: probability, applied to both branches while training.
    """

    def __init__(self, attn: nn.Module, mlp: nn.Module, attn_norm: nn.Module, mlp_norm: nn.Module, dropout: float):
        super().__init__()
        self.attn_norm, self.attn = attn_norm, attn
        self.mlp_norm, self.mlp = mlp_norm, mlp
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        lower_bound: Tensor | None,
        state: dict[str, Tensor] | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        keep_state: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Arguments as `hgrn2.nn.mixers.hgrn2.HGRN2Mixer.forward`."""
        y, new_state = self.attn(self.attn_norm(x), lower_bound, state, cu_seqlens, mask, keep_state=keep_state)
        x = x + functional.dropout(y, self.dropout, self.training)
        y = self.mlp(self.mlp_norm(x))
        return x + functional.dropout(y, self.dropout, self.training), new_state
