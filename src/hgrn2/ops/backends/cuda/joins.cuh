// The exact way through a chunk, for gates that are too near to 0 for the dense products of dense.cuh and backward.cu.
//
// The method is that of hgrn2/ops/backends/chunked: blocks of 1, 2, 4, ... tokens are joined in pairs, and decays are only
// ever multiplied. A lane holds two channels of 16 tokens, so that joins up to 16 tokens stay within it (and happen at
// once, as dense products do, where the gates allow that); the four blocks of a chunk meet through shared memory.

// A 16 x 64 piece of a tile, written by `row`, as four fragments
__device__ __forceinline__ void load_block(u32 (&r)[4][4], u32 tile, const Place& at, int block) {
    int row = 16 * block + (at.lane & 15);
#pragma unroll
    for (int t = 0; t < 4; t++) load_fragment(r[t], tile + panel_place(row, 8 * at.half + 2 * t + (at.lane >> 4)));
}

// first + second of the lanes with `bit`, of the others second + first: each side keeps one sum and sends the other
__device__ __forceinline__ float exchange(float first, float second, int lane, int bit) {
    bool side = lane & bit;
    return (side ? second : first) + __shfl_xor_sync(~0u, side ? first : second, bit);
}

// Joins pairs of neighbouring blocks of SIZE tokens: their scores, and the products of decays over both
template <int SIZE>
__device__ __forceinline__ void join_level(u32 scratch, const Place& at, Gates& x) {
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
#pragma unroll
    for (int early = 0; early < 16; early += 2 * SIZE)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float first = x.decay[early][j], second = x.decay[early + SIZE][j];
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                x.k[early + i][j] *= second;
                x.q[early + SIZE + i][j] *= first;
            }
            x.decay[early][j] = first * second;
        }
}

// Whether a warp's 16 tokens can meet in one product of queries and keys relative to their middle, as far as the lane sees
__device__ __forceinline__ bool block_is_dense(const Gates& x) {
    float2 early = make_float2(1.0f, 1.0f), late = early;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        early.x *= x.decay[i][0], early.y *= x.decay[i][1];
        late.x *= x.decay[8 + i][0], late.y *= x.decay[8 + i][1];
    }
    return early.x >= SMALLEST && early.y >= SMALLEST && late.x >= SMALLEST && late.y >= SMALLEST;
}

// What the joins up to blocks of 16 tokens find, by one product.
__device__ __forceinline__ void meet_at_once(const ForwardArguments& a, const Place& at, u32 q_tile, u32 f_tile, Gates& x) {
    // decays since the middle, one over those to it, and since the start; then one over the first, and to the end
    float2 e = make_float2(1.0f, 1.0f), since = e, rest = e;
#pragma unroll
    for (int i = 0; i < 8; i++) e.x *= x.decay[i][0], e.y *= x.decay[i][1];
    e.x = reciprocal(e.x), e.y = reciprocal(e.y);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float q0, q1;
        unpack(load_shared(at.row(q_tile, i)), q0, q1);
        q0 = activate(q0) * a.scale, q1 = activate(q1) * a.scale;
        e.x *= x.decay[i][0], e.y *= x.decay[i][1];
        since.x *= x.decay[i][0], since.y *= x.decay[i][1];
        store_shared(at.row(q_tile, i), pack(q0 * e.x, q1 * e.y));
        x.q[i][0] = q0 * since.x, x.q[i][1] = q1 * since.y;
    }
    e.x = reciprocal(e.x), e.y = reciprocal(e.y);
#pragma unroll
    for (int i = 15; i >= 0; i--) {
        store_shared(at.row(f_tile, i), pack(x.k[i][0] * e.x, x.k[i][1] * e.y));
        x.k[i][0] *= rest.x, x.k[i][1] *= rest.y;
        e.x *= x.decay[i][0], e.y *= x.decay[i][1];
        rest.x *= x.decay[i][0], rest.y *= x.decay[i][1];
    }
    __syncwarp();
    float left[4] = {0.0f, 0.0f, 0.0f, 0.0f}, right[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    u32 queries[4][4], keys[4][4];
    load_block(queries, q_tile, at, 0);
    load_block(keys, f_tile, at, 0);
#pragma unroll
    for (int t = 0; t < 4; t++) {
        multiply(left, queries[t], keys[t][0], keys[t][2]);
        multiply(right, queries[t], keys[t][1], keys[t][3]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        bool here = 2 * at.c + i <= at.g;
        x.scores[i] = here ? left[i] : 0.0f, x.scores[2 + i] = here ? right[2 + i] : 0.0f;
        x.cross[i] = left[2 + i];
    }
}

// All joins up to blocks of 16 tokens. Leaves the joined keys in the tile of f.
__device__ __forceinline__ void join_tokens(const ForwardArguments& a, const Memory& m, const Place& at, int stage,
                                            Gates& x) {
    // a warp's own piece of the tiles is free for other things once it is read
    u32 q_tile = m.tile(stage, 0) + at.block * 16 * 128, f_tile = m.tile(stage, 1) + at.block * 16 * 128;
    if (__ballot_sync(~0u, block_is_dense(x)) == ~0u) {
        meet_at_once(a, at, q_tile, f_tile, x);
    } else {
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
        // a warp's own pieces of the tiles serve in turn
        join_level<1>(f_tile, at, x);
        join_level<2>(q_tile, at, x);
        join_level<4>(f_tile, at, x);
        join_level<8>(q_tile, at, x);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; i++) store_shared(at.row(f_tile, i), pack(x.k[i][0], x.k[i][1]));
}

// Scores of the four blocks, as sums of two numbers like those of dense_scores, and queries with the decays since the
// chunk's start.
__device__ __forceinline__ void join_blocks(const Memory& m, const Place& at, int stage, int slot, Gates& x) {
    const float* decays = m.blocks() + 64 * at.half + 2 * at.lane;
    u32 scores = m.scores(slot, 0), q_tile = m.tile(stage, 0), f_tile = m.tile(stage, 1);
    u32 own = q_tile + at.block * 16 * 128;
    u32 row = scores + (16 * at.block + at.g) * CHUNK * 2 + 4 * at.c;
    // 16 x 16 scores: those of the second half of the channels lie, in float32, where the sum with the first half's goes
    auto write = [&](int block, const float(&left)[4], const float(&right)[4]) {
        auto each = [&](auto work) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float(&side)[4] = i & 1 ? right : left;
                // a piece's place is XORed with the row modulo 8, which is g
                u32 to = row + (i >> 1) * 8 * CHUNK * 2 + (((2 * block + (i & 1)) ^ at.g) << 4);
                work(to, side[i & 2], side[(i & 2) + 1]);
            }
        };
        if (at.half)
            each([](u32 to, float first, float second) {
                store_shared(to, __float_as_uint(first)), store_shared(to + SCORE_BYTES, __float_as_uint(second));
            });
        barrier_wait(PAIRS + at.block, 64);
        if (!at.half)
            each([](u32 to, float first, float second) {
                first += __uint_as_float(load_shared(to));
                second += __uint_as_float(load_shared(to + SCORE_BYTES));
                u32 high = pack(first, second);
                float high_first, high_second;
                unpack(high, high_first, high_second);
                store_shared(to, high), store_shared(to + SCORE_BYTES, pack(first - high_first, second - high_second));
            });
    };
    {
        float left[4] = {x.scores[0], x.scores[1], x.cross[0], x.cross[1]};
        float right[4] = {0.0f, 0.0f, x.scores[2], x.scores[3]};
        write(at.block, left, right);
    }
    for (int early = at.block - 1;; early--) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; i++) store_shared(at.row(own, i), pack(x.q[i][0], x.q[i][1]));
        if (early < 0) break;
        __syncwarp();
        float left[4] = {0.0f, 0.0f, 0.0f, 0.0f}, right[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        u32 late[4][4], others[4][4];
        load_block(late, q_tile, at, at.block);
        load_block(others, f_tile, at, early);
#pragma unroll
        for (int t = 0; t < 4; t++) {
            multiply(left, late[t], others[t][0], others[t][2]);
            multiply(right, late[t], others[t][1], others[t][3]);
        }
        write(early, left, right);
        float2 d = *(const float2*)(decays + early * WIDTH);
#pragma unroll
        for (int i = 0; i < 16; i++) x.q[i][0] *= d.x, x.q[i][1] *= d.y;
    }
}

// Scores, and queries and keys as the state needs them, which replace q and f. Gates are read once more: handed over,
// they would decide the registers of the way that most chunks go.
__device__ __forceinline__ void join(const ForwardArguments& a, const Memory& m, int stage, int slot, int left) {
    Gates x;
    Place at = read_gates(m, stage, left, x);
    join_tokens(a, m, at, stage, x);
    barrier_wait(GATES, GATE_THREADS);
    join_blocks(m, at, stage, slot, x);
    // the joined keys are read by other warps until here
    barrier_wait(GATES, GATE_THREADS);
    const float* decays = m.blocks() + 64 * at.half + 2 * at.lane;
    float2 rest = make_float2(1.0f, 1.0f);
    for (int block = at.block + 1; block < 4; block++) {
        float2 d = *(const float2*)(decays + block * WIDTH);
        rest.x *= d.x, rest.y *= d.y;
    }
    u32 own = m.tile(stage, 1) + at.block * 16 * 128;
#pragma unroll
    for (int i = 0; i < 16; i++) store_shared(at.row(own, i), pack(x.k[i][0] * rest.x, x.k[i][1] * rest.y));
}
