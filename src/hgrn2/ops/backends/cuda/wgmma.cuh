// Factors of products by a warpgroup, wgmma (instructions.cuh): read from shared memory directly.
//
// A tile of 64 rows of 128 numbers is two panels of 64 columns, each 64 rows of 128 bytes whose 16-byte pieces are at
// their index XORed with the row modulo 8: the 128-byte swizzle of wgmma. Descriptors of a panel:
//     rows are the product's rows or columns, columns the depth:      8 rows are 1024 bytes; depth 16 is 32 bytes on
//     rows are the depth, columns the product's (`turned` factors):  8 rows are 1024 bytes, the next 64 columns a
//                                                                    panel on; depth 16 is 2048 bytes on

constexpr int PANEL_BYTES = 64 * 128;

__device__ __forceinline__ u32 panel_place(int row, int piece) {
    return (piece >> 3) * PANEL_BYTES + row * 128 + (((piece & 7) ^ (row & 7)) << 4);
}

__device__ __forceinline__ u64 factor(u32 address) {
    // 128-byte swizzle, 1024 bytes between groups of 8 rows, a panel between groups of 64 columns
    return (u64)(address >> 4) | (u64)(PANEL_BYTES >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// a b^T over all 128 columns of a tile of 64 rows and of 32 rows of another
__device__ __forceinline__ void multiply_tiles(float (&sums)[4][4], u64 a, u64 b) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int depth = (i >> 2) * (PANEL_BYTES >> 4) + (i & 3) * (32 >> 4);
        multiply_narrow<false, false>(sums, a + depth, b + depth, i > 0);
    }
}
