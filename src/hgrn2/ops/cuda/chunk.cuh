// What the kernels for K = V = 128 share: where chunks lie, memory movement, matrix products, gates.
//
// Products of gradient.cu and of the joins are mma.sync m16n8k16 on bfloat16 or float16 with float32 sums; those of the
// walks are wgmma (wgmma.cuh). Shared memory holds rows in 16-byte pieces whose place is XORed with the row, so that
// eight rows of one column never meet in a bank.
//
// Fragment of a 16 x 16 piece, the same for a factor on the left (rows x depth) and, transposed in roles, on the right:
// lane = 4 g + c holds rows g and g + 8, columns 2c, 2c + 1, 2c + 8, 2c + 9 as four registers of two numbers,
//     [0] row g, low columns   [1] row g + 8, low   [2] row g, high   [3] row g + 8, high.

typedef unsigned int u32;
typedef long long i64;

constexpr int CHUNK = 64;
constexpr int WIDTH = 128;
constexpr int ROW_BYTES = WIDTH * 2;
constexpr int TILE_BYTES = CHUNK * ROW_BYTES;
constexpr int SCORE_BYTES = CHUNK * CHUNK * 2;
constexpr float LOG2_E = 1.4426950408889634f;

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

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// place of a 16-byte piece of a row of 128 numbers
__device__ __forceinline__ u32 tile_place(int row, int piece) { return row * ROW_BYTES + ((piece ^ (row & 7)) << 4); }

// place of a 16-byte piece of a row of 64 numbers
__device__ __forceinline__ u32 narrow_place(int row, int piece) { return row * CHUNK * 2 + ((piece ^ (row & 7)) << 4); }

__device__ __forceinline__ void copy_async(u32 to, const void* from, bool exists) {
    // a row that does not exist is filled with zeros
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0));
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;"); }
// waits for all but the last group
__device__ __forceinline__ void copy_wait_but_one() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void load_fragment(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_fragment_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ u32 load_shared(u32 address) {
    u32 r;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(address) : "memory");
    return r;
}
__device__ __forceinline__ void load_shared(u32 (&r)[4], u32 address) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void store_shared(u32 address, u32 value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// two numbers of the inputs' type in a register, the first in the low half
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
#if BFLOAT16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
    return r;
}
__device__ __forceinline__ void unpack(u32 x, float& low, float& high) {
#if BFLOAT16
    low = __uint_as_float(x << 16);
    high = __uint_as_float(x & 0xffff0000u);
#else
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(low), "=f"(high) : "r"(x));
#endif
}

// 0 as long as all pairs that were noted are finite
__device__ __forceinline__ void note_finite(u32& noted, u32 x) {
#if BFLOAT16
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(noted) : "r"(x), "r"(0u));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(noted) : "r"(x), "r"(0u));
#endif
}

// of two pairs of numbers of the inputs' type
__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
    u32 r;
#if BFLOAT16
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#endif
    return r;
}

// the transpose of an 8 x 8 piece of a fragment
__device__ __forceinline__ u32 transpose(u32 x) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}

// d += a b^T for a [16, 16] and b [8, 16], whose halves along the depth are b0 and b1
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BFLOAT16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
#endif
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// named barriers: some threads only say that they got there, others wait for all
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_wait(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// waits for all, and says whether all said yes
__device__ __forceinline__ bool barrier_all(int id, int threads, bool vote) {
    u32 all;
    asm volatile(
        "{.reg .pred p, q; setp.ne.u32 p, %3, 0; barrier.cta.red.and.pred q, %1, %2, p; selp.u32 %0, 1, 0, q;}"
        : "=r"(all)
        : "r"(id), "r"(threads), "r"((u32)vote)
        : "memory");
    return all != 0;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// the smaller one; not a number if either is not
__device__ __forceinline__ float minimum(float a, float b) {
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

// decay and key of a pre-activation z: f = beta + (1 - beta) sigmoid(z), k = (1 - beta) sigmoid(-z); also sigmoid(-z)
// and (1 - beta) sigmoid(z)
__device__ __forceinline__ void tied_gate(float z, float beta, float& f, float& k, float& closed, float& open) {
    // beyond 80 the key is 1e-35; an infinite exponential would make f not a number
    float e = exp2_fast(minimum(z * LOG2_E, 115.0f));
    closed = reciprocal(1.0f + e);
    k = fmaf(-beta, closed, closed);
    open = e * k;
    f = fmaf(e, k, beta);
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
