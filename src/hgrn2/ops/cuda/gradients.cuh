// What the kernels of the backward pass share: their argument, and small things.

struct BackwardArguments {
    const void* q;
    const void* f;
    const void* v;
    const void* dy;
    const float* bound;     // [H, K] or null
    const void* spans;      // PACKED: of each chunk, see chunk.cuh
    const int* num_spans;   // PACKED: how many chunks there are
    const void* states;     // [B, part_chunks, G, V, K], before each chunk, K in the order of walk.cuh
    void* d_states;         // [B, part_chunks, G, V, K], gradient of the state after it; only where it is left over
    void* dq;               // [B, T, H, K], contiguous like the next two
    void* df;               // [B, T, H, K]
    void* dv;               // [B, T, H, V]
    float* d_bound;         // [B, chunks, H, K] or null
    int* left_over;         // [B, part_chunks, G, 2]: 1 where gradients of query and gate are left to the exact kernel
    const float* d_final;   // [N, H, K, V], gradients of the last states, or null for zeros
    float* d_initial;       // [N, H, K, V], those of the first, or null
    const float* before;    // [B, before_segments, before_heads, K, V], gradient of the state after each segment, or null
    float* after;           // [B, G, K, V], gradient of the state before the first segment, or null
    i64 q_batch, q_row, q_head, f_batch, f_row, f_head, v_batch, v_row, v_head, dy_batch, dy_row, dy_head;
    i64 length;
    int batches, heads, chunks;           // B, H, and chunks of a sequence
    int first_head, group;                // heads that are worked on: the first, and how many, G
    int first_chunk, end_chunk, segment_chunks;
    int before_segments, before_segment, before_heads, before_head;
    int part_chunks, reverse;
    float scale;
};

constexpr int GROUPS = 8;  // of 8 tokens
// two numbers of the inputs' type
constexpr u32 ONES = BFLOAT16 ? 0x3f803f80u : 0x3c003c00u;

__device__ __forceinline__ float2 load_pair(u32 address) {
    float2 r;
    unpack(load_shared(address), r.x, r.y);
    return r;
}
