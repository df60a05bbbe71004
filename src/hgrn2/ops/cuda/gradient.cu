// Gradients of query and gate for K = V = 128, in parallel over chunks and halves of K; that of v is in walk.cu.
//
// With e the product of decays since the middle of the chunk (before it, one over the product up to it), Q = q e and
// K = k / e, a score is Q K^T whatever the two tokens, the state enters a query as Q M and a key leaves as K N, with M
// and N the decays across the two halves of the chunk. Then
//     dQ = M (dY S^T) + dA K      dK = N (V dS^T) + dA^T Q      dq = dQ e      dk = dK / e
//     d log f_u = sum over t >= u of (Q dQ - K dK)_t + sum of (K dK from the state) + (decay of the chunk) sum_v S dS
// The difference of sums is exact to float32 rounding, because a pair of tokens enters both with the same rounded Q
// and K. All this needs M and N to be above 2^-80 and, beside a lower bound, each decay to be above 2^-13, since the
// bound's gradient divides by it. Where that fails nothing is computed, and a flag is left for the exact kernel of
// ops/triton.

struct GradientArguments {
    const void* q;
    const void* f;
    const void* v;
    const void* dy;
    const float* bound;     // [H, K] or null
    const void* spans;      // PACKED: of each chunk, see chunk.cuh
    const int* num_spans;   // PACKED: how many chunks there are
    const void* states;     // [B, gridDim.x, G, V, K], before each chunk, K in the order of walk.cuh
    const void* d_states;   // [B, gridDim.x, G, V, K], gradient of the state after it
    void* dq;               // [B, T, H, K]
    void* df;               // [B, T, H, K]
    float* d_bound;         // [B, chunks, H, K] or null
    int* left_over;         // [B, gridDim.x, G, 2]: 1 where nothing was computed
    i64 q_batch, q_row, q_head, f_batch, f_row, f_head, v_batch, v_row, v_head, dy_batch, dy_row, dy_head;
    i64 length;
    int heads, first_head, first_chunk, chunks, reverse;
    float scale;
};

constexpr int HALF = 64;
constexpr int GROUPS = 8;  // of 8 tokens, one a warp
constexpr int SMALL_BYTES = CHUNK * HALF * 2;
constexpr int SUM_ROW = HALF + 8;  // padded, so that fragments' rows lie in different banks
constexpr float SMALLEST = 8.271806125530277e-25f;  // 2^-80
constexpr float SMALLEST_FOR_BOUND = 1.220703125e-4f;  // 2^-13

// Shared memory: S and dS [128 v, 64 k], v and dy, then (over these, when they are no longer needed) dQ and dK in
// float32; q and z as they came, Q, K; gradients of scores; sums of a few kinds, [64] each. launch.py knows the size
constexpr int AT_STATE = 0, AT_D_STATE = AT_STATE + TILE_BYTES;
constexpr int AT_V = AT_D_STATE + TILE_BYTES, AT_DY = AT_V + TILE_BYTES;
constexpr int AT_DQ = 0, AT_DK = CHUNK * SUM_ROW * 4;
constexpr int AT_Q = AT_DY + TILE_BYTES, AT_Z = AT_Q + SMALL_BYTES, AT_SCALED_Q = AT_Z + SMALL_BYTES;
constexpr int AT_SCALED_K = AT_SCALED_Q + SMALL_BYTES, AT_SCORES = AT_SCALED_K + SMALL_BYTES;
constexpr int AT_GROUPS = AT_SCORES + SMALL_BYTES, AT_HALVES = AT_GROUPS + GROUPS * HALF * 4;
constexpr int AT_KEYS = AT_HALVES + 2 * HALF * 4, AT_STATES = AT_KEYS + 4 * HALF * 4;
constexpr u32 ONES = BFLOAT16 ? 0x3f803f80u : 0x3c003c00u;

__device__ __forceinline__ float2 load_pair(u32 address) {
    float2 r;
    unpack(load_shared(address), r.x, r.y);
    return r;
}

// a compile-time answer that can be an argument
template <bool VALUE>
struct Which {
    static constexpr bool value = VALUE;
};

// `small` is e in the later half of the chunk, 1 / e in the earlier: at most 1.
template <bool LATER>
__device__ __forceinline__ void running_products(const float (&f)[8][2], float2 start, float (&small)[8][2]) {
    float2 p = start;
    if (LATER) {
#pragma unroll
        for (int i = 0; i < 8; i++) p.x *= f[i][0], p.y *= f[i][1], small[i][0] = p.x, small[i][1] = p.y;
    } else {
#pragma unroll
        for (int i = 7; i >= 0; i--) small[i][0] = p.x, small[i][1] = p.y, p.x *= f[i][0], p.y *= f[i][1];
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) backward_gates(const __grid_constant__ GradientArguments a) {
    extern __shared__ __align__(1024) char shared[];
    u32 base = shared_address(shared);
    // asked of one lane, so that the compiler sees that all agree
    int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    i64 chunk = a.first_chunk + blockIdx.x;
#if PACKED
    if (chunk >= *a.num_spans) return;
#endif
    Span span = span_of(a.spans, chunk, a.length, a.reverse);
    int local = blockIdx.y >> 1, half = blockIdx.y & 1, head = a.first_head + local, batch = blockIdx.z;
    int group = gridDim.y >> 1;
    i64 at = ((i64)batch * gridDim.x + blockIdx.x) * group + local;
    int left = span.left;

    // rows of the inputs and the states; of a row that does not exist nothing is read
    {
        int row = threadIdx.x >> 3, piece = threadIdx.x & 7, sign = a.reverse ? -1 : 1;
        u32 to = base + narrow_place(row, piece);
        i64 from = span.row + sign * row;
        const char* q = (const char*)a.q + (batch * a.q_batch + head * a.q_head + half * HALF + from * a.q_row) * 2;
        const char* f = (const char*)a.f + (batch * a.f_batch + head * a.f_head + half * HALF + from * a.f_row) * 2;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            // 32 rows on, a piece's place is XORed with the same
            bool exists = row + 32 * i < left;
            copy_async(to + AT_Q + 32 * i * HALF * 2, q + i * sign * 64 * a.q_row + piece * 16, exists);
            copy_async(to + AT_Z + 32 * i * HALF * 2, f + i * sign * 64 * a.f_row + piece * 16, exists);
        }
        copy_commit();
        i64 place = ((at * WIDTH + row) * WIDTH + half * HALF) * 2 + piece * 16;
        const char *state = (const char*)a.states + place, *d_state = (const char*)a.d_states + place;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            copy_async(to + AT_STATE + 32 * i * HALF * 2, state + 32 * i * ROW_BYTES, true);
            copy_async(to + AT_D_STATE + 32 * i * HALF * 2, d_state + 32 * i * ROW_BYTES, true);
        }
        row = threadIdx.x >> 4, piece = threadIdx.x & 15;
        to = base + tile_place(row, piece);
        from = span.row + sign * row;
        const char* v = (const char*)a.v + (batch * a.v_batch + head * a.v_head + from * a.v_row) * 2 + piece * 16;
        const char* dy = (const char*)a.dy + (batch * a.dy_batch + head * a.dy_head + from * a.dy_row) * 2 + piece * 16;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            bool exists = row + 16 * i < left;
            copy_async(to + AT_V + 16 * i * ROW_BYTES, v, exists), v += sign * 32 * a.v_row;
            copy_async(to + AT_DY + 16 * i * ROW_BYTES, dy, exists), dy += sign * 32 * a.dy_row;
        }
        copy_commit();
    }

    // gates, in columns: a warp has 8 tokens, a lane two channels of them
    bool later = warp >= GROUPS / 2;
    int first_row = 8 * warp;
    // first_row + i is i modulo 8, which is what a piece's place is XORed with
    u32 first_at = base + first_row * HALF * 2, raw_at = first_at + lane * 4;
    auto raw = [&](int tile, int i) { return (raw_at ^ (i << 4)) + (tile + i * HALF * 2); };
    // everything a product takes part in is in the states' order of channels: a lane's pair 4 i + c at 8 c + i
    int pair = (lane & 3) * 8 + (lane >> 2);
    u32 own_at = first_at + pair * 4;
    auto own = [&](int tile, int i) { return (own_at ^ (i << 4)) + (tile + i * HALF * 2); };
    float* groups = (float*)(shared + AT_GROUPS) + 2 * lane;
    float2* halves = (float2*)(shared + AT_HALVES) + pair;
    float2 beta = make_float2(0.0f, 0.0f);
    if (a.bound) beta = *(const float2*)(a.bound + head * WIDTH + half * HALF + 2 * lane);
    copy_wait_but_one();
    __syncthreads();
    float2 start = make_float2(1.0f, 1.0f);
    {
        float f[8][2], k[8][2], small[8][2];
        float2 whole = make_float2(1.0f, 1.0f);
        float smallest = 1.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float2 z = load_pair(raw(AT_Z, i));
            tied_gate(z.x, beta.x, f[i][0], k[i][0]);
            tied_gate(z.y, beta.y, f[i][1], k[i][1]);
            if (first_row + i >= left) f[i][0] = f[i][1] = 1.0f, k[i][0] = k[i][1] = 0.0f;
            whole.x *= f[i][0], whole.y *= f[i][1];
            smallest = minimum(smallest, minimum(f[i][0], f[i][1]));
        }
        *(float2*)(groups + warp * HALF) = whole;
        __syncthreads();
        float2 m[2] = {make_float2(1.0f, 1.0f), make_float2(1.0f, 1.0f)};
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
            float2 d = *(const float2*)(groups + j * HALF);
            m[j / 4].x *= d.x, m[j / 4].y *= d.y;
            bool between = later ? j >= 4 && j < warp : j > warp && j < 4;
            if (between) start.x *= d.x, start.y *= d.y;
        }
        if (warp == 0) halves[0] = m[0], halves[HALF / 2] = m[1];
        // the bound's gradient divides a difference of sums over the chunk, exact to the chunk's largest, by one decay
        bool fine = (!a.d_bound || smallest >= SMALLEST_FOR_BOUND) && m[0].x >= SMALLEST && m[0].y >= SMALLEST &&
                    m[1].x >= SMALLEST && m[1].y >= SMALLEST;
        auto scale = [&](auto which) {
            constexpr bool LATER = decltype(which)::value;
            running_products<LATER>(f, start, small);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float2 q = load_pair(raw(AT_Q, i));
                q.x = activate(q.x) * a.scale, q.y = activate(q.y) * a.scale;
                float large0 = reciprocal(small[i][0]), large1 = reciprocal(small[i][1]);
                q.x *= LATER ? small[i][0] : large0, q.y *= LATER ? small[i][1] : large1;
                k[i][0] *= LATER ? large0 : small[i][0], k[i][1] *= LATER ? large1 : small[i][1];
                store_shared(own(AT_SCALED_Q, i), pack(q.x, q.y));
                store_shared(own(AT_SCALED_K, i), pack(k[i][0], k[i][1]));
            }
        };
        if (later) scale(Which<true>());
        else scale(Which<false>());
        copy_wait();
        if (!__syncthreads_and(fine)) {
            if (threadIdx.x == 0) a.left_over[2 * at + half] = 1;
            return;
        }
    }

    // products, in fragments: a warp has 16 tokens and 32 channels
    int block = warp & 3, side = warp >> 2, row = lane & 15;
    u32 wide_lane = row * ROW_BYTES + (((lane >> 4) ^ (row & 7)) << 4);
    u32 narrow_lane = base + row * HALF * 2 + (((lane >> 4) ^ (row & 7)) << 4);
    // the warp's 32 channels are 4 pieces on, their second half another 2
    u32 channels[2] = {narrow_lane ^ (side << 6), narrow_lane ^ (side << 6) ^ 32};
    float dq[4][4], dk[4][4];
    {
        float d_scores[2][2][4], state_sums[4][4];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            dq[i >> 2][i & 3] = 0.0f, dk[i >> 2][i & 3] = 0.0f, state_sums[i >> 2][i & 3] = 0.0f;
            d_scores[i >> 3][(i >> 2) & 1][i & 3] = 0.0f;
        }
        u32 dy_lane = base + AT_DY + wide_lane + 16 * block * ROW_BYTES;
        u32 v_lane = base + AT_V + wide_lane;
#pragma unroll
        for (int t = 0; t < 8; t++) {
            u32 dy[4], v[4], s[4];
            load_fragment(dy, dy_lane ^ (t << 5));
            load_fragment(v, (v_lane ^ (t << 5)) + 16 * block * ROW_BYTES);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                u32 place = channels[j] + 16 * t * HALF * 2;
                load_fragment_transposed(s, place + AT_STATE);
                multiply(dq[2 * j], dy, s[0], s[1]);
                multiply(dq[2 * j + 1], dy, s[2], s[3]);
                u32 d[4];
                load_fragment_transposed(d, place + AT_D_STATE);
                multiply(dk[2 * j], v, d[0], d[1]);
                multiply(dk[2 * j + 1], v, d[2], d[3]);
                // sums of S dS over columns of V, a quarter a warp
                if (t >> 1 == block) {
                    u32 ones[4] = {ONES, ONES, ONES, ONES};
                    multiply(state_sums[2 * j], ones, multiply_pairs(s[0], d[0]), multiply_pairs(s[1], d[1]));
                    multiply(state_sums[2 * j + 1], ones, multiply_pairs(s[2], d[2]), multiply_pairs(s[3], d[3]));
                }
            }
            // of the scores' gradients each side takes every other block
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (side + 2 * j <= block) {
                    load_fragment(s, (v_lane ^ (t << 5)) + 16 * (side + 2 * j) * ROW_BYTES);
                    multiply(d_scores[j][0], dy, s[0], s[2]);
                    multiply(d_scores[j][1], dy, s[1], s[3]);
                }
        }
        if (g == 0) {
            float* to = (float*)(shared + AT_STATES) + block * HALF + 32 * side + 2 * c;
#pragma unroll
            for (int n = 0; n < 4; n++) *(float2*)(to + 8 * n) = make_float2(state_sums[n][0], state_sums[n][1]);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int early = side + 2 * j;
            if (early > block) continue;
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int token = 16 * block + g + 8 * i, other = 16 * early + 8 * n + 2 * c;
                    float x = other <= token ? d_scores[j][n][2 * i] : 0.0f;
                    float y = other + 1 <= token ? d_scores[j][n][2 * i + 1] : 0.0f;
                    u32 place = base + (16 * block + g) * HALF * 2 + (((2 * early + n) ^ g) << 4) + 4 * c;
                    store_shared(place + AT_SCORES + 8 * i * HALF * 2, pack(x, y));
                }
        }
    }
    float* key_sums = (float*)(shared + AT_KEYS);
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const float* m = (const float*)(shared + AT_HALVES) + 32 * side + 8 * n + 2 * c;
        float2 before = *(const float2*)m, after = *(const float2*)(m + HALF);
        dq[n][0] *= before.x, dq[n][1] *= before.y, dq[n][2] *= before.x, dq[n][3] *= before.y;
        dk[n][0] *= after.x, dk[n][1] *= after.y, dk[n][2] *= after.x, dk[n][3] *= after.y;
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
        u32 keys[4];
        load_fragment(keys, channels[j] + AT_SCALED_K + 16 * block * HALF * 2);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float k0, k1, k2, k3;
            unpack(keys[2 * n], k0, k1);
            unpack(keys[2 * n + 1], k2, k3);
            const float(&d)[4] = dk[2 * j + n];
            float x = fmaf(k0, d[0], k2 * d[2]), y = fmaf(k1, d[1], k3 * d[3]);
#pragma unroll
            for (int bit = 4; bit <= 16; bit *= 2) x += __shfl_xor_sync(~0u, x, bit), y += __shfl_xor_sync(~0u, y, bit);
            int place = block * HALF + 32 * side + 16 * j + 8 * n + 2 * c;
            if (g == 0) *(float2*)(key_sums + place) = make_float2(x, y);
        }
    }
    __syncthreads();
#pragma unroll
    for (int other = 0; other < 4; other++) {
        u32 s[4], x[4];
        if (other <= block) {
            u32 scores[4];
            load_fragment(scores, (narrow_lane ^ (other << 5)) + AT_SCORES + 16 * block * HALF * 2);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                load_fragment_transposed(s, channels[j] + AT_SCALED_K + 16 * other * HALF * 2);
                multiply(dq[2 * j], scores, s[0], s[1]);
                multiply(dq[2 * j + 1], scores, s[2], s[3]);
            }
        }
        if (other >= block) {
            load_fragment_transposed(x, (narrow_lane ^ (block << 5)) + AT_SCORES + 16 * other * HALF * 2);
            u32 scores[4] = {x[0], x[2], x[1], x[3]};
#pragma unroll
            for (int j = 0; j < 2; j++) {
                load_fragment_transposed(s, channels[j] + AT_SCALED_Q + 16 * other * HALF * 2);
                multiply(dk[2 * j], scores, s[0], s[1]);
                multiply(dk[2 * j + 1], scores, s[2], s[3]);
            }
        }
    }
    float *dq_sums = (float*)(shared + AT_DQ), *dk_sums = (float*)(shared + AT_DK);
    int sums_at = (16 * block + g) * SUM_ROW + 32 * side + 2 * c;
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int place = sums_at + 8 * i * SUM_ROW + 8 * n;
            *(float2*)(dq_sums + place) = make_float2(dq[n][2 * i], dq[n][2 * i + 1]);
            *(float2*)(dk_sums + place) = make_float2(dk[n][2 * i], dk[n][2 * i + 1]);
        }
    __syncthreads();

    // from here in columns again: sums over the tokens from each on
    int column_at = first_row * SUM_ROW + 2 * pair;
    float sums[8][2];
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 7; i >= 0; i--) {
        int place = column_at + i * SUM_ROW;
        float2 x = *(const float2*)(dq_sums + place), y = *(const float2*)(dk_sums + place);
        float2 q = load_pair(own(AT_SCALED_Q, i)), k = load_pair(own(AT_SCALED_K, i));
        sum.x += fmaf(q.x, x.x, -k.x * y.x), sum.y += fmaf(q.y, x.y, -k.y * y.y);
        sums[i][0] = sum.x, sums[i][1] = sum.y;
    }
    float2 d_log = make_float2(0.0f, 0.0f);
    float2 m0 = halves[0], m1 = halves[HALF / 2];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 s = *(const float2*)((const float*)(shared + AT_STATES) + j * HALF + 2 * pair);
        d_log.x += s.x, d_log.y += s.y;
    }
    d_log.x *= m0.x * m1.x, d_log.y *= m0.y * m1.y;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 s = *(const float2*)(key_sums + j * HALF + 2 * pair);
        d_log.x += s.x, d_log.y += s.y;
    }
    // the groups' decays are no longer needed
    *(float2*)(groups + warp * HALF) = sum;
    __syncthreads();
    for (int j = warp + 1; j < GROUPS; j++) {
        float2 s = *(const float2*)(groups + j * HALF);
        d_log.x += s.x, d_log.y += s.y;
    }
    float f[8][2], small[8][2], k[8][2], closed[8][2], open[8][2];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float2 z = load_pair(raw(AT_Z, i));
        tied_gate(z.x, beta.x, f[i][0], k[i][0], closed[i][0], open[i][0]);
        tied_gate(z.y, beta.y, f[i][1], k[i][1], closed[i][1], open[i][1]);
        if (first_row + i >= left) f[i][0] = f[i][1] = 1.0f;
    }
    i64 row_out = a.reverse ? span.row - first_row : span.row + first_row;
    i64 out = ((batch * a.length + row_out) * a.heads + head) * WIDTH + half * HALF;
    int step = (a.reverse ? -1 : 1) * a.heads * WIDTH;
    float2 d_bound = make_float2(0.0f, 0.0f);
    char *dq_out = (char*)a.dq + (out + 2 * lane) * 2, *df_out = (char*)a.df + (out + 2 * lane) * 2;
    auto finish = [&](auto which) {
        constexpr bool LATER = decltype(which)::value;
        running_products<LATER>(f, start, small);
#pragma unroll
        for (int i = 7; i >= 0; i--) {
            if (first_row + i >= left) continue;
            int place = column_at + i * SUM_ROW;
            float2 x = *(const float2*)(dq_sums + place), y = *(const float2*)(dk_sums + place);
            float2 u = load_pair(raw(AT_Q, i));
            float large0 = reciprocal(small[i][0]), large1 = reciprocal(small[i][1]);
            x.x *= LATER ? small[i][0] : large0, x.y *= LATER ? small[i][1] : large1;
            y.x *= LATER ? large0 : small[i][0], y.y *= LATER ? large1 : small[i][1];
            u32 d = pack(activate_backward(x.x * a.scale, u.x), activate_backward(x.y * a.scale, u.y));
            *(u32*)(dq_out + i * step * 2) = d;
            float g0 = closed[i][0] * ((sums[i][0] + d_log.x) * reciprocal(f[i][0]) - y.x);
            float g1 = closed[i][1] * ((sums[i][1] + d_log.y) * reciprocal(f[i][1]) - y.y);
            d_bound.x += g0, d_bound.y += g1;
            // open is (1 - beta) sigmoid(z)
            *(u32*)(df_out + i * step * 2) = pack(open[i][0] * g0, open[i][1] * g1);
        }
    };
    if (later) finish(Which<true>());
    else finish(Which<false>());
    if (!a.d_bound) return;
    __syncthreads();
    *(float2*)(groups + warp * HALF) = d_bound;
    __syncthreads();
    if (warp == 0) {
#pragma unroll
        for (int j = 1; j < GROUPS; j++) {
            float2 s = *(const float2*)(groups + j * HALF);
            d_bound.x += s.x, d_bound.y += s.y;
        }
        i64 to = (((i64)batch * a.chunks + chunk) * a.heads + head) * WIDTH + half * HALF + 2 * lane;
        *(float2*)(a.d_bound + to) = d_bound;
    }
}
