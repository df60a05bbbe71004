// Products by a warpgroup, wgmma: asynchronous, sums in registers, factors from shared memory as it lies there.
//
// A tile of 64 rows of 128 numbers is two panels of 64 columns, each 64 rows of 128 bytes whose 16-byte pieces are at
// their index XORed with the row modulo 8: the 128-byte swizzle that wgmma knows. Descriptors of a panel:
//     rows are the product's rows or columns, columns the depth:      8 rows are 1024 bytes; depth 16 is 32 bytes on
//     rows are the depth, columns the product's (`turned` factors):  8 rows are 1024 bytes, the next 64 columns a
//                                                                    panel on; depth 16 is 2048 bytes on

#if BFLOAT16
#define NUMBER "bf16"
#else
#define NUMBER "f16"
#endif

typedef unsigned long long u64;

constexpr int PANEL_BYTES = 64 * 128;

__device__ __forceinline__ u32 panel_place(int row, int piece) {
    return (piece >> 3) * PANEL_BYTES + row * 128 + (((piece & 7) ^ (row & 7)) << 4);
}

__device__ __forceinline__ u64 factor(u32 address) {
    // 128-byte swizzle, 1024 bytes between groups of 8 rows, a panel between groups of 64 columns
    return (u64)(address >> 4) | (u64)(PANEL_BYTES >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
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

// d = a b^T, or added to d, for a [64, 16] in registers, as fragments, and b [64, 16]
__device__ __forceinline__ void multiply_registers(float (&d)[8][4], const u32 (&a)[4], u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." NUMBER "." NUMBER " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, "
        "%36, p, 1, 1, 0; }"
        : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]), FOUR(d[4]), FOUR(d[5]), FOUR(d[6]), FOUR(d[7])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}

// d += a^T b^T for a turned factor a [16, 64] and b [64, 16] or, TURNED, [16, 64]
template <bool TURNED>
__device__ __forceinline__ void multiply_outputs(float (&d)[8][4], u64 a, u64 b) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." NUMBER "." NUMBER " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 1, "
        "%35; }"
        : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]), FOUR(d[4]), FOUR(d[5]), FOUR(d[6]), FOUR(d[7])
        : "l"(a), "l"(b), "r"(1), "n"((int)TURNED));
}

// d = a b^T, or added to d, for a [64, 16] and b [32, 16]
__device__ __forceinline__ void multiply_straight(float (&d)[4][4], u64 a, u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." NUMBER "." NUMBER " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, "
        "1, 0, 0; }"
        : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3])
        : "l"(a), "l"(b), "r"((int)add));
}
