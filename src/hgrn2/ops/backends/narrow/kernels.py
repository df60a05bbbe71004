"""Kernels of the recurrence for heads of at most 16 channels, which go from token to token in registers.

A program is one warp. It runs along a segment of a sequence for BH heads, BT tokens at a time, as tiles
[BT, BV, BH, BK]: lanes lie along K, then heads, then V; tokens and the rest of V lie inside a lane. So each gate is
computed once, and sums over V stay mostly inside a lane. Everything is float32, without matrix units.

Within a block a state is L_t + D_t S, with S the state before the block, L_t what the block has written and D_t the
product of its decays. The complement of D_t is a sum of non-negative numbers. Where it is below one half it replaces
the product, so that gates close to 1 keep their digits and S is rounded once a block.

A token is picked from a tile by a sum with -0.0 for the others. Adding -0.0 changes nothing, which the compiler knows:
the sum is a choice of registers.

Lanes stay where they are as long as every tile has its axes in the same order. For a load or store the compiler would
choose the order by what is contiguous in memory, and exchange lanes for every token. `max_contiguous` states an order,
the last axis first, and not a fact: it must never become a vector. So along the last axis either it is true, as for
gates and kept states, or a stride is an argument whose divisibility the compiler does not know (OPAQUE). COLUMN is 1.

Letters in shapes: BT = tokens of a block; BH, BK, BV = heads, gate channels and value channels of a program.
"""

import triton
import triton.language as tl

from hgrn2.ops.backends.triton.chunks import activate, activate_backward, one_minus_exp, sigmoids

# lengths, which vary; and what the hints of contiguity rest on (see above)
OPAQUE = ["T", "SEGMENT", "SEGMENTS", "COLUMN", "V", "v_batch", "v_row", "v_head"]


@triton.jit
def _segment(
    i_segment, first_p, sequence_p, cu_p, T, SEGMENT, SEGMENTS, BT: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Locate a segment.

    Returns:
        batch index, first row and length of the sequence, the segment's first token in it, its number of tokens, and
        the place of the sequence's first kept state.
    """
    if PACKED:
        i_sequence = tl.load(sequence_p + i_segment).to(tl.int64)
        i_batch = i_sequence * 0
        part = i_segment - tl.load(first_p + i_sequence)
        # wrong boundaries must not lead beyond the inputs
        start = tl.minimum(tl.maximum(tl.load(cu_p + i_sequence).to(tl.int64), 0), T)
        stop = tl.minimum(tl.maximum(tl.load(cu_p + i_sequence + 1).to(tl.int64), start), T)
        length = (stop - start).to(tl.int32)
        block = start // BT + i_sequence
    else:
        i_batch = i_segment // SEGMENTS
        part = i_segment % SEGMENTS
        start = i_batch * 0
        length = (start + T).to(tl.int32)
        block = i_batch * tl.cdiv(T, BT)
    begin = (part * SEGMENT).to(tl.int32)
    return i_batch, start, length, begin, tl.minimum(length - begin, SEGMENT), block


@triton.jit
def _channels(HEADS, K, V, BH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Return heads [BH], columns [BK] and [BV], and masks [1, BH, BK], [1, BV, BH] and [1, BV, BH, BK]."""
    heads = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH)
    k_columns, v_columns = tl.arange(0, BK), tl.arange(0, BV)
    gates = (heads < HEADS)[None, :, None] & (k_columns < K)[None, None, :]
    values = (v_columns < V)[None, :, None] & (heads < HEADS)[None, None, :]
    return heads, k_columns, v_columns, gates, values, gates[:, None, :, :] & values[:, :, :, None]


@triton.jit
def _tokens(start, length, first, count, BT: tl.constexpr, REVERSE: tl.constexpr):
    """Return the rows [BT] of a block in the order of time, and a mask of those that exist."""
    offsets = tl.arange(0, BT)
    if REVERSE:
        return start + (length - 1 - first) - offsets, offsets < count
    return start + first + offsets, offsets < count


@triton.jit
def _load_gates(p, i_batch, rows, heads, columns, batch, row, head, inside):
    """Read [BT, BH, BK] as float32; 0 outside."""
    places = i_batch * batch + rows[:, None, None] * row + heads[None, :, None] * head + columns[None, None, :]
    return tl.load(tl.max_contiguous(p + places, (1, 2, 4)), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_values(p, i_batch, rows, heads, columns, batch, row, head, inside):
    """Read [BT, BV, BH] as float32; 0 outside."""
    places = i_batch * batch + rows[:, None, None] * row + heads[None, None, :] * head + columns[None, :, None]
    return tl.load(tl.max_contiguous(p + places, (1, 2, 4)), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_bound(bound_p, heads, k_columns, K, gates, HAS_BOUND: tl.constexpr):
    """Return the lower bounds [1, BH, BK]; zeros if there are none."""
    bound = tl.zeros(gates.shape, tl.float32)
    if HAS_BOUND:
        bound = tl.load(bound_p + heads[None, :, None] * K + k_columns[None, None, :], mask=gates, other=0.0)
    return bound


@triton.jit
def _gate(z, bound, inside, TIED: tl.constexpr, FLOOR: tl.constexpr, FLOOR_LOST: tl.constexpr):
    """Return decay, complement and tied key [BT, BH, BK]; 1, 0 and 0 outside.

    With TIED, z is the pre-activation: f = beta + (1 - beta) sigmoid(z), or FLOOR if that is larger, and
    k = (1 - beta) sigmoid(-z) (arXiv 2404.07904, eq. 3 and 6). Otherwise it is the log decay, and the key is not used.
    """
    if TIED:
        positive, negative = sigmoids(z)
        f = tl.where(inside, bound + (1.0 - bound) * positive, 1.0)
        k = tl.where(inside, (1.0 - bound) * negative, 0.0)
        c = k
        if FLOOR > 0:
            f = tl.maximum(f, FLOOR, propagate_nan=tl.PropagateNan.ALL)
            c = tl.minimum(k, FLOOR_LOST)
    else:
        # the log decay read outside is 0
        f, c = tl.exp(z), one_minus_exp(z)
        k = c
    return f, c, k


@triton.jit
def _carry(h, product, lost, local):
    """Return the state after a block from the one before it."""
    # the complement first: a state that hardly decays is not rounded in a product with a number near 1
    return tl.where(lost < 0.5, h - lost * h, product * h) + local


@triton.jit
def _walk(h, f, c, write, BT: tl.constexpr):
    """Run S_t = f_t S_{t-1} + write_t through a block.

    Args:
        h: state before the block [1, BV, BH, BK].
        f: decays [BT, BV, BH, BK], like c, their complements, and write.

    Returns:
        the states before and after each token [BT, BV, BH, BK]; product of all decays, its complement, and what the
        block has written by its end [1, BV, BH, BK].
    """
    offsets = tl.arange(0, BT)[:, None, None, None]
    local, lost = tl.zeros_like(h), tl.zeros_like(h)
    product, state = lost + 1.0, h
    before, after = tl.zeros_like(f), tl.zeros_like(f)
    for t in tl.static_range(BT):
        is_token = offsets == t
        before = tl.where(is_token, state, before)
        decay = tl.sum(tl.where(is_token, f, -0.0), axis=0, keep_dims=True)
        local = decay * local + tl.sum(tl.where(is_token, write, -0.0), axis=0, keep_dims=True)
        lost += product * tl.sum(tl.where(is_token, c, -0.0), axis=0, keep_dims=True)
        product *= decay
        state = local + tl.where(lost < 0.5, 1.0 - lost, product) * h
        after = tl.where(is_token, state, after)
    return before, after, product, lost, local


@triton.jit
def _walk_back(g, f, c, write, BT: tl.constexpr):
    """Run G_t = write_t + f_{t+1} G_{t+1} through a block, from its last token to its first.

    Args:
        g: gradient of the state after the block that later blocks give, f_{t+1} G_{t+1}, [1, BV, BH, BK].
        f: decays [BT, BV, BH, BK], like c, their complements, and write.

    Returns:
        G [BT, BV, BH, BK]; product of all decays, its complement, and what the block gives to the state before it
        [1, BV, BH, BK].
    """
    offsets = tl.arange(0, BT)[:, None, None, None]
    local, lost = tl.zeros_like(g), tl.zeros_like(g)
    product = lost + 1.0
    total = tl.zeros_like(f)
    for back in tl.static_range(BT):
        is_token = offsets == BT - 1 - back
        local += tl.sum(tl.where(is_token, write, -0.0), axis=0, keep_dims=True)
        total = tl.where(is_token, local + tl.where(lost < 0.5, 1.0 - lost, product) * g, total)
        decay = tl.sum(tl.where(is_token, f, -0.0), axis=0, keep_dims=True)
        local *= decay
        lost += product * tl.sum(tl.where(is_token, c, -0.0), axis=0, keep_dims=True)
        product *= decay
    return total, product, lost, local


@triton.jit(do_not_specialize=OPAQUE)
def summary_kernel(
    q_p, f_p, k_p, v_p, bound_p, update_p, decay_p, first_p, sequence_p, cu_p,
    q_batch, q_row, q_head, f_batch, f_row, f_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    T, SEGMENT, SEGMENTS, COLUMN, HEADS, K, V, scale,
    BT: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TIED: tl.constexpr,
    HAS_BOUND: tl.constexpr, FLOOR: tl.constexpr, FLOOR_LOST: tl.constexpr, Q_ACTIVATION: tl.constexpr,
    V_ACTIVATION: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, OF_QUERIES: tl.constexpr,
):  # fmt: skip
    """Compute what each segment adds to the state after it [segments, HEADS, K, V], and its decay.

    OF_QUERIES: what the outputs' gradients, passed as v, add to the gradient of the state before it. The decay and its
    complement are [segments, HEADS, 2, K]. Programs: (segments, blocks of heads).
    """
    i_segment = tl.program_id(0).to(tl.int64)
    i_batch, start, length, begin, count, _block = _segment(
        i_segment, first_p, sequence_p, cu_p, T, SEGMENT, SEGMENTS, BT, PACKED
    )
    heads, k_columns, v_columns, gates, values, pairs = _channels(HEADS, K, V, BH, BK, BV)
    bound = _load_bound(bound_p, heads, k_columns, K, gates, HAS_BOUND)
    h = tl.zeros((1, BV, BH, BK), tl.float32)
    all_lost = tl.zeros((1, BV, BH, BK), tl.float32)
    whole = all_lost + 1.0
    for i in range(0, count, BT):
        first = i
        if OF_QUERIES:
            # the last block is the one that may be partial
            first = (count - 1 - i) // BT * BT
        rows, valid = _tokens(start, length, begin + first, count - first, BT, REVERSE)
        inside, inside_values = valid[:, None, None] & gates, valid[:, None, None] & values
        z = _load_gates(f_p, i_batch, rows, heads, k_columns, f_batch, f_row, f_head, inside)
        v = _load_values(v_p, i_batch, rows, heads, v_columns, v_batch, v_row, v_head, inside_values)
        f, c, k = _gate(z, bound, inside, TIED, FLOOR, FLOOR_LOST)
        if OF_QUERIES:
            k = _load_gates(q_p, i_batch, rows, heads, k_columns, q_batch, q_row, q_head, inside)
            k = tl.where(inside, activate(k, Q_ACTIVATION) * scale, 0.0)
        else:
            v = activate(v, V_ACTIVATION)
            if not TIED:
                k = _load_gates(k_p, i_batch, rows, heads, k_columns, k_batch, k_row, k_head, inside)
        f = tl.broadcast_to(f[:, None, :, :], (BT, BV, BH, BK))
        c = tl.broadcast_to(c[:, None, :, :], (BT, BV, BH, BK))
        write = k[:, None, :, :] * v[:, :, :, None]
        if OF_QUERIES:
            _, product, lost, local = _walk_back(h, f, c, write, BT)
        else:
            _, _, product, lost, local = _walk(h, f, c, write, BT)
        h = _carry(h, product, lost, local)
        all_lost += whole * lost
        whole *= product
    if count > 0:
        at = (i_segment * HEADS + heads)[None, None, :, None] * K
        columns = k_columns[None, None, None, :]
        tl.store(update_p + (at + columns) * V + v_columns[None, :, None, None] * COLUMN, h, mask=pairs)
        # all value channels have the same decay, so the first one's is stored
        first_v = v_columns[None, :, None, None]
        once = pairs & (first_v == 0)
        decay_places = decay_p + 2 * at + columns + first_v
        tl.store(decay_places, whole, mask=once)
        tl.store(decay_places + K, all_lost, mask=once)


@triton.jit(do_not_specialize=OPAQUE)
def forward_kernel(
    q_p, f_p, k_p, v_p, bound_p, before_p, y_p, after_p, kept_p, first_p, sequence_p, cu_p,
    q_batch, q_row, q_head, f_batch, f_row, f_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    T, SEGMENT, SEGMENTS, COLUMN, HEADS, K, V, scale,
    BT: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TIED: tl.constexpr,
    HAS_BOUND: tl.constexpr, FLOOR: tl.constexpr, FLOOR_LOST: tl.constexpr, Q_ACTIVATION: tl.constexpr,
    V_ACTIVATION: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """Compute y [B, T, HEADS, V]. Programs: (segments, blocks of heads).

    before and after [segments, HEADS, K, V] are the states around segments. With KEEPS, kept
    [blocks, V, HEADS, K] gets the state before each block of BT tokens.
    """
    i_segment = tl.program_id(0).to(tl.int64)
    i_batch, start, length, begin, count, i_block = _segment(
        i_segment, first_p, sequence_p, cu_p, T, SEGMENT, SEGMENTS, BT, PACKED
    )
    heads, k_columns, v_columns, gates, values, pairs = _channels(HEADS, K, V, BH, BK, BV)
    bound = _load_bound(bound_p, heads, k_columns, K, gates, HAS_BOUND)
    at = ((i_segment * HEADS + heads)[None, None, :, None] * K + k_columns[None, None, None, :]) * V
    at += v_columns[None, :, None, None] * COLUMN
    kept_at = (v_columns[None, :, None, None] * HEADS + heads[None, None, :, None]) * K + k_columns[None, None, None, :]
    h = tl.zeros((1, BV, BH, BK), tl.float32)
    if HAS_BEFORE:
        h = tl.load(tl.max_contiguous(before_p + at, (1, 2, 4, 8)), mask=pairs, other=0.0)
    for i in range(0, count, BT):
        rows, valid = _tokens(start, length, begin + i, count - i, BT, REVERSE)
        inside, inside_values = valid[:, None, None] & gates, valid[:, None, None] & values
        q = _load_gates(q_p, i_batch, rows, heads, k_columns, q_batch, q_row, q_head, inside)
        z = _load_gates(f_p, i_batch, rows, heads, k_columns, f_batch, f_row, f_head, inside)
        v = _load_values(v_p, i_batch, rows, heads, v_columns, v_batch, v_row, v_head, inside_values)
        f, c, k = _gate(z, bound, inside, TIED, FLOOR, FLOOR_LOST)
        if not TIED:
            k = _load_gates(k_p, i_batch, rows, heads, k_columns, k_batch, k_row, k_head, inside)
        if KEEPS:
            tl.store(
                tl.max_contiguous(kept_p + (i_block + (begin + i) // BT) * V * HEADS * K + kept_at, (1, 2, 4, 8)),
                h,
                mask=pairs,
            )
        # channels that do not exist have a state of zeros, but their query is not always 0
        q = tl.where(inside, activate(q, Q_ACTIVATION) * scale, 0.0)
        f = tl.broadcast_to(f[:, None, :, :], (BT, BV, BH, BK))
        c = tl.broadcast_to(c[:, None, :, :], (BT, BV, BH, BK))
        write = k[:, None, :, :] * activate(v, V_ACTIVATION)[:, :, :, None]
        _, states, product, lost, local = _walk(h, f, c, write, BT)
        y = tl.sum(states * q[:, None, :, :], axis=3)
        y_places = ((i_batch * T + rows)[:, None, None] * HEADS + heads[None, None, :]) * V + v_columns[None, :, None]
        tl.store(tl.max_contiguous(y_p + y_places, (1, 2, 4)), y.to(y_p.dtype.element_ty), mask=inside_values)
        h = _carry(h, product, lost, local)
    if HAS_AFTER:
        tl.store(tl.max_contiguous(after_p + at, (1, 2, 4, 8)), h, mask=pairs)


@triton.jit(do_not_specialize=[*OPAQUE, "dy_batch", "dy_row", "dy_head"])
def backward_kernel(
    q_p, f_p, k_p, v_p, bound_p, kept_p, dy_p, after_p, dq_p, df_p, dk_p, dv_p, d_bound_p, before_p,
    first_p, sequence_p, cu_p,
    q_batch, q_row, q_head, f_batch, f_row, f_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dy_batch, dy_row, dy_head, T, SEGMENT, SEGMENTS, COLUMN, HEADS, K, V, scale,
    BT: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TIED: tl.constexpr,
    HAS_BOUND: tl.constexpr, FLOOR: tl.constexpr, FLOOR_LOST: tl.constexpr, Q_ACTIVATION: tl.constexpr,
    V_ACTIVATION: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, HAS_AFTER: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
):  # fmt: skip
    """Compute all gradients, the last block of BT tokens first. Programs: (segments, blocks of heads).

    With G_t the gradient of S_t: dq_t = S_t dy_t, dk_t = G_t v_t, dv_t = G_t^T k_t, and the decay's is the sum of
    G_t S_{t-1} over V. after and before [segments, HEADS, K, V] are the gradients of the states around segments. The
    bound's, d_bound [segments, HEADS, K], is a sum over a segment, which the caller adds up in a fixed order.
    """
    i_segment = tl.program_id(0).to(tl.int64)
    i_batch, start, length, begin, count, i_block = _segment(
        i_segment, first_p, sequence_p, cu_p, T, SEGMENT, SEGMENTS, BT, PACKED
    )
    heads, k_columns, v_columns, gates, values, pairs = _channels(HEADS, K, V, BH, BK, BV)
    bound = _load_bound(bound_p, heads, k_columns, K, gates, HAS_BOUND)
    at = ((i_segment * HEADS + heads)[None, None, :, None] * K + k_columns[None, None, None, :]) * V
    at += v_columns[None, :, None, None] * COLUMN
    kept_at = (v_columns[None, :, None, None] * HEADS + heads[None, None, :, None]) * K + k_columns[None, None, None, :]
    g = tl.zeros((1, BV, BH, BK), tl.float32)
    if HAS_AFTER:
        g = tl.load(tl.max_contiguous(after_p + at, (1, 2, 4, 8)), mask=pairs, other=0.0)
    d_bound = tl.zeros((1, BH, BK), tl.float32)
    for back in range(0, count, BT):
        # the last block is the one that may be partial
        i = (count - 1 - back) // BT * BT
        rows, valid = _tokens(start, length, begin + i, count - i, BT, REVERSE)
        inside, inside_values = valid[:, None, None] & gates, valid[:, None, None] & values
        q_raw = _load_gates(q_p, i_batch, rows, heads, k_columns, q_batch, q_row, q_head, inside)
        z = _load_gates(f_p, i_batch, rows, heads, k_columns, f_batch, f_row, f_head, inside)
        v_raw = _load_values(v_p, i_batch, rows, heads, v_columns, v_batch, v_row, v_head, inside_values)
        dy = _load_values(dy_p, i_batch, rows, heads, v_columns, dy_batch, dy_row, dy_head, inside_values)
        kept = kept_p + (i_block + (begin + i) // BT) * V * HEADS * K + kept_at
        h = tl.load(tl.max_contiguous(kept, (1, 2, 4, 8)), mask=pairs, other=0.0)
        f, c, k = _gate(z, bound, inside, TIED, FLOOR, FLOOR_LOST)
        if not TIED:
            k = _load_gates(k_p, i_batch, rows, heads, k_columns, k_batch, k_row, k_head, inside)
        q = tl.where(inside, activate(q_raw, Q_ACTIVATION) * scale, 0.0)
        v = activate(v_raw, V_ACTIVATION)
        f4 = tl.broadcast_to(f[:, None, :, :], (BT, BV, BH, BK))
        c4 = tl.broadcast_to(c[:, None, :, :], (BT, BV, BH, BK))
        past, states, _, _, _ = _walk(h, f4, c4, k[:, None, :, :] * v[:, :, :, None], BT)
        d_states, product, lost, local = _walk_back(g, f4, c4, q[:, None, :, :] * dy[:, :, :, None], BT)
        g = _carry(g, product, lost, local)
        dq = tl.sum(states * dy[:, :, :, None], axis=1)
        dk = tl.sum(d_states * v[:, :, :, None], axis=1)
        df = tl.sum(d_states * past, axis=1)
        dv = tl.sum(d_states * k[:, None, :, :], axis=3)
        tokens = (i_batch * T + rows)[:, None, None]
        places = (tokens * HEADS + heads[None, :, None]) * K + k_columns[None, None, :]
        dq = activate_backward(dq * scale, q_raw, Q_ACTIVATION)
        tl.store(tl.max_contiguous(dq_p + places, (1, 2, 4)), dq.to(dq_p.dtype.element_ty), mask=inside)
        if TIED:
            positive, negative = sigmoids(z)
            if FLOOR > 0:
                # a decay at the floor is not the gate's
                df = tl.where(f > FLOOR, df, 0.0)
            # with respect to beta: df / dbeta = sigmoid(-z) = -dk / dbeta
            d_gate = tl.where(inside, negative * (df - dk), 0.0)
            df = (1.0 - bound) * positive * d_gate
            if HAS_BOUND:
                d_bound += tl.sum(d_gate, axis=0, keep_dims=True)
        else:
            df *= f
            tl.store(tl.max_contiguous(dk_p + places, (1, 2, 4)), dk.to(dk_p.dtype.element_ty), mask=inside)
        tl.store(tl.max_contiguous(df_p + places, (1, 2, 4)), df.to(df_p.dtype.element_ty), mask=inside)
        places = (tokens * HEADS + heads[None, None, :]) * V + v_columns[None, :, None]
        dv = activate_backward(dv, v_raw, V_ACTIVATION)
        tl.store(tl.max_contiguous(dv_p + places, (1, 2, 4)), dv.to(dv_p.dtype.element_ty), mask=inside_values)
    if HAS_BOUND:
        places = (i_segment * HEADS + heads)[None, :, None] * K + k_columns[None, None, :]
        tl.store(d_bound_p + places, d_bound, mask=gates)
    if HAS_BEFORE:
        tl.store(tl.max_contiguous(before_p + at, (1, 2, 4, 8)), g, mask=pairs)
