"""The channel mixer: a gated linear unit."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from hgrn2.nn.parameters import InitialValues
from hgrn2.ops.device import ROW_ALIGNMENT
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
        """Mix the channels of x [..., D]."""
        missing = -self.gate_proj.out_features % ROW_ALIGNMENT
        # an adapter or a hook on a projection must be called, not only its weight read
        if missing and x.is_cuda and all(map(_is_plain, (self.gate_proj, self.up_proj, self.down_proj))):
            return self._padded(x, missing)
        return self.down_proj(self._activate(self.gate_proj(x)) * self.up_proj(x))

    def reset_parameters(self, init: InitialValues) -> None:
        """Draw the projections."""
        init.draw(self.gate_proj, self.up_proj)
        init.draw_end(self.down_proj)

    def activation_bytes(self, low: int) -> int:
        """Return the bytes per token saved for the backward pass: both branches, the activated gate and the product.

        Args:
            low: bytes of a number whose precision autocast may lower.
        """
        return low * (3 if self.activation == "none" else 4) * self.gate_proj.out_features

    def _activate(self, gate: Tensor) -> Tensor:
        return functional.gelu(gate) if self.activation == "gelu" else activate(gate, self.activation)

    def _padded(self, x: Tensor, missing: int) -> Tensor:
        """Compute with `missing` more channels in the middle, all of them 0: up is 0 there, and so is the product."""
        gate, up = (
            functional.linear(
                x,
                functional.pad(proj.weight, (0, 0, 0, missing)),
                None if proj.bias is None else functional.pad(proj.bias, (0, missing)),
            )
            for proj in (self.gate_proj, self.up_proj)
        )
        weight = functional.pad(self.down_proj.weight, (0, missing))
        return functional.linear(self._activate(gate) * up, weight, self.down_proj.bias)


def _is_plain(projection: nn.Module) -> bool:
    return type(projection) is nn.Linear and not projection._forward_hooks and not projection._forward_pre_hooks
