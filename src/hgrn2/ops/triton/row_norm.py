"""Kernels of RMSNorm and its gradient: each reads its inputs once and keeps intermediate values on the chip."""

import triton
import triton.language as tl


@triton.jit
def norm_forward_kernel(
    x_p, weight_p, y_p, factor_p, ROWS, WIDTH, eps, BR: tl.constexpr, BW: tl.constexpr, HAS_WEIGHT: tl.constexpr
):  # fmt: skip
    """Compute rows times their factor, 1 / sqrt(mean square + eps), times the weight. Programs: blocks of BR rows."""
    rows, columns = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BW)
    row_inside, column_inside = rows < ROWS, columns < WIDTH
    places = rows[:, None] * WIDTH + columns[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    x = tl.load(x_p + places, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / WIDTH + eps)
    tl.store(factor_p + rows, factor, mask=row_inside)
    y = x * factor[:, None]
    if HAS_WEIGHT:
        y = y * tl.load(weight_p + columns, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y_p + places, y.to(y_p.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    dy_p, x_p, weight_p, factor_p, dx_p, d_weight_p, ROWS, WIDTH, BLOCKS, PROGRAMS, BR: tl.constexpr, BW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, WEIGHT_LEARNS: tl.constexpr,
):  # fmt: skip
    """Compute dx = (g - n mean(g n)) factor and d weight = sum of dy n, with n = x factor and g = dy weight.

    Programs: PROGRAMS, each with every PROGRAMS-th of the BLOCKS blocks of BR rows and a sum of its own.
    """
    i_program = tl.program_id(0)
    columns = tl.arange(0, BW)
    column_inside = columns < WIDTH
    d_weight = tl.zeros((BW,), tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_p + columns, mask=column_inside, other=0.0).to(tl.float32)
    for i_block in range(i_program, BLOCKS, PROGRAMS):
        rows = (i_block * BR + tl.arange(0, BR)).to(tl.int64)
        row_inside = rows < ROWS
        places = rows[:, None] * WIDTH + columns[None, :]
        inside = row_inside[:, None] & column_inside[None, :]
        x = tl.load(x_p + places, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy_p + places, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(factor_p + rows, mask=row_inside, other=0.0)[:, None]
        normed = x * factor
        if WEIGHT_LEARNS:
            d_weight += tl.sum(grad * normed, axis=0)
        if HAS_WEIGHT:
            grad = grad * weight[None, :]
        share = tl.sum(grad * normed, axis=1) / WIDTH
        dx = (grad - normed * share[:, None]) * factor
        tl.store(dx_p + places, dx.to(dx_p.dtype.element_ty), mask=inside)
    if WEIGHT_LEARNS:
        tl.store(d_weight_p + i_program.to(tl.int64) * WIDTH + columns, d_weight, mask=column_inside)
