// Shared by the warps of a walk (forward.cu): argument, constants, shared memory.

struct ForwardArguments {
    const void* q;
    const void* f;
    const void* v;
    const float* bound;    // [H, K] or null
    const void* spans;     // PACKED: of each chunk, see chunk.cuh
    const int* num_spans;  // PACKED: how many chunks there are
    void* y;               // [B, T, H, V], contiguous
    const float* initial;  // [N, H, K, V], states that sequences begin with, or null for zeros
                           // BACK: gradients of those they end with
    float* final;          // [N, H, K, V], states after them, or null
    const float* before;   // [B, before_segments, before_heads, K, V], state before each segment, or null for zeros
    float* update;         // summaries: [B, segments, G, K, V], what a segment adds to the state
    float* decay;          // summaries: [B, segments, G, 2, K], decay across a segment and 1 minus it
    float* coarse;         // [B, pieces, H, K, V]: the state every coarse_chunks, but for the first, or null
    void* kept;            // states: [B, kept_chunks, G, V, K] in the inputs' type, each half of K in the order
                           // channel 8 i + 2 c + e at 16 c + 2 i + e
    i64 q_batch, q_row, q_head, f_batch, f_row, f_head, v_batch, v_row, v_head;
    i64 length;
    int heads, first_head;                // of all; of the G heads of this launch
    int first_chunk, end_chunk;           // that are walked
    int segments, segment_chunks;         // into which they are cut
    int before_segments, before_segment;  // of `before`: how many there are, and which is that of segment 0
    int before_heads, before_head;        // likewise heads
    int coarse_chunks, pieces, kept_chunks, reverse;
    float scale;
};

constexpr int GATE_THREADS = 256;
constexpr int STATE_THREADS = 256;
constexpr int GROUP_THREADS = 128;  // of a warpgroup: four warps that take part in a product together
constexpr int THREADS = GATE_THREADS + STATE_THREADS;
// 16 warps start with 128 registers a lane; what the gate warps give up the state warps get
constexpr int GATE_REGISTERS = 112;
constexpr int STATE_REGISTERS = 144;
constexpr int STAGES = 3;
// barriers: among the gate warps; slots filled for the state warps, and emptied by them; among the warps of a half of
// the state; between the two gate warps of a block of tokens
constexpr int GATES = 1, FILLED = 2, EMPTIED = 4, STATES = 6, PAIRS = 8;
// flag of a chunk: it took the joins
constexpr int JOINED = 1;

// Shared memory: q, f, v of STAGES chunks; for two chunks (slots) two summands of the scores, and the decays that the
// state is multiplied by [4, 128] (summaries: what is left across all chunks so far, and 1 minus it); decays of the
// blocks of 16 tokens, and 1 minus them [4, 128]; beta [128]; how far values that are not finite reach [128]; what is
// said of both slots. kernels.py holds the size. Tiles are laid out as in wgmma.cuh
struct Memory {
    char* start;
    __device__ __forceinline__ u32 tile(int stage, int which) const {
        return shared_address(start) + (3 * stage + which) * TILE_BYTES;
    }
    __device__ __forceinline__ u32 scores(int slot, int summand) const {
        return shared_address(start) + 3 * STAGES * TILE_BYTES + (2 * slot + summand) * SCORE_BYTES;
    }
    __device__ __forceinline__ float* numbers() const {
        return (float*)(start + 3 * STAGES * TILE_BYTES + 4 * SCORE_BYTES);
    }
    __device__ __forceinline__ float* decays(int slot, int part) const { return numbers() + (4 * slot + part) * WIDTH; }
    __device__ __forceinline__ float* blocks() const { return numbers() + 8 * WIDTH; }
    __device__ __forceinline__ float* lost() const { return numbers() + 12 * WIDTH; }
    __device__ __forceinline__ float* beta() const { return numbers() + 16 * WIDTH; }
    __device__ __forceinline__ int* reached() const { return (int*)(numbers() + 17 * WIDTH); }
    __device__ __forceinline__ int* said(int slot) const { return (int*)(numbers() + 18 * WIDTH) + slot; }
};
