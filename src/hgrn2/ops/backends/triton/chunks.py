"""What every chunk kernel does first: find its rows, read and activate them, join their gates.

The method is that of `hgrn2.ops.chunked`, stage by stage: decays are multiplied, never divided, and no logarithm is
taken, so that every score keeps its relative precision for any gate.

Letters in shapes: C = tokens of a chunk, BK and BV = block sizes along K and V.
"""

# jitted functions: annotations name compile-time constants and nothing else

import triton
import triton.language as tl

# smallest decay of a tied gate. Below it nothing of a state is left in any dtype's rounding, and a gradient by the
# decay is a gradient by its logarithm divided by the decay, which therefore must not be 0
SMALLEST_DECAY = tl.constexpr(1e-30)


@triton.constexpr_function
def log2(n):
    """Exponent of a power of two."""
    return n.bit_length() - 1


@triton.jit
def chunk_place(i_chunk, first_chunk_p, sequence_p, cu_seqlens_p, T, NT, C: tl.constexpr, PACKED: tl.constexpr):
    """Where a chunk lies.

    Returns:
        batch index, first row of its sequence, its sequence's length, the chunk's first token counted from there.
    """
    if PACKED:
        i_seq = tl.load(sequence_p + i_chunk)
        start = tl.load(cu_seqlens_p + i_seq).to(tl.int64)
        # whatever the boundaries say, no row beyond the tensor is touched
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
    """Rows of a chunk in the order of time [C], int64, and which of them exist."""
    time = begin + tl.arange(0, C)
    exists = time < length
    if REVERSE:
        return start + length - 1 - time, exists
    return start + time, exists


@triton.jit
def load_rows(p, rows, exists, stride, first, W, BW: tl.constexpr):
    """Reads columns first ... first + BW of the rows of p [T, W] as float32; 0 where there are none. [C, BW]."""
    columns = first + tl.arange(0, BW)
    at = p + rows[:, None] * stride + columns[None, :]
    return tl.load(at, mask=exists[:, None] & (columns < W)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(p, x, rows, exists, stride, first, W, BW: tl.constexpr):
    """Writes x [C, BW] where `load_rows` reads."""
    columns = first + tl.arange(0, BW)
    at = p + rows[:, None] * stride + columns[None, :]
    tl.store(at, x.to(p.dtype.element_ty), mask=exists[:, None] & (columns < W)[None, :])


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), both to the last digits."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    small = small * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu, sigmoid or nothing."""
    if ACTIVATION == "none":
        return x
    positive, _ = sigmoids(x)
    # an infinite x times 0 is not a number; its silu is 0
    return x * positive if ACTIVATION == "silu" else positive


@triton.jit
def activate_backward(grad, x, ACTIVATION: tl.constexpr):
    """Gradient with respect to x of `activate`."""
    if ACTIVATION == "none":
        return grad
    positive, negative = sigmoids(x)
    if ACTIVATION == "silu":
        return grad * positive * (1.0 + x * negative)
    return grad * positive * negative


@triton.jit
def tied_gate(z, bound_p, i_head, first, K, exists, BK: tl.constexpr, HAS_BOUND: tl.constexpr, FLOOR: tl.constexpr):
    """Decay, key and what their gradients need, of pre-activations z [C, BK].

    f = beta + (1 - beta) sigmoid(z), or FLOOR if that is larger; k = (1 - beta) sigmoid(-z) (arXiv 2404.07904, eq. 3
    and 6).

    Returns:
        f, k, sigmoid(z), sigmoid(-z), each [C, BK], and 1 - beta [1, BK]. Where no row is, f = 1 and k = 0.
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
    """1 - exp(x) for x <= 0, to the last digits."""
    # Horner's form of the series; the first term left out is below 2e-9 of the sum
    series = 1.0 + x / 8 * (1.0 + x / 9)
    series = 1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * series))
    series = -x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * series)))
    return tl.where(x > -0.5, series, 1.0 - tl.exp(x))


@triton.jit
def free_gate(log_f):
    """Decay and its complement of log decays [C, BK]; where no row is, 1 and 0 (their log decay is read as 0)."""
    # nothing is divided by this decay, which may be 0
    return tl.exp(log_f), one_minus_exp(log_f)


@triton.jit
def is_late(size, C: tl.constexpr):
    """Of each pair of neighbouring blocks of `size` rows: which rows are in the later one, [C, 1]."""
    return ((tl.arange(0, C) & size) != 0)[:, None]


@triton.jit
def pair_mask(size, C: tl.constexpr):
    """Which rows and columns [C, C] lie in the two different blocks of one pair."""
    i = tl.arange(0, C)
    # two rows of one pair differ in the bit of `size`, and in none above it
    differ = i[:, None] ^ i[None, :]
    return (differ >= size) & (differ < 2 * size)


@triton.jit
def join(prefix, suffix, size, C: tl.constexpr, BK: tl.constexpr):
    """Products of decays within blocks of `size` rows become those within blocks of twice as many.

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
    """Products of decays from the chunk's start through each row, and after each row to the chunk's end."""
    prefix, suffix = f, tl.full([C, BK], 1.0, tl.float32)
    # not unrolled: compilers would keep all levels' numbers at once
    for level in range(log2(C)):
        prefix, suffix = join(prefix, suffix, 1 << level, C, BK)
    return prefix, suffix


@triton.jit
def without_bad(v):
    """Values with 0 for what is not finite, and 1 where that was, else 0.

    A product of matrices would spread such a value to the tokens before it, as 0 times it.
    """
    # not as v - v: where v is a product, compilers fuse it into a difference that is its rounding error
    bad = (tl.abs(v) < float("inf")) == 0
    return tl.where(bad, 0.0, v), bad.to(tl.int32)
