// Gradients where gates are too near to 0 for the dense products of backward.cu: exact for any gate. Here those of query
// and gate, in values.cuh that of the value.
//
// The method is that of hgrn2/ops/backends/chunked: blocks of 1, 2, 4, ... tokens are joined in pairs, and decays are only
// ever multiplied. In the later block of a pair X is the query times the decays from its start, in the earlier one the
// key times those to its end, and dX = dA X for the scores' gradients dA of the two blocks' pairs of tokens. The
// gradient of a decay's logarithm is the sum of X dX over the X that hold the decay: terms of one kind added up, none
// taken away. Within a warp's 8 tokens pairs are taken one by one, larger blocks by matrix products.

// of a pair of tokens among 8, scores' gradients in float32: over memory of the values
constexpr int AT_PAIRS = 3 * SUMS_BYTES, AT_DX = 2 * SUMS_BYTES, AT_X = AT_SCALED_Q;
// sums of X dX over a warp's tokens, [8, 64] each: of the two larger kinds of blocks, and of products with the states
constexpr int AT_TOTALS = AT_SCALED_K, TOTAL_BYTES = GROUPS * HALF * 4;
static_assert(AT_PAIRS + GROUPS * 64 * 4 <= AT_Q && AT_TOTALS + 4 * TOTAL_BYTES <= AT_SCORES);
// of a decay. Below it nothing of a state is left, and a gradient by the decay is one by its logarithm divided by it
constexpr float SMALLEST_DECAY = 1e-30f;

// 8 tokens of two channels
typedef float Eight[8][2];

__device__ __forceinline__ void open_eight(const BackwardArguments& a, const Columns& columns, float2 beta, int left,
                                           Eight& f, Eight& k, Eight& q) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float2 z = load_pair(columns.raw(AT_Z, i)), u = load_pair(columns.raw(AT_Q, i));
        tied_gate(z.x, beta.x, f[i][0], k[i][0]);
        tied_gate(z.y, beta.y, f[i][1], k[i][1]);
        q[i][0] = activate(u.x) * a.scale, q[i][1] = activate(u.y) * a.scale;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            // not a number stays what it is
            if (f[i][j] < SMALLEST_DECAY) f[i][j] = SMALLEST_DECAY;
            if (columns.first_row + i >= left) f[i][j] = 1.0f, k[i][j] = 0.0f;
        }
    }
}

// Products of the decays of tokens first ... last - 1 of the warps' eights
__device__ __forceinline__ float2 decay_of(const float* groups, int first, int last) {
    float2 product = make_float2(1.0f, 1.0f);
    for (int j = first; j < last; j++) {
        float2 d = *(const float2*)(groups + j * HALF);
        product.x *= d.x, product.y *= d.y;
    }
    return product;
}

// Adds to the gradients of the decays' logarithms what is summed in other eights
__device__ __forceinline__ void add_totals(const float* totals, int first, int last, Eight& d_log) {
    float2 sum = make_float2(0.0f, 0.0f);
    for (int j = first; j < last; j++) {
        float2 s = *(const float2*)(totals + j * HALF);
        sum.x += s.x, sum.y += s.y;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) d_log[i][0] += sum.x, d_log[i][1] += sum.y;
}

// What x * factor times its gradient dx adds: to the gradient of x, and to those of the decays in the factor. LATE: the
// factor has the decays from `start` up to and with each token, else those after it. Returns the sum over all tokens.
template <bool LATE>
__device__ __forceinline__ float2 take_up(const Eight& f, const Eight& x, float2 start, const float* dx, Eight& grad,
                                          Eight& d_log) {
    float2 factor = start, sum = make_float2(0.0f, 0.0f);
    Eight w;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        int i = LATE ? n : 7 - n;
        float2 d = *(const float2*)(dx + i * SUM_ROW);
        if (LATE) factor.x *= f[i][0], factor.y *= f[i][1];
        d.x *= factor.x, d.y *= factor.y;
        if (!LATE) factor.x *= f[i][0], factor.y *= f[i][1];
        grad[i][0] += d.x, grad[i][1] += d.y;
        w[i][0] = x[i][0] * d.x, w[i][1] = x[i][1] * d.y;
    }
    // a decay is in the factors of this token and of later ones; else of the tokens before
#pragma unroll
    for (int n = 0; n < 8; n++) {
        int i = LATE ? 7 - n : n;
        if (LATE) sum.x += w[i][0], sum.y += w[i][1];
        d_log[i][0] += sum.x, d_log[i][1] += sum.y;
        if (!LATE) sum.x += w[i][0], sum.y += w[i][1];
    }
    return sum;
}

// All pairs among a warp's eight tokens. pairs: [8, 8], gradients of scores, queries in rows
__device__ __forceinline__ void take_pairs(const float* pairs, const Eight& f, const Eight& k, const Eight& q, Eight& dq,
                                           Eight& dk, Eight& d_log) {
    // decays after a token through the query's
    Eight decay;
#pragma unroll
    for (int t = 0; t < 8; t++) {
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int s = 0; s < t; s++) {
            decay[s][0] *= f[t][0], decay[s][1] *= f[t][1];
            float d = pairs[8 * t + s], x = d * decay[s][0], y = d * decay[s][1];
            dk[s][0] = fmaf(x, q[t][0], dk[s][0]), dk[s][1] = fmaf(y, q[t][1], dk[s][1]);
            x *= k[s][0], y *= k[s][1];
            dq[t][0] += x, dq[t][1] += y;
            sum.x = fmaf(x, q[t][0], sum.x), sum.y = fmaf(y, q[t][1], sum.y);
            d_log[s + 1][0] += sum.x, d_log[s + 1][1] += sum.y;
        }
        decay[t][0] = decay[t][1] = 1.0f;
        float d = pairs[9 * t];
        dq[t][0] = fmaf(d, k[t][0], dq[t][0]), dq[t][1] = fmaf(d, k[t][1], dq[t][1]);
        dk[t][0] = fmaf(d, q[t][0], dk[t][0]), dk[t][1] = fmaf(d, q[t][1], dk[t][1]);
    }
}

// dX of a warp's 16 tokens for pairs of blocks of SIZE tokens
template <int SIZE>
__device__ __forceinline__ void multiply_pairs_of(const Fragments& x, float (&dx)[4][4]) {
#pragma unroll
    for (int i = 0; i < 16; i++) dx[i >> 2][i & 3] = 0.0f;
    auto add = [&](const u32(&scores)[4], int other) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            u32 s[4];
            load_fragment_transposed(s, x.channels[j] + AT_X + 16 * other * HALF * 2);
            multiply(dx[2 * j], scores, s[0], s[1]);
            multiply(dx[2 * j + 1], scores, s[2], s[3]);
        }
    };
    auto straight = [&](u32(&r)[4], int row, int column) {
        load_fragment(r, (x.narrow_lane ^ (column << 5)) + AT_SCORES + 16 * row * HALF * 2);
    };
    auto turned = [&](u32(&r)[4], int row, int column) {
        u32 t[4];
        load_fragment_transposed(t, (x.narrow_lane ^ (column << 5)) + AT_SCORES + 16 * row * HALF * 2);
        r[0] = t[0], r[1] = t[2], r[2] = t[1], r[3] = t[3];
    };
    u32 r[4];
    if (SIZE == 8) {
        u32 back[4];
        straight(r, x.block, x.block), turned(back, x.block, x.block);
        u32 both[4] = {0u, r[1], back[2], 0u};
        add(both, x.block);
    } else if (SIZE == 16) {
        int other = x.block ^ 1;
        if (x.block & 1) straight(r, x.block, other);
        else turned(r, other, x.block);
        add(r, other);
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int other = (x.block & 2 ? 0 : 2) + i;
            if (x.block & 2) straight(r, x.block, other);
            else turned(r, other, x.block);
            add(r, other);
        }
    }
}

// Pairs of blocks of SIZE tokens. totals: where the sums of X dX over the warp's tokens go
template <int SIZE>
__device__ __forceinline__ void join_pairs(char* shared, const Columns& columns, const Fragments& fragments, int warp,
                                           const float* groups, float* totals, const Eight& f, const Eight& k,
                                           const Eight& q, Eight& dq, Eight& dk, Eight& d_log) {
    constexpr int COUNT = SIZE / 8;
    int first = warp & ~(COUNT - 1);
    bool late = warp & COUNT;
    float2 start = late ? decay_of(groups, first, warp) : decay_of(groups, warp + 1, first + COUNT);
    float2 factor = start;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        // a token's own decay is in the factor of a query, not in that of a key
        int i = late ? n : 7 - n;
        float x, y;
        if (late) {
            factor.x *= f[n][0], factor.y *= f[n][1];
            x = q[n][0] * factor.x, y = q[n][1] * factor.y;
        } else {
            x = k[7 - n][0] * factor.x, y = k[7 - n][1] * factor.y;
            factor.x *= f[7 - n][0], factor.y *= f[7 - n][1];
        }
        store_shared(columns.own(AT_X, i), pack(x, y));
    }
    __syncthreads();
    float dx[4][4];
    multiply_pairs_of<SIZE>(fragments, dx);
    write_sums((float*)(shared + AT_DX), fragments, dx);
    __syncthreads();
    const float* sums = (const float*)(shared + AT_DX) + columns.sums();
    float2 total = late ? take_up<true>(f, q, start, sums, dq, d_log) : take_up<false>(f, k, start, sums, dk, d_log);
    if (COUNT > 1) *(float2*)(totals + warp * HALF) = total;
}

// Computes the gradients of one piece
__device__ __forceinline__ void exact_gradients(const BackwardArguments& a, const Piece& p, char* shared) {
    u32 base = shared_address(shared);
    int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
    int head = a.first_head + p.local, left = p.span.left;
    fetch(a, p, base);
    Columns columns(base, warp, lane);
    Fragments fragments(base, warp, lane);
    float* groups = (float*)(shared + AT_GROUPS) + 2 * lane;
    float2 beta = make_float2(0.0f, 0.0f);
    if (a.bound) beta = *(const float2*)(a.bound + head * WIDTH + p.half * HALF + 2 * lane);
    copy_wait();
    __syncthreads();

    // products with the values, and what is left of them in float32
    {
        float dq[4][4], dk[4][4], d_scores[2][2][4];
        multiply_values(shared, fragments, dq, dk, d_scores);
        write_scores(fragments, base, d_scores);
        // values and states are no longer needed
        __syncthreads();
        write_sums((float*)(shared + AT_DQ), fragments, dq);
        write_sums((float*)(shared + AT_DK), fragments, dk);
        // of a warp's blocks one may be the diagonal one, with two eights
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (fragments.side + 2 * j == fragments.block) {
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    float* pairs = (float*)(shared + AT_PAIRS) + (2 * fragments.block + n) * 64;
                    *(float2*)(pairs + 8 * fragments.g + 2 * fragments.c) =
                        make_float2(d_scores[j][n][2 * n], d_scores[j][n][2 * n + 1]);
                }
            }
    }
    Eight f, k, q, dq, dk, d_log;
    open_eight(a, columns, beta, left, f, k, q);
    float2 own = make_float2(1.0f, 1.0f);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        own.x *= f[i][0], own.y *= f[i][1];
#pragma unroll
        for (int j = 0; j < 2; j++) dq[i][j] = dk[i][j] = d_log[i][j] = 0.0f;
    }
    *(float2*)(groups + warp * HALF) = own;
    __syncthreads();

    // the states: the one before the chunk meets every query, the gradient of the one after it every key
    float* totals = (float*)(shared + AT_TOTALS) + 2 * lane;
    constexpr int TOTAL = GROUPS * HALF;
    const float *dq_sums = (const float*)(shared + AT_DQ), *dk_sums = (const float*)(shared + AT_DK);
    float2 before = decay_of(groups, 0, warp), after = decay_of(groups, warp + 1, GROUPS);
    *(float2*)(totals + warp * HALF) = take_up<true>(f, q, before, dq_sums + columns.sums(), dq, d_log);
    *(float2*)(totals + TOTAL + warp * HALF) = take_up<false>(f, k, after, dk_sums + columns.sums(), dk, d_log);
    take_pairs((const float*)(shared + AT_PAIRS) + 64 * warp, f, k, q, dq, dk, d_log);
    join_pairs<8>(shared, columns, fragments, warp, groups, totals, f, k, q, dq, dk, d_log);
    join_pairs<16>(shared, columns, fragments, warp, groups, totals + 2 * TOTAL, f, k, q, dq, dk, d_log);
    join_pairs<32>(shared, columns, fragments, warp, groups, totals + 3 * TOTAL, f, k, q, dq, dk, d_log);
    __syncthreads();
    add_totals(totals, warp + 1, GROUPS, d_log);
    add_totals(totals + TOTAL, 0, warp, d_log);
#pragma unroll
    for (int kind = 0; kind < 2; kind++) {
        int count = 2 << kind, first = warp & ~(count - 1);
        bool late = warp & count;
        add_totals(totals + (2 + kind) * TOTAL, late ? warp + 1 : first, late ? first + count : warp, d_log);
    }
    float2 whole = decay_of(groups, 0, GROUPS), of_states = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 s = *(const float2*)((const float*)(shared + AT_STATES) + j * HALF + 2 * columns.pair);
        of_states.x += s.x, of_states.y += s.y;
    }

    i64 row_out = a.reverse ? p.span.row - columns.first_row : p.span.row + columns.first_row;
    i64 out = ((p.batch * a.length + row_out) * a.heads + head) * WIDTH + p.half * HALF;
    int step = (a.reverse ? -1 : 1) * a.heads * WIDTH;
    char *dq_out = (char*)a.dq + (out + 2 * lane) * 2, *df_out = (char*)a.df + (out + 2 * lane) * 2;
    float2 d_bound = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (columns.first_row + i >= left) continue;
        float2 z = load_pair(columns.raw(AT_Z, i)), u = load_pair(columns.raw(AT_Q, i));
        float unused, closed0, closed1, open0, open1;
        tied_gate(z.x, beta.x, unused, unused, closed0, open0);
        tied_gate(z.y, beta.y, unused, unused, closed1, open1);
        float by_log0 = fmaf(of_states.x, whole.x, d_log[i][0]), by_log1 = fmaf(of_states.y, whole.y, d_log[i][1]);
        float g0 = closed0 * ((at_floor(f[i][0]) ? 0.0f : by_log0 / f[i][0]) - dk[i][0]);
        float g1 = closed1 * ((at_floor(f[i][1]) ? 0.0f : by_log1 / f[i][1]) - dk[i][1]);
        d_bound.x += g0, d_bound.y += g1;
        float d0 = activate_backward(dq[i][0] * a.scale, u.x), d1 = activate_backward(dq[i][1] * a.scale, u.y);
        *(u32*)(dq_out + i * step * 2) = pack(d0, d1);
        // open is (1 - beta) sigmoid(z)
        *(u32*)(df_out + i * step * 2) = pack(open0 * g0, open1 * g1);
    }
    // all threads have read the groups' decays
    __syncthreads();
    *(float2*)(groups + warp * HALF) = d_bound;
    __syncthreads();
    if (warp == 0 && a.d_bound) {
        for (int j = 1; j < GROUPS; j++) {
            float2 s = *(const float2*)(groups + j * HALF);
            d_bound.x += s.x, d_bound.y += s.y;
        }
        i64 to = (((i64)p.batch * a.chunks + p.chunk) * a.heads + head) * WIDTH + p.half * HALF + 2 * lane;
        *(float2*)(a.d_bound + to) = d_bound;
    }
    // the next piece reuses the memory
    __syncthreads();
}

// Any number of programs share the flags.
extern "C" __global__ void __launch_bounds__(GATE_THREADS, 2) backward_exact(
    const __grid_constant__ BackwardArguments a) {
    extern __shared__ __align__(1024) char shared[];
    i64 pieces = (i64)a.batches * a.part_chunks * a.group * 2;
    for (i64 first = blockIdx.x; first < pieces; first += 32 * gridDim.x) {
        // every warp reads the same 32 flags
        i64 own = first + (i64)(threadIdx.x & 31) * gridDim.x;
        u32 found = __ballot_sync(~0u, own < pieces && a.fallback[own]);
        while (found) {
            i64 i = first + (i64)(__ffs(found) - 1) * gridDim.x;
            found &= found - 1;
            Piece p;
            p.half = i & 1, p.at = i >> 1, p.local = p.at % a.group;
            i64 row = p.at / a.group;
            p.batch = row / a.part_chunks, p.chunk = a.first_chunk + row % a.part_chunks;
            p.span = span_of(a.spans, p.chunk, a.length, a.reverse);
            exact_gradients(a, p, shared);
            // dV of all channels by the program that has one half or the other, in turns, so that all have as many
            int turn = p.at / ((gridDim.x + 1) / 2) & 1;
            if (p.half == turn && a.fallback[i] == VALUE_TOO) exact_values(a, p, shared);
        }
    }
}
