"""Kernels of Mamba's recurrence and its gradient, which keep the states of a block of tokens in registers.

A program runs along a sequence, for EV * EL channels and all S numbers of their states. It computes BT tokens at once,
as a tile [BT, EV, BS, EL] of decays and states that is never stored; only the state before each block is. The axes are
in this order so that time lies inside a thread, which then joins tokens without exchange, and neighbouring channels
lie in neighbouring threads.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _join(a, b, next_a, next_b):
    return a * next_a, next_a * b + next_b


@triton.jit
def _join_both(a, b, a_before, b_before, next_a, next_b, next_a_before, next_b_before):
    """Join steps (a, b) and, beside them, the same without the last step of each."""
    return a * next_a, next_a * b + next_b, a * next_a_before, next_a_before * b + next_b_before


@triton.jit
def _bounds(i_sequence, cu_p, LENGTH, TILES, BT: tl.constexpr, PACKED: tl.constexpr):
    """Return the row of the batch, the first token of a sequence, its length, and its first place among kept states."""
    row, start, count, tile = i_sequence, i_sequence * 0, LENGTH, i_sequence * TILES
    if PACKED:
        row = start
        # wrong boundaries must not lead beyond the inputs
        start = tl.minimum(tl.maximum(tl.load(cu_p + i_sequence).to(tl.int64), 0), LENGTH)
        stop = tl.minimum(tl.maximum(tl.load(cu_p + i_sequence + 1).to(tl.int64), 0), LENGTH)
        count, tile = tl.maximum(stop - start, 0).to(tl.int32), start // BT + i_sequence
    return row, start, count, tile


@triton.jit
def _channels(i_block, WIDTH, STATES, EV: tl.constexpr, EL: tl.constexpr, BS: tl.constexpr):
    """Return channels [EV, EL], numbers of the state [BS], and which pairs exist [EV, BS, EL]."""
    channels = i_block * (EV * EL) + tl.arange(0, EV)[:, None] * EL + tl.arange(0, EL)[None, :]
    numbers = tl.arange(0, BS)
    return channels, numbers, (channels < WIDTH)[:, None, :] & (numbers < STATES)[None, :, None]


@triton.jit
def forward_kernel(
    u_p, dt_p, a_p, b_p, c_p, initial_p, y_p, final_p, kept_p, cu_p,
    U_B, U_T, U_E, DT_B, DT_T, DT_E, B_B, B_T, B_S, C_B, C_T, C_S, LENGTH, WIDTH, STATES, TILES,
    BT: tl.constexpr, EV: tl.constexpr, EL: tl.constexpr, BS: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """Compute y [B, T, E] and final states [N, E, S]. Programs: (sequences, blocks of EV * EL channels).

    With KEEPS, kept [tiles, S, E] gets the state before each block of BT tokens. All results are contiguous.
    """
    i_sequence = tl.program_id(0).to(tl.int64)
    row, start, count, tile = _bounds(i_sequence, cu_p, LENGTH, TILES, BT, PACKED)
    channels, numbers, exist = _channels(tl.program_id(1), WIDTH, STATES, EV, EL, BS)
    places = channels[:, None, :] * STATES + numbers[None, :, None]
    kept_places = numbers[None, :, None] * WIDTH + channels[:, None, :]
    a = tl.load(a_p + places, mask=exist, other=0.0) * LOG2_E
    h = tl.zeros((EV, BS, EL), tl.float32)
    if HAS_INITIAL:
        h = tl.load(initial_p + i_sequence * WIDTH * STATES + places, mask=exist, other=0.0)
    offsets = tl.arange(0, BT)
    is_first, is_last = (offsets == 0)[:, None, None, None], (offsets == BT - 1)[:, None, None, None]
    for i in range(0, count, BT):
        tokens = start + i + offsets
        if REVERSE:
            tokens = start + (count - 1 - i) - offsets
        valid = i + offsets < count
        inside = valid[:, None, None] & (channels < WIDTH)[None, :, :]
        inside_numbers = valid[:, None] & (numbers < STATES)[None, :]
        rows, columns = tokens[:, None, None], channels[None, :, :]
        u = tl.load(u_p + row * U_B + rows * U_T + columns * U_E, mask=inside, other=0.0).to(tl.float32)
        dt = tl.load(dt_p + row * DT_B + rows * DT_T + columns * DT_E, mask=inside, other=0.0).to(tl.float32)
        b_places = row * B_B + tokens[:, None] * B_T + numbers[None, :] * B_S
        b = tl.load(b_p + b_places, mask=inside_numbers, other=0.0).to(tl.float32)
        c_places = row * C_B + tokens[:, None] * C_T + numbers[None, :] * C_S
        c = tl.load(c_p + c_places, mask=inside_numbers, other=0.0).to(tl.float32)
        if KEEPS:
            tl.store(kept_p + tile * WIDTH * STATES + kept_places, h, mask=exist)
            tile += 1
        decay = tl.exp2(dt[:, :, None, :] * a[None, :, :, :])
        write = (dt * u)[:, :, None, :] * b[:, None, :, None]
        # inside the first write the state before needs no product of decays, which the compiler then leaves out
        write += tl.where(is_first, decay * h[None, :, :, :], 0.0)
        _, states = tl.associative_scan((decay, write), 0, _join)
        y = tl.sum(states * c[:, None, :, None], axis=2)
        tl.store(y_p + (row * LENGTH + rows) * WIDTH + columns, y, mask=inside)
        h = tl.sum(tl.where(is_last, states, 0.0), axis=0)
    tl.store(final_p + i_sequence * WIDTH * STATES + places, h, mask=exist)


@triton.jit
def backward_kernel(
    u_p, dt_p, a_p, b_p, c_p, kept_p, dy_p, d_final_p, du_p, ddt_p, da_p, db_p, dc_p, d_initial_p, cu_p,
    U_B, U_T, U_E, DT_B, DT_T, DT_E, B_B, B_T, B_S, C_B, C_T, C_S, G_B, G_T, G_E, LENGTH, WIDTH, STATES, TILES, ROWS,
    BT: tl.constexpr, EV: tl.constexpr, EL: tl.constexpr, BS: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """Compute gradients from the last block of tokens to the first. Programs as for `forward_kernel`.

    With k_t = exp(dt_t a) g_t, the gradient of the state before token t, and g_t = dy_t c_t + k_{t+1} that of h_t, the
    exponent dt_t a has the gradient k_t h_{t-1}. da [N, E, S] and db, dc [blocks of channels, B T = ROWS, S] are
    sums over the tokens or channels of one program, which the caller adds up in a fixed order.
    """
    i_sequence, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, start, count, tile = _bounds(i_sequence, cu_p, LENGTH, TILES, BT, PACKED)
    channels, numbers, exist = _channels(i_block, WIDTH, STATES, EV, EL, BS)
    places = channels[:, None, :] * STATES + numbers[None, :, None]
    kept_places = numbers[None, :, None] * WIDTH + channels[:, None, :]
    a = tl.load(a_p + places, mask=exist, other=0.0)
    da = tl.zeros((EV, BS, EL), tl.float32)
    k = tl.zeros((EV, BS, EL), tl.float32)
    if HAS_FINAL:
        k = tl.load(d_final_p + i_sequence * WIDTH * STATES + places, mask=exist, other=0.0)
    offsets = tl.arange(0, BT)
    is_first, is_last = (offsets == 0)[:, None, None, None], (offsets == BT - 1)[:, None, None, None]
    ones = tl.full((BT, EV, BS, EL), 1.0, tl.float32)
    # adding -0.0 changes nothing, which the compiler knows
    nothing = tl.full((BT, EV, BS, EL), -0.0, tl.float32)
    for back in range(0, count, BT):
        # the last block is the one that may be partial
        i = (count - 1 - back) // BT * BT
        tokens = start + i + offsets
        if REVERSE:
            tokens = start + (count - 1 - i) - offsets
        valid = i + offsets < count
        inside = valid[:, None, None] & (channels < WIDTH)[None, :, :]
        inside_numbers = valid[:, None] & (numbers < STATES)[None, :]
        rows, columns = tokens[:, None, None], channels[None, :, :]
        u = tl.load(u_p + row * U_B + rows * U_T + columns * U_E, mask=inside, other=0.0).to(tl.float32)
        dt = tl.load(dt_p + row * DT_B + rows * DT_T + columns * DT_E, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_p + row * G_B + rows * G_T + columns * G_E, mask=inside, other=0.0).to(tl.float32)
        b_places = row * B_B + tokens[:, None] * B_T + numbers[None, :] * B_S
        b = tl.load(b_p + b_places, mask=inside_numbers, other=0.0).to(tl.float32)
        c_places = row * C_B + tokens[:, None] * C_T + numbers[None, :] * C_S
        c = tl.load(c_p + c_places, mask=inside_numbers, other=0.0).to(tl.float32)
        before = tl.load(kept_p + (tile + i // BT) * WIDTH * STATES + kept_places, mask=exist, other=0.0)
        decay = tl.exp2(dt[:, :, None, :] * (a * LOG2_E)[None, :, :, :])
        write = (dt * u)[:, :, None, :] * b[:, None, :, None]
        write += tl.where(is_first, decay * before[None, :, :, :], 0.0)
        _, states, _, past = tl.associative_scan((decay, write, ones, nothing), 0, _join_both)
        past = tl.where(is_first, before[None, :, :, :], past)
        sum_places = (i_block * ROWS + row * LENGTH + tokens[:, None]) * STATES + numbers[None, :]
        dc = tl.sum(tl.sum(states * dy[:, :, None, :], axis=1), axis=2)
        tl.store(dc_p + sum_places, dc, mask=inside_numbers)
        read = dy[:, :, None, :] * c[:, None, :, None]
        d_past = decay * (read + tl.where(is_last, k[None, :, :, :], 0.0))
        _, d_past, _, g = tl.associative_scan((decay, d_past, ones, nothing), 0, _join_both, reverse=True)
        g = read + tl.where(is_last, k[None, :, :, :], g)
        k = tl.sum(tl.where(is_first, d_past, 0.0), axis=0)
        d_exponent = d_past * past
        da += tl.sum(d_exponent * dt[:, :, None, :], axis=0)
        d_written = tl.sum(g * b[:, None, :, None], axis=2)
        ddt = tl.sum(d_exponent * a[None, :, :, :], axis=2) + d_written * u
        db = tl.sum(tl.sum(g * (dt * u)[:, :, None, :], axis=1), axis=2)
        tl.store(db_p + sum_places, db, mask=inside_numbers)
        out_places = (row * LENGTH + rows) * WIDTH + columns
        tl.store(du_p + out_places, (d_written * dt).to(du_p.dtype.element_ty), mask=inside)
        tl.store(ddt_p + out_places, ddt.to(ddt_p.dtype.element_ty), mask=inside)
    tl.store(da_p + i_sequence * WIDTH * STATES + places, da, mask=exist)
    tl.store(d_initial_p + i_sequence * WIDTH * STATES + places, k, mask=exist)
