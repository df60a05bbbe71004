// Gradients of query and gate for K = V = 128, in parallel over chunks and halves of K; that of v is in walk.cu.
//
// With e the product of decays since the middle of the chunk (before it, one over the product up to it), Q = q e and
// K = k / e, a score is Q K^T whatever the two tokens, the state enters a query as Q M and a key leaves as K N, with M
// and N the decays across the two halves of the chunk. Then
//     dQ = M (dY S^T) + dA K      dK = N (V dS^T) + dA^T Q      dq = dQ e      dk = dK / e
//     d log f_u = sum over t >= u of (Q dQ - K dK)_t + sum of (K dK from the state) + (decay of the chunk) sum_v S dS
// The difference of sums is exact to float32 rounding, because a pair of tokens enters both with the same rounded Q
// and K. All this needs M and N to be above 2^-80 and, beside a lower bound, each decay to be above 2^-13, since the
// bound's gradient divides by it. Where that fails nothing is computed, and a flag is left for the kernel of
// gradient_joins.cuh.

constexpr float SMALLEST = 8.271806125530277e-25f;  // 2^-80
constexpr float SMALLEST_FOR_BOUND = 1.220703125e-4f;  // 2^-13

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
    Piece piece;
    piece.batch = blockIdx.z, piece.local = blockIdx.y >> 1, piece.half = blockIdx.y & 1;
    piece.chunk = a.first_chunk + blockIdx.x;
#if PACKED
    if (piece.chunk >= *a.num_spans) return;
#endif
    piece.at = ((i64)piece.batch * a.part_chunks + blockIdx.x) * a.group + piece.local;
    piece.span = span_of(a.spans, piece.chunk, a.length, a.reverse);
    int head = a.first_head + piece.local, half = piece.half, left = piece.span.left;
    fetch(a, piece, base);

    // gates, in columns
    bool later = warp >= GROUPS / 2;
    Columns columns(base, warp, lane);
    int first_row = columns.first_row, pair = columns.pair;
    auto raw = [&](int tile, int i) { return columns.raw(tile, i); };
    auto own = [&](int tile, int i) { return columns.own(tile, i); };
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
            if (threadIdx.x == 0) a.left_over[2 * piece.at + half] = 1;
            return;
        }
    }

    // products, in fragments
    Fragments fragments(base, warp, lane);
    int block = fragments.block, side = fragments.side;
    u32 narrow_lane = fragments.narrow_lane;
    const u32(&channels)[2] = fragments.channels;
    float dq[4][4], dk[4][4];
    {
        float d_scores[2][2][4];
        multiply_values(shared, fragments, dq, dk, d_scores);
        write_scores(fragments, base, d_scores);
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
    write_sums(dq_sums, fragments, dq);
    write_sums(dk_sums, fragments, dk);
    __syncthreads();

    // from here in columns again: sums over the tokens from each on
    int column_at = columns.sums();
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
    i64 row_out = a.reverse ? piece.span.row - first_row : piece.span.row + first_row;
    i64 out = ((piece.batch * a.length + row_out) * a.heads + head) * WIDTH + half * HALF;
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
        i64 to = (((i64)piece.batch * a.chunks + piece.chunk) * a.heads + head) * WIDTH + half * HALF + 2 * lane;
        *(float2*)(a.d_bound + to) = d_bound;
    }
}
