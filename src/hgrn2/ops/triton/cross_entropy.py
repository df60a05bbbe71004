"""Cross entropy of rows of logits, and the gradient of each row written over its logits."""

# a kernel's call takes a grid and compile-time options that its signature does not show
# pyright: reportCallIssue=false, reportIndexIssue=false, reportMissingImports=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hgrn2.ops.device import on_device

BLOCK = 8192
WARPS = 16
# neighbours that one thread holds, twice 16 bytes of a 16-bit type
NEIGHBOURS = 16


@triton.jit
def cross_entropy_kernel(
    logits_p, targets_p, losses_p, VOCAB, WIDTH, stride, IGNORE: tl.constexpr, WRITES: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Write log sum exp(logits) - logits[target], and softmax(logits) - onehot(target). Programs: rows.

    A row is read twice; the second time from the cache, as a rule. Columns from VOCAB to WIDTH are padding, whose
    gradient is 0.
    """
    i_row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_p + i_row)
    row_p = logits_p + i_row * stride
    columns = tl.arange(0, BV // BN)[:, None] * BN + tl.arange(0, BN)[None, :]
    is_counted = target != IGNORE
    # a maximum and a sum for each thread's neighbours: one exponential an element, and one reduction a row
    largest = tl.full((BV // BN,), float("-inf"), tl.float32)
    total = tl.zeros((BV // BN,), tl.float32)
    if is_counted:
        for start in range(0, VOCAB, BV):
            x = tl.load(row_p + start + columns, mask=start + columns < VOCAB, other=float("-inf")).to(tl.float32)
            new_largest = tl.maximum(largest, tl.max(x, axis=1))
            # without a finite value so far it would be inf - inf
            shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
            largest = new_largest
        top = tl.max(largest, axis=0)
        log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
        tl.store(losses_p + i_row, log_sum - tl.load(row_p + target).to(tl.float32))
        if WRITES:
            # the target's logit is read before any program thread overwrites it
            tl.debug_barrier()
            for start in range(0, WIDTH, BV):
                x = tl.load(row_p + start + columns, mask=start + columns < VOCAB, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - log_sum) - tl.where(start + columns == target, 1.0, 0.0)
                inside = start + columns < WIDTH
                tl.store(row_p + start + columns, gradient.to(logits_p.dtype.element_ty), mask=inside)
    else:
        tl.store(losses_p + i_row, 0.0)
        if WRITES:
            for start in range(0, WIDTH, BV):
                zeros = tl.zeros((BV // BN, BN), logits_p.dtype.element_ty)
                tl.store(row_p + start + columns, zeros, mask=start + columns < WIDTH)


def cross_entropy_(logits: Tensor, targets: Tensor, vocab_size: int, ignore: int, writes_gradient: bool) -> Tensor:
    """Cross entropy of each row, computed in float32; the logits' gradient takes the logits' place.

    Args:
        logits: [M, W] with contiguous rows; overwritten if writes_gradient.
        targets: [M] int64, contiguous.
        vocab_size: columns that count, at most W; the rest is padding, whose gradient is 0.
        ignore: the target of rows that do not count: their loss and gradient are 0.
        writes_gradient: whether the logits are overwritten by softmax(logits) - onehot(target).

    Returns:
        [M] float32, nats.
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        block = max(16 * NEIGHBOURS, min(BLOCK, triton.next_power_of_2(logits.shape[1])))
        with on_device(logits.device):
            cross_entropy_kernel[(logits.shape[0],)](
                logits, targets, losses, vocab_size, logits.shape[1], logits.stride(0), IGNORE=ignore,
                WRITES=writes_gradient, BV=block, BN=NEIGHBOURS, num_warps=WARPS,
            )  # fmt: skip
    return losses
