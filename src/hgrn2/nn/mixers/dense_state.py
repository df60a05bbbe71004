"""Keys and values of earlier layers, added to those of a layer (DenseSSM, arXiv 2403.00818)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from hgrn2.nn.mixers.context import MixerState
from hgrn2.nn.norm import Norm
from hgrn2.nn.parameters import InitialValues

# D over the width between the two projections of a gate, as released
REDUCTION = 32


class DenseState(nn.Module):
    """Fuse keys and values of earlier layers into those of one layer, through gates computed from its input.

        k' = k + SiLU(G_k(x)) * (k_{l-1} + k_{l-2} + ...)        G(x) = SiLU(x W_1) W_2
        v' = RMSNorm(v + SiLU(G_v(x)) * (v_{l-1} + v_{l-2} + ...))

    These are DenseRetNet's equations (arXiv 2403.00818, section 3, and the authors' code), except that they normalise k
    too. A tied key 1 - f is small where the state is kept; a norm would undo that, so the key has none.

    Args:
        hidden_size: D.
        eps: eps of the norm.
    """

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        rank = max(1, hidden_size // REDUCTION)
        self.k_down, self.k_up = _projections(hidden_size, rank)
        self.v_down, self.v_up = _projections(hidden_size, rank)
        self.v_norm = Norm("rmsnorm", hidden_size, eps, True)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, earlier: tuple[MixerState, ...]) -> tuple[Tensor, Tensor]:
        """Return the fused key and value, [B, T, D].

        Args:
            x: [B, T, D], the input of the layer's mixer.
            k: [B, T, D], its key.
            v: [B, T, D], its value.
            earlier: "k" and "v" of earlier layers, before their own fusion, [B, T, D].
        """
        k_gate = functional.silu(self.k_up(functional.silu(self.k_down(x))))
        v_gate = functional.silu(self.v_up(functional.silu(self.v_down(x))))
        past_k, past_v = earlier[0]["k"], earlier[0]["v"]
        for features in earlier[1:]:
            past_k, past_v = past_k + features["k"], past_v + features["v"]
        return k + k_gate * past_k, self.v_norm(v + v_gate * past_v)

    def reset_parameters(self, init: InitialValues) -> None:
        """Draw the projections."""
        init.draw(self.k_down, self.k_up, self.v_down, self.v_up, self.v_norm)

    def activation_bytes(self, low: int) -> int:
        """Return the bytes per token that are saved for the backward pass; `low` as in `Mixer.activation_bytes`."""
        rank, width = self.k_up.in_features, self.k_up.out_features
        return 4 * low * (rank + width) + self.v_norm.activation_bytes(low)


def _projections(hidden_size: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(hidden_size, rank, bias=False), nn.Linear(rank, hidden_size, bias=False)
