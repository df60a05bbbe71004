// The forward pass, and most of the backward pass, for K = V = 128: see docs/kernels.md for the picture.
//
// The method is that of hgrn2/ops/chunked.py: blocks of 1, 2, 4, ... tokens are joined in pairs, and decays are only
// ever multiplied. A lane of a gate warp holds two channels of 16 tokens, so that joins up to 16 tokens stay within it;
// the four blocks of a chunk meet through shared memory. The state lives in the registers of the state warps,
// transposed: each warp holds 32 of the 128 columns of V.
//
// The gradient of v is the same walk from the last chunk to the first (BACK): keys and queries exchange their roles,
// dy is the value, and the state is the gradient of the state. Modes:
//     OUTPUT  outputs (y or dv); without it only the state is carried
//     BACK    backwards
//     KEEP    the state before each chunk (BACK: the gradient of the state after it) is written down

struct WalkArguments {
    const void* q;
    const void* f;
    const void* v;
    const float* bound;    // [H, K] or null
    void* y;               // [B, T, H, V], contiguous
    const float* initial;  // state before each segment, [B, segments, initial_heads, K, V], or null for zeros
    float* final;          // [B, H, K, V]: state after the last segment; null if not wanted
    float* update;         // neither OUTPUT nor KEEP: [B, segments, G, K, V], what a segment adds to the state
    float* decay;          // neither OUTPUT nor KEEP: [B, segments, G, 2, K], decay across a segment and 1 minus it
    float* coarse;         // OUTPUT and not BACK: state every coarse_chunks, [B, ceil(chunks / coarse_chunks), H, K, V]
    void* kept;            // KEEP: [B, chunks, G, V, K] in the inputs' type, each half of K in the order
                           // channel 8 i + 2 c + e at 16 c + 2 i + e
    float* kept_decay;     // KEEP and not BACK: [B, chunks, G, K], decay across each chunk
    i64 q_batch, q_row, q_head, f_batch, f_row, f_head, v_batch, v_row, v_head;
    i64 length;
    int heads, segments, segment_chunks, coarse_chunks, reverse;
    int first_head;  // of the G heads of this launch
    int initial_heads, initial_first;
    float scale;
};

#ifndef GATE_REGISTERS
#define GATE_REGISTERS 136
#endif
// 12 warps start with 168 registers a lane; what the gate warps give up the state warps get
constexpr int STATE_REGISTERS = 168 + 2 * (168 - GATE_REGISTERS);
constexpr int PARTS = 2;  // of 16 columns of V, that a state warp holds
constexpr int STAGES = 3;
// barriers: among the gate warps; slots filled for the state warps, and emptied by them
constexpr int GATES = 1, FILLED = 2, EMPTIED = 4;

// Shared memory: q, f, v of STAGES chunks; for two chunks (slots) keys times the decay to the chunk's end, scores of
// the lower and the upper 64 channels, decays of the chunk [128]; decays of the blocks [4, 128]; beta [128]. launch.py
// knows the size
struct Memory {
    char* start;
    __device__ __forceinline__ u32 tile(int stage, int which) const {
        return shared_address(start) + (3 * stage + which) * TILE_BYTES;
    }
    __device__ __forceinline__ u32 keys(int slot) const {
        return shared_address(start) + (3 * STAGES + slot) * TILE_BYTES;
    }
    __device__ __forceinline__ u32 scores(int slot, int half) const {
        return shared_address(start) + (3 * STAGES + 2) * TILE_BYTES + (2 * slot + half) * SCORE_BYTES;
    }
    __device__ __forceinline__ float* whole(int slot) const {
        return (float*)(start + (3 * STAGES + 2) * TILE_BYTES + 4 * SCORE_BYTES) + slot * WIDTH;
    }
    __device__ __forceinline__ float* blocks() const { return whole(2); }
    __device__ __forceinline__ float* beta() const { return whole(6); }
};

// One head of one sequence
struct Row {
    const char* q;
    const char* f;
    const char* v;
    char* y;
};

template <bool QUERIES>
__device__ __forceinline__ void fetch(const WalkArguments& a, const Memory& m, int stage, i64 chunk, const Row& from) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = (threadIdx.x >> 4) + 16 * i, piece = threadIdx.x & 15;
        i64 time = chunk * CHUNK + row;
        bool exists = time < a.length;
        i64 at = exists ? (a.reverse ? a.length - 1 - time : time) : 0;
        u32 to = tile_place(row, piece);
        if (QUERIES) copy_async(m.tile(stage, 0) + to, from.q + at * a.q_row * 2 + piece * 16, exists);
        copy_async(m.tile(stage, 1) + to, from.f + at * a.f_row * 2 + piece * 16, exists);
        copy_async(m.tile(stage, 2) + to, from.v + at * a.v_row * 2 + piece * 16, exists);
    }
    copy_commit();
}

// What a lane of a gate warp holds: 16 tokens x 2 channels
struct Gates {
    float q[16][2], k[16][2], decay[16][2];
    // of the 16 x 16 scores of the warp's tokens: [row g, col 2c], [g, 2c + 1], [g + 8, 2c + 8], [g + 8, 2c + 9], and
    // [g + 8, 2c], [g + 8, 2c + 1]
    float scores[4], cross[2];
};

// Which part of a chunk a gate warp works on, and where its lane's two channels are in the first 8 rows of a tile
struct Place {
    int lane, g, c, block, half;
    u32 column;
    __device__ __forceinline__ u32 row(u32 tile, int i) const {
        // 16 block + i is i modulo 8, which is what a piece's place is XORed with
        return tile + ((column ^ ((i & 7) << 4)) + i * ROW_BYTES);
    }
};

// A 16 x 64 piece of a tile, written by `row`, as four fragments
__device__ __forceinline__ void load_block(u32 (&r)[4][4], u32 tile, const Place& at, int block) {
    int row = 16 * block + (at.lane & 15);
#pragma unroll
    for (int t = 0; t < 4; t++) load_fragment(r[t], tile + tile_place(row, 8 * at.half + 2 * t + (at.lane >> 4)));
}

// first + second of the lanes with `bit`, of the others second + first: each side keeps one sum and sends the other
__device__ __forceinline__ float exchange(float first, float second, int lane, int bit) {
    bool side = lane & bit;
    return (side ? second : first) + __shfl_xor_sync(~0u, side ? first : second, bit);
}

// Joins pairs of neighbouring blocks of SIZE tokens: their scores, and the products of decays over both
template <bool OUTPUT, bool BACK, int SIZE>
__device__ __forceinline__ void join_level(u32 scratch, const Place& at, Gates& x) {
    if (OUTPUT) {
        // one piece holds queries in late rows and keys in early ones: its product with itself all the pairs
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; i++)
            store_shared(at.row(scratch, i), i & SIZE ? pack(x.q[i][0], x.q[i][1]) : pack(x.k[i][0], x.k[i][1]));
        __syncwarp();
        float low[4] = {0.0f, 0.0f, 0.0f, 0.0f}, high[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        u32 both[4][4];
        load_block(both, scratch, at, 0);
#pragma unroll
        for (int t = 0; t < 4; t++) {
            multiply(low, both[t], both[t][0], both[t][2]);
            if (SIZE < 8) multiply(high, both[t], both[t][1], both[t][3]);
        }
        if (SIZE == 8) x.cross[0] = low[2], x.cross[1] = low[3];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int column = 2 * at.c + i, differ = at.g ^ column;
            bool here = column < at.g && differ >= SIZE && differ < 2 * SIZE;
            if (SIZE < 8) x.scores[i] = here ? low[i] : x.scores[i];
            if (SIZE < 8) x.scores[2 + i] = here ? high[2 + i] : x.scores[2 + i];
        }
    }
#pragma unroll
    for (int early = 0; early < 16; early += 2 * SIZE)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float first = x.decay[early][j], second = x.decay[early + SIZE][j];
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                if (OUTPUT || !BACK) x.k[early + i][j] *= second;
                if (OUTPUT || BACK) x.q[early + SIZE + i][j] *= first;
            }
            x.decay[early][j] = first * second;
        }
}

// Gates of a chunk, and all joins up to blocks of 16 tokens. Leaves the joined keys in the tile of f.
template <bool OUTPUT, bool BACK>
__device__ __forceinline__ void join_blocks(const WalkArguments& a, const Memory& m, const Place& at, int stage,
                                            i64 chunk, Gates& x) {
    // a warp's own piece of the tiles is free for other things once it is read
    u32 q_tile = m.tile(stage, 0) + at.block * 16 * ROW_BYTES, f_tile = m.tile(stage, 1) + at.block * 16 * ROW_BYTES;
    float2 beta = *(const float2*)(m.beta() + 64 * at.half + 2 * at.lane);
    i64 left = a.length - chunk * CHUNK - 16 * at.block;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float z0, z1;
        unpack(load_shared(at.row(f_tile, i)), z0, z1);
        tied_gate(z0, beta.x, x.decay[i][0], x.k[i][0]);
        tied_gate(z1, beta.y, x.decay[i][1], x.k[i][1]);
    }
    if (left < 16) {
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (i >= left) x.decay[i][0] = x.decay[i][1] = 1.0f, x.k[i][0] = x.k[i][1] = 0.0f;
    }
    if (!OUTPUT && BACK) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float q0, q1;
            unpack(load_shared(at.row(q_tile, i)), q0, q1);
            x.q[i][0] = activate(q0) * a.scale * x.decay[i][0], x.q[i][1] = activate(q1) * a.scale * x.decay[i][1];
        }
    }
    if (OUTPUT) {
        // scores of tokens with themselves: sums over the lanes, which end where the row's fragment is
        float sums[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float some[4];
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                float part[2];
#pragma unroll
                for (int other = 0; other < 2; other++) {
                    int i = 8 * half + pair + 4 * other;
                    float q0, q1;
                    unpack(load_shared(at.row(q_tile, i)), q0, q1);
                    q0 = activate(q0) * a.scale, q1 = activate(q1) * a.scale;
                    part[other] = fmaf(q0, x.k[i][0], q1 * x.k[i][1]);
                    x.q[i][0] = q0 * x.decay[i][0], x.q[i][1] = q1 * x.decay[i][1];
                }
                some[pair] = exchange(part[0], part[1], at.lane, 16);
            }
            some[0] = exchange(some[0], some[2], at.lane, 8), some[1] = exchange(some[1], some[3], at.lane, 8);
            sums[half] = exchange(some[0], some[1], at.lane, 4);
            sums[half] += __shfl_xor_sync(~0u, sums[half], 2);
            sums[half] += __shfl_xor_sync(~0u, sums[half], 1);
            x.scores[2 * half] = 2 * at.c == at.g ? sums[half] : 0.0f;
            x.scores[2 * half + 1] = 2 * at.c + 1 == at.g ? sums[half] : 0.0f;
        }
    }
    // a warp's own pieces of the tiles serve in turn
    join_level<OUTPUT, BACK, 1>(f_tile, at, x);
    join_level<OUTPUT, BACK, 2>(q_tile, at, x);
    join_level<OUTPUT, BACK, 4>(f_tile, at, x);
    join_level<OUTPUT, BACK, 8>(q_tile, at, x);
    *(float2*)(m.blocks() + at.block * WIDTH + 64 * at.half + 2 * at.lane) = make_float2(x.decay[0][0], x.decay[0][1]);
    if (OUTPUT) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; i++) store_shared(at.row(f_tile, i), pack(x.k[i][0], x.k[i][1]));
    }
}

// The four blocks of a chunk meet. Leaves scores, and queries and keys as the state needs them.
template <bool OUTPUT, bool BACK>
__device__ __forceinline__ void join_chunk(const Memory& m, const Place& at, int stage, int slot, Gates& x) {
    const float* decays = m.blocks() + 64 * at.half + 2 * at.lane;
    float2 rest = make_float2(1.0f, 1.0f);
    for (int after = at.block + 1; after < 4; after++) {
        float2 d = *(const float2*)(decays + after * WIDTH);
        rest.x *= d.x, rest.y *= d.y;
    }
    if (OUTPUT || !BACK) {
        u32 keys = m.keys(slot) + at.block * 16 * ROW_BYTES;
#pragma unroll
        for (int i = 0; i < 16; i++) store_shared(at.row(keys, i), pack(x.k[i][0] * rest.x, x.k[i][1] * rest.y));
    } else {
        float2 since = make_float2(1.0f, 1.0f);
        for (int before = 0; before < at.block; before++) {
            float2 d = *(const float2*)(decays + before * WIDTH);
            since.x *= d.x, since.y *= d.y;
        }
        u32 own = m.tile(stage, 0) + at.block * 16 * ROW_BYTES;
#pragma unroll
        for (int i = 0; i < 16; i++) store_shared(at.row(own, i), pack(x.q[i][0] * since.x, x.q[i][1] * since.y));
    }
    if (at.block == 0) {
        float* whole = m.whole(slot) + 64 * at.half + 2 * at.lane;
        *(float2*)whole = make_float2(x.decay[0][0] * rest.x, x.decay[0][1] * rest.y);
    }
    if (OUTPUT) {
        u32 scores = m.scores(slot, at.half), q_tile = m.tile(stage, 0), f_tile = m.tile(stage, 1);
        u32 own = q_tile + at.block * 16 * ROW_BYTES;
        u32 low_row = scores + (16 * at.block + at.g) * CHUNK * 2 + 4 * at.c, high_row = low_row + 8 * CHUNK * 2;
        // a piece's place is XORed with the row modulo 8, which is g
        auto place = [&](int piece) { return (piece ^ at.g) << 4; };
        int piece = 2 * at.block;
        store_shared(low_row + place(piece), pack(x.scores[0], x.scores[1]));
        store_shared(low_row + place(piece + 1), 0u);
        store_shared(high_row + place(piece), pack(x.cross[0], x.cross[1]));
        store_shared(high_row + place(piece + 1), pack(x.scores[2], x.scores[3]));
        for (int early = at.block - 1;; early--) {
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 16; i++) store_shared(at.row(own, i), pack(x.q[i][0], x.q[i][1]));
            if (early < 0) break;
            __syncwarp();
            float low[4] = {0.0f, 0.0f, 0.0f, 0.0f}, high[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            u32 late[4][4], others[4][4];
            load_block(late, q_tile, at, at.block);
            load_block(others, f_tile, at, early);
#pragma unroll
            for (int t = 0; t < 4; t++) {
                multiply(low, late[t], others[t][0], others[t][2]);
                multiply(high, late[t], others[t][1], others[t][3]);
            }
            piece = 2 * early;
            store_shared(low_row + place(piece), pack(low[0], low[1]));
            store_shared(high_row + place(piece), pack(low[2], low[3]));
            store_shared(low_row + place(piece + 1), pack(high[0], high[1]));
            store_shared(high_row + place(piece + 1), pack(high[2], high[3]));
            float2 d = *(const float2*)(decays + early * WIDTH);
#pragma unroll
            for (int i = 0; i < 16; i++) x.q[i][0] *= d.x, x.q[i][1] *= d.y;
        }
    }
}

// What a lane of a state warp keeps from chunk to chunk
struct Reader {
    int warp, c;
    u32 tile_lane, score_lane;  // where its row of a fragment's first piece is
    char* y;                    // its first output
    int y_step;                 // bytes from a token's output to the next token's
    i64 left;                   // tokens from its first to the sequence's end
};

// state[p][i]: columns 8 i ... of K, rows 16 (PARTS warp + p) ... of V
typedef float State[PARTS][16][4];

// Outputs of a chunk and the state after it.
template <bool OUTPUT, bool BACK>
__device__ __forceinline__ void advance(const Memory& m, const Reader& r, int stage, int slot, State& state) {
    // the place of piece p + 2 i is that of p, XORed with 32 i
    u32 values_lane = (m.tile(stage, 2) + r.tile_lane) ^ (PARTS * r.warp << 5);
    u32 q_lane = (BACK ? m.keys(slot) : m.tile(stage, 0)) + r.tile_lane;
    u32 keys_lane = (BACK ? m.tile(stage, 0) : m.keys(slot)) + r.tile_lane;
    if (OUTPUT) {
        // 32 tokens at a time: the sums of all 64 and the state would not fit the registers
#pragma unroll
        for (int part = 0; part < 4; part += 2) {
            float out[2][2 * PARTS][4];
#pragma unroll
            for (int t = 0; t < 2; t++)
#pragma unroll
                for (int n = 0; n < 2 * PARTS; n++) out[t][n][0] = out[t][n][1] = out[t][n][2] = out[t][n][3] = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                u32 q[2][4];
#pragma unroll
                for (int t = 0; t < 2; t++) load_fragment(q[t], (q_lane ^ (i << 5)) + 16 * (part + t) * ROW_BYTES);
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
                    const float(&low)[4] = state[p][2 * i], (&high)[4] = state[p][2 * i + 1];
                    u32 b[4] = {pack(low[0], low[1]), pack(high[0], high[1]),
                                pack(low[2], low[3]), pack(high[2], high[3])};
#pragma unroll
                    for (int t = 0; t < 2; t++) {
                        multiply(out[t][2 * p], q[t], b[0], b[1]);
                        multiply(out[t][2 * p + 1], q[t], b[2], b[3]);
                    }
                }
            }
#pragma unroll
            for (int s = BACK ? part : 0; s <= (BACK ? 3 : part + 1); s++) {
                u32 values[PARTS][4];
#pragma unroll
                for (int p = 0; p < PARTS; p++)
                    load_fragment_transposed(values[p], (values_lane ^ (p << 5)) + 16 * s * ROW_BYTES);
#pragma unroll
                for (int t = 0; t < 2; t++) {
                    // of every pair of blocks only one is earlier
                    if (BACK ? s < part + t : s > part + t) continue;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        u32 scores[4];
                        u32 lane = m.scores(slot, half) + r.score_lane;
                        if (BACK) {
                            u32 x[4];
                            load_fragment_transposed(x, (lane ^ ((part + t) << 5)) + 16 * s * CHUNK * 2);
                            scores[0] = x[0], scores[1] = x[2], scores[2] = x[1], scores[3] = x[3];
                        } else {
                            load_fragment(scores, (lane ^ (s << 5)) + 16 * (part + t) * CHUNK * 2);
                        }
#pragma unroll
                        for (int p = 0; p < PARTS; p++) {
                            multiply(out[t][2 * p], scores, values[p][0], values[p][1]);
                            multiply(out[t][2 * p + 1], scores, values[p][2], values[p][3]);
                        }
                    }
                }
            }
#pragma unroll
            for (int t = 0; t < 2; t++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int token = 16 * (part + t) + 8 * i;
                    if (token < r.left) {
                        u32* y = (u32*)(r.y + token * r.y_step);
#pragma unroll
                        for (int n = 0; n < 2 * PARTS; n++) y[4 * n] = pack(out[t][n][2 * i], out[t][n][2 * i + 1]);
                    }
                }
        }
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float2 d = *(const float2*)(m.whole(slot) + 8 * i + 2 * r.c);
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            float(&s)[4] = state[p][i];
            s[0] *= d.x, s[1] *= d.y, s[2] *= d.x, s[3] *= d.y;
        }
    }
#pragma unroll
    for (int s = 0; s < 4; s++) {
        u32 left[PARTS][4];
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            u32 values[4];
            load_fragment_transposed(values, (values_lane ^ (p << 5)) + 16 * s * ROW_BYTES);
            left[p][0] = values[0], left[p][1] = values[2], left[p][2] = values[1], left[p][3] = values[3];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 k[4];
            load_fragment_transposed(k, (keys_lane ^ (i << 5)) + 16 * s * ROW_BYTES);
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                multiply(state[p][2 * i], left[p], k[0], k[1]);
                multiply(state[p][2 * i + 1], left[p], k[2], k[3]);
            }
        }
    }
}

template <bool OUTPUT, bool BACK>
__device__ __forceinline__ void work_on_gates(const WalkArguments& a, const Memory& m, i64 first, i64 end,
                                              const Row& from) {
    constexpr bool QUERIES = OUTPUT || BACK;
    Place at;
    int warp = threadIdx.x >> 5;
    at.lane = threadIdx.x & 31, at.g = at.lane >> 2, at.c = at.lane & 3, at.block = warp & 3, at.half = warp >> 2;
    at.column = ((8 * at.half + (at.lane >> 2)) << 4) + 4 * (at.lane & 3);
    i64 chunk = BACK ? end - 1 : first;
    fetch<QUERIES>(a, m, 0, chunk, from);
    int stage = 0, next = 1, count = (int)(end - first);
    for (int i = 0; i < count; i++, chunk += BACK ? -1 : 1) {
        int slot = i & 1;
        copy_wait();
        barrier_wait(GATES, GATE_THREADS);
        // the slot, and the stage the next chunk goes to, were last used two chunks ago
        if (i >= 2) barrier_wait(EMPTIED + slot, THREADS);
        if (i + 1 < count) fetch<QUERIES>(a, m, next, chunk + (BACK ? -1 : 1), from);
        Gates x;
        join_blocks<OUTPUT, BACK>(a, m, at, stage, chunk, x);
        barrier_wait(GATES, GATE_THREADS);
        join_chunk<OUTPUT, BACK>(m, at, stage, slot, x);
        barrier_arrive(FILLED + slot, THREADS);
        stage = next, next = next == STAGES - 1 ? 0 : next + 1;
    }
}

// where an element of a lane's state is in a state [K, V], from the lane's corner
__device__ __forceinline__ int state_place(int p, int i, int e) {
    return (8 * i + (e & 1)) * WIDTH + 16 * p + (e & 2 ? 8 : 0);
}

__device__ __forceinline__ void write_state(float* to, const State& state) {
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int i = 0; i < 16; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) to[state_place(p, i, e)] = state[p][i][e];
}

template <bool OUTPUT, bool BACK, bool KEEP>
__device__ __forceinline__ void work_on_state(const WalkArguments& a, const Memory& m, i64 first, i64 end,
                                              const Row& from) {
    constexpr bool SUMMARY = !OUTPUT && !KEEP;
    int thread = threadIdx.x - GATE_THREADS, warp = thread >> 5, lane = thread & 31, g = lane >> 2, c = lane & 3;
    int segment = blockIdx.x, local = blockIdx.y, batch = blockIdx.z, group = gridDim.y;
    i64 corner = 2 * c * WIDTH + 16 * PARTS * warp + g;
    i64 own = (i64)batch * a.segments + segment;
    State state;
    const float* initial = a.initial + (own * a.initial_heads + a.initial_first + local) * WIDTH * WIDTH + corner;
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int i = 0; i < 16; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                state[p][i][e] = !SUMMARY && a.initial ? initial[state_place(p, i, e)] : 0.0f;
    float decay = 1.0f;
    Reader r;
    r.warp = warp, r.c = c;
    int row = lane & 15, piece = (lane >> 4) ^ (row & 7);
    r.tile_lane = row * ROW_BYTES + (piece << 4), r.score_lane = row * CHUNK * 2 + (piece << 4);
    i64 chunk = BACK ? end - 1 : first, time = chunk * CHUNK + g;
    r.y_step = (a.reverse ? -1 : 1) * a.heads * WIDTH * 2;
    r.y = from.y + (a.reverse ? a.length - 1 - time : time) * a.heads * WIDTH * 2 + (16 * PARTS * warp + 2 * c) * 2;
    r.left = a.length - time;
    i64 at = ((i64)batch * ((a.length + CHUNK - 1) / CHUNK) + chunk) * group + local;
    int stage = 0, count = (int)(end - first);
    for (int i = 0; i < count; i++) {
        int slot = i & 1;
        if (KEEP) {
            // what a lane holds of each half of K lies together
            uint4* kept = (uint4*)a.kept + (at * WIDTH + 16 * PARTS * warp + g) * 16 + 2 * c;
#pragma unroll
            for (int p = 0; p < PARTS; p++)
#pragma unroll
                for (int k = 0; k < 4; k++)
#pragma unroll
                    for (int e = 0; e < 4; e += 2) {
                        uint4 four;
                        four.x = pack(state[p][4 * k][e], state[p][4 * k][e + 1]);
                        four.y = pack(state[p][4 * k + 1][e], state[p][4 * k + 1][e + 1]);
                        four.z = pack(state[p][4 * k + 2][e], state[p][4 * k + 2][e + 1]);
                        four.w = pack(state[p][4 * k + 3][e], state[p][4 * k + 3][e + 1]);
                        kept[(k >> 1) * 8 + (k & 1) + (16 * p + 4 * e) * 16] = four;
                    }
        }
        if (OUTPUT && !BACK && a.coarse && (chunk + i) % a.coarse_chunks == 0) {
            i64 pieces = ((a.length + CHUNK - 1) / CHUNK + a.coarse_chunks - 1) / a.coarse_chunks;
            i64 place = ((batch * pieces + (chunk + i) / a.coarse_chunks) * a.heads + a.first_head + local);
            write_state(a.coarse + place * WIDTH * WIDTH + corner, state);
        }
        barrier_wait(FILLED + slot, THREADS);
        advance<OUTPUT, BACK>(m, r, stage, slot, state);
        if (thread < WIDTH) {
            if (SUMMARY) decay *= m.whole(slot)[thread];
            if (KEEP && !BACK) a.kept_decay[at * WIDTH + thread] = m.whole(slot)[thread];
        }
        if (i + 2 < count) barrier_arrive(EMPTIED + slot, THREADS);
        constexpr int STEP = BACK ? -1 : 1;
        r.y += STEP * CHUNK * (i64)r.y_step, r.left -= STEP * CHUNK, at += STEP * group;
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    float* to;
    if (SUMMARY) {
        to = a.update + (own * group + local) * WIDTH * WIDTH;
        float* out = a.decay + (own * group + local) * WIDTH * 2 + thread;
        if (thread < WIDTH) out[0] = decay, out[WIDTH] = 1.0f - decay;
    } else {
        if (!OUTPUT || !a.final || segment != (BACK ? 0 : a.segments - 1)) return;
        to = a.final + ((i64)batch * a.heads + a.first_head + local) * WIDTH * WIDTH;
    }
    write_state(to + corner, state);
}

// One segment of one head of one sequence.
template <bool OUTPUT, bool BACK, bool KEEP>
__device__ __forceinline__ void walk(const WalkArguments& a) {
    extern __shared__ __align__(1024) char shared[];
    Memory m = {shared};
    int segment = blockIdx.x, head = a.first_head + blockIdx.y, batch = blockIdx.z;
    i64 chunks = (a.length + CHUNK - 1) / CHUNK;
    i64 first = (i64)segment * a.segment_chunks;
    i64 end = first + a.segment_chunks < chunks ? first + a.segment_chunks : chunks;
    Row row;
    row.q = (const char*)a.q + (batch * a.q_batch + head * a.q_head) * 2;
    row.f = (const char*)a.f + (batch * a.f_batch + head * a.f_head) * 2;
    row.v = (const char*)a.v + (batch * a.v_batch + head * a.v_head) * 2;
    row.y = (char*)a.y + ((i64)batch * a.length * a.heads + head) * WIDTH * 2;
    if (threadIdx.x < WIDTH) m.beta()[threadIdx.x] = a.bound ? a.bound[head * WIDTH + threadIdx.x] : 0.0f;
    __syncthreads();
    if (threadIdx.x < GATE_THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(GATE_REGISTERS));
        work_on_gates<OUTPUT, BACK>(a, m, first, end, row);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(STATE_REGISTERS));
        work_on_state<OUTPUT, BACK, KEEP>(a, m, first, end, row);
    }
}

#define KERNEL(NAME, OUTPUT, BACK, KEEP)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ WalkArguments a) { \
        walk<OUTPUT, BACK, KEEP>(a);                                                                         \
    }
KERNEL(forward_outputs, true, false, false)
KERNEL(forward_summaries, false, false, false)
KERNEL(forward_states, false, false, true)
KERNEL(backward_values, true, true, true)
KERNEL(backward_summaries, false, true, false)
