// What the machine can do that has no name in CUDA C++. All of it is here, and only here: where there is no GPU, tests
// put functions that do the same on a CPU in this file's place.

typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#if BFLOAT16
#define NUMBER "bf16"
#else
#define NUMBER "f16"
#endif

// threadIdx.x, read again each time
__device__ __forceinline__ u32 thread_index() {
    u32 thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// blockIdx, likewise; of 0, 1, 2
template <int AXIS>
__device__ __forceinline__ int block_index() {
    int index;
    if (AXIS == 0) asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    else if (AXIS == 1) asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(index));
    else asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(index));
    return index;
}

// registers a lane, of those of a program
template <int LEFT>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LEFT));
}
template <int WANTED>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WANTED));
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

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

// one number of the inputs' type
__device__ __forceinline__ unsigned short load_shared_number(u32 address) {
    unsigned short x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ void store_shared_number(u32 address, unsigned short x) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(x) : "memory");
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

// waits for all threads, and returns whether every vote is true
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

// before the first product, and where registers it takes were written
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// waits for all but the last LEFT groups
template <int LEFT>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// what was written to shared memory is seen by products, once a barrier is passed
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// keeps the compiler from moving uses of the sums across what is before or after
template <int N>
__device__ __forceinline__ void settle(float (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
}

// likewise of registers that a product takes: written before it begins
template <int N>
__device__ __forceinline__ void settle(u32 (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
}

#define FOUR(X) "+f"(X[0]), "+f"(X[1]), "+f"(X[2]), "+f"(X[3])

// d += a^T b for turned factors a [16, 64] and b [16, 128]
__device__ __forceinline__ void multiply_turned(float (&d)[16][4], u64 a, u64 b) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." NUMBER "." NUMBER " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
        "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 1, 1; }"
        : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]), FOUR(d[4]), FOUR(d[5]), FOUR(d[6]), FOUR(d[7]), FOUR(d[8]),
          FOUR(d[9]), FOUR(d[10]), FOUR(d[11]), FOUR(d[12]), FOUR(d[13]), FOUR(d[14]), FOUR(d[15])
        : "l"(a), "l"(b), "r"(1));
}

// d = a b^T, or added to d, for a [64, 16] in registers, as fragments, and b [32, 16]
__device__ __forceinline__ void multiply_registers(float (&d)[4][4], const u32 (&a)[4], u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." NUMBER "." NUMBER " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, "
        "%20, p, 1, 1, 0; }"
        : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}

// d = a b^T, or added to d, for a [64, 16] and b [32, 16]; turned factors are [16, 64] and [16, 32]
template <bool A_TURNED, bool B_TURNED>
__device__ __forceinline__ void multiply_narrow(float (&d)[4][4], u64 a, u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." NUMBER "." NUMBER " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, "
        "1, %19, %20; }"
        : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3])
        : "l"(a), "l"(b), "r"((int)add), "n"((int)A_TURNED), "n"((int)B_TURNED));
}

// the same with b [64, 16] or, turned, [16, 64]
template <bool A_TURNED, bool B_TURNED>
__device__ __forceinline__ void multiply_wide(float (&d)[8][4], u64 a, u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." NUMBER "." NUMBER " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, %35, "
        "%36; }"
        : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]), FOUR(d[4]), FOUR(d[5]), FOUR(d[6]), FOUR(d[7])
        : "l"(a), "l"(b), "r"((int)add), "n"((int)A_TURNED), "n"((int)B_TURNED));
}
