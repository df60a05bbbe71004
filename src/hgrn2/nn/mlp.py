"""The channel mixer: a gated linear unit."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from hgrn2.ops.gates import activate

GLU_ACTIVATIONS = ("silu", "sigmoid", "gelu", "none")


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)); "silu" is SwiGLU, "none" the bilinear unit.

    Args:
        hidden_size: D.
        intermediate_size: width of the two branches.
        activation: one of `GLU_ACTIVATIONS`.
        bias: whether the projections have biases.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, bias: bool):
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the channels of x [..., D]."""
        gate = self.gate_proj(x)
        gate = functional.gelu(gate) if self.activation == "gelu" else activate(gate, self.activation)
        return self.down_proj(gate * self.up_proj(x))
