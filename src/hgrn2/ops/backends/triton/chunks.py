"""The first steps of every chunk kernel: find its rows, read and activate them, join their gates.

The method is that of `hgrn2.ops.backends.chunked`, stage by stage: decays are multiplied, never divided, and no
logarithm is taken, so that every score keeps its relative precision for any gate.

Letters in shapes: C = tokens of a chunk, BK and BV = block sizes along K and V.
"""

# jitted functions: annotations name compile-time constants and nothing else

import triton
import triton.language as tl

# smallest decay of a tied gate. A smaller one rounds any state away in every dtype. It must not be 0: the gradient by
# the decay is the gradient by its logarithm divided by the decay
SMALLEST_DECAY = tl.constexpr(1e-30)


@triton.constexpr_function
def log2(n):
    """Return the exponent of a power of two."""
    return n.bit_length() - 1


@triton.jit
def chunk_place(i_chunk, first_chunk_p, sequence_p, cu_seqlens_p, T, NT, C: tl.constexpr, PACKED: tl.constexpr):
    """Locate a chunk.

    Returns:
        batch index, first row of the sequence, length of the sequence, and the chunk's first token in it.
    """
    if PACKED:
        i_seq = tl.load(sequence_p + i_chunk)
        start = tl.load(cu_seqlens_p + i_seq).to(tl.int64)
        # wrong boundaries must not lead beyond the tensor
        start = tl.minimum(tl.maximum(start, 0), T)
        stop = tl.minimum(tl.maximum(tl.load(cu_seqlens_p + i_seq + 1).to(tl.int64), start), T)
        begin = (i_chunk - tl.load(first_chunk_p + i_seq)) * C
        i_batch = i_seq * 0
        length = stop - start
    else:
        i_batch = i_chunk // NT
        begin = (i_chunk % NT) * C
        start = tl.cast(0, tl.int64)
        length = tl.cast(T, tl.int64)
    return i_batch, start, length, begin


@triton.jit
def chunk_rows(start, length, begin, C: tl.constexpr, REVERSE: tl.constexpr):
    """Return the rows of a chunk in the order of time [C], int64, and a mask of those that exist."""
    time = begin + tl.arange(0, C)
    exists = time < length
    if REVERSE:
        return start + length - 1 - time, exists
    return start + time, exists


@triton.jit
def load_rows(p, rows, exists, stride, first, W, BW: tl.constexpr):
    """Read columns first ... first + BW of the rows of p [T, W] as float32 [C, BW]; 0 outside the tensor."""
    columns = first + tl.arange(0, BW)
    at = p + rows[:, None] * stride + columns[None, :]
    return tl.load(at, mask=exists[:, None] & (columns < W)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(p, x, rows, exists, stride, first, W, BW: tl.constexpr):
    """Write x [C, BW] where `load_rows` reads."""
    columns = first + tl.arange(0, BW)
    at = p + rows[:, None] * stride + columns[None, :]
    tl.store(at, x.to(p.dtype.element_ty), mask=exists[:, None] & (columns < W)[None, :])


@triton.jit
def sigmoids(x):
    """Return sigmoid(x) and sigmoid(-x), both to full precision."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    small = small * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply silu, sigmoid or nothing."""
    if ACTIVATION == "none":
        return x
    positive, _ = sigmoids(x)
    # an infinite x times 0 is not a number; its silu is 0
    return x * positive if ACTIVATION == "silu" else positive


@triton.jit
def activate_backward(grad, x, ACTIVATION: tl.constexpr):
    """Return the gradient with respect to x of `activate`."""
    if ACTIVATION == "none":
        return grad
    positive, negative = sigmoids(x)
    if ACTIVATION == "silu":
        return grad * positive * (1.0 + x * negative)
    return grad * positive * negative


@triton.jit
def tied_gate(z, bound_p, i_head, first, K, exists, BK: tl.constexpr, HAS_BOUND: tl.constexpr, FLOOR: tl.constexpr):
    """Return decay, key and the values their gradients need, for pre-activations z [C, BK].

    f = beta + (1 - beta) sigmoid(z), or FLOOR if that is larger; k = (1 - beta) sigmoid(-z) (arXiv 2404.07904, eq. 3
    and 6).

    Returns:
        f, k, sigmoid(z), sigmoid(-z), each [C, BK], and 1 - beta [1, BK]. Where there is no row, f = 1 and k = 0.
    """
    positive, negative = sigmoids(z)
    columns = first + tl.arange(0, BK)
    if HAS_BOUND:
        beta = tl.load(bound_p + i_head * K + columns, mask=columns < K, other=0.0)[None, :]
        free = 1.0 - beta
        f = beta + free * positive
        k = free * negative
    else:
        free = tl.full([1, BK], 1.0, tl.float32)
        f = positive
        k = negative
    smallest: tl.constexpr = FLOOR if FLOOR > SMALLEST_DECAY else SMALLEST_DECAY
    f = tl.where(exists[:, None], tl.maximum(f, smallest, propagate_nan=tl.PropagateNan.ALL), 1.0)
    # padded channels too must add nothing to scores
    return f, tl.where(exists[:, None] & (columns < K)[None, :], k, 0.0), positive, negative, free


@triton.jit
def one_minus_exp(x):
    """Return 1 - exp(x) for x <= 0, to full precision."""
    # Horner's form of the series; the first term left out is below 2e-9 of the sum
    series = 1.0 + x / 8 * (1.0 + x / 9)
    series = 1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * series))
    series = -x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * series)))
    return tl.where(x > -0.5, series, 1.0 - tl.exp(x))


@triton.jit
def free_gate(log_f):
    """Return decay and complement of log decays [C, BK]; 1 and 0 where there is no row (a log decay of 0 is read)."""
    # nothing is divided by this decay, which may be 0
    return tl.exp(log_f), one_minus_exp(log_f)


@triton.jit
def is_late(size, C: tl.constexpr):
    """Return a mask [C, 1] of the rows in the later of each pair of neighbouring blocks of `size` rows."""
    return ((tl.arange(0, C) & size) != 0)[:, None]


@triton.jit
def pair_mask(size, C: tl.constexpr):
    """Return a mask [C, C] of rows and columns that lie in different blocks of one pair."""
    i = tl.arange(0, C)
    # two rows of one pair differ in the bit of `size`, and in none above it
    differ = i[:, None] ^ i[None, :]
    return (differ >= size) & (differ < 2 * size)


@triton.jit
def join(prefix, suffix, size, C: tl.constexpr, BK: tl.constexpr):
    """Turn products of decays within blocks of `size` rows into those within blocks of twice as many.

    Args:
        prefix: [C, BK], product from the block's first row through this one.
        suffix: [C, BK], product after this row to the block's end.
    """
    i = tl.arange(0, C)
    late = (i & size) != 0
    first = i & -(2 * size)
    # the last row of the other block of the pair holds its whole decay
    other = tl.where(late, first + size - 1, first + 2 * size - 1)
    decay = tl.gather(prefix, tl.broadcast_to(other[:, None], (C, BK)), 0)
    return tl.where(late[:, None], prefix * decay, prefix), tl.where(late[:, None], suffix, suffix * decay)


@triton.jit
def join_all(f, C: tl.constexpr, BK: tl.constexpr):
    """Return products of decays from the chunk's start through each row, and after each row to the chunk's end."""
    prefix, suffix = f, tl.full([C, BK], 1.0, tl.float32)
    # not unrolled: the compiler would keep the values of all levels in registers
    for level in range(log2(C)):
        prefix, suffix = join(prefix, suffix, 1 << level, C, BK)
    return prefix, suffix


@triton.jit
def without_bad(v):
    """Return values with 0 in place of non-finite ones, and a mask, 1 where they were.

    A matrix product would spread a non-finite value to earlier tokens, as 0 times it.
    """
    # not as v - v: where v is a product, the compiler fuses that into its rounding error
    bad = (tl.abs(v) < float("inf")) == 0
    return tl.where(bad, 0.0, v), bad.to(tl.int32)
