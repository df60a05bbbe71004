// Computes the state before each segment from the update and decay of each.

struct CarryArguments {
    float* update;       // [B, segments, G, K, V]: what it adds; replaced by the state before it (back: after it)
    const float* decay;  // [B, segments, G, 2, K], decay across it and 1 minus it, see summary.cuh
    int segments, back;
};

constexpr int CARRY_THREADS = 128;

// Programs: (blocks of four elements a thread, G, B).
extern "C" __global__ void __launch_bounds__(CARRY_THREADS) carry_states(const __grid_constant__ CarryArguments a) {
    // read before the first is needed, so that reads do not wait for each other
    constexpr int AHEAD = 4, STATE = WIDTH * WIDTH;
    int element = 4 * (blockIdx.x * CARRY_THREADS + threadIdx.x), last = a.segments - 1;
    i64 first = (i64)blockIdx.z * a.segments * gridDim.y + blockIdx.y;
    auto place = [&](int n) { return first + (i64)(a.back ? last - n : n) * gridDim.y; };
    float4 state = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int start = 0; start < a.segments; start += AHEAD) {
        float4 update[AHEAD];
        float decay[AHEAD], gone[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (start + i > last) break;
            update[i] = *(const float4*)(a.update + place(start + i) * STATE + element);
            const float* of_channel = a.decay + place(start + i) * 2 * WIDTH + element / WIDTH;
            decay[i] = of_channel[0], gone[i] = of_channel[WIDTH];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (start + i > last) break;
            *(float4*)(a.update + place(start + i) * STATE + element) = state;
            auto carry = [&](float x, float added) {
                // the complement first: a state that hardly decays is not rounded in a product with a number near 1
                float kept = gone[i] < 0.5f ? fmaf(-gone[i], x, x) : decay[i] * x;
                return (gone[i] == REPLACED ? 0.0f : kept) + added;
            };
            state.x = carry(state.x, update[i].x), state.y = carry(state.y, update[i].y);
            state.z = carry(state.z, update[i].z), state.w = carry(state.w, update[i].w);
        }
    }
}
