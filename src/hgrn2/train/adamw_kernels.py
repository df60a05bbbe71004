"""AdamW over all parameters in one launch, with the update of the bfloat16 copies that the model computes with."""

# a kernel's call takes a grid and compile-time options that its signature does not show
# pyright: reportCallIssue=false, reportIndexIssue=false, reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def squares_kernel(grads_p, tensors_p, orders_p, sizes_p, sums_p, IS_LOW: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum of a block's squared gradients. Programs: blocks of all tensors."""
    i_block = tl.program_id(0)
    i_tensor = tl.load(tensors_p + i_block)
    address = tl.load(grads_p + i_tensor)
    total = 0.0
    # a parameter without a gradient
    if address != 0:
        grad_p = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16 if IS_LOW else tl.float32)), 16)
        start, size = tl.load(orders_p + i_block).to(tl.int64) * BLOCK, tl.load(sizes_p + i_tensor)
        places = start + tl.arange(0, BLOCK)
        # without a mask, loads are 16 bytes wide
        if start + BLOCK <= size:
            grad = tl.load(grad_p + places)
        else:
            grad = tl.load(grad_p + places, mask=places < size, other=0.0)
        grad = grad.to(tl.float32)
        total = tl.sum(grad * grad)
    tl.store(sums_p + i_block, total)


@triton.jit
def prepare_kernel(
    sums_p, loss_p, step_p, norm_p, scalars_p, NUM_SUMS, clip_norm, log2_beta1, log2_beta2, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the norm of the gradient and the numbers that `update_kernel` reads. Programs: 1.

    They are: whether to skip the step; the factor that clips the gradient; one minus beta1^step; the root of one minus
    beta2^step. The learning rate after them is the host's. The step is counted unless it is skipped.
    """
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, NUM_SUMS, BLOCK):
        total += tl.load(sums_p + start + lanes, mask=start + lanes < NUM_SUMS, other=0.0)
    norm = tl.sqrt(tl.sum(total))
    loss = tl.load(loss_p)
    is_finite = (tl.abs(loss) < float("inf")) & (norm < float("inf"))
    step = tl.load(step_p) + tl.where(is_finite, 1.0, 0.0)
    factor = 1.0
    if clip_norm > 0:
        factor = tl.minimum(clip_norm / (norm + 1e-6), 1.0)
    tl.store(step_p, step)
    tl.store(norm_p, norm)
    tl.store(scalars_p, tl.where(is_finite, 0.0, 1.0))
    tl.store(scalars_p + 1, factor)
    # float32 would lose the digits of a beta near 1
    tl.store(scalars_p + 2, (1.0 - tl.exp2((step * log2_beta1).to(tl.float64))).to(tl.float32))
    tl.store(scalars_p + 3, tl.sqrt((1.0 - tl.exp2((step * log2_beta2).to(tl.float64))).to(tl.float32)))


@triton.jit
def update_kernel(
    tables_p, grads_p, tensors_p, orders_p, sizes_p, decays_p, scalars_p, beta1, beta2, eps, COUNT,
    IS_LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a block of one parameter and of its moments. Programs: blocks of all tensors.

    `tables_p` holds the addresses of the parameters, their first and second moments and, if IS_LOW, their bfloat16
    copies, COUNT each; `grads_p` those of the gradients, 0 where there is no gradient.
    """
    i_block = tl.program_id(0)
    i_tensor = tl.load(tensors_p + i_block)
    address = tl.load(grads_p + i_tensor)
    is_skipped = tl.load(scalars_p) != 0.0
    if (address != 0) & (not is_skipped):
        grad_p = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16 if IS_LOW else tl.float32)), 16)
        table_p = tables_p + i_tensor
        param_p = tl.multiple_of(tl.load(table_p).to(tl.pointer_type(tl.float32)), 16)
        mean_p = tl.multiple_of(tl.load(table_p + COUNT).to(tl.pointer_type(tl.float32)), 16)
        square_p = tl.multiple_of(tl.load(table_p + 2 * COUNT).to(tl.pointer_type(tl.float32)), 16)
        start, size = tl.load(orders_p + i_block).to(tl.int64) * BLOCK, tl.load(sizes_p + i_tensor)
        places = start + tl.arange(0, BLOCK)
        factor, decay = tl.load(scalars_p + 1), tl.load(decays_p + i_tensor)
        learning_rate, root = tl.load(scalars_p + 4), tl.load(scalars_p + 3)
        step_size = learning_rate / tl.load(scalars_p + 2)
        if start + BLOCK <= size:
            grad = tl.load(grad_p + places)
            param, mean, square = tl.load(param_p + places), tl.load(mean_p + places), tl.load(square_p + places)
        else:
            inside = places < size
            grad = tl.load(grad_p + places, mask=inside, other=0.0)
            param = tl.load(param_p + places, mask=inside, other=0.0)
            mean = tl.load(mean_p + places, mask=inside, other=0.0)
            square = tl.load(square_p + places, mask=inside, other=0.0)
        grad = grad.to(tl.float32) * factor
        param = param * (1.0 - learning_rate * decay)
        mean = mean + (grad - mean) * (1.0 - beta1)
        square = square * beta2 + grad * grad * (1.0 - beta2)
        param = param - step_size * mean / (tl.sqrt(square) / root + eps)
        if start + BLOCK <= size:
            tl.store(param_p + places, param)
            tl.store(mean_p + places, mean)
            tl.store(square_p + places, square)
            if IS_LOW:
                low_p = tl.multiple_of(tl.load(table_p + 3 * COUNT).to(tl.pointer_type(tl.bfloat16)), 16)
                tl.store(low_p + places, param.to(tl.bfloat16))
        else:
            inside = places < size
            tl.store(param_p + places, param, mask=inside)
            tl.store(mean_p + places, mean, mask=inside)
            tl.store(square_p + places, square, mask=inside)
            if IS_LOW:
                low_p = tl.multiple_of(tl.load(table_p + 3 * COUNT).to(tl.pointer_type(tl.bfloat16)), 16)
                tl.store(low_p + places, param.to(tl.bfloat16), mask=inside)
