// dV of a chunk whose gates are too near to 0 for the dense products of backward.cu, by way of the joins of joins.cuh:
// K D + A^T dY for the scores A, keys K with all decays to the chunk's end, and D the gradient of the state after it.

// q and f of a chunk, with channels in the states' order; zeros where there is no token.
__device__ __forceinline__ void read_in_order(const Memory& m, const char* q, i64 q_row, const char* f, i64 f_row, int left) {
    constexpr int EACH = 2 * CHUNK * 32 / GATE_THREADS;
    int thread = thread_index(), lane = thread & 31, piece = (lane & 3) * 2 + (lane >> 4), byte = (lane >> 2 & 3) * 4;
    int half = thread >> 5 & 1, first = thread >> 6, from = half * (WIDTH / 2) * 2 + lane * 4;
#pragma unroll 4
    for (int i = 0; i < EACH; i++) {
        int token = first + i * (GATE_THREADS / 64);
        u32 x = token < left ? *(const u32*)(q + token * q_row + from) : 0u;
        u32 y = token < left ? *(const u32*)(f + token * f_row + from) : 0u;
        u32 place = panel_place(token, 8 * half + piece) + byte;
        store_shared(m.tile(0, 0) + place, x);
        store_shared(m.tile(0, 1) + place, y);
    }
}

__device__ __forceinline__ void exact_values(const BackwardArguments& a, const Piece& p, char* shared) {
    Memory m = {shared};
    int thread = thread_index(), head = a.first_head + p.local, left = p.span.left;
    i64 sign = a.reverse ? -1 : 1;
    const char* q = (const char*)a.q + (p.batch * a.q_batch + head * a.q_head + p.span.row * a.q_row) * 2;
    const char* f = (const char*)a.f + (p.batch * a.f_batch + head * a.f_head + p.span.row * a.f_row) * 2;
    const char* dy = (const char*)a.dy + (p.batch * a.dy_batch + head * a.dy_head + p.span.row * a.dy_row) * 2;
    const char* d_state = (const char*)a.d_states + p.at * WIDTH * ROW_BYTES;
#pragma unroll
    for (int i = thread; i < CHUNK * 16; i += GATE_THREADS) {
        int row = i >> 4, piece = i & 15;
        copy_async(m.at(Memory::DY) + panel_place(row, piece), dy + sign * row * a.dy_row * 2 + piece * 16, row < left);
    }
#pragma unroll
    for (int i = thread; i < WIDTH * 16; i += GATE_THREADS) {
        // a panel has 128 rows
        int row = i >> 4, piece = i & 15, panel = piece >> 3;
        copy_async(m.at(Memory::D_STATE) + panel * PANEL_BYTES + panel_place(row, piece), d_state + i * 16, true);
    }
    copy_commit();
    read_in_order(m, q, sign * a.q_row * 2, f, sign * a.f_row * 2, left);
    for (int i = thread; i < 2 * SCORE_BYTES / 4; i += GATE_THREADS) store_shared(m.scores(0, 0) + 4 * i, 0u);
    if (thread < WIDTH) m.beta()[place_of_channel(thread)] = a.bound ? a.bound[head * WIDTH + thread] : 0.0f;
    copy_wait();
    __syncthreads();
    remove_bad(m.at(Memory::DY), m.reached());
    {
        // decays of the blocks, which the joins read behind a barrier of theirs
        Gates x;
        open_gates(m, 0, left, x);
    }
    join(a, m, 0, 0, left);
    publish();
    __syncthreads();
    int group = __shfl_sync(~0u, thread >> 7, 0), warp = __shfl_sync(~0u, thread >> 5 & 3, 0);
#pragma unroll 1
    for (int columns = group; columns < 4; columns += 2) {
        float out[4][4];
        u64 k = factor(m.tile(0, 1)), d = factor(m.at(Memory::D_STATE) + 32 * columns * 128);
        u64 y = factor(m.at(Memory::DY) + (columns >> 1) * PANEL_BYTES + (columns & 1) * 64);
        products_begin();
#pragma unroll
        for (int s = 0; s < 8; s++)
            multiply_narrow<false, false>(out, k + (s >> 2) * (PANEL_BYTES >> 4) + (s & 3) * (32 >> 4),
                                          d + (s >> 2) * (2 * PANEL_BYTES >> 4) + (s & 3) * (32 >> 4), s > 0);
#pragma unroll
        for (int summand = 0; summand < 2; summand++)
#pragma unroll
            for (int s = 0; s < 4; s++)
                multiply_narrow<true, true>(out, factor(m.scores(0, summand)) + s * (2048 >> 4), y + s * (2048 >> 4), true);
        products_commit();
        products_wait<0>();
        settle(out);
        write_values(a, p.batch, head, p.span, warp, columns, m.reached(), out);
    }
    // the next piece reuses the memory
    __syncthreads();
}
