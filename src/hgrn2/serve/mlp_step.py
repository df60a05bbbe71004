"""The channel mixer of a layer in the decode step."""

from __future__ import annotations

from torch import Tensor, nn

from hgrn2.nn.mlp import GatedMLP
from hgrn2.ops.device import ROW_ALIGNMENT
from hgrn2.serve.mixer_steps import can_join, join_projections
from hgrn2.serve.row_linear import linear_rows, project_rows


class MLPStep:
    """The channel mixer with one product for both branches.

    Args:
        mlp: a `GatedMLP` of plain projections.
    """

    def __init__(self, mlp: GatedMLP):
        self.mlp = mlp
        self.weight, self.bias = join_projections([mlp.gate_proj, mlp.up_proj])

    def __call__(self, x: Tensor) -> Tensor:
        """Mix the channels of rows x [B, D]."""
        gate, up = linear_rows(x, self.weight, self.bias).chunk(2, -1)
        return project_rows(self.mlp.down_proj, self.mlp._activate(gate) * up)


def has_plain_branches(mlp: nn.Module | None) -> bool:
    """Return whether `MLPStep` can compute a channel mixer."""
    if type(mlp) is not GatedMLP or not can_join([mlp.gate_proj, mlp.up_proj]):
        return False
    # the module pads widths that a GPU is slow at
    return not (mlp.gate_proj.weight.is_cuda and mlp.gate_proj.out_features % ROW_ALIGNMENT)
