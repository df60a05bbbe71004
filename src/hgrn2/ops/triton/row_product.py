"""Kernels of the decode step: what lies between its large products, and products of few rows."""

import triton
import triton.language as tl

from hgrn2.ops.backends.triton.chunks import activate


@triton.jit
def row_product_kernel(
    x_p, norm_p, weight_p, bias_p, residual_p, y_p, B, N, K, eps, BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WHOLE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, IS_GATED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Compute y = residual + norm(x) W^T + bias for B rows; gated: act of the first N rows of W times the last N.

    Every program computes the norm's factor again, which reads a row from the cache. Programs: blocks of BN columns.
    """
    rows, columns, inner = tl.arange(0, BB), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    row_inside, column_inside = rows < B, columns < N
    if HAS_NORM:
        whole = tl.arange(0, WHOLE)
        whole_inside = row_inside[:, None] & (whole < K)[None, :]
        row = tl.load(x_p + rows[:, None] * K + whole[None, :], mask=whole_inside, other=0.0).to(tl.float32)
        factor = 1.0 / tl.sqrt_rn(tl.sum(row * row, axis=1) / K + eps)
    total = tl.zeros((BB, BN, BK), tl.float32)
    if IS_GATED:
        up_total = tl.zeros((BB, BN, BK), tl.float32)
    for start in range(0, K, BK):
        places = start + inner
        inside = places < K
        x = tl.load(x_p + rows[:, None] * K + places[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        if HAS_NORM:
            x = x.to(tl.float32) * factor[:, None]
            if HAS_NORM_WEIGHT:
                x = x * tl.load(norm_p + places, mask=inside, other=0.0).to(tl.float32)[None, :]
            # as the norm on its own rounds
            x = x.to(y_p.dtype.element_ty)
        x = x.to(tl.float32)
        w_places = columns[:, None].to(tl.int64) * K + places[None, :]
        w_inside = column_inside[:, None] & inside[None, :]
        w = tl.load(weight_p + w_places, mask=w_inside, other=0.0).to(tl.float32)
        total += x[:, None, :] * w[None, :, :]
        if IS_GATED:
            w = tl.load(weight_p + N.to(tl.int64) * K + w_places, mask=w_inside, other=0.0).to(tl.float32)
            up_total += x[:, None, :] * w[None, :, :]
    y = tl.sum(total, axis=2)
    if HAS_BIAS:
        y += tl.load(bias_p + columns, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    y = y.to(y_p.dtype.element_ty)
    if IS_GATED:
        up = tl.sum(up_total, axis=2)
        if HAS_BIAS:
            up += tl.load(bias_p + N + columns, mask=column_inside, other=0.0).to(tl.float32)[None, :]
        up = up.to(y_p.dtype.element_ty).to(tl.float32)
        y = activate(y.to(tl.float32), ACTIVATION).to(y_p.dtype.element_ty).to(tl.float32) * up
    places = rows[:, None] * N + columns[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    y = y.to(y_p.dtype.element_ty)
    if HAS_RESIDUAL:
        y = y.to(tl.float32) + tl.load(residual_p + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_p + places, y.to(y_p.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_kernel(
    x_p, y_p, weight_p, sum_p, normed_p, WIDTH, eps, BW: tl.constexpr, HAS_WEIGHT: tl.constexpr
):  # fmt: skip
    """Compute x + y and its RMSNorm. Programs: rows."""
    columns = tl.arange(0, BW)
    inside = columns < WIDTH
    places = tl.program_id(0).to(tl.int64) * WIDTH + columns
    x = tl.load(x_p + places, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(y_p + places, mask=inside, other=0.0).to(tl.float32)
    x = x.to(sum_p.dtype.element_ty)
    tl.store(sum_p + places, x, mask=inside)
    x = x.to(tl.float32)
    x = x / tl.sqrt_rn(tl.sum(x * x, axis=0) / WIDTH + eps)
    if HAS_WEIGHT:
        x = x * tl.load(weight_p + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_p + places, x.to(normed_p.dtype.element_ty), mask=inside)


@triton.jit
def gated_kernel(branches_p, y_p, WIDTH, BW: tl.constexpr, ACTIVATION: tl.constexpr):
    """Compute act(gate) * up for rows [gate, up]. Programs: (rows, blocks of columns)."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BW + tl.arange(0, BW)
    inside = columns < WIDTH
    gate = tl.load(branches_p + row * 2 * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(branches_p + row * 2 * WIDTH + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    gate = activate(gate, ACTIVATION).to(y_p.dtype.element_ty).to(tl.float32)
    tl.store(y_p + row * WIDTH + columns, (gate * up).to(y_p.dtype.element_ty), mask=inside)
