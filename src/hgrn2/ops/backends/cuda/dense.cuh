// Work of the gate warps: decays, queries and keys for the state warps, and scores of dense products.

// Where one head of one sequence begins
struct Row {
    const char* q;
    const char* f;
    const char* v;
    char* y;
};

// Each warp fetches what it works on itself, 16 rows and half of the channels, so that no other warp waits for it
template <bool QUERIES>
__device__ __forceinline__ void fetch(const ForwardArguments& a, const Memory& m, int stage, const Span& span,
                                      const Row& from) {
    Place at = place_of_thread();
    int first = 16 * at.block + (at.lane >> 3), piece = 8 * at.half + (at.lane & 7);
    int sign = a.reverse ? -1 : 1;
    i64 row = span.row + sign * first;
    const char* q = QUERIES ? from.q + row * a.q_row * 2 + piece * 16 : nullptr;
    const char* f = from.f + row * a.f_row * 2 + piece * 16;
    const char* v = from.v + row * a.v_row * 2 + piece * 16;
    // rows are 4 apart, which changes one bit of what a piece's place is XORed with
    u32 even = m.tile(stage, 0) + panel_place(first, piece), odd = m.tile(stage, 0) + panel_place(first, piece ^ 4);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        // of a row that does not exist nothing is read
        bool exists = first + 4 * i < span.left;
        u32 to = (i & 1 ? odd : even) + 4 * i * 128;
        if (QUERIES) copy_async(to, q, exists), q += sign * 8 * a.q_row;
        copy_async(to + TILE_BYTES, f, exists), f += sign * 8 * a.f_row;
        copy_async(to + 2 * TILE_BYTES, v, exists), v += sign * 8 * a.v_row;
    }
    copy_commit();
}

// The decays that the state is multiplied by: of the chunk's four blocks, or, joined, of all of it. The warps of the first
// block do it.
__device__ __forceinline__ void state_decays(const Memory& m, int slot, bool joined, float2& owed) {
    Place at = place_of_thread();
    if (at.block != 0) return;
    int column = 64 * at.half + 2 * at.lane;
    float2 d[4], lost = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        d[j] = *(const float2*)(m.blocks() + j * WIDTH + column);
        float2 l = *(const float2*)(m.lost() + j * WIDTH + column);
        lost.x = fmaf(lost.x, d[j].x, l.x), lost.y = fmaf(lost.y, d[j].y, l.y);
    }
    if (!joined) join_inner(d[1].x, d[2].x), join_inner(d[1].y, d[2].y);
    // of the first two, of three, and what rounding takes from that
    float2 two = make_float2(d[0].x * d[1].x, d[0].y * d[1].y), three = make_float2(two.x * d[2].x, two.y * d[2].y);
    if (joined) {
        d[0] = make_float2(three.x * d[3].x, three.y * d[3].y);
        d[0].x = without_drift(1.0f, d[0].x, lost.x, owed.x), d[0].y = without_drift(1.0f, d[0].y, lost.y, owed.y);
        *(float2*)(m.decays(slot, 0) + column) = d[0];
        return;
    }
    float2 more = make_float2(fmaf(d[0].x, d[1].x, -two.x) * d[2].x, fmaf(d[0].y, d[1].y, -two.y) * d[2].y);
    more.x += fmaf(two.x, d[2].x, -three.x), more.y += fmaf(two.y, d[2].y, -three.y);
    d[3].x = without_drift(three.x, d[3].x, lost.x, owed.x, more.x);
    d[3].y = without_drift(three.y, d[3].y, lost.y, owed.y, more.y);
#pragma unroll
    for (int j = 0; j < 4; j++) *(float2*)(m.decays(slot, j) + column) = d[j];
}

// Keys with the decays to the end of the chunk, in place of what they come from. Exact for any gate.
__device__ __forceinline__ void to_the_end(const Memory& m, int stage, const Gates& x) {
    Place at = place_of_thread();
    u32 tile = m.tile(stage, 1) + at.block * 16 * 128;
    const float* blocks = m.blocks() + 64 * at.half + 2 * at.lane;
    float2 e = make_float2(1.0f, 1.0f);
    for (int block = at.block + 1; block < 4; block++) {
        float2 d = *(const float2*)(blocks + block * WIDTH);
        e.x *= d.x, e.y *= d.y;
    }
#pragma unroll
    for (int i = 15; i >= 0; i--) {
        store_shared(at.row(tile, i), pack(x.k[i][0] * e.x, x.k[i][1] * e.y));
        e.x *= x.decay[i][0], e.y *= x.decay[i][1];
    }
}

// Queries and keys relative to the middle of their half of the chunk, in place of what they come from.
__device__ __forceinline__ void from_the_middle(const ForwardArguments& a, const Memory& m, int stage, const Gates& x) {
    Place at = place_of_thread();
    u32 q_tile = m.tile(stage, 0) + at.block * 16 * 128, f_tile = m.tile(stage, 1) + at.block * 16 * 128;
    float2 own = *(const float2*)(m.blocks() + at.block * WIDTH + 64 * at.half + 2 * at.lane);
    // e before the first of the warp's tokens
    float2 e = make_float2(1.0f, 1.0f);
    if (!(at.block & 1)) e.x = reciprocal(own.x), e.y = reciprocal(own.y);
    u32 raw[8];
    float2 scaled = make_float2(e.x * a.scale, e.y * a.scale);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        // several reads before the first write, so that none waits for it
        if (i % 8 == 0)
#pragma unroll
            for (int j = 0; j < 8; j++) raw[j] = load_shared(at.row(q_tile, i + j));
        float q0, q1;
        unpack(raw[i % 8], q0, q1);
        scaled.x *= x.decay[i][0], scaled.y *= x.decay[i][1];
        store_shared(at.row(q_tile, i), pack(activate(q0) * scaled.x, activate(q1) * scaled.y));
    }
    // reciprocals are dear: 1 / e of a token is that of the token after it times that token's decay
    if (at.block & 1) e.x = reciprocal(own.x), e.y = reciprocal(own.y);
    else e.x = e.y = 1.0f;
#pragma unroll
    for (int i = 15; i >= 0; i--) {
        store_shared(at.row(f_tile, i), pack(x.k[i][0] * e.x, x.k[i][1] * e.y));
        e.x *= x.decay[i][0], e.y *= x.decay[i][1];
    }
}

// Scores Q K^T within the halves of the chunk, as sums of two numbers of the inputs' type: one has too few digits. Each
// half of the warps has 32 keys, of which two of them have the queries; above the diagonal the zeros of the beginning stay.
__device__ __forceinline__ void dense_scores(const Memory& m, int stage, int slot) {
    Place at = place_of_thread();
    float sums[4][4];
    u64 q = factor(m.tile(stage, 0)), k = factor(m.tile(stage, 1) + 32 * at.half * 128);
    products_begin();
    multiply_tiles(sums, q, k);
    products_commit();
    products_wait<0>();
    settle(sums);
    if (at.block >> 1 != at.half) return;
    u32 row = m.scores(slot, 0) + (16 * at.block + at.g) * 128 + 4 * at.c;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        int early = 32 * at.half + 8 * n - 16 * at.block;
        if (early > 8) break;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int behind = at.g + 8 * i - early - 2 * at.c;
            float x = behind < 0 ? 0.0f : sums[n][2 * i], y = behind < 1 ? 0.0f : sums[n][2 * i + 1];
            u32 high = pack(x, y);
            float x_high, y_high;
            unpack(high, x_high, y_high);
            u32 to = row + 8 * i * 128 + (((4 * at.half + n) ^ at.g) << 4);
            store_shared(to, high);
            store_shared(to + SCORE_BYTES, pack(x - x_high, y - y_high));
        }
    }
}
