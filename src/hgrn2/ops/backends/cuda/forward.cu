// The forward pass, and the states that the backward pass needs, for K = V = 128: see docs/kernels.md for the picture.
//
// A program walks along a segment of one head of one sequence, a chunk of 64 tokens at a time. Of its 16 warps 8 work on
// gates and scores, 8 on the state, one chunk behind. The state lives in the registers of the state warps, transposed:
// each holds 16 of the 128 columns of V.
//
// With e the product of decays since the middle of a token's half of the chunk (before it, one over the product up to it),
// Q = q e and K = k / e, a score within the half is Q K^T for any two tokens. The state, as the half's middle sees it,
// holds all earlier tokens, so everything is a dense product, for one half and then the other:
//     X = S times the decays to the middle      Y = Q X + (Q K^T) V      X += K^T V      S = X times the decays to the end
// That needs the decays between a middle and the tokens of its half to be far from 0. Where they are not, the chunk goes
// through the joins of joins.cuh, which are exact for any gate: Q then holds the decays since the chunk's start, K those
// to its end, and the state is multiplied by the whole between the products.
//
// A walk has an OUTPUT, or only carries the state, with keys that hold all decays to the chunk's end, and writes down the
// one before each chunk. What a segment adds to the state must be known before segments can be walked side by side: the
// work of summary.cuh instead.

template <bool OUTPUT>
__device__ __forceinline__ void work_on_gates(const ForwardArguments& a, const Memory& m, i64 first, i64 end,
                                              const Row& from) {
    int count = (int)(end - first), stage = 0, next = 1;
    if (count <= 0) return;
    int chunk = (int)first;
    Span span = span_of(a.spans, chunk, a.length, a.reverse);
    int left = span.left;
    bool begins = span.first;
    fetch<OUTPUT>(a, m, 0, span, from);
    // read long before it is needed
    if (count > 1) span = span_of(a.spans, chunk + 1, a.length, a.reverse);
    float2 owed = make_float2(0.0f, 0.0f);
    for (int i = 0; i < count; i++, chunk++) {
        int slot = i & 1;
        copy_wait();
        __syncwarp();
        // the slot, and the stage the next chunk goes to, were last used two chunks ago
        if (i >= 2) barrier_wait(EMPTIED + slot, THREADS);
        else if (i == 1) barrier_wait(GATES, GATE_THREADS);  // what the blocks lost is still read
        // nothing is owed to another sequence
        if (begins) owed = make_float2(0.0f, 0.0f);
        int next_left = span.left;
        begins = span.first;
        if (i + 1 < count) {
            fetch<OUTPUT>(a, m, next, span, from);
            if (i + 2 < count) span = span_of(a.spans, chunk + 2, a.length, a.reverse);
        }
        Gates x;
        float2 product = open_gates(m, stage, left, x);
        if (OUTPUT) {
            bool dense = barrier_all(GATES, GATE_THREADS, product.x >= SMALLEST && product.y >= SMALLEST);
            state_decays(m, slot, !dense, owed);
            if (threadIdx.x == 0) *m.said(slot) = dense ? 0 : JOINED;
            if (dense) {
                from_the_middle(a, m, stage, x);
                publish();
                barrier_wait(GATES, GATE_THREADS);
                dense_scores(m, stage, slot);
            } else {
                join(a, m, stage, slot, left);
            }
        } else {
            barrier_wait(GATES, GATE_THREADS);
            state_decays(m, slot, true, owed);
            to_the_end(m, stage, x);
        }
        publish();
        barrier_arrive(FILLED + slot, THREADS);
        left = next_left, stage = next, next = next == STAGES - 1 ? 0 : next + 1;
    }
}

template <bool OUTPUT>
__device__ __forceinline__ void work_on_state(const ForwardArguments& a, const Memory& m, i64 first, i64 end,
                                              const Row& from) {
    Reader r = reader_of_thread(a);
    int segment = blockIdx.x, local = blockIdx.y, batch = blockIdx.z, group = gridDim.y;
    constexpr i64 STATE = WIDTH * WIDTH;
    int corner = corner_of(r);
    int chunk = (int)first;
    int stage = 0, count = (int)(end - first);
    int until_coarse = a.coarse ? a.coarse_chunks - chunk % a.coarse_chunks : 0;
    State state;
    Span span;
    span.first = span.last = false;
    if (count > 0) span = span_of(a.spans, chunk, a.length, a.reverse);
    for (int i = 0;; i++, chunk++) {
        if (i == 0 || span.first) {
            const float* known = nullptr;
            if (span.first) {
                if (a.initial) known = a.initial + ((i64)span.sequence * a.heads + a.first_head + local) * STATE + corner;
            } else if (a.before && count > 0) {
                i64 own = (i64)batch * a.before_segments + a.before_segment + segment;
                known = a.before + (own * a.before_heads + a.before_head + local) * STATE + corner;
            }
#pragma unroll
            for (int j = 0; j < 16; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) state[j][e] = known ? known[state_place(j, e)] : 0.0f;
        }
        if (i >= count) break;
        int slot = i & 1;
        if (!OUTPUT) {
            i64 at = ((i64)batch * a.kept_chunks + (chunk - a.first_chunk)) * group + local;
            // the elements of a lane in each half of K are contiguous
            uint4* kept = (uint4*)a.kept + (at * WIDTH + 64 * r.half + 16 * r.warp + r.g) * 16 + 2 * r.c;
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int e = 0; e < 4; e += 2) {
                    uint4 four;
                    four.x = pack(state[4 * k][e], state[4 * k][e + 1]);
                    four.y = pack(state[4 * k + 1][e], state[4 * k + 1][e + 1]);
                    four.z = pack(state[4 * k + 2][e], state[4 * k + 2][e + 1]);
                    four.w = pack(state[4 * k + 3][e], state[4 * k + 3][e + 1]);
                    kept[(k >> 1) * 8 + (k & 1) + 4 * e * 16] = four;
                }
        }
        Span now = span;
        span.first = span.last = false;
        if (i + 1 < count) span = span_of(a.spans, chunk + 1, a.length, a.reverse);
        barrier_wait(FILLED + slot, THREADS);
        char* y = nullptr;
        if (OUTPUT)
            y = from.y + (now.row * a.heads * WIDTH + 64 * r.half + 16 * r.warp + 2 * r.c) * 2 + (i64)r.g * r.y_step;
        advance<OUTPUT>(m, r, stage, slot, y, now.left, state);
        if (OUTPUT) {
            float* to = nullptr;
            if (now.last) {
                if (a.final) to = a.final + ((i64)now.sequence * a.heads + a.first_head + local) * STATE;
            } else if (a.coarse && until_coarse == 1 && chunk + 1 < a.end_chunk) {
                i64 known = (i64)batch * a.pieces + (chunk + 1) / a.coarse_chunks - 1;
                to = a.coarse + (known * a.heads + a.first_head + local) * STATE;
            }
            if (to) write_state(to + corner, state);
            until_coarse = until_coarse == 1 ? a.coarse_chunks : until_coarse - 1;
        }
        if (i + 2 < count) barrier_arrive(EMPTIED + slot, THREADS);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
}

// One segment of one head of one sequence.
template <bool OUTPUT, bool SUMMARY, bool BACK>
__device__ __forceinline__ void walk(const ForwardArguments& a) {
    extern __shared__ __align__(1024) char shared[];
    Memory m = {shared};
    int head = a.first_head + blockIdx.y, batch = blockIdx.z;
    i64 first = a.first_chunk + (i64)blockIdx.x * a.segment_chunks, end = first + a.segment_chunks;
    if (end > a.end_chunk) end = a.end_chunk;
#if PACKED
    if (end > *a.num_spans) end = *a.num_spans;
#endif
    Row row;
    row.q = (const char*)a.q + (batch * a.q_batch + head * a.q_head) * 2;
    row.f = (const char*)a.f + (batch * a.f_batch + head * a.f_head) * 2;
    row.v = (const char*)a.v + (batch * a.v_batch + head * a.v_head) * 2;
    row.y = (char*)a.y + ((i64)batch * a.length * a.heads + head) * WIDTH * 2;
    if (threadIdx.x < WIDTH) m.beta()[threadIdx.x] = a.bound ? a.bound[head * WIDTH + threadIdx.x] : 0.0f;
    // above the diagonal scores are never written
    if (OUTPUT)
        for (int i = threadIdx.x; i < 4 * SCORE_BYTES / 4; i += THREADS) store_shared(m.scores(0, 0) + 4 * i, 0u);
    __syncthreads();
    if (threadIdx.x < GATE_THREADS) {
        give_registers<GATE_REGISTERS>();
        if constexpr (SUMMARY) summarize_gates<BACK>(a, m, first, end, row);
        else work_on_gates<OUTPUT>(a, m, first, end, row);
    } else {
        take_registers<STATE_REGISTERS>();
        if constexpr (SUMMARY) summarize_state<BACK>(a, m, first, end);
        else work_on_state<OUTPUT>(a, m, first, end, row);
    }
}

#define KERNEL(NAME, ...)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ ForwardArguments a) { \
        walk<__VA_ARGS__>(a);                                                                                \
    }
KERNEL(forward_outputs, true, false, false)
KERNEL(forward_summaries, false, true, false)
KERNEL(forward_states, false, false, false)
KERNEL(backward_summaries, false, true, true)
