// Shared by the kernels of the backward pass: their argument and helpers.

struct BackwardArguments {
    const void* q;
    const void* f;
    const void* v;
    const void* dy;
    const float* bound;     // [H, K] or null
    const void* spans;      // PACKED: of each chunk, see chunk.cuh
    const int* num_spans;   // PACKED: how many chunks there are
    const void* states;     // [B, part_chunks, G, V, K], before each chunk, K in the order of forward.cuh
    void* d_states;         // [B, part_chunks, G, V, K], gradient of the state after it; only where `fallback` says so
    void* dq;               // [B, T, H, K], contiguous like the next two
    void* df;               // [B, T, H, K]
    void* dv;               // [B, T, H, V]
    float* d_bound;         // [B, chunks, H, K], or null where it is not wanted
    int* fallback;          // [B, part_chunks, G, 2]: gradients left to the exact kernel
    const float* d_final;   // [N, H, K, V], gradients of the last states, or null for zeros
    float* d_initial;       // [N, H, K, V], those of the first, or null
    const float* before;    // [B, before_segments, before_heads, K, V], gradient of the state after each segment, or null
    float* after;           // [B, G, K, V], gradient of the state before the first segment, or null
    i64 q_batch, q_row, q_head, f_batch, f_row, f_head, v_batch, v_row, v_head, dy_batch, dy_row, dy_head;
    i64 length;
    int batches, heads, chunks;           // B, H, and chunks of a sequence
    int first_head, group;                // heads of this launch: the first, and their number G
    int first_chunk, end_chunk, segment_chunks;
    int before_segments, before_segment, before_heads, before_head;
    int part_chunks, reverse;
    float scale;
};

// values of `fallback`
constexpr int QUERY_AND_GATE = 1, VALUE_TOO = 2;
constexpr int GROUPS = 8;  // of 8 tokens
// two numbers of the inputs' type
constexpr u32 ONES = BFLOAT16 ? 0x3f803f80u : 0x3c003c00u;

__device__ __forceinline__ float2 load_pair(u32 address) {
    float2 r;
    unpack(load_shared(address), r.x, r.y);
    return r;
}

// place of a channel in the states' order: of 32 pairs of channels, pair 4 i + c at place 8 c + i
__device__ __forceinline__ int place_of_channel(int channel) {
    return (channel & 64) + (channel >> 1 & 3) * 16 + (channel >> 3 & 7) * 2 + (channel & 1);
}

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// Replaces non-finite numbers of a tile of dy by 0: 0 times them would reach every token of the chunk. Stores for each
// column the last token they may reach in time, or -1.
__device__ __forceinline__ void remove_bad(u32 dy, int* reached) {
    constexpr u32 EXPONENT = BFLOAT16 ? 0x7f80u : 0x7c00u;
    int column = thread_index(), found = -1;
    if (column < WIDTH) {
#pragma unroll 1
        for (int token = 0; token < CHUNK; token++) {
            u32 place = dy + panel_place(token, column >> 3) + 2 * (column & 7);
            if ((load_shared_number(place) & EXPONENT) != EXPONENT) continue;
            store_shared_number(place, 0);
            found = token;
        }
        reached[column] = found;
    }
    publish();
    __syncthreads();
}

// dV, 32 columns of it, from a warpgroup's product. A column of dy that was not finite at some token is not a number in dV
// at that token and at all earlier ones. reached: as remove_bad leaves it, or null
__device__ __forceinline__ void write_values(const BackwardArguments& a, i64 batch, int head, const Span& span, int warp,
                                             int columns, const int* reached, float (&out)[4][4]) {
    int lane = thread_index() & 31, token = 16 * warp + (lane >> 2), column = 32 * columns + 2 * (lane & 3);
    int sign = a.reverse ? -1 : 1, step = a.heads * ROW_BYTES, row = (int)span.row + sign * token;
    char* to = (char*)a.dv + (batch * a.length * step + head * ROW_BYTES + (i64)row * step + 2 * column);
    if (reached) {
        reached += column;
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (token + 4 * (e & 2) <= reached[8 * n + (e & 1)]) out[n][e] = not_a_number();
    }
#pragma unroll
    for (int e = 0; e < 2; e++)
        if (token + 8 * e < span.left)
#pragma unroll
            for (int n = 0; n < 4; n++) *(u32*)(to + (i64)e * sign * 8 * step + 16 * n) = pack(out[n][2 * e], out[n][2 * e + 1]);
}
