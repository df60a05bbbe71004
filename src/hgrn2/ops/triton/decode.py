"""Launch the kernels of the decode step."""

# a kernel's call takes a grid and compile-time options that its signature does not show
# pyright: reportCallIssue=false, reportIndexIssue=false, reportMissingImports=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hgrn2.ops.device import on_device
from hgrn2.ops.triton.row_product import add_norm_kernel, gated_kernel, row_product_kernel

# activations that the kernels have
ACTIVATIONS = ("silu", "sigmoid", "none")


class RowBlock(NamedTuple):
    """Sizes of a program of `row_product`: columns, numbers of a column read at once, and warps."""

    columns: int
    inner: int
    warps: int


def row_block(rows: int, is_gated: bool) -> RowBlock:
    """Return the block of a product.

    Args:
        rows: rows of x, few.
        is_gated: whether there are two sums.
    """
    columns = 8 if rows == 1 and not is_gated else 4
    return RowBlock(columns, 1024 if rows == 1 else 512, 8)


def row_product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: tuple[Tensor | None, float] | None = None,
    residual: Tensor | None = None, activation: str | None = None, block: RowBlock | None = None,
) -> Tensor:  # fmt: skip
    """Multiply few rows by a weight in one kernel, with what comes before and after.

        y = residual + norm(x) W^T + bias, or with an activation act(norm(x) W_1^T + b_1) * (norm(x) W_2^T + b_2)

    Sums are float32; values are rounded where separate operations would round them.

    Args:
        x: [B, K], contiguous, few rows.
        weight: [N, K], contiguous; [2 N, K] with an activation.
        bias: [N] or [2 N], or None.
        norm: weight [K] or None, and eps, of an RMSNorm of x; None for no norm.
        residual: [B, N], contiguous, or None.
        activation: one of `ACTIVATIONS`, for a gated unit; None for a plain product.
        block: sizes of a program; None for those of `row_block`.

    Returns:
        [B, N], in x's dtype.
    """
    rows, inner = x.shape
    columns = weight.shape[0] // (1 if activation is None else 2)
    block = row_block(rows, activation is not None) if block is None else block
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    norm_weight, eps = (None, 0.0) if norm is None else norm
    with on_device(x.device):
        row_product_kernel[(triton.cdiv(columns, block.columns),)](
            x, norm_weight, weight, bias, residual, y, rows, columns, inner, eps,
            BB=triton.next_power_of_2(rows), BN=block.columns, BK=min(block.inner, triton.next_power_of_2(inner)),
            WHOLE=triton.next_power_of_2(inner), HAS_NORM=norm is not None, HAS_NORM_WEIGHT=norm_weight is not None,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, IS_GATED=activation is not None,
            ACTIVATION=activation or "none", num_warps=block.warps,
        )  # fmt: skip
    return y


def add_norm(x: Tensor, y: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + y and its RMSNorm, both [B, D] in x's dtype, for contiguous x and y."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[1]
    with on_device(x.device):
        add_norm_kernel[(x.shape[0],)](
            x, y, weight, total, normed, width, eps, BW=triton.next_power_of_2(width), HAS_WEIGHT=weight is not None,
            num_warps=8,
        )  # fmt: skip
    return total, normed


def gated(branches: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up, [B, I], for contiguous branches [B, 2 I], the gate first."""
    rows, width = branches.shape[0], branches.shape[1] // 2
    y = torch.empty((rows, width), dtype=branches.dtype, device=branches.device)
    block = min(2048, triton.next_power_of_2(width))
    with on_device(branches.device):
        gated_kernel[(rows, triton.cdiv(width, block))](
            branches, y, width, BW=block, ACTIVATION=activation, num_warps=4
        )
    return y
