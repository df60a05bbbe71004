// Locations of packed sequences and their chunks.

struct PackedArguments {
    const void* cu_seqlens;  // [N + 1], of 4 or 8 bytes
    int4* spans;             // [most], see chunk.cuh
    int* num_spans;          // how many there are
    void* outputs[3];        // [1, length, H, 128] each, or null: rows of no sequence become zeros
    i64 length;              // rows there are
    int sequences, most;     // N, and the most chunks that fit
    int heads;               // H
    int wide, reverse;       // wide: boundaries have 8 bytes
};

constexpr int PACKED_THREADS = 1024;

// One program: sequences are taken as many at a time as there are threads.
extern "C" __global__ void __launch_bounds__(PACKED_THREADS) cut_sequences(const __grid_constant__ PackedArguments a) {
    __shared__ int of_warp[32], first_of[PACKED_THREADS], tokens_of[PACKED_THREADS];
    __shared__ i64 start_of[PACKED_THREADS];
    int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, before = 0;
    auto bound = [&](i64 i) {
        i64 x = a.wide ? ((const i64*)a.cu_seqlens)[i] : ((const int*)a.cu_seqlens)[i];
        // wrong boundaries must not lead beyond the inputs
        return x < 0 ? 0 : x > a.length ? a.length : x;
    };
    for (int tile = 0; tile < a.sequences; tile += PACKED_THREADS) {
        int sequence = tile + thread;
        i64 start = 0, tokens = 0;
        if (sequence < a.sequences) {
            start = bound(sequence), tokens = bound(sequence + 1) - start;
            // boundaries that fall leave a sequence without a token
            if (tokens < 0) tokens = 0;
        }
        int chunks = (int)((tokens + CHUNK - 1) / CHUNK), sum = chunks;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            int x = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += x;
        }
        if (lane == 31) of_warp[warp] = sum;
        __syncthreads();
        int earlier = before, all = before;
        for (int j = 0; j < 32; j++) {
            if (j < warp) earlier += of_warp[j];
            all += of_warp[j];
        }
        first_of[thread] = earlier + sum - chunks, tokens_of[thread] = (int)tokens, start_of[thread] = start;
        __syncthreads();
        // the chunks of a sequence are written by a warp
        for (int j = warp; j < PACKED_THREADS && tile + j < a.sequences; j += 32) {
            int tokens = tokens_of[j];
            for (int i = lane; i * CHUNK < tokens; i += 32) {
                int left = tokens - i * CHUNK, place = first_of[j] + i;
                // boundaries that fall would make more chunks than fit
                if (place >= a.most) break;
                i64 row = a.reverse ? start_of[j] + left - 1 : start_of[j] + i * CHUNK;
                a.spans[place] = make_int4((int)row, left, tile + j, (i == 0) | (left <= CHUNK) << 1);
            }
        }
        before = all;
        __syncthreads();
    }
    auto clear = [&](i64 first, i64 end) {
        i64 row = a.heads * (ROW_BYTES / sizeof(int4));
        for (int i = 0; i < 3 && a.outputs[i]; i++)
            for (i64 at = first * row + thread; at < end * row; at += PACKED_THREADS)
                ((int4*)a.outputs[i])[at] = make_int4(0, 0, 0, 0);
    };
    // before the first sequence and behind the last: none if the boundaries are right; and if there is no room for all
    // chunks, whose rows that would be is not asked
    bool fits = before <= a.most;
    clear(0, fits ? bound(0) : a.length);
    if (fits) clear(bound(a.sequences), a.length);
    if (thread == 0) *a.num_spans = fits ? before : a.most;
}
