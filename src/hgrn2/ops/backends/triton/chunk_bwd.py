"""Kernel of the gradients of query, key and decay; `chunk_fwd` computes that of v."""

import triton
import triton.language as tl

from hgrn2.ops.backends.triton.chunks import (
    activate,
    activate_backward,
    chunk_place,
    chunk_rows,
    free_gate,
    is_late,
    join,
    load_rows,
    log2,
    pair_mask,
    store_rows,
    tied_gate,
)


@triton.jit
def chunk_gradient_kernel(
    q_p, f_p, k_p, v_p, dy_p, bound_p, state_p, d_state_p, decay_p, dq_p, df_p, dk_p, d_bound_p,
    first_chunk_p, sequence_p, cu_seqlens_p,
    q_batch, q_row, q_head, f_batch, f_row, f_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dy_batch, dy_row, dy_head, T, NT, head, HEADS, ALL_HEADS, K, V, scale,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TIED: tl.constexpr, HAS_BOUND: tl.constexpr,
    FLOOR: tl.constexpr, FLOOR_LOST: tl.constexpr, Q_ACTIVATION: tl.constexpr, V_ACTIVATION: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of q, of the key and of the decay. Programs: (chunks, HEADS, blocks of K).

    X is a query or key times a product of decays. The gradient of a decay's logarithm is the sum of X dX over all X
    that contain the decay: a sum without differences. Gradients are contiguous,
    [B, T, ALL_HEADS, K].
    """
    i_chunk, i_local, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_batch, start, length, begin = chunk_place(i_chunk, first_chunk_p, sequence_p, cu_seqlens_p, T, NT, C, PACKED)
    if begin >= length:
        return
    first_k = i_k * BK
    i_head = (head + i_local).to(tl.int64)
    k_columns = first_k + tl.arange(0, BK)
    rows, exists = chunk_rows(start, length, begin, C, REVERSE)
    i_batch = i_batch.to(tl.int64)
    low = v_p.dtype.element_ty
    # sums of products, for which bfloat16 has the range and float16 has not
    wide = tl.bfloat16 if low == tl.bfloat16 else tl.float32
    at = (i_chunk.to(tl.int64) * HEADS + i_local) * K

    # from the values: gradients of the scores, and of the factors of the states
    v_p += i_batch * v_batch + i_head * v_head
    dy_p += i_batch * dy_batch + i_head * dy_head
    d_scores = tl.zeros([C, C], tl.float32)
    d_scores_t = tl.zeros([C, C], tl.float32)
    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    d_decay = tl.zeros([BK], tl.float32)
    for first_v in range(0, V, BV):
        v = activate(load_rows(v_p, rows, exists, v_row, first_v, V, BV), V_ACTIVATION).to(low)
        dy = load_rows(dy_p, rows, exists, dy_row, first_v, V, BV).to(low)
        # computed twice rather than transposed: compilers for Hopper get the transpose of a product wrong
        d_scores += tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        d_scores_t += tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        v_columns = first_v + tl.arange(0, BV)
        inside = (k_columns < K)[None, :] & (v_columns < V)[:, None]
        places = at * V + k_columns[None, :] * V + v_columns[:, None]
        state = tl.load(state_p + places, mask=inside, other=0.0)
        d_state = tl.load(d_state_p + places, mask=inside, other=0.0)
        dq += tl.dot(dy, state.to(low), input_precision=PRECISION)
        dk += tl.dot(v, d_state.to(low), input_precision=PRECISION)
        d_decay += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=0)
    i = tl.arange(0, C)
    earlier = i[:, None] > i[None, :]
    diagonal = tl.sum(tl.where(i[:, None] == i[None, :], d_scores, 0.0), axis=1)[:, None]
    # rows and columns are one pair of tokens, whichever is the query
    d_pairs = tl.where(earlier, d_scores, d_scores_t)

    q_p += i_batch * q_batch + i_head * q_head
    f_p += i_batch * f_batch + i_head * f_head
    q = activate(load_rows(q_p, rows, exists, q_row, first_k, K, BK), Q_ACTIVATION) * scale
    z = load_rows(f_p, rows, exists, f_row, first_k, K, BK)
    if TIED:
        f, k, _, _, _ = tied_gate(z, bound_p, i_head, first_k, K, exists, BK, HAS_BOUND, FLOOR)
    else:
        f, _ = free_gate(z)
        k = load_rows(k_p + i_batch * k_batch + i_head * k_head, rows, exists, k_row, first_k, K, BK)
    dq_new = diagonal * k
    dk_new = diagonal * q
    d_log = tl.zeros([C, BK], tl.float32)
    prefix, suffix = f, tl.full([C, BK], 1.0, tl.float32)
    for level in range(log2(C)):
        late = is_late(1 << level, C)
        factor = tl.where(late, prefix, suffix)
        x = tl.where(late, q, k) * factor
        pairs = pair_mask(1 << level, C)
        dx = tl.dot(tl.where(pairs, d_pairs, 0.0).to(low), x.to(low), input_precision=PRECISION)
        # row u holds its decay in x of the rows t of its block with t >= u when late, t < u when early
        same_block = (i[:, None] >> level) == (i[None, :] >> level)
        holds = tl.where(late, i[:, None] <= i[None, :], i[:, None] > i[None, :]) & same_block
        w = x * dx
        d_log += tl.dot(holds.to(wide), w.to(wide), input_precision=PRECISION)
        dx *= factor
        dq_new += tl.where(late, dx, 0.0)
        dk_new += tl.where(late, 0.0, dx)
        prefix, suffix = join(prefix, suffix, 1 << level, C, BK)
    # the states: the one before the chunk meets every query, the one after it every key
    dq *= prefix
    dk *= suffix
    w = (q * dq).to(wide)
    d_log += tl.dot((i[:, None] <= i[None, :]).to(wide), w, input_precision=PRECISION)
    w = (k * dk).to(wide)
    d_log += tl.dot((i[:, None] > i[None, :]).to(wide), w, input_precision=PRECISION)
    # each decay is followed by its complement
    decay_p += 2 * at
    whole = tl.load(decay_p + k_columns, mask=k_columns < K, other=0.0)
    d_log += (d_decay * whole)[None, :]
    dq += dq_new
    dk += dk_new

    # read again rather than held in registers throughout
    q_raw = load_rows(q_p, rows, exists, q_row, first_k, K, BK)
    z = load_rows(f_p, rows, exists, f_row, first_k, K, BK)
    out_row = ALL_HEADS * K
    out = i_batch * T * out_row + i_head * K
    dq = activate_backward(dq * scale, q_raw, Q_ACTIVATION)
    store_rows(dq_p + out, dq, rows, exists, out_row, first_k, K, BK)
    if TIED:
        f, _, positive, negative, free = tied_gate(z, bound_p, i_head, first_k, K, exists, BK, HAS_BOUND, FLOOR)
        if FLOOR > 0:
            # a decay at the floor is not the gate's
            d_log = tl.where(f > FLOOR, d_log, 0.0)
        # with respect to beta: df / dbeta = sigmoid(-z) = -dk / dbeta
        d_gate = negative * (d_log / f - dk)
        store_rows(df_p + out, free * positive * d_gate, rows, exists, out_row, first_k, K, BK)
        if HAS_BOUND:
            d_bound = tl.sum(tl.where(exists[:, None], d_gate, 0.0), axis=0)
            places = d_bound_p + (i_chunk.to(tl.int64) * ALL_HEADS + i_head) * K + k_columns
            tl.store(places, d_bound, mask=k_columns < K)
    else:
        store_rows(df_p + out, d_log, rows, exists, out_row, first_k, K, BK)
        store_rows(dk_p + out, dk, rows, exists, out_row, first_k, K, BK)
