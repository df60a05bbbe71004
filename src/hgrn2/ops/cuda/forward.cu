// Forward pass for K = V = 128: see docs/kernels.md for the picture.
//
// The method is that of hgrn2/ops/chunked.py: blocks of 1, 2, 4, ... tokens are joined in pairs, and decays are only
// ever multiplied. Joins up to 16 tokens happen in registers, between lanes; the four blocks of a chunk meet through
// shared memory. The state lives in registers, transposed: each warp holds 16 of the 128 columns of V.

struct ForwardArguments {
    const void* q;
    const void* f;
    const void* v;
    const float* bound;    // [H, K] or null
    void* y;               // [B, T, H, V], contiguous
    const float* initial;  // state before each segment, [B, segments, H, K, V], or null for zeros
    float* final;          // [B, H, K, V]: state after the last segment
    float* update;         // summaries: [B, segments, H, K, V], what a segment adds to the state
    float* decay;          // summaries: [B, segments, H, 2, K], the decay across a segment and 1 minus it
    i64 q_batch, q_row, q_head, f_batch, f_row, f_head, v_batch, v_row, v_head;
    i64 length;
    int heads, segments, segment_chunks, reverse, q_activation;
    float scale;
};

struct Lane {
    int warp, lane, g, c;  // lane = 4 g + c
    int block, half;       // in the gate phases: 16 tokens and 64 channels of a warp
};

// Shared memory: q, f, v of the chunk worked on and of the next; keys times the decay to the chunk's end; scores of the
// lower and the upper 64 channels; decays of the blocks [4, 128] and of the chunk [128]; beta [128]
struct Memory {
    char* start;
    __device__ __forceinline__ u32 tile(int stage, int which) const {
        return shared_address(start) + (3 * stage + which) * TILE_BYTES;
    }
    __device__ __forceinline__ u32 keys() const { return shared_address(start) + 6 * TILE_BYTES; }
    __device__ __forceinline__ u32 scores(int half) const {
        return shared_address(start) + 7 * TILE_BYTES + half * SCORE_BYTES;
    }
    __device__ __forceinline__ float* blocks() const { return (float*)(start + 7 * TILE_BYTES + 2 * SCORE_BYTES); }
    __device__ __forceinline__ float* whole() const { return blocks() + 4 * WIDTH; }
    __device__ __forceinline__ float* beta() const { return whole() + WIDTH; }
};

constexpr int FORWARD_SHARED = 7 * TILE_BYTES + 2 * SCORE_BYTES + 6 * WIDTH * 4;

template <bool OUTPUT>
__device__ __forceinline__ void fetch(const ForwardArguments& a, const Memory& m, int stage, i64 chunk,
                                      const char* q, const char* f, const char* v) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = (threadIdx.x >> 4) + 16 * i, piece = threadIdx.x & 15;
        i64 time = chunk * CHUNK + row;
        bool exists = time < a.length;
        i64 at = exists ? (a.reverse ? a.length - 1 - time : time) : 0;
        u32 to = tile_place(row, piece);
        if (OUTPUT) copy_async(m.tile(stage, 0) + to, q + at * a.q_row * 2 + piece * 16, exists);
        copy_async(m.tile(stage, 1) + to, f + at * a.f_row * 2 + piece * 16, exists);
        copy_async(m.tile(stage, 2) + to, v + at * a.v_row * 2 + piece * 16, exists);
    }
    copy_commit();
}

// A warp's 16 tokens x 64 channels: 4 fragments of 8 numbers
struct Gates {
    float q[4][8], k[4][8], decay[4][8];
    float scores[4];  // [row g, col 2c], [g, 2c + 1], [g + 8, 2c + 8], [g + 8, 2c + 9] of the 16 x 16 block
    float cross[2];   // [g + 8, 2c], [g + 8, 2c + 1]
};

// Gates of a chunk, and all joins up to blocks of 16 tokens. Leaves the joined keys in the tile of f.
template <bool OUTPUT>
__device__ __forceinline__ void join_blocks(const ForwardArguments& a, const Memory& m, const Lane& l, int stage,
                                            i64 chunk, Gates& x) {
    u32 q_tile = m.tile(stage, 0), f_tile = m.tile(stage, 1);
    int row = 16 * l.block + (l.lane & 15);
    bool partial = (chunk + 1) * CHUNK > a.length;
    float diagonal[2] = {0.0f, 0.0f};
#pragma unroll
    for (int t = 0; t < 4; t++) {
        int piece = 8 * l.half + 2 * t;
        u32 raw[4];
        load_fragment(raw, f_tile + tile_place(row, piece + (l.lane >> 4)));
        float2 beta_low = *(const float2*)(m.beta() + 8 * piece + 2 * l.c);
        float2 beta_high = *(const float2*)(m.beta() + 8 * piece + 2 * l.c + 8);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float z0, z1;
            unpack(raw[i], z0, z1);
            tied_gate(z0, i < 2 ? beta_low.x : beta_high.x, x.decay[t][2 * i], x.k[t][2 * i]);
            tied_gate(z1, i < 2 ? beta_low.y : beta_high.y, x.decay[t][2 * i + 1], x.k[t][2 * i + 1]);
        }
        if (partial) {
#pragma unroll
            for (int e = 0; e < 8; e++) {
                i64 time = chunk * CHUNK + 16 * l.block + l.g + ((e & 2) ? 8 : 0);
                if (time >= a.length) x.decay[t][e] = 1.0f, x.k[t][e] = 0.0f;
            }
        }
        if (OUTPUT) {
            load_fragment(raw, q_tile + tile_place(row, piece + (l.lane >> 4)));
#pragma unroll
            for (int i = 0; i < 4; i++) unpack(raw[i], x.q[t][2 * i], x.q[t][2 * i + 1]);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                float q = x.q[t][e];
                if (a.q_activation) q = a.q_activation == 1 ? q * sigmoid(q) : sigmoid(q);
                q *= a.scale;
                diagonal[(e >> 1) & 1] = fmaf(q, x.k[t][e], diagonal[(e >> 1) & 1]);
                x.q[t][e] = q * x.decay[t][e];
            }
        }
    }
    // which level of joins two tokens of one block of 8 meet at: 1, 2, 4; 8 stands for one token and itself
    int level[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int column = 2 * l.c + i, differ = l.g ^ column;
        level[i] = column > l.g ? 0 : differ == 0 ? 8 : differ >= 4 ? 4 : differ >= 2 ? 2 : 1;
    }
    if (OUTPUT) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            diagonal[i] += __shfl_xor_sync(~0u, diagonal[i], 1);
            diagonal[i] += __shfl_xor_sync(~0u, diagonal[i], 2);
            x.scores[2 * i] = level[0] == 8 ? diagonal[i] : 0.0f;
            x.scores[2 * i + 1] = level[1] == 8 ? diagonal[i] : 0.0f;
        }
    }
#pragma unroll
    for (int size = 1; size <= 4; size *= 2) {
        bool late = l.g & size;
        if (OUTPUT) {
            // one fragment holds queries in late rows and keys in early ones: its product with itself all the pairs
            float low[4] = {0.0f, 0.0f, 0.0f, 0.0f}, high[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int t = 0; t < 4; t++) {
                u32 both[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    both[i] = pack(late ? x.q[t][2 * i] : x.k[t][2 * i], late ? x.q[t][2 * i + 1] : x.k[t][2 * i + 1]);
                multiply(low, both, both[0], both[2]);
                multiply(high, both, both[1], both[3]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (level[i] == size) x.scores[i] = low[i], x.scores[2 + i] = high[2 + i];
        }
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int e = 0; e < 8; e++) {
                float other = __shfl_xor_sync(~0u, x.decay[t][e], 4 * size);
                if (!late) x.k[t][e] *= other;
                else if (OUTPUT) x.q[t][e] *= other;
                x.decay[t][e] *= other;
            }
    }
    // blocks of 8: rows g and g + 8 are in one lane
    if (OUTPUT) {
        float products[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int t = 0; t < 4; t++) {
            u32 late[4] = {0u, pack(x.q[t][2], x.q[t][3]), 0u, pack(x.q[t][6], x.q[t][7])};
            multiply(products, late, pack(x.k[t][0], x.k[t][1]), pack(x.k[t][4], x.k[t][5]));
        }
        x.cross[0] = products[2], x.cross[1] = products[3];
    }
#pragma unroll
    for (int t = 0; t < 4; t++) {
#pragma unroll
        for (int e = 0; e < 8; e++) {
            if (e & 2) {
                if (OUTPUT) x.q[t][e] *= x.decay[t][e - 2];
            } else {
                x.k[t][e] *= x.decay[t][e + 2];
            }
        }
        int column = 64 * l.half + 16 * t + 2 * l.c;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            x.decay[t][i] *= x.decay[t][i + 2];
            x.decay[t][4 + i] *= x.decay[t][6 + i];
        }
        if (l.g == 0) {
            float* to = m.blocks() + l.block * WIDTH + column;
            *(float2*)to = make_float2(x.decay[t][0], x.decay[t][1]);
            *(float2*)(to + 8) = make_float2(x.decay[t][4], x.decay[t][5]);
        }
        if (OUTPUT) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int to_row = 16 * l.block + l.g + ((i & 1) ? 8 : 0);
                u32 to = f_tile + tile_place(to_row, 8 * l.half + 2 * t + (i >> 1)) + 4 * l.c;
                store_shared(to, pack(x.k[t][2 * i], x.k[t][2 * i + 1]));
            }
        }
    }
}

__device__ __forceinline__ void scale_by(float (&x)[4][8], const float* decay) {
#pragma unroll
    for (int t = 0; t < 4; t++) {
        float2 low = *(const float2*)(decay + 16 * t), high = *(const float2*)(decay + 16 * t + 8);
        x[t][0] *= low.x, x[t][1] *= low.y, x[t][2] *= low.x, x[t][3] *= low.y;
        x[t][4] *= high.x, x[t][5] *= high.y, x[t][6] *= high.x, x[t][7] *= high.y;
    }
}

__device__ __forceinline__ void store_tile(u32 tile, const Lane& l, const float (&x)[4][8]) {
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = 16 * l.block + l.g + ((i & 1) ? 8 : 0);
            u32 to = tile + tile_place(row, 8 * l.half + 2 * t + (i >> 1)) + 4 * l.c;
            store_shared(to, pack(x[t][2 * i], x[t][2 * i + 1]));
        }
}

// The four blocks of a chunk meet. Leaves scores, and queries and keys as the state needs them.
template <bool OUTPUT>
__device__ __forceinline__ void join_chunk(const Memory& m, const Lane& l, int stage, Gates& x) {
    const float* decays = m.blocks() + 64 * l.half + 2 * l.c;
    if (OUTPUT) {
        u32 scores = m.scores(l.half), f_tile = m.tile(stage, 1);
        int low_row = 16 * l.block + l.g, high_row = low_row + 8, piece = 2 * l.block;
        store_shared(scores + score_place(low_row, piece) + 4 * l.c, pack(x.scores[0], x.scores[1]));
        store_shared(scores + score_place(low_row, piece + 1) + 4 * l.c, 0u);
        store_shared(scores + score_place(high_row, piece) + 4 * l.c, pack(x.cross[0], x.cross[1]));
        store_shared(scores + score_place(high_row, piece + 1) + 4 * l.c, pack(x.scores[2], x.scores[3]));
        for (int early = l.block - 1; early >= 0; early--) {
            float low[4] = {0.0f, 0.0f, 0.0f, 0.0f}, high[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int t = 0; t < 4; t++) {
                u32 late[4], keys[4];
#pragma unroll
                for (int i = 0; i < 4; i++) late[i] = pack(x.q[t][2 * i], x.q[t][2 * i + 1]);
                load_fragment(keys, f_tile + tile_place(16 * early + (l.lane & 15), 8 * l.half + 2 * t + (l.lane >> 4)));
                multiply(low, late, keys[0], keys[2]);
                multiply(high, late, keys[1], keys[3]);
            }
            piece = 2 * early;
            store_shared(scores + score_place(low_row, piece) + 4 * l.c, pack(low[0], low[1]));
            store_shared(scores + score_place(high_row, piece) + 4 * l.c, pack(low[2], low[3]));
            store_shared(scores + score_place(low_row, piece + 1) + 4 * l.c, pack(high[0], high[1]));
            store_shared(scores + score_place(high_row, piece + 1) + 4 * l.c, pack(high[2], high[3]));
            scale_by(x.q, decays + early * WIDTH);
        }
        store_tile(m.tile(stage, 0), l, x.q);
    }
    for (int after = l.block + 1; after < 4; after++) scale_by(x.k, decays + after * WIDTH);
    store_tile(m.keys(), l, x.k);
    if (threadIdx.x < WIDTH) {
        const float* d = m.blocks() + threadIdx.x;
        m.whole()[threadIdx.x] = d[0] * d[WIDTH] * (d[2 * WIDTH] * d[3 * WIDTH]);
    }
}

// Outputs of a chunk and the state after it. state[i][.]: columns 8 i ... of K, rows 16 warp ... of V.
template <bool OUTPUT>
__device__ __forceinline__ void advance(const ForwardArguments& a, const Memory& m, const Lane& l, int stage, i64 chunk,
                                        float (&state)[16][4], char* y) {
    int row = l.lane & 15, side = l.lane >> 4;
    u32 v_tile = m.tile(stage, 2), keys = m.keys();
    u32 values[4][4];
#pragma unroll
    for (int s = 0; s < 4; s++)
        load_fragment_transposed(values[s], v_tile + tile_place(16 * s + row, 2 * l.warp + side));
    if (OUTPUT) {
        u32 q_tile = m.tile(stage, 0);
        float out[4][2][4];
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int i = 0; i < 8; i++) out[t][i >> 2][i & 3] = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 low0 = pack(state[2 * i][0], state[2 * i][1]), low1 = pack(state[2 * i + 1][0], state[2 * i + 1][1]);
            u32 high0 = pack(state[2 * i][2], state[2 * i][3]), high1 = pack(state[2 * i + 1][2], state[2 * i + 1][3]);
#pragma unroll
            for (int t = 0; t < 4; t++) {
                u32 q[4];
                load_fragment(q, q_tile + tile_place(16 * t + row, 2 * i + side));
                multiply(out[t][0], q, low0, low1);
                multiply(out[t][1], q, high0, high1);
            }
        }
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int s = 0; s <= t; s++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    u32 scores[4];
                    load_fragment(scores, m.scores(half) + score_place(16 * t + row, 2 * s + side));
                    multiply(out[t][0], scores, values[s][0], values[s][1]);
                    multiply(out[t][1], scores, values[s][2], values[s][3]);
                }
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                i64 time = chunk * CHUNK + 16 * t + l.g + 8 * i;
                if (time < a.length) {
                    i64 at = (a.reverse ? a.length - 1 - time : time) * a.heads * WIDTH + 16 * l.warp + 2 * l.c;
                    *(u32*)(y + at * 2) = pack(out[t][0][2 * i], out[t][0][2 * i + 1]);
                    *(u32*)(y + at * 2 + 16) = pack(out[t][1][2 * i], out[t][1][2 * i + 1]);
                }
            }
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float2 d = *(const float2*)(m.whole() + 8 * i + 2 * l.c);
        state[i][0] *= d.x, state[i][1] *= d.y, state[i][2] *= d.x, state[i][3] *= d.y;
    }
#pragma unroll
    for (int s = 0; s < 4; s++) {
        u32 left[4] = {values[s][0], values[s][2], values[s][1], values[s][3]};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 k[4];
            load_fragment_transposed(k, keys + tile_place(16 * s + row, 2 * i + side));
            multiply(state[2 * i], left, k[0], k[1]);
            multiply(state[2 * i + 1], left, k[2], k[3]);
        }
    }
}

// One segment of one head of one sequence: its outputs and the last state or, without OUTPUT, what it adds to the state.
template <bool OUTPUT>
__device__ __forceinline__ void walk(const ForwardArguments& a, char* shared) {
    Memory m = {shared};
    Lane l;
    l.warp = threadIdx.x >> 5, l.lane = threadIdx.x & 31, l.g = l.lane >> 2, l.c = l.lane & 3;
    l.block = l.warp & 3, l.half = l.warp >> 2;
    int segment = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
    i64 chunks = (a.length + CHUNK - 1) / CHUNK;
    i64 chunk = (i64)segment * a.segment_chunks;
    i64 end = chunk + a.segment_chunks < chunks ? chunk + a.segment_chunks : chunks;
    i64 own = (((i64)batch * a.segments + segment) * a.heads + head) * WIDTH * WIDTH;
    const char* q = (const char*)a.q + (batch * a.q_batch + head * a.q_head) * 2;
    const char* f = (const char*)a.f + (batch * a.f_batch + head * a.f_head) * 2;
    const char* v = (const char*)a.v + (batch * a.v_batch + head * a.v_head) * 2;
    char* y = (char*)a.y + ((i64)batch * a.length * a.heads + head) * WIDTH * 2;

    float state[16][4];
    int v_row = 16 * l.warp + l.g;
#pragma unroll
    for (int i = 0; i < 16; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float* from = a.initial + own + (8 * i + 2 * l.c + (e & 1)) * WIDTH + v_row + (e & 2 ? 8 : 0);
            state[i][e] = OUTPUT && a.initial ? *from : 0.0f;
        }
    float decay = 1.0f;
    if (threadIdx.x < WIDTH) m.beta()[threadIdx.x] = a.bound ? a.bound[head * WIDTH + threadIdx.x] : 0.0f;

    Gates x;
    int stage = 0;
    fetch<OUTPUT>(a, m, 0, chunk, q, f, v);
    copy_wait();
    __syncthreads();
    if (chunk + 1 < end) fetch<OUTPUT>(a, m, 1, chunk + 1, q, f, v);
    join_blocks<OUTPUT>(a, m, l, 0, chunk, x);
    __syncthreads();
    join_chunk<OUTPUT>(m, l, 0, x);
    for (;;) {
        copy_wait();
        __syncthreads();
        // while some warps multiply matrices, others are at the gates of the next chunk
        advance<OUTPUT>(a, m, l, stage, chunk, state, y);
        if (!OUTPUT && threadIdx.x < WIDTH) decay *= m.whole()[threadIdx.x];
        if (++chunk == end) break;
        join_blocks<OUTPUT>(a, m, l, stage ^ 1, chunk, x);
        __syncthreads();
        if (chunk + 1 < end) fetch<OUTPUT>(a, m, stage, chunk + 1, q, f, v);
        stage ^= 1;
        join_chunk<OUTPUT>(m, l, stage, x);
    }
    float* to = a.update + own;
    if (OUTPUT) {
        if (segment != a.segments - 1) return;
        to = a.final + ((i64)batch * a.heads + head) * WIDTH * WIDTH;
    } else if (threadIdx.x < WIDTH) {
        float* out = a.decay + own / WIDTH * 2 + threadIdx.x;
        out[0] = decay, out[WIDTH] = 1.0f - decay;
    }
#pragma unroll
    for (int i = 0; i < 16; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            to[(8 * i + 2 * l.c + (e & 1)) * WIDTH + v_row + (e & 2 ? 8 : 0)] = state[i][e];
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward_outputs(const __grid_constant__ ForwardArguments a) {
    extern __shared__ __align__(128) char shared[];
    walk<true>(a, shared);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward_summaries(const __grid_constant__ ForwardArguments a) {
    extern __shared__ __align__(128) char shared[];
    walk<false>(a, shared);
}
