"""Kernels of the forward pass; with the roles of key and query exchanged they serve the backward pass too.

1. `chunk_update_kernel`: the update each chunk makes to the state, and its decay. In parallel over chunks.
2. `carry_states_kernel`: the state before each chunk, from chunk to chunk.
3. `chunk_output_kernel`: outputs of each chunk from its scores and the state before it. In parallel over chunks.

In reverse time dS_{t-1} = Diag(f_t) (dS_t + q_t dy_t^T), and dv_t = (dS_t + q_t dy_t^T)^T k_t: the gradient of v is
the same scan with the query as key, the key as query, dy as value.
"""

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
    join_all,
    load_rows,
    log2,
    pair_mask,
    store_rows,
    tied_gate,
    without_bad,
)


@triton.jit
def chunk_update_kernel(
    q_p, f_p, k_p, v_p, bound_p, update_p, decay_p, first_chunk_p, sequence_p, cu_seqlens_p,
    q_batch, q_row, q_head, f_batch, f_row, f_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    T, NT, head, HEADS, K, V, scale,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TIED: tl.constexpr, HAS_BOUND: tl.constexpr,
    FLOOR: tl.constexpr, FLOOR_LOST: tl.constexpr, Q_ACTIVATION: tl.constexpr, V_ACTIVATION: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, OF_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the update a chunk makes to the state by its end, X^T V [BK, BV], and its decay unless OF_QUERIES.

    X is the key times the decay to the chunk's end or, OF_QUERIES, the query times the decay since its start. `head`
    is the first of HEADS heads in this launch. Programs: (chunks, HEADS, blocks of K x V).
    """
    i_chunk, i_local, i_kv = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks_v = tl.cdiv(V, BV)
    first_k, first_v = (i_kv // blocks_v) * BK, (i_kv % blocks_v) * BV
    i_head = (head + i_local).to(tl.int64)
    i_batch, start, length, begin = chunk_place(
        i_chunk, first_chunk_p, sequence_p, cu_seqlens_p, T, NT, C, PACKED
    )  # fmt: skip
    if begin >= length:
        return
    rows, exists = chunk_rows(start, length, begin, C, REVERSE)
    i_batch = i_batch.to(tl.int64)
    z = load_rows(f_p + i_batch * f_batch + i_head * f_head, rows, exists, f_row, first_k, K, BK)
    if TIED:
        f, k, _, _, _ = tied_gate(z, bound_p, i_head, first_k, K, exists, BK, HAS_BOUND, FLOOR)
        complement = tl.minimum(k, FLOOR_LOST) if FLOOR > 0 else k
    else:
        f, complement = free_gate(z)
    prefix, suffix = join_all(f, C, BK)
    if OF_QUERIES:
        q = load_rows(q_p + i_batch * q_batch + i_head * q_head, rows, exists, q_row, first_k, K, BK)
        x = activate(q, Q_ACTIVATION) * scale * prefix
    else:
        if not TIED:
            k = load_rows(k_p + i_batch * k_batch + i_head * k_head, rows, exists, k_row, first_k, K, BK)
        x = k * suffix
    v = load_rows(v_p + i_batch * v_batch + i_head * v_head, rows, exists, v_row, first_v, V, BV)
    if not OF_QUERIES:
        v = activate(v, V_ACTIVATION)
    v, bad = without_bad(v)
    low = v_p.dtype.element_ty
    update = tl.dot(tl.trans(x.to(low)), v.to(low), input_precision=PRECISION)
    update = tl.where(tl.max(bad, axis=0)[None, :] > 0, float("nan"), update)
    at = (i_chunk.to(tl.int64) * HEADS + i_local) * K
    k_columns, v_columns = first_k + tl.arange(0, BK), first_v + tl.arange(0, BV)
    inside = (k_columns < K)[:, None] & (v_columns < V)[None, :]
    places = update_p + at * V + k_columns[:, None] * V + v_columns[None, :]
    tl.store(places, update.to(update_p.dtype.element_ty), mask=inside)
    if not OF_QUERIES and first_v == 0:
        # the last row holds the decay of the whole chunk; its complement is a sum over tokens, without cancellation
        whole = tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], prefix, 0.0), axis=0)
        tl.store(decay_p + 2 * at + k_columns, whole, mask=k_columns < K)
        tl.store(decay_p + 2 * at + K + k_columns, tl.sum(complement * suffix, axis=0), mask=k_columns < K)


@triton.jit
def _read_chunk(update_p, decay_p, n, first, count, i_local, HEADS, K, KV, element, k, inside, BACKWARD: tl.constexpr):
    """Read a chunk's update, decay and complement; return the address and mask of the update as well."""
    i_chunk = first + (count - 1 - n if BACKWARD else n)
    at = i_chunk.to(tl.int64) * HEADS + i_local
    # not a scalar: some interpreters cannot take one into a mask
    valid = inside & (element * 0 + n < count)
    place = update_p + at * KV + element
    update = tl.load(place, mask=valid, other=0.0).to(tl.float32)
    decay = tl.load(decay_p + 2 * at * K + k, mask=valid, other=1.0)
    complement = tl.load(decay_p + (2 * at + 1) * K + k, mask=valid, other=0.0)
    return update, decay, complement, place, valid


@triton.jit
def _carry(state, update, decay, complement, place, valid):
    """Write the state before a chunk over its update; return the state after the chunk."""
    tl.store(place, state.to(place.dtype.element_ty), mask=valid)
    # the complement first: a state that hardly decays is not rounded in a product with a number near 1
    return tl.where(complement < 0.5, state - complement * state, decay * state) + update


@triton.jit
def carry_states_kernel(
    update_p, decay_p, initial_p, final_p, first_chunk_p, NT, head, HEADS, ALL_HEADS, K, V,
    BLOCK: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """Carry the state through the chunks of a sequence, and replace each chunk's update by the state before it.

    BACKWARD goes from the last chunk to the first. Programs: (sequences, HEADS, blocks of K x V).
    """
    i_seq, i_local, i_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    KV = K * V
    element = i_block * BLOCK + tl.arange(0, BLOCK)
    inside = element < KV
    k = element // V
    if PACKED:
        first = tl.load(first_chunk_p + i_seq)
        count = tl.load(first_chunk_p + i_seq + 1) - first
    else:
        first, count = i_seq * NT, NT
    own = (i_seq.to(tl.int64) * ALL_HEADS + head + i_local) * KV + element
    if HAS_INITIAL:
        state = tl.load(initial_p + own, mask=inside, other=0.0)
    else:
        state = tl.zeros([BLOCK], tl.float32)
    for n in range(0, count, 4):
        # four chunks are read ahead, so that their reads overlap
        u0, d0, c0, p0, m0 = _read_chunk(
            update_p, decay_p, n, first, count, i_local, HEADS, K, KV, element, k, inside, BACKWARD
        )
        u1, d1, c1, p1, m1 = _read_chunk(
            update_p, decay_p, n + 1, first, count, i_local, HEADS, K, KV, element, k, inside, BACKWARD
        )
        u2, d2, c2, p2, m2 = _read_chunk(
            update_p, decay_p, n + 2, first, count, i_local, HEADS, K, KV, element, k, inside, BACKWARD
        )
        u3, d3, c3, p3, m3 = _read_chunk(
            update_p, decay_p, n + 3, first, count, i_local, HEADS, K, KV, element, k, inside, BACKWARD
        )
        state = _carry(state, u0, d0, c0, p0, m0)
        state = _carry(state, u1, d1, c1, p1, m1)
        state = _carry(state, u2, d2, c2, p2, m2)
        state = _carry(state, u3, d3, c3, p3, m3)
    if HAS_FINAL:
        tl.store(final_p + own, state, mask=inside)


@triton.jit
def chunk_output_kernel(
    q_p, f_p, k_p, v_p, bound_p, state_p, y_p, first_chunk_p, sequence_p, cu_seqlens_p,
    q_batch, q_row, q_head, f_batch, f_row, f_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    y_batch, y_row, y_head, i_p, i_batch_stride, i_row, i_head_stride, T, NT, head, HEADS, K, V, scale,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TIED: tl.constexpr, HAS_BOUND: tl.constexpr,
    FLOOR: tl.constexpr, FLOOR_LOST: tl.constexpr, Q_ACTIVATION: tl.constexpr, V_ACTIVATION: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, OF_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the outputs of a chunk, Q S + A V, with S the state before it and A the scores among its tokens.

    OF_QUERIES: the gradient of v instead: K dS + A^T dY. Then v_p is dy, and i_p the pre-activation whose gradient
    is wanted. Programs: (chunks, HEADS, blocks of V).
    """
    i_chunk, i_local, i_v = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_v = i_v * BV
    i_head = (head + i_local).to(tl.int64)
    i_batch, start, length, begin = chunk_place(
        i_chunk, first_chunk_p, sequence_p, cu_seqlens_p, T, NT, C, PACKED
    )  # fmt: skip
    if begin >= length:
        return
    rows, exists = chunk_rows(start, length, begin, C, REVERSE)
    i_batch = i_batch.to(tl.int64)
    q_p += i_batch * q_batch + i_head * q_head
    f_p += i_batch * f_batch + i_head * f_head
    if not TIED:
        k_p += i_batch * k_batch + i_head * k_head
    low = v_p.dtype.element_ty
    state_p += (i_chunk.to(tl.int64) * HEADS + i_local) * K * V
    v_columns = first_v + tl.arange(0, BV)
    scores = tl.zeros([C, C], tl.float32)
    diagonal = tl.zeros([C], tl.float32)
    y = tl.zeros([C, BV], tl.float32)
    for first_k in range(0, K, BK):
        q = activate(load_rows(q_p, rows, exists, q_row, first_k, K, BK), Q_ACTIVATION) * scale
        z = load_rows(f_p, rows, exists, f_row, first_k, K, BK)
        if TIED:
            f, k, _, _, _ = tied_gate(z, bound_p, i_head, first_k, K, exists, BK, HAS_BOUND, FLOOR)
        else:
            f, _ = free_gate(z)
            k = load_rows(k_p, rows, exists, k_row, first_k, K, BK)
        diagonal += tl.sum(q * k, axis=1)
        prefix, suffix = f, tl.full([C, BK], 1.0, tl.float32)
        for level in range(log2(C)):
            x = tl.where(is_late(1 << level, C), q * prefix, k * suffix).to(low)
            products = tl.dot(x, tl.trans(x), input_precision=PRECISION)
            scores += tl.where(pair_mask(1 << level, C), products, 0.0)
            prefix, suffix = join(prefix, suffix, 1 << level, C, BK)
        x = k * suffix if OF_QUERIES else q * prefix
        k_columns = first_k + tl.arange(0, BK)
        inside = (k_columns < K)[:, None] & (v_columns < V)[None, :]
        state = tl.load(state_p + k_columns[:, None] * V + v_columns[None, :], mask=inside, other=0.0)
        y += tl.dot(x.to(low), state.to(low), input_precision=PRECISION)
    i = tl.arange(0, C)
    after = i[:, None] < i[None, :] if OF_QUERIES else i[:, None] > i[None, :]
    scores = tl.where(after, scores, tl.where(i[:, None] == i[None, :], diagonal[:, None], 0.0))
    v = load_rows(v_p + i_batch * v_batch + i_head * v_head, rows, exists, v_row, first_v, V, BV)
    if not OF_QUERIES:
        v = activate(v, V_ACTIVATION)
    v, bad = without_bad(v)
    y += tl.dot(scores.to(low), v.to(low), input_precision=PRECISION)
    if OF_QUERIES:
        touched = i[:, None] <= tl.max(tl.where(bad > 0, i[:, None], -1), axis=0)[None, :]
    else:
        touched = i[:, None] >= tl.min(tl.where(bad > 0, i[:, None], C), axis=0)[None, :]
    y = tl.where(touched, float("nan"), y)
    if OF_QUERIES and V_ACTIVATION != "none":
        v_in = load_rows(i_p + i_batch * i_batch_stride + i_head * i_head_stride, rows, exists, i_row, first_v, V, BV)
        y = activate_backward(y, v_in, V_ACTIVATION)
    store_rows(y_p + i_batch * y_batch + i_head * y_head, y, rows, exists, y_row, first_v, V, BV)
