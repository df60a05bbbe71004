"""Kernels of h_t = a_t h_{t-1} + b_t and its gradient, for real and complex numbers; docs/kernels.md describes them.

Sequences are cut into segments of SEGMENT tokens, which run side by side; usually one segment is a whole sequence.
Otherwise, a first launch with SUMMARY computes the product of the decays of each segment and its last state from
zeros, `carry_kernel` turns these into the states before the segments, and a second launch computes every token.
Positions i inside a segment follow the direction of the scan. Complex numbers are pairs of real ones in memory, and
strides count real numbers. Real numbers have an imaginary part that no operation reads.
"""

import triton
import triton.language as tl


@triton.jit
def _join(a, b, next_a, next_b):
    return a * next_a, next_a * b + next_b


@triton.jit
def _join_complex(a_re, a_im, b_re, b_im, c_re, c_im, d_re, d_im):
    return (
        a_re * c_re - a_im * c_im,
        a_re * c_im + a_im * c_re,
        c_re * b_re - c_im * b_im + d_re,
        c_re * b_im + c_im * b_re + d_im,
    )


@triton.jit
def _multiply(a_re, a_im, b_re, b_im, COMPLEX: tl.constexpr):
    re, im = a_re * b_re, a_im
    if COMPLEX:
        re, im = re - a_im * b_im, a_re * b_im + a_im * b_re
    return re, im


@triton.jit
def _scan(a_re, a_im, b_re, b_im, COMPLEX: tl.constexpr, FROM_END: tl.constexpr):
    """Join the steps (a, b) from the first to each, or from the last."""
    if COMPLEX:
        a_re, a_im, b_re, b_im = tl.associative_scan((a_re, a_im, b_re, b_im), 0, _join_complex, reverse=FROM_END)
    else:
        a_re, b_re = tl.associative_scan((a_re, b_re), 0, _join, reverse=FROM_END)
    return a_re, a_im, b_re, b_im


@triton.jit
def _load(p, places, inside, COMPLEX: tl.constexpr):
    re = tl.load(p + places, mask=inside, other=0.0).to(tl.float32)
    im = re
    if COMPLEX:
        im = tl.load(p + places + 1, mask=inside, other=0.0).to(tl.float32)
    return re, im


@triton.jit
def _store(p, places, inside, re, im, COMPLEX: tl.constexpr):
    tl.store(p + places, re.to(p.dtype.element_ty), mask=inside)
    if COMPLEX:
        tl.store(p + places + 1, im.to(p.dtype.element_ty), mask=inside)


@triton.jit
def _load_decays(a_p, places, inside, turn_re, turn_im, A_COMPLEX: tl.constexpr, TURNED: tl.constexpr):
    """Load decays, 1 where nothing is inside; TURNED ones are real numbers times a rotation of each channel."""
    re, im = _load(a_p, places, inside, A_COMPLEX)
    if TURNED:
        im = re * turn_im
        re = re * turn_re
    elif not A_COMPLEX:
        im = tl.zeros_like(re)
    return tl.where(inside, re, 1.0), tl.where(inside, im, 0.0)


@triton.jit
def _row(x, is_row):
    return tl.sum(tl.where(is_row[:, None], x, 0.0), axis=0)


@triton.jit
def _segment(i_segment, cu_p, sequence_p, first_p, LENGTH, SEGMENT, SEGMENTS, PACKED: tl.constexpr):
    """Return the row of the batch, and the first and the end of tokens of a sequence and of a segment of it."""
    if PACKED:
        row = i_segment * 0
        i_sequence = tl.load(sequence_p + i_segment)
        i_part = i_segment - tl.load(first_p + i_sequence)
        # wrong boundaries must not lead beyond the inputs
        begin = tl.minimum(tl.maximum(tl.load(cu_p + i_sequence).to(tl.int64), 0), LENGTH)
        end = tl.minimum(tl.maximum(tl.load(cu_p + i_sequence + 1).to(tl.int64), 0), LENGTH)
    else:
        row = i_segment // SEGMENTS
        i_part = i_segment % SEGMENTS
        begin = row * 0
        end = begin + LENGTH
    start = begin + i_part.to(tl.int64) * SEGMENT
    return row, begin, end, start, tl.minimum(start + SEGMENT, end)


@triton.jit
def scan_kernel(
    a_p, b_p, turn_p, before_p, h_p, after_p, product_p, cu_p, sequence_p, first_p,
    A_B, A_T, A_D, B_B, B_T, B_D, LENGTH, WIDTH, SEGMENT, SEGMENTS,
    BT: tl.constexpr, BD: tl.constexpr, COMPLEX: tl.constexpr, A_COMPLEX: tl.constexpr, TURNED: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr,
    SUMMARY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute h of every token or, with SUMMARY, the product of the decays and the last state of each segment.

    Programs: (segments, blocks of BD channels). h, states and products are contiguous.
    """
    i_segment = tl.program_id(0).to(tl.int64)
    row, _, _, start, stop = _segment(i_segment, cu_p, sequence_p, first_p, LENGTH, SEGMENT, SEGMENTS, PACKED)
    count = tl.maximum(stop - start, 0).to(tl.int32)
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    there = columns < WIDTH
    turn_re, turn_im = tl.zeros((1, BD), tl.float32), tl.zeros((1, BD), tl.float32)
    if TURNED:
        turn_re = tl.load(turn_p + 2 * columns, mask=there, other=1.0)[None, :]
        turn_im = tl.load(turn_p + 2 * columns + 1, mask=there, other=0.0)[None, :]
    state_places = (i_segment * WIDTH + columns) * PARTS
    h_re, h_im = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if HAS_BEFORE:
        h_re, h_im = _load(before_p, state_places, there, COMPLEX)
    p_re, p_im = tl.full((BD,), 1.0, tl.float32), tl.zeros((BD,), tl.float32)
    offsets = tl.arange(0, BT)
    is_last = offsets == BT - 1
    for i in tl.range(0, count, BT, num_stages=STAGES):
        inside = (i + offsets < count)[:, None] & there[None, :]
        tokens = start + i + offsets
        if REVERSE:
            tokens = stop - 1 - i - offsets
        a_places = row * A_B + tokens[:, None] * A_T + columns[None, :] * A_D
        a_re, a_im = _load_decays(a_p, a_places, inside, turn_re, turn_im, A_COMPLEX, TURNED)
        b_re, b_im = _load(b_p, row * B_B + tokens[:, None] * B_T + columns[None, :] * B_D, inside, COMPLEX)
        a_re, a_im, b_re, b_im = _scan(a_re, a_im, b_re, b_im, COMPLEX, False)
        s_re, s_im = _multiply(a_re, a_im, h_re[None, :], h_im[None, :], COMPLEX)
        s_re += b_re
        s_im += b_im
        h_re = _row(s_re, is_last)
        if COMPLEX:
            h_im = _row(s_im, is_last)
        if SUMMARY:
            p_re, p_im = _multiply(p_re, p_im, _row(a_re, is_last), _row(a_im, is_last), COMPLEX)
        else:
            places = ((row * LENGTH + tokens[:, None]) * WIDTH + columns[None, :]) * PARTS
            _store(h_p, places, inside, s_re, s_im, COMPLEX)
    if HAS_AFTER:
        _store(after_p, state_places, there, h_re, h_im, COMPLEX)
    if SUMMARY:
        _store(product_p, state_places, there, p_re, p_im, COMPLEX)


@triton.jit
def gradient_kernel(
    a_p, h_p, dh_p, turn_p, initial_p, after_p, da_p, db_p, d_turn_p, before_p, product_p, cu_p, sequence_p, first_p,
    A_B, A_T, A_D, G_B, G_T, G_D, LENGTH, WIDTH, SEGMENT, SEGMENTS,
    BT: tl.constexpr, BD: tl.constexpr, COMPLEX: tl.constexpr, A_COMPLEX: tl.constexpr, TURNED: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, HAS_AFTER: tl.constexpr, HAS_INITIAL: tl.constexpr,
    SUMMARY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute db_t = dh_t + conj(a_{t+1}) db_{t+1} and da_t = db_t conj(h_{t-1}), from the last token to the first.

    after_p has the gradient of the state after each segment, before_p gets that of the state before it. With SUMMARY,
    before_p and product_p get what `carry_kernel` needs. d_turn_p gets the gradient of the rotation from each segment.
    Programs: (segments, blocks of BD channels).
    """
    i_segment = tl.program_id(0).to(tl.int64)
    row, begin, end, start, stop = _segment(i_segment, cu_p, sequence_p, first_p, LENGTH, SEGMENT, SEGMENTS, PACKED)
    count = tl.maximum(stop - start, 0).to(tl.int32)
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    A_PARTS: tl.constexpr = 2 if A_COMPLEX else 1
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    there = columns < WIDTH
    turn_re, turn_im = tl.zeros((1, BD), tl.float32), tl.zeros((1, BD), tl.float32)
    if TURNED:
        turn_re = tl.load(turn_p + 2 * columns, mask=there, other=1.0)[None, :]
        turn_im = tl.load(turn_p + 2 * columns + 1, mask=there, other=0.0)[None, :]
    state_places = (i_segment * WIDTH + columns) * PARTS
    g_re, g_im = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if HAS_AFTER:
        g_re, g_im = _load(after_p, state_places, there, COMPLEX)
    first_re, first_im = tl.zeros((1, BD), tl.float32), tl.zeros((1, BD), tl.float32)
    if HAS_INITIAL:
        i_sequence = row
        if PACKED:
            i_sequence = tl.load(sequence_p + i_segment).to(tl.int64)
        first_re, first_im = _load(
            initial_p, ((i_sequence * WIDTH + columns) * PARTS)[None, :], there[None, :], COMPLEX
        )
    p_re, p_im = tl.full((BD,), 1.0, tl.float32), tl.zeros((BD,), tl.float32)
    d_turn_re, d_turn_im = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    offsets = tl.arange(0, BT)
    is_top = offsets == 0
    for back in tl.range(0, count, BT, num_stages=STAGES):
        # the last block is the one that may be partial
        i = (count - 1 - back) // BT * BT
        at = i + offsets
        inside = (at < count)[:, None] & there[None, :]
        before_last = (at + 1 < count)[:, None] & there[None, :]
        tokens = start + at
        after, before, is_first = tokens + 1, tokens - 1, tokens == begin
        if REVERSE:
            tokens = stop - 1 - at
            after, before, is_first = tokens - 1, tokens + 1, tokens == end - 1
        g_places = row * G_B + tokens[:, None] * G_T + columns[None, :] * G_D
        a_places = row * A_B + after[:, None] * A_T + columns[None, :] * A_D
        a_re, a_im = _load_decays(a_p, a_places, before_last, turn_re, turn_im, A_COMPLEX, TURNED)
        d_re, d_im = _load(dh_p, g_places, inside, COMPLEX)
        a_re, a_im, d_re, d_im = _scan(a_re, -a_im, d_re, d_im, COMPLEX, True)
        s_re, s_im = _multiply(a_re, a_im, g_re[None, :], g_im[None, :], COMPLEX)
        s_re += d_re
        s_im += d_im
        g_re = _row(s_re, is_top)
        if COMPLEX:
            g_im = _row(s_im, is_top)
        if SUMMARY:
            p_re, p_im = _multiply(p_re, p_im, _row(a_re, is_top), _row(a_im, is_top), COMPLEX)
        else:
            places = (row * LENGTH + tokens[:, None]) * WIDTH + columns[None, :]
            _store(db_p, places * PARTS, inside, s_re, s_im, COMPLEX)
            h_places = ((row * LENGTH + before[:, None]) * WIDTH + columns[None, :]) * PARTS
            h_re, h_im = _load(h_p, h_places, inside & ~is_first[:, None], COMPLEX)
            h_re = tl.where(is_first[:, None], first_re, h_re)
            if COMPLEX:
                h_im = tl.where(is_first[:, None], first_im, h_im)
            s_re, s_im = _multiply(s_re, s_im, h_re, -h_im, COMPLEX)
            if TURNED:
                a_places = row * A_B + tokens[:, None] * A_T + columns[None, :] * A_D
                size = tl.load(a_p + a_places, mask=inside, other=0.0).to(tl.float32)
                d_turn_re += tl.sum(size * s_re, axis=0)
                d_turn_im += tl.sum(size * s_im, axis=0)
                s_re = turn_re * s_re + turn_im * s_im
            _store(da_p, places * A_PARTS, inside, s_re, s_im, A_COMPLEX)
    # through the first decay, to the state before the segment
    token = start
    if REVERSE:
        token = stop - 1
    inside = there & (count > 0)
    a_places = (row * A_B + token * A_T + columns * A_D)[None, :]
    a_re, a_im = _load_decays(a_p, a_places, inside[None, :], turn_re, turn_im, A_COMPLEX, TURNED)
    a_re, a_im = tl.sum(a_re, axis=0), -tl.sum(a_im, axis=0)
    g_re, g_im = _multiply(a_re, a_im, g_re, g_im, COMPLEX)
    _store(before_p, state_places, there, g_re, g_im, COMPLEX)
    if SUMMARY:
        p_re, p_im = _multiply(a_re, a_im, p_re, p_im, COMPLEX)
        _store(product_p, state_places, there, p_re, p_im, COMPLEX)
    elif TURNED:
        _store(d_turn_p, state_places, there, d_turn_re, d_turn_im, True)


@triton.jit
def carry_kernel(
    product_p, state_p, initial_p, final_p, first_p, WIDTH, SEGMENTS,
    BD: tl.constexpr, COMPLEX: tl.constexpr, PACKED: tl.constexpr, FROM_END: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Replace the last state of each segment, computed from zeros, by the state before it.

    Programs: (sequences, blocks of BD channels). FROM_END: the last segment comes first.
    """
    i_sequence = tl.program_id(0).to(tl.int64)
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    there = columns < WIDTH
    first, count = i_sequence * SEGMENTS, SEGMENTS
    if PACKED:
        first = tl.load(first_p + i_sequence).to(tl.int64)
        count = (tl.load(first_p + i_sequence + 1) - first).to(tl.int32)
    places = (i_sequence * WIDTH + columns) * PARTS
    h_re, h_im = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if HAS_INITIAL:
        h_re, h_im = _load(initial_p, places, there, COMPLEX)
    for i in range(count):
        at = first + i
        if FROM_END:
            at = first + count - 1 - i
        at = (at * WIDTH + columns) * PARTS
        a_re, a_im = _load(product_p, at, there, COMPLEX)
        b_re, b_im = _load(state_p, at, there, COMPLEX)
        _store(state_p, at, there, h_re, h_im, COMPLEX)
        h_re, h_im = _multiply(a_re, a_im, h_re, h_im, COMPLEX)
        h_re += b_re
        h_im += b_im
    _store(final_p, places, there, h_re, h_im, COMPLEX)
