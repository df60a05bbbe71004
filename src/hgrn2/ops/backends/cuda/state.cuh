// Work of the state warps: outputs of a chunk, and the state after it.

// Which part of the state a state warp holds: of the half of the columns of V that is its warpgroup's, 16
struct Reader {
    int half, warp, lane, g, c;
    int y_step;  // bytes from a token's output to the next token's
};

__device__ __forceinline__ Reader reader_of_thread(const ForwardArguments& a) {
    Reader r;
    // read from one lane, so that the compiler knows that all agree
    int warp = __shfl_sync(~0u, (threadIdx.x - GATE_THREADS) >> 5, 0);
    r.half = warp >> 2, r.warp = warp & 3, r.lane = threadIdx.x & 31, r.g = r.lane >> 2, r.c = r.lane & 3;
    r.y_step = (a.reverse ? -1 : 1) * a.heads * WIDTH * 2;
    return r;
}

// state[i]: columns 8 i ... of K, rows 64 half + 16 warp ... of V, as a product leaves its sums
typedef float State[16][4];

__device__ __forceinline__ void multiply_by(State& state, const float* decays, int c) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float2 d = *(const float2*)(decays + 8 * i + 2 * c);
        float(&s)[4] = state[i];
        s[0] *= d.x, s[1] *= d.y, s[2] *= d.x, s[3] *= d.y;
    }
}

// Whether a half of the columns of the values is finite; called by its four warps together.
__device__ __forceinline__ bool finite_values(u32 panel, const Reader& r) {
    u32 noted[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 values[4];
        load_shared(values, panel + 2048 * i + 512 * r.warp + 16 * r.lane);
#pragma unroll
        for (int e = 0; e < 4; e++) note_finite(noted[e], values[e]);
    }
    // NaN of either sign
    return barrier_all(STATES + r.half, GROUP_THREADS, !((noted[0] | noted[1] | noted[2] | noted[3]) & 0x7fff7fffu));
}

// Takes what is not finite out of a column of values: 0 times it would reach every token of the chunk. Returns the
// first token it may reach, or one that does not exist.
__device__ __forceinline__ int remove_bad(u32 panel, int column) {
    constexpr u32 EXPONENT = BFLOAT16 ? 0x7f80u : 0x7c00u;
    int found = CHUNK;
#pragma unroll 1
    for (int token = 0; token < CHUNK; token++) {
        u32 place = panel + panel_place(token, column >> 3) + 2 * (column & 7);
        if ((load_shared_number(place) & EXPONENT) != EXPONENT) continue;
        store_shared_number(place, 0);
        if (found == CHUNK) found = token;
    }
    return found;
}

// The state, rounded, as left factors
__device__ __forceinline__ void round_state(const State& state, u32 (&x)[8][4]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float(&low)[4] = state[2 * i], (&high)[4] = state[2 * i + 1];
        x[i][0] = pack(low[0], low[1]), x[i][1] = pack(low[2], low[3]);
        x[i][2] = pack(high[0], high[1]), x[i][3] = pack(high[2], high[3]);
    }
}

// Starts the outputs of half of a chunk's tokens, transposed as the state is: of the rounded state and queries, and of
// scores and the values of `count` times 16 tokens from 16 first on.
__device__ __forceinline__ void begin_outputs(const Memory& m, const Reader& r, int stage, int slot, int half, int first,
                                              int count, const u32 (&x)[8][4], float (&out)[4][4]) {
    // places are sums, so that the compiler keeps them in the warp's own registers
    u64 q = factor(m.tile(stage, 0)), values = q + (2 * TILE_BYTES >> 4) + r.half * (PANEL_BYTES >> 4);
    q += half * (32 * 128 >> 4);
    u64 scores = factor(m.scores(slot, 0)) + half * (32 * 128 >> 4);
#pragma unroll
    for (int i = 0; i < 8; i++)
        multiply_registers(out, x[i], q + (i >> 2) * (PANEL_BYTES >> 4) + (i & 3) * (32 >> 4), i > 0);
#pragma unroll
    for (int summand = 0; summand < 2; summand++)
#pragma unroll
        for (int s = first; s < first + count; s++)
            multiply_narrow<true, false>(out, values + s * (2048 >> 4),
                                         scores + summand * (SCORE_BYTES >> 4) + s * (32 >> 4), true);
    products_commit();
}

// Starts adding V^T K to the state, of a tile of keys, over `count` times 16 tokens from 16 first on
__device__ __forceinline__ void add_keys(const Memory& m, const Reader& r, int stage, int keys, int first, int count,
                                         State& state) {
    u64 k = factor(m.tile(stage, 0)) + keys * (TILE_BYTES >> 4), values = factor(m.tile(stage, 0)) + (2 * TILE_BYTES >> 4);
    values += r.half * (PANEL_BYTES >> 4);
#pragma unroll
    for (int s = first; s < first + count; s++) multiply_turned(state, values + s * (2048 >> 4), k + s * (2048 >> 4));
    products_commit();
}

// The outputs of half of a chunk's tokens, to memory. y, left: as in `advance`
__device__ __forceinline__ void write_outputs(const Reader& r, char* y, int half, int left, const float (&out)[4][4]) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
        u32 low = transpose(pack(out[n][0], out[n][1])), high = transpose(pack(out[n][2], out[n][3]));
        int token = 32 * half + 8 * n;
        if (token + r.g < left) {
            u32* to = (u32*)(y + token * r.y_step);
            to[0] = low, to[4] = high;
        }
    }
}

// Outputs of a chunk and the state after it. y: the output of token g in the lane's first column, left: tokens there are
template <bool OUTPUT>
__device__ __forceinline__ void advance(const Memory& m, const Reader& r, int stage, int slot, char* y, int left,
                                        State& state) {
    u32 panel = m.tile(stage, 2) + r.half * PANEL_BYTES;
    bool bad = OUTPUT && !finite_values(panel, r);
    // of the group's 64 columns two threads have each
    int column = threadIdx.x & 63;
    int* reached = m.reached() + 64 * r.half;
    if (bad) {
        if (r.warp < 2) reached[column] = remove_bad(panel, column);
        publish();
        barrier_wait(STATES + r.half, GROUP_THREADS);
    }
    // what all products are of is computed once, and not kept by each lane
    stage = __shfl_sync(~0u, stage, 0), slot = __shfl_sync(~0u, slot, 0);
    if (!OUTPUT) {
        multiply_by(state, m.decays(slot, 0), r.c);
        settle(state);
        products_begin();
        add_keys(m, r, stage, 1, 0, 4, state);
        products_wait<0>();
        settle(state);
    } else if (*m.said(slot) & JOINED) {
        float out[4][4];
        u32 x[8][4];
        round_state(state, x);
        multiply_by(state, m.decays(slot, 0), r.c);
        settle(state), settle(x);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            products_begin();
            begin_outputs(m, r, stage, slot, half, 0, 2 + 2 * half, x, out);
            if (half == 1) add_keys(m, r, stage, 1, 0, 4, state);
            if (half == 0) products_wait<0>();
            else products_wait<1>();
            settle(out);
            write_outputs(r, y, half, left, out);
        }
        products_wait<0>();
        settle(state);
    } else {
        multiply_by(state, m.decays(slot, 0), r.c);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float out[4][4];
            u32 x[8][4];
            round_state(state, x);
            settle(state), settle(x);
            products_begin();
            begin_outputs(m, r, stage, slot, half, 2 * half, 2, x, out);
            add_keys(m, r, stage, 1, 2 * half, 2, state);
            products_wait<1>();
            settle(out);
            write_outputs(r, y, half, left, out);
            products_wait<0>();
            settle(state);
            // one after the other: what is near to the end of one half and the start of the other is large, and the product
            // of both decays may be smaller than any number
            if (half == 0) multiply_by(state, m.decays(slot, 1), r.c), multiply_by(state, m.decays(slot, 2), r.c);
            else multiply_by(state, m.decays(slot, 3), r.c);
        }
    }
    if (bad) {
        float nan = __int_as_float(0x7fffffff);
        // all outputs of the chunk are written
        barrier_wait(STATES + r.half, GROUP_THREADS);
        if (r.warp < 2) {
            // from the first token of the chunk
            char* own = y - r.g * r.y_step - (16 * r.warp + 2 * r.c) * 2 + 2 * column;
#pragma unroll 1
            for (int token = 0; token < CHUNK && token < left; token++)
                if (token >= reached[column])
                    *(unsigned short*)(own + token * r.y_step) = 0x7fff;
        }
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            int of_row = reached[16 * r.warp + 8 * upper + r.g];
            if (of_row == CHUNK) continue;
#pragma unroll
            for (int i = 0; i < 16; i++) state[i][2 * upper] = state[i][2 * upper + 1] = nan;
        }
        // before the next chunk's are found
        barrier_wait(STATES + r.half, GROUP_THREADS);
    }
}

// where an element of a lane's state is in a state [K, V], from the lane's corner
__device__ __forceinline__ int corner_of(const Reader& r) {
    return 2 * r.c * WIDTH + 64 * r.half + 16 * r.warp + r.g;
}
__device__ __forceinline__ int state_place(int i, int e) { return (8 * i + (e & 1)) * WIDTH + (e & 2 ? 8 : 0); }

__device__ __forceinline__ void write_state(float* to, const State& state) {
#pragma unroll
    for (int i = 0; i < 16; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) to[state_place(i, e)] = state[i][e];
}
