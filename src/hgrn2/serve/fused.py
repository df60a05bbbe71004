"""The decode step of an HGRN2 layer in few kernels, on a GPU.

A step waits for launches more than for bytes: at batch 1 the weights of the 1.3B model are read in 0.64 ms on an H200,
and every kernel adds one or two microseconds. Up to `MOST_ROWS` rows a layer is five kernels: four products with the
norms, activations and residual sums inside, and the recurrence. Above, products are the library's, and two kernels
join the sums with the norms and the activation with its product: nine a layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from hgrn2.nn.mixers.base import Context, MixerState
from hgrn2.nn.norm import Norm
from hgrn2.ops.triton.installed import triton_runs
from hgrn2.serve.mixer_steps import HGRN2Step, can_join
from hgrn2.serve.mlp_step import MLPStep

# rows above which a library's product is faster than `row_product`
MOST_ROWS = 4
# the widest row that one program normalises
_WIDEST = 8192


class FusedLayer:
    """One layer of HGRN2 with RMSNorms and a gated unit.

    Args:
        layer: a `LayerStep` that `can_fuse` allows.
    """

    def __init__(self, layer: Any):
        self.mix: HGRN2Step = layer.mix
        self.mlp = layer.mlp
        self.context = Context(is_step=True, lower_bound=layer.bound)
        block = layer.block
        self.norm, self.mlp_norm, self.g_norm = (
            norm_values(x) for x in (block.attn_norm, block.mlp_norm, block.attn.g_norm)
        )
        self.o_proj, self.down_proj = block.attn.o_proj, block.mlp.down_proj

    def run_few(self, x: Tensor, state: MixerState) -> Tensor:
        """Run the layer on x [B, D] of at most `MOST_ROWS` rows, the state changed in place."""
        from hgrn2.ops.triton.decode import row_product

        mix, mlp = self.mix, self.mlp
        projected = row_product(x, mix.weight, mix.bias, norm=self.norm)
        y = mix.recur(*mix.split(projected), state["recurrent"], mix.bound(self.context))
        x = row_product(y.flatten(1), self.o_proj.weight, self.o_proj.bias, norm=self.g_norm, residual=x)
        h = row_product(x, mlp.weight, mlp.bias, norm=self.mlp_norm, activation=mlp.mlp.activation)
        return row_product(h, self.down_proj.weight, self.down_proj.bias, residual=x)

    def run_many(
        self, x: Tensor, normed: Tensor, state: MixerState, next_norm: tuple[Tensor | None, float]
    ) -> tuple[Tensor, Tensor]:
        """Run the layer on rows that are already normalised.

        Args:
            x: [B, D].
            normed: [B, D], x after the layer's first norm.
            state: tensors [B, ...], changed in place.
            next_norm: weight and eps of the norm that follows the layer.

        Returns:
            x after the layer, and after the next norm.
        """
        from hgrn2.ops.triton.decode import add_norm, gated

        mix, mlp = self.mix, self.mlp
        q, f, v = mix.project(normed)
        y = mix.finish(mix.recur(q, f, v, state["recurrent"], mix.bound(self.context)))
        x, normed = add_norm(x, y, *self.mlp_norm)
        h = gated(functional.linear(normed, mlp.weight, mlp.bias), mlp.mlp.activation)
        return add_norm(x, self.down_proj(h), *next_norm)


def can_fuse(layer: Any) -> bool:
    """Return whether a `LayerStep` is of the form that `FusedLayer` computes, on a device with its kernels."""
    block, mix, mlp = layer.block, layer.mix, layer.mlp
    if not isinstance(mix, HGRN2Step) or not isinstance(mlp, MLPStep):
        return False
    weight = mix.weight
    norms = (block.attn_norm, block.mlp_norm, block.attn.g_norm)
    simple = all(map(is_rms_norm, norms))
    plain = can_join([block.attn.o_proj]) and can_join([block.mlp.down_proj])
    kernels = triton_runs(weight.dtype) and weight.shape[1] <= _WIDEST and weight.is_cuda
    return simple and plain and kernels and mlp.mlp.activation in ("silu", "sigmoid", "none")


def is_rms_norm(norm: Any) -> bool:
    """Return whether a norm is an RMSNorm of ours."""
    return type(norm) is Norm and norm.kind == "rmsnorm"


def norm_values(norm: Norm) -> tuple[Tensor | None, float]:
    """Return the weight, or None, and the eps of an RMSNorm."""
    return None if norm.weight is None else norm.weight.detach(), norm.eps
