// Parts of backward_exact.cu: reads, and the products with values. A program works on one half of the channels of one head
// in one chunk at a time; for dV, on all of them.

// joins.cuh and gates.cuh take this argument; the fields they use exist in both structs
typedef BackwardArguments ForwardArguments;

constexpr int GATE_THREADS = 256, GATES = 1, PAIRS = 8;
constexpr int HALF = 64;
constexpr int SMALL_BYTES = CHUNK * HALF * 2;
constexpr int SUM_ROW = HALF + 8;  // padded, so that fragments' rows lie in different banks

// Shared memory: S and dS [128 v, 64 k], v and dy, then (over these, when they are no longer needed) gradients in
// float32; q and z as they came; two tiles of what they become; gradients of scores; sums of a few kinds, [64] each.
// kernels.py holds the size
constexpr int AT_STATE = 0, AT_D_STATE = AT_STATE + TILE_BYTES;
constexpr int AT_V = AT_D_STATE + TILE_BYTES, AT_DY = AT_V + TILE_BYTES;
constexpr int SUMS_BYTES = CHUNK * SUM_ROW * 4;
constexpr int AT_DQ = 0, AT_DK = SUMS_BYTES;
constexpr int AT_Q = AT_DY + TILE_BYTES, AT_Z = AT_Q + SMALL_BYTES, AT_SCALED_Q = AT_Z + SMALL_BYTES;
constexpr int AT_SCALED_K = AT_SCALED_Q + SMALL_BYTES, AT_SCORES = AT_SCALED_K + SMALL_BYTES;
constexpr int AT_GROUPS = AT_SCORES + SMALL_BYTES, AT_STATES = AT_GROUPS + GROUPS * HALF * 4;

// For dV, laid out for the joins: q and f, then Q and K, with channels in the states' order; dy; dS [128 v, 128 k]; scores, as
// two summands; numbers.
struct Memory {
    static constexpr int DY = 2 * TILE_BYTES, D_STATE = DY + TILE_BYTES, SCORES = D_STATE + 2 * TILE_BYTES;
    static constexpr int NUMBERS = SCORES + 2 * SCORE_BYTES, END = NUMBERS + 10 * WIDTH * 4;
    char* start;
    __device__ __forceinline__ u32 at(int place) const { return shared_address(start) + place; }
    __device__ __forceinline__ u32 tile(int, int which) const { return at(which * TILE_BYTES); }
    __device__ __forceinline__ u32 scores(int, int summand) const { return at(SCORES + summand * SCORE_BYTES); }
    __device__ __forceinline__ float* beta() const { return (float*)(start + NUMBERS); }
    // decays of blocks of 16 tokens, and 1 minus them [4, 128]
    __device__ __forceinline__ float* blocks() const { return beta() + WIDTH; }
    __device__ __forceinline__ float* lost() const { return blocks() + 4 * WIDTH; }
    // last token that a non-finite number reaches, [128]
    __device__ __forceinline__ int* reached() const { return (int*)(lost() + 4 * WIDTH); }
};
static_assert(Memory::END <= AT_STATES + 4 * HALF * 4);

// One half of the channels of one head in one chunk
struct Piece {
    int batch, local, half;
    i64 chunk, at;  // of its sequence; among the chunks and heads whose states are kept
    Span span;
};

// place of a 16-byte piece of a row of 128 numbers
__device__ __forceinline__ u32 tile_place(int row, int piece) { return row * ROW_BYTES + ((piece ^ (row & 7)) << 4); }

// place of a 16-byte piece of a row of 64 numbers
__device__ __forceinline__ u32 narrow_place(int row, int piece) { return row * CHUNK * 2 + ((piece ^ (row & 7)) << 4); }

// Reads rows of q and f, which come first, then of the states, v and dy. Rows that do not exist are not read.
__device__ __forceinline__ void fetch(const BackwardArguments& a, const Piece& p, u32 base) {
    int head = a.first_head + p.local, left = p.span.left;
    int row = threadIdx.x >> 3, piece = threadIdx.x & 7, sign = a.reverse ? -1 : 1;
    u32 to = base + narrow_place(row, piece);
    i64 from = p.span.row + sign * row;
    const char* q = (const char*)a.q + (p.batch * a.q_batch + head * a.q_head + p.half * HALF + from * a.q_row) * 2;
    const char* f = (const char*)a.f + (p.batch * a.f_batch + head * a.f_head + p.half * HALF + from * a.f_row) * 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        // 32 rows on, a piece's place is XORed with the same
        bool exists = row + 32 * i < left;
        copy_async(to + AT_Q + 32 * i * HALF * 2, q + i * sign * 64 * a.q_row + piece * 16, exists);
        copy_async(to + AT_Z + 32 * i * HALF * 2, f + i * sign * 64 * a.f_row + piece * 16, exists);
    }
    copy_commit();
    i64 place = ((p.at * WIDTH + row) * WIDTH + p.half * HALF) * 2 + piece * 16;
    const char *state = (const char*)a.states + place, *d_state = (const char*)a.d_states + place;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        copy_async(to + AT_STATE + 32 * i * HALF * 2, state + 32 * i * ROW_BYTES, true);
        copy_async(to + AT_D_STATE + 32 * i * HALF * 2, d_state + 32 * i * ROW_BYTES, true);
    }
    row = threadIdx.x >> 4, piece = threadIdx.x & 15;
    to = base + tile_place(row, piece);
    from = p.span.row + sign * row;
    const char* v = (const char*)a.v + (p.batch * a.v_batch + head * a.v_head + from * a.v_row) * 2 + piece * 16;
    const char* dy = (const char*)a.dy + (p.batch * a.dy_batch + head * a.dy_head + from * a.dy_row) * 2 + piece * 16;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        bool exists = row + 16 * i < left;
        copy_async(to + AT_V + 16 * i * ROW_BYTES, v, exists), v += sign * 32 * a.v_row;
        copy_async(to + AT_DY + 16 * i * ROW_BYTES, dy, exists), dy += sign * 32 * a.dy_row;
    }
    copy_commit();
}

// Where a thread finds what it works on in columns: a warp has 8 tokens, a lane two channels of them
struct Columns {
    int first_row, pair;
    u32 raw_at, own_at;
    __device__ __forceinline__ Columns(u32 base, int warp, int lane) {
        first_row = 8 * warp;
        // everything a product takes part in is in the states' order of channels: a lane's pair 4 i + c at 8 c + i
        pair = (lane & 3) * 8 + (lane >> 2);
        raw_at = base + first_row * HALF * 2 + lane * 4, own_at = base + first_row * HALF * 2 + pair * 4;
    }
    // first_row + i is i modulo 8, which is what a piece's place is XORed with
    __device__ __forceinline__ u32 raw(int tile, int i) const { return (raw_at ^ (i << 4)) + (tile + i * HALF * 2); }
    __device__ __forceinline__ u32 own(int tile, int i) const { return (own_at ^ (i << 4)) + (tile + i * HALF * 2); }
    // in a tile of sums in float32, of the first row
    __device__ __forceinline__ int sums() const { return first_row * SUM_ROW + 2 * pair; }
};

// Where it finds fragments of products: a warp has 16 tokens and 32 channels
struct Fragments {
    int block, side, g, c;
    u32 wide_lane, narrow_lane, channels[2];
    __device__ __forceinline__ Fragments(u32 base, int warp, int lane) {
        int row = lane & 15;
        block = warp & 3, side = warp >> 2, g = lane >> 2, c = lane & 3;
        wide_lane = base + row * ROW_BYTES + (((lane >> 4) ^ (row & 7)) << 4);
        narrow_lane = base + row * HALF * 2 + (((lane >> 4) ^ (row & 7)) << 4);
        // the warp's 32 channels are 4 pieces on, their second half another 2
        channels[0] = narrow_lane ^ (side << 6), channels[1] = channels[0] ^ 32;
    }
    // in a tile of sums in float32
    __device__ __forceinline__ int sums() const { return (16 * block + g) * SUM_ROW + 32 * side + 2 * c; }
};

// dY S^T, V dS^T, gradients of the scores dY V^T of the warp's tokens with those of blocks `side` and `side` + 2, as far
// as these are not later; and, to shared memory, sums of S dS over the columns of V, a quarter a warp.
__device__ __forceinline__ void multiply_values(char* shared, const Fragments& x, float (&dq)[4][4], float (&dk)[4][4],
                                                float (&d_scores)[2][2][4]) {
    float state_sums[4][4];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        dq[i >> 2][i & 3] = 0.0f, dk[i >> 2][i & 3] = 0.0f, state_sums[i >> 2][i & 3] = 0.0f;
        d_scores[i >> 3][(i >> 2) & 1][i & 3] = 0.0f;
    }
    u32 dy_lane = AT_DY + x.wide_lane + 16 * x.block * ROW_BYTES, v_lane = AT_V + x.wide_lane;
#pragma unroll
    for (int t = 0; t < 8; t++) {
        u32 dy[4], v[4], s[4];
        load_fragment(dy, dy_lane ^ (t << 5));
        load_fragment(v, (v_lane ^ (t << 5)) + 16 * x.block * ROW_BYTES);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            u32 place = x.channels[j] + 16 * t * HALF * 2;
            load_fragment_transposed(s, place + AT_STATE);
            multiply(dq[2 * j], dy, s[0], s[1]);
            multiply(dq[2 * j + 1], dy, s[2], s[3]);
            u32 d[4];
            load_fragment_transposed(d, place + AT_D_STATE);
            multiply(dk[2 * j], v, d[0], d[1]);
            multiply(dk[2 * j + 1], v, d[2], d[3]);
            if (t >> 1 == x.block) {
                u32 ones[4] = {ONES, ONES, ONES, ONES};
                multiply(state_sums[2 * j], ones, multiply_pairs(s[0], d[0]), multiply_pairs(s[1], d[1]));
                multiply(state_sums[2 * j + 1], ones, multiply_pairs(s[2], d[2]), multiply_pairs(s[3], d[3]));
            }
        }
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (x.side + 2 * j <= x.block) {
                load_fragment(s, (v_lane ^ (t << 5)) + 16 * (x.side + 2 * j) * ROW_BYTES);
                multiply(d_scores[j][0], dy, s[0], s[2]);
                multiply(d_scores[j][1], dy, s[1], s[3]);
            }
    }
    if (x.g == 0) {
        float* to = (float*)(shared + AT_STATES) + x.block * HALF + 32 * x.side + 2 * x.c;
#pragma unroll
        for (int n = 0; n < 4; n++) *(float2*)(to + 8 * n) = make_float2(state_sums[n][0], state_sums[n][1]);
    }
}

// Gradients of scores to shared memory, rounded, where the key is not later than the query.
__device__ __forceinline__ void write_scores(const Fragments& x, u32 base, const float (&d_scores)[2][2][4]) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
        int early = x.side + 2 * j;
        if (early > x.block) continue;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int token = 16 * x.block + x.g + 8 * i, other = 16 * early + 8 * n + 2 * x.c;
                float first = other <= token ? d_scores[j][n][2 * i] : 0.0f;
                float second = other + 1 <= token ? d_scores[j][n][2 * i + 1] : 0.0f;
                u32 place = base + (16 * x.block + x.g) * HALF * 2 + (((2 * early + n) ^ x.g) << 4) + 4 * x.c;
                store_shared(place + AT_SCORES + 8 * i * HALF * 2, pack(first, second));
            }
    }
}

// Sums of a warp's fragments to a tile in float32
__device__ __forceinline__ void write_sums(float* tile, const Fragments& x, const float (&sums)[4][4]) {
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            *(float2*)(tile + x.sums() + 8 * i * SUM_ROW + 8 * n) = make_float2(sums[n][2 * i], sums[n][2 * i + 1]);
}
