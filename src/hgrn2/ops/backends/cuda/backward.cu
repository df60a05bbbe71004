// Gradients of query, gate and value for K = V = 128 in one walk, from the last chunk of 64 tokens to the first.
//
// With e the product of decays since the middle of the chunk (before it, one over the product up to it), Q = q e and
// K = k / e, M and N the decays across the two halves of the chunk, S the state before it, D = N dS the gradient of the
// state after it as the keys see it, A = Q K^T the scores and dA = dY V^T their gradients where the key is not later:
//     dV = K D + A^T dY      dQ = M (dY S^T) + dA K      dK = V D^T + dA^T Q      dS before = M (D + Q^T dY)
//     dq = dQ e      dk = dK / e
//     d log f_u = sum over t >= u of (Q dQ - K dK)_t + sum of (K dK from the state) + M sum_v S D
// The difference of sums is exact to float32 rounding of the chunk's largest, because a pair of tokens enters both with
// the same rounded Q and K. All this needs M and N to be above 2^-80.
//
// All warps run the same stages in turn; what a stage waits for was requested a chunk earlier. In columns a thread has 8
// tokens of two channels; in products a warpgroup has 64 columns of V and of K of dS, which stays in its
// registers, transposed.
//
// Where the chunk's middle is too far away, queries and keys are relative to the middle of their half (`halved`). Within
// a half everything is as above. What a token has to do with the other half is found as that half's middle sees it, and
// then multiplied by the decays of the two blocks of 16 tokens between the two middles, one after the other. Each of the
// four blocks must keep 2^-80; where one does not, the walk finds dS alone, and the gradients are left, by a flag and dS,
// to backward_exact.cu. So are all but dV where dy is not finite, and where a gate is below 2^-13, unless the bound's
// gradient is not wanted and a check of the gates' gradients passes.

// Each warp fetches of q and f what it works on itself: two pieces of each, of this token and the fourth after it.
struct Fetched {
    int row, piece;
    u32 place;
    __device__ __forceinline__ Fetched() {
        int thread = thread_index(), lane = thread & 31;
        row = 8 * (thread >> 5 & 7) + (lane >> 3), piece = 8 * (thread >> 8) + (lane & 7);
        place = panel_place(row, piece);
    }
    __device__ __forceinline__ u32 other() const { return (place ^ 64) + 4 * 128; }
};

__device__ __forceinline__ void fetch_pair(u32 to, const char* first, int first_row, const char* second, int second_row,
                                           const Span& span, int sign) {
    Fetched own;
    int row = (int)span.row + sign * own.row;
    first += (i64)row * first_row + own.piece * 16, second += (i64)row * second_row + own.piece * 16;
    bool exists = own.row < span.left, other = own.row + 4 < span.left;
    copy_async(to + own.place, first, exists);
    copy_async(to + own.place + TILE_BYTES, second, exists);
    copy_async(to + own.other(), first + sign * 4 * first_row, other);
    copy_async(to + own.other() + TILE_BYTES, second + sign * 4 * second_row, other);
}

__device__ __forceinline__ void fetch_state(u32 to, const void* states, i64 at) {
    int thread = thread_index(), row = thread >> 4, piece = thread & 15;
    const char* from = (const char*)states + (at * WIDTH * ROW_BYTES + thread * 16);
    to += (piece >> 3) * STATE_PANEL + row * 128 + (((piece & 7) ^ (row & 7)) << 4);
#pragma unroll
    for (int i = 0; i < 4; i++) copy_async(to + i * 32 * 128, from + i * 32 * ROW_BYTES, true);
}

// Result of `open_chunk`
struct Opened {
    bool dense;            // all gradients come from dense products, relative to the middle of the chunk
    bool gates_divisible;  // every gate is large enough to divide by
    bool dy_finite;        // what the thread reads of dy is finite
    float2 start;          // e before the thread's first token
};

// Fills tokens beyond the end: they keep the state and add nothing
__device__ __forceinline__ void close_missing(u32 tile, int left) {
    Fetched own;
    u32 open = pack(OPEN, OPEN);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 place = tile + (i ? own.other() : own.place);
        if (own.row + 4 * i >= left)
#pragma unroll
            for (int j = 0; j < 4; j++) store_shared(place + 4 * j, open);
    }
}

// Whether what the thread fetched of dy is finite
__device__ __forceinline__ bool finite_outputs(u32 tile) {
    Fetched own;
    u32 noted[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 values[4];
        load_shared(values, tile + (i ? own.other() : own.place));
#pragma unroll
        for (int e = 0; e < 4; e++) note_finite(noted[e], values[e]);
    }
    // NaN of either sign
    return !((noted[0] | noted[1] | noted[2] | noted[3]) & 0x7fff7fffu);
}

// Computes Q, K and the decays M (second) and N (first) of a chunk. v, dy and the state have arrived afterwards.
__device__ __forceinline__ Opened open_chunk(const BackwardArguments& a, const Memory& m, u32 raw) {
    Opened opened;
    Column at;
    float f[8][2], k[8][2];
    float2 beta = *(const float2*)(m.beta() + at.place);
    float2 whole = make_float2(1.0f, 1.0f), lost = make_float2(0.0f, 0.0f);
    float smallest = 1.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float2 z = load_pair(at.raw(raw + TILE_BYTES, i));
        tied_gate(z.x, beta.x, f[i][0], k[i][0]);
        tied_gate(z.y, beta.y, f[i][1], k[i][1]);
        whole.x *= f[i][0], whole.y *= f[i][1];
        lost.x = fmaf(lost.x, f[i][0], lost_of(k[i][0])), lost.y = fmaf(lost.y, f[i][1], lost_of(k[i][1]));
        smallest = minimum(smallest, minimum(f[i][0], f[i][1]));
    }
    *(float2*)(m.groups() + at.group * WIDTH + at.apart) = whole;
    *(float2*)(m.lost() + at.group * WIDTH + at.apart) = lost;
    // gradients by a gate divide a difference of sums over the chunk, exact to the chunk's largest, by its decay
    opened.gates_divisible = __syncthreads_and(smallest >= SMALLEST_GATE);
    float2 half[2] = {make_float2(1.0f, 1.0f), make_float2(1.0f, 1.0f)};
    // decays between the thread's tokens and the middle
    opened.start = make_float2(1.0f, 1.0f);
    bool later = at.group >= GROUPS / 2;
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
        float2 d = *(const float2*)(m.groups() + j * WIDTH + at.apart);
        half[j / 4].x *= d.x, half[j / 4].y *= d.y;
        bool between = later ? j >= 4 && j < at.group : j > at.group && j < 4;
        if (between) opened.start.x *= d.x, opened.start.y *= d.y;
    }
    if (!later) {
        opened.start.x = reciprocal(opened.start.x * whole.x), opened.start.y = reciprocal(opened.start.y * whole.y);
    }
    float2 e = make_float2(opened.start.x * a.scale, opened.start.y * a.scale);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float2 q = load_pair(at.raw(raw, i));
        e.x *= f[i][0], e.y *= f[i][1];
        store_shared(at.own(m.at(AT_Q), i), pack(activate(q.x) * e.x, activate(q.y) * e.y));
    }
    // reciprocals are dear: 1 / e of a token is that of the token after it times that token's decay
    e.x = reciprocal(opened.start.x * whole.x), e.y = reciprocal(opened.start.y * whole.y);
#pragma unroll
    for (int i = 7; i >= 0; i--) {
        store_shared(at.own(m.at(AT_K), i), pack(k[i][0] * e.x, k[i][1] * e.y));
        e.x *= f[i][0], e.y *= f[i][1];
    }
    bool dense = half[0].x >= SMALLEST && half[0].y >= SMALLEST && half[1].x >= SMALLEST && half[1].y >= SMALLEST;
    if (at.group == 0) {
        lost = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
            float2 d = *(const float2*)(m.groups() + j * WIDTH + at.apart);
            float2 l = *(const float2*)(m.lost() + j * WIDTH + at.apart);
            lost.x = fmaf(lost.x, d.x, l.x), lost.y = fmaf(lost.y, d.y, l.y);
        }
        float2 first = half[1], second = half[0];
        float2 owed = *(const float2*)(m.owed() + at.place);
        second.x = without_drift(first.x, second.x, lost.x, owed.x);
        second.y = without_drift(first.y, second.y, lost.y, owed.y);
        *(float2*)(m.owed() + at.place) = owed;
        *(float2*)(m.first() + at.apart) = first;
        *(float2*)(m.second() + at.apart) = second;
    }
    copy_wait();
    opened.dy_finite = finite_outputs(m.at(AT_DY));
    publish();
    opened.dense = __syncthreads_and(dense && opened.dy_finite) && opened.gates_divisible;
    return opened;
}

// Whether products can be dense where queries and keys are relative to the middle of their half of the chunk, as far as
// the thread sees
__device__ __forceinline__ bool halves_are_dense(const Memory& m) {
    Column at;
    bool dense = true;
#pragma unroll
    for (int j = 0; j < GROUPS; j += 2) {
        float2 d = *(const float2*)(m.groups() + j * WIDTH + at.apart);
        float2 other = *(const float2*)(m.groups() + (j + 1) * WIDTH + at.apart);
        dense = dense && d.x * other.x >= SMALLEST && d.y * other.y >= SMALLEST;
    }
    return dense;
}

// Recomputes Q and K relative to the middle of their half of the chunk; to `later`, keys relative to the middle of the second
// half, which those of the first half never are in K. And the decays across the four blocks of 16 tokens, in the walk's
// order `first`, `inner` twice, `second`. Returns e before the thread's first token.
__device__ __forceinline__ float2 open_halves(const BackwardArguments& a, const Memory& m, u32 raw, u32 later) {
    Column at;
    int from_middle = at.group & 3;  // in groups, 2 behind it
    auto decay = [&](int group) { return *(const float2*)(m.groups() + group * WIDTH + at.apart); };
    float2 start = make_float2(1.0f, 1.0f), whole = decay(at.group);
    if (from_middle == 0 || from_middle == 3) start = decay(from_middle == 0 ? at.group + 1 : at.group - 1);
    if (from_middle < 2) start.x = reciprocal(start.x * whole.x), start.y = reciprocal(start.y * whole.y);
    float2 beta = *(const float2*)(m.beta() + at.place), e = make_float2(start.x * a.scale, start.y * a.scale);
    float f[8][2], k[8][2];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float2 z = load_pair(at.raw(raw + TILE_BYTES, i)), q = load_pair(at.raw(raw, i));
        tied_gate(z.x, beta.x, f[i][0], k[i][0]);
        tied_gate(z.y, beta.y, f[i][1], k[i][1]);
        e.x *= f[i][0], e.y *= f[i][1];
        store_shared(at.own(m.at(AT_Q), i), pack(activate(q.x) * e.x, activate(q.y) * e.y));
    }
    float2 inverse = make_float2(reciprocal(start.x * whole.x), reciprocal(start.y * whole.y)), after = inverse;
    if (at.group < GROUPS / 2) {
        after = make_float2(1.0f, 1.0f);
        for (int j = at.group + 1; j < 6; j++) {
            float2 d = decay(j);
            after.x *= d.x, after.y *= d.y;
        }
    }
#pragma unroll
    for (int i = 7; i >= 0; i--) {
        store_shared(at.own(m.at(AT_K), i), pack(k[i][0] * inverse.x, k[i][1] * inverse.y));
        store_shared(at.own(later, i), pack(k[i][0] * after.x, k[i][1] * after.y));
        inverse.x *= f[i][0], inverse.y *= f[i][1];
        after.x *= f[i][0], after.y *= f[i][1];
    }
    if (at.group == 0) {
        float2 d[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 x = decay(2 * j), y = decay(2 * j + 1);
            d[j] = make_float2(x.x * y.x, x.y * y.y);
        }
        join_inner(d[1].x, d[2].x), join_inner(d[1].y, d[2].y);
        float2 n = *(const float2*)(m.first() + at.apart), o = *(const float2*)(m.second() + at.apart);
        float2 owed = *(const float2*)(m.owed() + at.place);
        d[0].x = without_drift((double)n.x * o.x, (double)d[3].x * d[2].x * d[1].x, d[0].x, owed.x);
        d[0].y = without_drift((double)n.y * o.y, (double)d[3].y * d[2].y * d[1].y, d[0].y, owed.y);
        *(float2*)(m.owed() + at.place) = owed;
        *(float2*)(m.first() + at.apart) = d[3];
        *(float2*)(m.inner(0) + at.apart) = d[2];
        *(float2*)(m.inner(1) + at.apart) = d[1];
        *(float2*)(m.second() + at.apart) = d[0];
    }
    publish();
    __syncthreads();
    return start;
}

typedef float Quarter[8][4];  // of 64 rows of V and 64 of K, as a product leaves its sums

// For gates too close to 0 for dense products: replaces Q by queries with all decays since the chunk's start, which is all
// that the gradient of the state needs, and `second` by the whole decay of the chunk.
__device__ __forceinline__ void decay_queries(const BackwardArguments& a, const Memory& m, u32 raw) {
    Column at;
    float2 beta = *(const float2*)(m.beta() + at.place), e = make_float2(a.scale, a.scale);
    for (int j = 0; j < at.group; j++) {
        float2 d = *(const float2*)(m.groups() + j * WIDTH + at.apart);
        e.x *= d.x, e.y *= d.y;
    }
#pragma unroll 1
    for (int i = 0; i < 8; i++) {
        float2 z = load_pair(at.raw(raw + TILE_BYTES, i)), q = load_pair(at.raw(raw, i)), f, k;
        tied_gate(z.x, beta.x, f.x, k.x);
        tied_gate(z.y, beta.y, f.y, k.y);
        e.x *= f.x, e.y *= f.y;
        store_shared(at.own(m.at(AT_Q), i), pack(activate(q.x) * e.x, activate(q.y) * e.y));
    }
    if (thread_index() < WIDTH) m.second()[thread_index()] *= m.first()[thread_index()];
    publish();
    __syncthreads();
}

// Sums over the eight lanes of one column of a product, of sixteen values a lane; each lane returns two of them, those of
// its columns in piece `piece` of 8.
__device__ __forceinline__ float2 sum_rows(float (&x)[8][2], int& piece) {
    int lane = thread_index() & 31;
    piece = 0;
#pragma unroll
    for (int step = 0; step < 3; step++) {
        int bit = 4 << step, count = 4 >> step;
        bool side = lane & bit;
#pragma unroll
        for (int i = 0; i < count; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float own = side ? x[i + count][j] : x[i][j], other = side ? x[i][j] : x[i + count][j];
                x[i][j] = own + __shfl_xor_sync(~0u, other, bit);
            }
        piece += side ? count : 0;
    }
    return make_float2(x[0][0], x[0][1]);
}

// Scores A, by two warpgroups, and their gradients dA by the others: begun here, and written by write_scores. keys: a
// tile
__device__ __forceinline__ void begin_scores(const Memory& m, const Product& p, u32 keys, float (&sums)[4][4]) {
    bool gradients = p.group >> 1;
    u64 left = factor(m.at(gradients ? AT_DY : AT_Q));
    u64 right = factor((gradients ? m.at(AT_V) : keys) + 32 * (p.group & 1) * 128);
    products_begin();
    multiply_tiles(sums, left, right);
    products_commit();
}

// Writes scores, zero where the key is later.
__device__ __forceinline__ void write_scores(const Memory& m, const Product& p, float (&sums)[4][4]) {
    bool gradients = p.group >> 1;
    int side = p.group & 1, g = Product::g(), c = Product::c();
    u32 row = m.scores(gradients ? 2 : 0) + (16 * p.warp + g) * 128 + 4 * c;
    // how far a query is behind a key, for the first of the lane's
    int distance = g - 2 * c + 16 * p.warp - 32 * side;
#pragma unroll
    for (int n = 0; n < 4; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int behind = distance + 8 * i - 8 * n;
            float x = behind < 0 ? 0.0f : sums[n][2 * i], y = behind < 1 ? 0.0f : sums[n][2 * i + 1];
            u32 high = pack(x, y), to = row + 8 * i * 128 + (((4 * side + n) ^ g) << 4);
            store_shared(to, high);
            if (!gradients) {
                float x_high, y_high;
                unpack(high, x_high, y_high);
                store_shared(to + SCORE_BYTES, pack(x - x_high, y - y_high));
            }
        }
    }
}

// Multiplies columns by decays, or by 1 unless `really`
__device__ __forceinline__ void multiply_by(Quarter& x, const float* decays, bool really = true) {
    decays += 2 * Product::c();
#pragma unroll
    for (int n = 0; n < 8; n++) {
        float2 d = *(const float2*)(decays + 8 * spread_piece(n));
        if (!really) d = make_float2(1.0f, 1.0f);
        x[n][0] *= d.x, x[n][1] *= d.y, x[n][2] *= d.x, x[n][3] *= d.y;
    }
}

// Writes the gradient of the state, rounded, to the tile that products read
__device__ __forceinline__ void write_factor(const Memory& m, const Product& p, const Quarter& state) {
    u32 to = m.at(AT_D_STATE) + p.panel();
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
            store_shared(to + Product::panel_place(n, e), pack(state[n][2 * e], state[n][2 * e + 1]));
}

// Sums of S D over all columns of V: a warp has 8 channels, and its products of two numbers are summed by a matrix of ones
__device__ __forceinline__ void sum_states(const Memory& m) {
    int thread = thread_index(), warp = thread >> 5, lane = thread & 31, piece = warp & 7, half = warp >> 3;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    u32 from = m.at(AT_STATE) + half * STATE_PANEL + lane * 128 + ((piece ^ (lane & 7)) << 4);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 s[4], d[4], ones[4] = {ONES, ONES, ONES, ONES};
        load_fragment_transposed(s, from + 32 * i * 128);
        load_fragment_transposed(d, from + 32 * i * 128 + STATE_BYTES);
        multiply(sums, ones, multiply_pairs(s[0], d[0]), multiply_pairs(s[1], d[1]));
        multiply(sums, ones, multiply_pairs(s[2], d[2]), multiply_pairs(s[3], d[3]));
    }
    if (lane < 4) *(float2*)(m.state_sums() + 64 * half + 8 * spread_piece(piece) + 2 * lane) = make_float2(sums[0], sums[1]);
}

// Sums of K dK over the tokens of a warp. `finish` takes them away again, token by token, so that they must be of the
// same rounded K. HALVED: dK is as the middle of the second half sees it
template <bool HALVED>
__device__ __forceinline__ void sum_keys(const Memory& m, const Product& p, int channels, const Quarter& grad) {
    float sums[8][2];
    u32 from = m.at(AT_K) + channels * PANEL_BYTES + (16 * p.warp + Product::g()) * 128 + 4 * Product::c();
#pragma unroll
    for (int n = 0; n < 8; n++) {
        float2 s = load_pair(from + Product::panel_place(n, 0)), t = load_pair(from + Product::panel_place(n, 1));
        sums[n][0] = fmaf(s.x, grad[n][0], t.x * grad[n][2]), sums[n][1] = fmaf(s.y, grad[n][1], t.y * grad[n][3]);
    }
    int piece;
    float2 sum = sum_rows(sums, piece);
    int place = 64 * channels + 8 * spread_piece(piece) + 2 * Product::c();
    if (HALVED && p.warp < 2)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float2 d = *(const float2*)(m.inner(j) + place);
            sum.x *= d.x, sum.y *= d.y;
        }
    *(float2*)(m.key_sums() + p.warp * WIDTH + place) = sum;
}

// Tells the exact kernel which gradients of a chunk it has to compute
__device__ __forceinline__ void raise_flag(const BackwardArguments& a, i64 at, int flag) {
    if (thread_index() < 2) a.fallback[2 * at + thread_index()] = flag;
}

// Stores the gradient of the state after the chunk, laid out as forward_states stores a state, and raises the flag.
__device__ __forceinline__ void leave_to_exact(const BackwardArguments& a, const Product& p, const Quarter& state, i64 at, int flag) {
    u32* to = (u32*)a.d_states + (at * WIDTH + 64 * p.v_half + 16 * p.warp + Product::g()) * (WIDTH / 2);
    to += 32 * p.k_half + Product::c();
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) to[e * 8 * (WIDTH / 2) + 4 * n] = pack(state[n][2 * e], state[n][2 * e + 1]);
    raise_flag(a, at, flag);
}

// Writes sums for dQ or dK to the tile that `finish` reads
__device__ __forceinline__ void write_sums(const Memory& m, const Product& p, int of_keys, int channels, const Quarter& grad) {
    int g = Product::g();
    float* to = m.sums(of_keys) + (16 * p.warp + g) * WIDTH + 64 * channels;
    int place = (2 * Product::c()) ^ ((g & 3) << 3);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
            *(float2*)(to + 8 * e * WIDTH + (place ^ (8 * spread_piece(n)))) = make_float2(grad[n][2 * e], grad[n][2 * e + 1]);
}

// Writes the gradients of query and gate, from their sums, to memory. The chunk's tiles are free afterwards. HALVED:
// leaves the largest of the thread's sums in `lost`
template <bool HALVED>
__device__ __forceinline__ void finish(const BackwardArguments& a, const Memory& m, u32 raw, const Span& span, i64 chunk,
                                       float2 start) {
    Column at;
    int head = a.first_head + blockIdx.y;
    const float *dq_sums = m.sums(0), *dk_sums = m.sums(1);
    float sums[8][2];
    float2 sum = make_float2(0.0f, 0.0f), largest = sum;
#pragma unroll
    for (int i = 7; i >= 0; i--) {
        float2 x = *(const float2*)(dq_sums + at.sum(i)), y = *(const float2*)(dk_sums + at.sum(i));
        float2 q = load_pair(at.own(m.at(AT_Q), i)), k = load_pair(at.own(m.at(AT_K), i));
        sum.x += fmaf(q.x, x.x, -k.x * y.x), sum.y += fmaf(q.y, x.y, -k.y * y.y);
        sums[i][0] = sum.x, sums[i][1] = sum.y;
        if (HALVED) {
            largest.x = fmaxf(largest.x, fmaxf(fabsf(q.x * x.x), fabsf(k.x * y.x)));
            largest.y = fmaxf(largest.y, fmaxf(fabsf(q.y * x.y), fabsf(k.y * y.y)));
        }
    }
    *(float2*)(m.group_sums() + at.group * WIDTH + at.apart) = sum;
    float2 d_log = *(const float2*)(m.state_sums() + at.apart), second = *(const float2*)(m.second() + at.apart);
    d_log.x *= second.x, d_log.y *= second.y;
    if (HALVED)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float2 d = *(const float2*)(m.inner(j) + at.apart);
            d_log.x *= d.x, d_log.y *= d.y;
        }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 s = *(const float2*)(m.key_sums() + j * WIDTH + at.apart);
        d_log.x += s.x, d_log.y += s.y;
    }
    if (HALVED) {
        largest.x = fmaxf(largest.x, fabsf(d_log.x)), largest.y = fmaxf(largest.y, fabsf(d_log.y));
        *(float2*)(m.lost() + at.group * WIDTH + at.apart) = largest;
    }
    __syncthreads();
#pragma unroll
    for (int j = 1; j < GROUPS; j++) {
        float2 s = *(const float2*)(m.group_sums() + j * WIDTH + at.apart);
        if (j > at.group) d_log.x += s.x, d_log.y += s.y;
    }
    float2 beta = *(const float2*)(m.beta() + at.place);
    int sign = a.reverse ? -1 : 1, step = a.heads * ROW_BYTES, row = (int)span.row + sign * 8 * at.group;
    i64 out = (i64)blockIdx.z * a.length * step + head * ROW_BYTES + (i64)row * step + 2 * at.channel;
    char *dq_out = (char*)a.dq + out, *df_out = (char*)a.df + out;
    step *= sign;
    int rows = span.left - 8 * at.group;
    float2 d_bound = make_float2(0.0f, 0.0f), e = make_float2(start.x * a.scale, start.y * a.scale);
    float2 inverse = make_float2(reciprocal(start.x), reciprocal(start.y));
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float2 z = load_pair(at.raw(raw + TILE_BYTES, i)), u = load_pair(at.raw(raw, i)), f, k, closed, open;
        tied_gate(z.x, beta.x, f.x, k.x, closed.x, open.x);
        tied_gate(z.y, beta.y, f.y, k.y, closed.y, open.y);
        float2 opened = make_float2(reciprocal(f.x), reciprocal(f.y));
        e.x *= f.x, e.y *= f.y, inverse.x *= opened.x, inverse.y *= opened.y;
        if (at_floor(f.x)) opened.x = 0.0f;
        if (at_floor(f.y)) opened.y = 0.0f;
        float2 x = *(const float2*)(dq_sums + at.sum(i)), y = *(const float2*)(dk_sums + at.sum(i));
        u32 d = pack(activate_backward(x.x * e.x, u.x), activate_backward(x.y * e.y, u.y));
        float g0 = closed.x * fmaf(sums[i][0] + d_log.x, opened.x, -y.x * inverse.x);
        float g1 = closed.y * fmaf(sums[i][1] + d_log.y, opened.y, -y.y * inverse.y);
        d_bound.x += g0, d_bound.y += g1;
        if (i < rows) {
            *(u32*)(dq_out + (i64)i * step) = d;
            // open is (1 - beta) sigmoid(z)
            *(u32*)(df_out + (i64)i * step) = pack(open.x * g0, open.y * g1);
        }
    }
    float* of_groups = m.group_sums() + GROUPS * WIDTH;
    // recomputed: keeping it would cost registers throughout
    at = Column();
    *(float2*)(of_groups + at.group * WIDTH + at.apart) = d_bound;
    __syncthreads();
    if (a.d_bound && at.group == 0) {
#pragma unroll
        for (int j = 1; j < GROUPS; j++) {
            float2 s = *(const float2*)(of_groups + j * WIDTH + at.apart);
            d_bound.x += s.x, d_bound.y += s.y;
        }
        i64 to = (((i64)blockIdx.z * a.chunks + chunk) * a.heads + head) * WIDTH + at.channel;
        *(float2*)(a.d_bound + to) = d_bound;
    }
}

// Whether the gradients by gates that `finish` wrote are right as shares of their channel's size in the chunk. They are
// exact to the largest of the sums, which a closed gate's does not come near to; so they are wrong where all of a channel's
// are small.
__device__ __forceinline__ bool gates_are_right(const BackwardArguments& a, const Memory& m, const Span& span) {
    Column at;
    int sign = a.reverse ? -1 : 1, step = sign * a.heads * ROW_BYTES, row = (int)span.row + sign * 8 * at.group;
    // written by the same thread
    const char* df = (const char*)a.df + ((i64)blockIdx.z * a.length + row) * a.heads * ROW_BYTES;
    df += (a.first_head + blockIdx.y) * ROW_BYTES + 2 * at.channel;
    float2 gradient = make_float2(0.0f, 0.0f), largest = gradient;
#pragma unroll 1
    for (int i = 0; i < 8; i++)
        if (i < span.left - 8 * at.group) {
            float2 x;
            unpack(*(const u32*)(df + (i64)i * step), x.x, x.y);
            gradient.x = fmaxf(gradient.x, fabsf(x.x)), gradient.y = fmaxf(gradient.y, fabsf(x.y));
        }
    *(float2*)(m.groups() + at.group * WIDTH + at.apart) = gradient;
    __syncthreads();
#pragma unroll 1
    for (int j = 0; j < GROUPS; j++) {
        float2 x = *(const float2*)(m.groups() + j * WIDTH + at.apart);
        float2 y = *(const float2*)(m.lost() + j * WIDTH + at.apart);
        gradient.x = fmaxf(gradient.x, x.x), gradient.y = fmaxf(gradient.y, x.y);
        largest.x = fmaxf(largest.x, y.x), largest.y = fmaxf(largest.y, y.y);
    }
    return __syncthreads_and(gradient.x >= SMALLEST_SHARE * largest.x && gradient.y >= SMALLEST_SHARE * largest.y);
}

// A walk along a segment of one head of one sequence. Block indices are read again, and addresses computed again, each
// time: no register is free to keep them in, and shared memory is full.
struct Walk {
    const BackwardArguments& a;
    Memory m;
    static __device__ __forceinline__ int segment() { return block_index<0>(); }
    static __device__ __forceinline__ int local() { return block_index<1>(); }
    static __device__ __forceinline__ int batch() { return block_index<2>(); }
    __device__ __forceinline__ int head() const { return a.first_head + local(); }
    __device__ __forceinline__ i64 place_of(int chunk) const {
        return ((i64)batch() * a.part_chunks + (chunk - a.first_chunk)) * gridDim.y + local();
    }
    // the chunk it ends with, and whether one before `chunk` follows
    __device__ __forceinline__ int first() const { return a.first_chunk + segment() * a.segment_chunks; }
    __device__ __forceinline__ bool more(int chunk) const { return chunk > first(); }
    __device__ __forceinline__ Span span_at(int chunk) const { return span_of(a.spans, chunk, a.length, a.reverse); }
    // q and f as they came of a chunk
    __device__ __forceinline__ u32 raw(int chunk) const { return m.at(AT_RAW + (chunk & 1) * 2 * TILE_BYTES); }
    __device__ __forceinline__ void fetch_gates(int chunk) const {
        i64 b = batch(), h = head();
        const char* q = (const char*)a.q + (b * a.q_batch + h * a.q_head) * 2;
        const char* f = (const char*)a.f + (b * a.f_batch + h * a.f_head) * 2;
        fetch_pair(raw(chunk), q, 2 * (int)a.q_row, f, 2 * (int)a.f_row, span_at(chunk), a.reverse ? -1 : 1);
    }
    __device__ __forceinline__ void fetch_values(int chunk) const {
        i64 b = batch(), h = head();
        const char* v = (const char*)a.v + (b * a.v_batch + h * a.v_head) * 2;
        const char* dy = (const char*)a.dy + (b * a.dy_batch + h * a.dy_head) * 2;
        fetch_pair(m.at(AT_V), v, 2 * (int)a.v_row, dy, 2 * (int)a.dy_row, span_at(chunk), a.reverse ? -1 : 1);
    }
};

// Adds Q^T dY to the gradient of the state, over `count` times 16 tokens from 16 first on
__device__ __forceinline__ void add_queries(const Memory& m, const Product& p, int first, int count, Quarter& state) {
    u64 dy = factor(m.at(AT_DY) + p.v_half * PANEL_BYTES), q = factor(m.at(AT_Q) + p.k_half * PANEL_BYTES);
#pragma unroll
    for (int s = 0; s < 4; s++)
        if (s >= first && s < first + count) multiply_wide<true, true>(state, dy + s * (2048 >> 4), q + s * (2048 >> 4), true);
    products_commit();
}

// Stores the gradient of the state before a chunk where one is wanted
__device__ __forceinline__ void end_state(const Walk& walk, const Product& p, int chunk, bool dy_finite, Quarter& state) {
    const BackwardArguments& a = walk.a;
    if (!dy_finite)
#pragma unroll
        for (int upper = 0; upper < 2; upper++)
            if (walk.m.reached()[64 * p.v_half + 16 * p.warp + Product::g() + 8 * upper] >= 0)
#pragma unroll
                for (int n = 0; n < 8; n++) state[n][2 * upper] = state[n][2 * upper + 1] = not_a_number();
    float* to = nullptr;
    Span span = walk.span_at(chunk);
    if (span.first) {
        if (a.d_initial) to = a.d_initial + ((i64)span.sequence * a.heads + walk.head()) * WIDTH * WIDTH;
    } else if (a.after && walk.segment() == 0 && !walk.more(chunk)) {
        to = a.after + ((i64)walk.batch() * gridDim.y + walk.local()) * WIDTH * WIDTH;
    }
    if (to) {
        to += p.corner();
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) to[Product::place(n, e)] = state[n][e];
    }
}

// Computes the gradients of a chunk. HALVED: queries and keys are relative to the middles of the halves of the chunk;
// otherwise `gates_divisible` and `dy_finite` hold, which the compiler then knows. gates_divisible: compute gradients of
// query and gate; doubtful: check them afterwards
template <bool HALVED>
__device__ __forceinline__ void take_gradients(const Walk& walk, const Product& p, int chunk, bool gates_divisible, bool doubtful,
                                               bool dy_finite, float2 start, Quarter& state) {
    const BackwardArguments& a = walk.a;
    const Memory& m = walk.m;
    if (!HALVED) gates_divisible = dy_finite = true, doubtful = false;
    // keys as the state and later queries see them
    u32 keys = HALVED ? walk.raw(chunk + 1) : m.at(AT_K);
    multiply_by(state, m.first() + 64 * p.k_half);
    write_factor(m, p, state);
    {
        float scores[4][4];
        begin_scores(m, p, m.at(AT_K), scores);
        if (HALVED) {
            float others[4][4];
            begin_scores(m, p, keys, others);
            products_wait<0>();
            settle(scores), settle(others);
            // queries of the second half and keys of the first
            bool other = p.group == 0 && p.warp >= 2;
#pragma unroll
            for (int i = 0; i < 16; i++) scores[i >> 2][i & 3] = other ? others[i >> 2][i & 3] : scores[i >> 2][i & 3];
        } else {
            products_wait<0>();
            settle(scores);
        }
        write_scores(m, p, scores);
    }
    publish();
    __syncthreads();

    float out[4][4];
    Quarter grad;
    // dQ by two warpgroups, dK by the others, each 64 channels. The warpgroup is read again, and places are sums,
    // not choices: so the compiler keeps all of it in the warp's own registers, where products want it.
    int of_keys = __shfl_sync(~0u, thread_index() >> 8, 0), channels = __shfl_sync(~0u, thread_index() >> 7 & 1, 0);
    if (gates_divisible) {
        static_assert(AT_V == AT_DY - TILE_BYTES && AT_D_STATE == AT_STATE + STATE_BYTES && AT_Q == AT_K - TILE_BYTES);
        u64 left = factor(m.at(AT_DY) - of_keys * TILE_BYTES);
        u64 right = factor(m.at(AT_STATE) + of_keys * STATE_BYTES + channels * STATE_PANEL);
        products_begin();
#pragma unroll
        for (int s = 0; s < 8; s++)
            multiply_wide<false, true>(grad, left + (s >> 2) * (PANEL_BYTES >> 4) + (s & 3) * (32 >> 4),
                                       right + s * (2048 >> 4), s > 0);
        products_commit();
    }
    settle(state);
    products_begin();
    {
        u64 k = factor(keys), d = factor(m.at(AT_D_STATE) + 32 * p.group * 128);
#pragma unroll
        for (int s = 0; s < 8; s++)
            multiply_narrow<false, false>(out, k + (s >> 2) * (PANEL_BYTES >> 4) + (s & 3) * (32 >> 4),
                                          d + (s >> 2) * (STATE_PANEL >> 4) + (s & 3) * (32 >> 4), s > 0);
        u64 dy = factor(m.at(AT_DY) + (p.group >> 1) * PANEL_BYTES + (p.group & 1) * 64);
#pragma unroll
        for (int summand = 0; summand < 2; summand++)
#pragma unroll
            for (int s = 0; s < 4; s++)
                multiply_narrow<true, true>(out, factor(m.scores(summand)) + s * (2048 >> 4), dy + s * (2048 >> 4), true);
    }
    if (HALVED) {
        // the tokens of the second half first, whose middle `first` leads to
        add_queries(m, p, 2, 2, state);
        products_wait<0>();
        settle(state);
        multiply_by(state, m.inner(0) + 64 * p.k_half);
        multiply_by(state, m.inner(1) + 64 * p.k_half);
        settle(state);
        products_begin();
        add_queries(m, p, 0, 2, state);
    } else {
        add_queries(m, p, 0, 4, state);
        if (walk.more(chunk)) walk.fetch_gates(chunk - 1);
        copy_commit();
    }
    if (gates_divisible) {
        sum_states(m);
        products_wait<1>();
        settle(grad);
        if (of_keys) sum_keys<HALVED>(m, p, channels, grad);
        else multiply_by(grad, m.second() + 64 * channels);
        settle(grad);
        // over `count` times 16 tokens from 16 first on
        auto add_scores = [&](int first, int count) {
            u64 gradients = factor(m.scores(2));
            u64 other = factor(m.at(AT_K) - of_keys * TILE_BYTES + channels * PANEL_BYTES) + first * (2048 >> 4);
            if (of_keys) {
                gradients += first * (2048 >> 4);
                products_begin();
#pragma unroll
                for (int s = 0; s < count; s++)
                    multiply_wide<true, true>(grad, gradients + s * (2048 >> 4), other + s * (2048 >> 4), true);
                products_commit();
            } else {
                gradients += first * (32 >> 4);
                products_begin();
#pragma unroll
                for (int s = 0; s < count; s++)
                    multiply_wide<false, true>(grad, gradients + s * (32 >> 4), other + s * (2048 >> 4), true);
                products_commit();
            }
        };
        if (HALVED) {
            // first what is relative to the middle of the half that is not the row's own; brought to that of its own
            add_scores(2 * of_keys, 2);
            products_wait<0>();
            settle(grad);
            bool other = p.warp >> 1 != of_keys;
            multiply_by(grad, m.inner(0) + 64 * channels, other);
            multiply_by(grad, m.inner(1) + 64 * channels, other);
            settle(grad);
            add_scores(2 - 2 * of_keys, 2);
        } else {
            add_scores(0, 4);
        }
        products_wait<1>();
    } else {
        products_wait<0>();
    }
    settle(out), settle(state);
    write_values(a, walk.batch(), walk.head(), walk.span_at(chunk), p.warp, p.group, dy_finite ? nullptr : m.reached(), out);
    multiply_by(state, m.second() + 64 * p.k_half);
    end_state(walk, p, chunk, dy_finite, state);
    products_wait<0>();
    settle(grad);
    // all products are done: the memory of their factors is free
    __syncthreads();
    if (HALVED) {
        // where keys were
        if (walk.more(chunk)) walk.fetch_gates(chunk - 1);
        copy_commit();
    }
    if (walk.more(chunk)) walk.fetch_values(chunk - 1);
    if (gates_divisible) {
        write_sums(m, p, of_keys, channels, grad);
        __syncthreads();
        finish<HALVED>(a, m, walk.raw(chunk), walk.span_at(chunk), chunk, start);
        if (doubtful && !gates_are_right(a, m, walk.span_at(chunk)))
            raise_flag(a, walk.place_of(chunk), QUERY_AND_GATE);
    }
}

// Computes the gradient of the state alone, across a chunk whose other gradients are left to backward_exact.cu
__device__ __forceinline__ void carry_gradient(const Walk& walk, const Product& p, int chunk, bool dy_finite,
                                               Quarter& state) {
    multiply_by(state, walk.m.second() + 64 * p.k_half);
    settle(state);
    products_begin();
    add_queries(walk.m, p, 0, 4, state);
    if (walk.more(chunk)) walk.fetch_gates(chunk - 1);
    copy_commit();
    products_wait<0>();
    settle(state);
    end_state(walk, p, chunk, dy_finite, state);
    __syncthreads();
    if (walk.more(chunk)) walk.fetch_values(chunk - 1);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) backward_walk(const __grid_constant__ BackwardArguments a) {
    extern __shared__ __align__(1024) char shared[];
    constexpr i64 STATE = WIDTH * WIDTH;
    Walk walk = {a, {shared}};
    const Memory& m = walk.m;
    int end = walk.first() + a.segment_chunks;
    if (end > a.end_chunk) end = a.end_chunk;
#if PACKED
    if (end > *a.num_spans) end = *a.num_spans;
#endif
    if (threadIdx.x < WIDTH)
        m.beta()[place_of_channel(threadIdx.x)] = a.bound ? a.bound[walk.head() * WIDTH + threadIdx.x] : 0.0f;
    if (end <= walk.first()) return;
    walk.fetch_gates(end - 1);
    copy_commit();
    walk.fetch_values(end - 1);
    fetch_state(m.at(AT_STATE), a.states, walk.place_of(end - 1));
    copy_commit();
    Product p;
    Quarter state;
    __syncthreads();
    for (int chunk = end - 1; chunk >= walk.first(); chunk--) {
        // recomputed wherever it is needed: no register is free to keep it in
        Span span = walk.span_at(chunk);
        if (chunk == end - 1 || span.last) {
            const float* known = nullptr;
            if (span.last) {
                if (a.d_final) known = a.d_final + ((i64)span.sequence * a.heads + walk.head()) * STATE + p.corner();
            } else if (a.before) {
                i64 own = walk.batch() * a.before_segments + a.before_segment + walk.segment();
                known = a.before + (own * a.before_heads + a.before_head + walk.local()) * STATE + p.corner();
            }
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) state[n][e] = known ? known[Product::place(n, e)] : 0.0f;
            // nothing is owed to another sequence
            if (thread_index() < WIDTH) m.owed()[thread_index()] = 0.0f;
        }
        u32 raw = walk.raw(chunk);
        // q and f
        copy_wait_but_one();
        if (span.left < CHUNK) close_missing(raw + TILE_BYTES, span.left);
        __syncwarp();
        Opened opened = open_chunk(a, m, raw);
        if (opened.dense) {
            take_gradients<false>(walk, p, chunk, true, false, true, opened.start, state);
        } else {
            bool dy_finite = __syncthreads_and(opened.dy_finite), halved = __syncthreads_and(halves_are_dense(m));
            // a bound's gradient is a sum of gradients by gates, without the gates as factors
            bool gates_divisible = halved && dy_finite && (opened.gates_divisible || !a.d_bound);
            bool doubtful = gates_divisible && !opened.gates_divisible;
            float2 start;
            if (halved) start = open_halves(a, m, raw, walk.raw(chunk + 1));
            else decay_queries(a, m, raw);
            if (!dy_finite) remove_bad(m.at(AT_DY), m.reached());
            if (!gates_divisible || doubtful)
                leave_to_exact(a, p, state, walk.place_of(chunk), gates_divisible ? 0 : halved ? QUERY_AND_GATE : VALUE_TOO);
            if (halved) take_gradients<true>(walk, p, chunk, gates_divisible, doubtful, dy_finite, start, state);
            else carry_gradient(walk, p, chunk, dy_finite, state);
        }
        if (walk.more(chunk)) fetch_state(m.at(AT_STATE), a.states, walk.place_of(chunk - 1));
        copy_commit();
    }
}
