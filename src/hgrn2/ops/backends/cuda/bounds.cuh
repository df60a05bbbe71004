// Gradient of the lower bound: the sum over chunks.

struct BoundsArguments {
    const float* parts;  // [rows, H, 128], of every chunk
    float* sum;          // [H, 128]
    i64 rows;
    int heads;
};

constexpr int BOUNDS_THREADS = 1024;

// Programs: (H). A thread sums every 32nd row of four channels, then those sums are added, always in the same order.
extern "C" __global__ void __launch_bounds__(BOUNDS_THREADS) sum_bounds(const __grid_constant__ BoundsArguments a) {
    extern __shared__ __align__(1024) char shared[];
    constexpr int FOURS = WIDTH / 4, ROWS = BOUNDS_THREADS / FOURS;
    int channel = 4 * (threadIdx.x % FOURS), own = threadIdx.x / FOURS;
    const float* from = a.parts + (i64)blockIdx.x * WIDTH + channel;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (i64 row = own; row < a.rows; row += ROWS) {
        float4 x = *(const float4*)(from + row * a.heads * WIDTH);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    float* sums = (float*)shared;
    *(float4*)(sums + own * WIDTH + channel) = sum;
    __syncthreads();
    if (threadIdx.x >= WIDTH) return;
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < ROWS; i++) all += sums[i * WIDTH + threadIdx.x];
    a.sum[blockIdx.x * WIDTH + threadIdx.x] = all;
}
