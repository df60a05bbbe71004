// Shared by the kernels for K = V = 128: location of chunks, memory movement, matrix products, gates.
//
// Products of backward_exact.cu and of the joins are mma.sync m16n8k16 on bfloat16 or float16 with float32 sums; those of the
// walks and of values.cuh are wgmma (wgmma.cuh). Shared memory holds rows in 16-byte pieces whose place is XORed with the
// row, so that eight rows of one column are in different banks.
//
// Fragment of a 16 x 16 piece, the same for a factor on the left (rows x depth) and, transposed in roles, on the right:
// lane = 4 g + c holds rows g and g + 8, columns 2c, 2c + 1, 2c + 8, 2c + 9 as four registers of two numbers,
//     [0] row g, low columns   [1] row g + 8, low   [2] row g, high   [3] row g + 8, high.

constexpr int CHUNK = 64;
constexpr int WIDTH = 128;
constexpr int ROW_BYTES = WIDTH * 2;
constexpr int TILE_BYTES = CHUNK * ROW_BYTES;
constexpr int SCORE_BYTES = CHUNK * CHUNK * 2;
constexpr float LOG2_E = 1.4426950408889634f;
// what the tokens on one side of a middle must keep of every channel for dense products relative to it. This leaves room
// for values and states of any ordinary size; numbers in float16 have none
constexpr float SMALLEST = BFLOAT16 ? 8.271806125530277e-25f : 2.0f;  // 2^-80

// A chunk of 64 tokens, or fewer at the end of a sequence. A sequence is one of the batch or, PACKED, a run of rows.
struct Span {
    i64 row;       // of its first token in time
    int left;      // tokens from there to the end of its sequence, or more than a chunk's
    int sequence;  // among all
    bool first, last;  // of its sequence
};

// spans: of each chunk {row, left, sequence, first | last << 1}, only where sequences are packed
__device__ __forceinline__ Span span_of(const void* spans, i64 chunk, i64 length, bool reverse) {
#if PACKED
    int4 x = __ldg((const int4*)spans + chunk);
    return {x.x, x.y, x.z, (x.w & 1) != 0, (x.w & 2) != 0};
#else
    i64 time = chunk * CHUNK, left = length - time;
    int some = (int)(left < 2 * CHUNK ? left : 2 * CHUNK);
    return {reverse ? length - 1 - time : time, some, (int)blockIdx.z, time == 0, left <= CHUNK};
#endif
}

// Whether a decay is FLOOR, or would be less, if there is one: then it is not the gate's
__device__ __forceinline__ bool at_floor(float f) { return FLOOR > 0.0f && f <= FLOOR; }

// 1 minus the decay, of a key
__device__ __forceinline__ float lost_of(float k) { return FLOOR > 0.0f ? minimum(k, FLOOR_LOST) : k; }

// decay and key of a pre-activation z: f = beta + (1 - beta) sigmoid(z), or FLOOR if that is larger, k = (1 - beta)
// sigmoid(-z); also sigmoid(-z) and (1 - beta) sigmoid(z)
__device__ __forceinline__ void tied_gate(float z, float beta, float& f, float& k, float& closed, float& open) {
    // beyond 80 the key is 1e-35; an infinite exponential would make f not a number
    float e = exp2_fast(minimum(z * LOG2_E, 115.0f));
    closed = reciprocal(1.0f + e);
    k = fmaf(-beta, closed, closed);
    open = e * k;
    f = fmaf(e, k, beta);
    // not a number stays what it is
    if (at_floor(f)) f = FLOOR;
}
__device__ __forceinline__ void tied_gate(float z, float beta, float& f, float& k) {
    float closed, open;
    tied_gate(z, beta, f, k, closed, open);
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-LOG2_E * x)); }

// 0: none, 1: silu, 2: sigmoid
__device__ __forceinline__ float activate_backward(float grad, float x) {
#if Q_ACTIVATION == 0
    return grad;
#elif Q_ACTIVATION == 1
    float p = sigmoid(x);
    return grad * p * fmaf(x, 1.0f - p, 1.0f);
#else
    float p = sigmoid(x);
    return grad * p * (1.0f - p);
#endif
}
__device__ __forceinline__ float activate(float x) {
#if Q_ACTIVATION == 0
    return x;
#elif Q_ACTIVATION == 1
    return x * sigmoid(x);
#else
    return sigmoid(x);
#endif
}

// The second of two decays a state is multiplied by, changed such that rounding does not add up from chunk to chunk.
// `lost` is 1 minus their product, to the last digits; `owed` what earlier chunks still owe, as a share of the state.
// more: what the first has beyond its rounded value
__device__ __forceinline__ float without_drift(float first, float second, float lost, float& owed, float more = 0.0f) {
    if (!(lost < 0.5f)) {
        owed = 0.0f;
        return second;
    }
    float whole = first * second;
    // all differences of close numbers are exact
    owed += ((1.0f - whole) - lost - fmaf(more, second, fmaf(first, second, -whole))) / whole;
    float changed = fmaf(second, owed, second);
    owed -= (changed - second) / second;
    return changed;
}

// The same of the last of several decays. wanted: their product, others: that of all but the last
__device__ __forceinline__ float without_drift(double wanted, double others, float last, float& owed) {
    if (!(wanted > 0.5)) {
        owed = 0.0f;
        return last;
    }
    double whole = others * last;
    owed += (float)((wanted - whole) / whole);
    float changed = fmaf(last, owed, last);
    owed -= (changed - last) / last;
    return changed;
}

// The decays across the two blocks of 16 tokens between the middles of a chunk's halves. One after the other they may be
// far smaller than any number; where they are not, one multiplication rounds less than two.
__device__ __forceinline__ void join_inner(float& earlier, float& later) {
    float both = earlier * later;
    bool one = both >= SMALLEST;
    earlier = one ? both : earlier, later = one ? 1.0f : later;
}
