"""Launch the kernels of RMSNorm."""

# a kernel's call takes a grid and compile-time options that its signature does not show
# pyright: reportCallIssue=false, reportIndexIssue=false, reportMissingImports=false

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hgrn2.ops.device import multiprocessors, on_device
from hgrn2.ops.triton.row_norm import norm_backward_kernel, norm_forward_kernel

# elements of a block, so that registers suffice for two or more programs on a multiprocessor
BLOCK_ELEMENTS = 4096
PROGRAMS_PER_MULTIPROCESSOR = 4


def forward(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normalise rows.

    Args:
        x: [M, W], contiguous.
        weight: [W] or None.
        eps: added to the mean square.
        dtype: dtype of the result; sums are float32.

    Returns:
        the result [M, W], and the factor of each row [M], float32, which `backward` needs.
    """
    rows, width = x.shape
    y, factor = x.new_empty(x.shape, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    block_rows, block_width, warps = _block(width)
    with on_device(x.device):
        norm_forward_kernel[(triton.cdiv(rows, block_rows),)](
            x, weight, y, factor, rows, width, eps,
            BR=block_rows, BW=block_width, HAS_WEIGHT=weight is not None, num_warps=warps,
        )  # fmt: skip
    return y, factor


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, factor: Tensor, weight_learns: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and of the weight, in their dtypes; two runs give the same bits.

    Args:
        dy: [M, W], contiguous.
        x: [M, W], contiguous.
        weight: [W] or None.
        factor: [M], from `forward`.
        weight_learns: whether to compute the gradient of the weight.
    """
    rows, width = x.shape
    block_rows, block_width, warps = _block(width)
    blocks = triton.cdiv(rows, block_rows)
    programs = min(blocks, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device))
    dx = torch.empty_like(x)
    sums = x.new_empty((programs, width), dtype=torch.float32) if weight is not None and weight_learns else None
    with on_device(x.device):
        norm_backward_kernel[(programs,)](
            dy, x, weight, factor, dx, sums, rows, width, blocks, programs,
            BR=block_rows, BW=block_width, HAS_WEIGHT=weight is not None, WEIGHT_LEARNS=sums is not None,
            num_warps=warps,
        )  # fmt: skip
    return dx, None if sums is None or weight is None else sums.sum(0).to(weight.dtype)


def _block(width: int) -> tuple[int, int, int]:
    """Return rows, columns and warps of a block."""
    columns = triton.next_power_of_2(width)
    rows = max(1, min(16, BLOCK_ELEMENTS // columns))
    return rows, columns, 4 if rows * columns <= 2048 else 8 if columns <= 8192 else 16
