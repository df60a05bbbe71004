// The work of a walk's state warps: outputs of a chunk, and the state after it.

// What a lane of a state warp keeps from chunk to chunk
struct Reader {
    int warp, lane, g, c;
    int y_step;  // bytes from a token's output to the next token's
};

// state[p][i]: columns 8 i ... of K, rows 16 (PARTS warp + p) ... of V
typedef float State[PARTS][16][4];

__device__ __forceinline__ void multiply_by(State& state, const float* decays, int c) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float2 d = *(const float2*)(decays + 8 * i + 2 * c);
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            float(&s)[4] = state[p][i];
            s[0] *= d.x, s[1] *= d.y, s[2] *= d.x, s[3] *= d.y;
        }
    }
}

// Whether a warp's columns of the values are finite.
__device__ __forceinline__ bool finite_values(u32 values_lane) {
    u32 noted[4] = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < 4; s++)
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            u32 values[4];
            load_fragment(values, (values_lane ^ (p << 5)) + 16 * s * ROW_BYTES);
#pragma unroll
            for (int e = 0; e < 4; e++) note_finite(noted[e], values[e]);
        }
    // not a number, whatever its sign
    return !__any_sync(~0u, (noted[0] | noted[1] | noted[2] | noted[3]) & 0x7fff7fffu);
}

// Takes what is not finite out of a column of values: 0 times it would reach every token of the chunk. Returns the
// first token it may reach in the walk's order, or one that does not exist.
template <bool BACK>
__device__ __forceinline__ int remove_bad(u32 tile, int column) {
    constexpr u32 EXPONENT = BFLOAT16 ? 0x7f80u : 0x7c00u;
    int found = BACK ? -1 : CHUNK;
#pragma unroll 1
    for (int token = 0; token < CHUNK; token++) {
        u32 place = tile + tile_place(token, column >> 3) + 2 * (column & 7);
        unsigned short x;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(place) : "memory");
        if ((x & EXPONENT) != EXPONENT) continue;
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(place), "h"((unsigned short)0) : "memory");
        if (BACK || found == CHUNK) found = token;
    }
    return found;
}

// Adds V^T K to the state, of the values and a tile of keys.
__device__ __forceinline__ void add_products(const Memory& m, const Reader& r, int stage, int keys, State& state) {
    u32 keys_lane = m.tile(stage, keys) + fragment_lane(r.lane, ROW_BYTES);
    u32 values_lane = (m.tile(stage, 2) + turned_lane(r.lane, ROW_BYTES)) ^ (PARTS * r.warp << 5);
#pragma unroll
    for (int s = 0; s < 4; s++) {
        u32 values[PARTS][4];
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            load_fragment_transposed(values[p], (values_lane ^ (p << 5)) + 16 * s * ROW_BYTES);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 k[4];
            load_fragment_transposed(k, (keys_lane ^ (i << 5)) + 16 * s * ROW_BYTES);
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                multiply(state[p][2 * i], values[p], k[0], k[1]);
                multiply(state[p][2 * i + 1], values[p], k[2], k[3]);
            }
        }
    }
}

// Outputs of a chunk and the state after it. y: the output of token g in the lane's first column, left: tokens there are
template <bool OUTPUT, bool BACK>
__device__ __forceinline__ void advance(const Memory& m, const Reader& r, int stage, int slot, char* y, int left,
                                        State& state) {
    int said = *m.said(slot);
    // the place of piece p + 2 i is that of p, XORed with 32 i
    u32 lane = fragment_lane(r.lane, ROW_BYTES), q_lane = m.tile(stage, BACK ? 1 : 0) + lane;
    u32 values_lane = (m.tile(stage, 2) + lane) ^ (PARTS * r.warp << 5);
    bool bad = OUTPUT && !finite_values(values_lane);
    int reached = 0;
    if (bad) {
        reached = remove_bad<BACK>(m.tile(stage, 2), 16 * PARTS * r.warp + r.lane);
        __syncwarp();
    }
    multiply_by(state, m.first(slot), r.c);
    if (OUTPUT) {
        u32 scores_lane = m.scores(slot, 0) + (BACK ? turned_lane(r.lane, CHUNK * 2) : fragment_lane(r.lane, CHUNK * 2));
        // 16 columns of V at a time: the sums of all 32 and the state would not fit the registers
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            float out[4][2][4];
#pragma unroll
            for (int t = 0; t < 4; t++)
#pragma unroll
                for (int n = 0; n < 2; n++) out[t][n][0] = out[t][n][1] = out[t][n][2] = out[t][n][3] = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float(&low)[4] = state[p][2 * i], (&high)[4] = state[p][2 * i + 1];
                u32 b[4] = {pack(low[0], low[1]), pack(high[0], high[1]),
                            pack(low[2], low[3]), pack(high[2], high[3])};
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    u32 q[4];
                    load_fragment(q, (q_lane ^ (i << 5)) + 16 * t * ROW_BYTES);
                    multiply(out[t][0], q, b[0], b[1]);
                    multiply(out[t][1], q, b[2], b[3]);
                }
            }
#pragma unroll
            for (int s = 0; s < 4; s++) {
                u32 values[4];
                load_fragment_transposed(values, (values_lane ^ (p << 5)) + 16 * s * ROW_BYTES);
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    // of every pair of blocks only one is earlier
                    if (BACK ? s < t : s > t) continue;
#pragma unroll
                    for (int summand = 0; summand < 2; summand++) {
                        u32 scores[4], from = scores_lane + summand * SCORE_BYTES;
                        if (BACK)
                            load_fragment_transposed(scores, (from ^ (t << 5)) + 16 * s * CHUNK * 2);
                        else
                            load_fragment(scores, (from ^ (s << 5)) + 16 * t * CHUNK * 2);
                        multiply(out[t][0], scores, values[0], values[1]);
                        multiply(out[t][1], scores, values[2], values[3]);
                    }
                }
            }
#pragma unroll
            for (int t = 0; t < 4; t++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int token = 16 * t + 8 * i;
                    if (token + r.g < left) {
                        u32* to = (u32*)(y + token * r.y_step + 32 * p);
#pragma unroll
                        for (int n = 0; n < 2; n++) to[4 * n] = pack(out[t][n][2 * i], out[t][n][2 * i + 1]);
                    }
                }
        }
    }
    if (said & JOINED) multiply_by(state, m.second(slot), r.c);
    add_products(m, r, stage, BACK ? 0 : 1, state);
    if (said & SETTLED) multiply_by(state, m.second(slot), r.c);
    if (bad) {
        float nan = __int_as_float(0x7fffffff);
        __syncwarp();
        // the lane's own column, from the first token of the chunk
        char* own = y - r.g * r.y_step - 4 * r.c + 2 * r.lane;
#pragma unroll 1
        for (int token = 0; token < CHUNK && token < left; token++)
            if (BACK ? token <= reached : token >= reached) *(unsigned short*)(own + token * r.y_step) = 0x7fff;
#pragma unroll
        for (int p = 0; p < PARTS; p++)
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
                int of_column = __shfl_sync(~0u, reached, 16 * p + 8 * upper + r.g);
                if (BACK ? of_column < 0 : of_column == CHUNK) continue;
#pragma unroll
                for (int i = 0; i < 16; i++) state[p][i][2 * upper] = state[p][i][2 * upper + 1] = nan;
            }
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
