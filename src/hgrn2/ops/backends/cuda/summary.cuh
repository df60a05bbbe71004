// What a segment adds to the state, and how much of the state before it is left.
//
// The state after a segment holds each key times the decays from there to the segment's end, so this walk goes against
// time and keeps their product, `rest`: the state is a sum, never multiplied, for any gate. Once nothing is left of any
// channel, what came before adds nothing, and the walk ends. BACK: the gradient of the state before a segment, from the
// segment's start on, with queries as keys.

// flags of a chunk: it is the first of its sequence (BACK: the last); it adds nothing
constexpr int BEGINS = 1, OVER = 2;
// in place of 1 minus the decay where a sequence begins: whatever came before, numbers that are none included, is not
// of this sequence
constexpr float REPLACED = 2.0f;
constexpr float NOTHING = 1.1754943508222875e-38f;  // 2^-126

template <bool BACK>
__device__ __forceinline__ void summarize_gates(const ForwardArguments& a, const Memory& m, i64 first, i64 end,
                                                const Row& from) {
    constexpr int STEP = BACK ? 1 : -1;
    int count = (int)(end - first), stage = 0, next = 1;
    if (count <= 0) return;
    int chunk = (int)(BACK ? first : end - 1);
    Span span = span_of(a.spans, chunk, a.length, a.reverse), coming = span;
    fetch<BACK>(a, m, 0, span, from);
    if (count > 1) coming = span_of(a.spans, chunk + STEP, a.length, a.reverse);
    float2 rest = make_float2(1.0f, 1.0f), gone = make_float2(0.0f, 0.0f);
    for (int i = 0; i < count; i++, chunk += STEP) {
        int slot = i & 1;
        bool begins = BACK ? span.last : span.first;
        int left = span.left;
        copy_wait();
        __syncwarp();
        // as in forward.cu
        if (i >= 2) barrier_wait(EMPTIED + slot, THREADS);
        else if (i == 1) barrier_wait(GATES, GATE_THREADS);
        if (i + 1 < count) {
            span = coming;
            fetch<BACK>(a, m, next, span, from);
            if (i + 2 < count) coming = span_of(a.spans, chunk + 2 * STEP, a.length, a.reverse);
        }
        Gates x;
        open_gates(m, stage, left, x);
        bool over = barrier_all(GATES, GATE_THREADS, rest.x < NOTHING && rest.y < NOTHING);
        if (!over) {
            Place at = place_of_thread();
            int column = 64 * at.half + 2 * at.lane;
            float2 own = rest, all = make_float2(1.0f, 1.0f), lost = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 d = *(const float2*)(m.blocks() + column + j * WIDTH);
                float2 l = *(const float2*)(m.lost() + column + j * WIDTH);
                all.x *= d.x, all.y *= d.y;
                lost.x = fmaf(lost.x, d.x, l.x), lost.y = fmaf(lost.y, d.y, l.y);
                if (BACK ? j < at.block : j > at.block) own.x *= d.x, own.y *= d.y;
            }
            u32 tile = m.tile(stage, BACK ? 0 : 1) + at.block * 16 * 128;
            if (BACK) {
                u32 raw[16];
#pragma unroll
                for (int j = 0; j < 16; j++) raw[j] = load_shared(at.row(tile, j));
#pragma unroll
                for (int j = 0; j < 16; j++) {
                    float q0, q1;
                    unpack(raw[j], q0, q1);
                    own.x *= x.decay[j][0], own.y *= x.decay[j][1];
                    store_shared(at.row(tile, j), pack(activate(q0) * a.scale * own.x, activate(q1) * a.scale * own.y));
                }
            } else {
#pragma unroll
                for (int j = 15; j >= 0; j--) {
                    store_shared(at.row(tile, j), pack(x.k[j][0] * own.x, x.k[j][1] * own.y));
                    own.x *= x.decay[j][0], own.y *= x.decay[j][1];
                }
            }
            gone.x = fmaf(rest.x, lost.x, gone.x), gone.y = fmaf(rest.y, lost.y, gone.y);
            // rounding would add up in the product where little is gone
            rest.x = gone.x < 0.5f ? 1.0f - gone.x : rest.x * all.x;
            rest.y = gone.y < 0.5f ? 1.0f - gone.y : rest.y * all.y;
            if (at.block == 0) {
                *(float2*)(m.decays(slot, 0) + 64 * at.half + 2 * at.lane) = rest;
                *(float2*)(m.decays(slot, 1) + 64 * at.half + 2 * at.lane) = gone;
            }
        }
        if (threadIdx.x == 0) *m.said(slot) = over ? OVER : begins ? BEGINS : 0;
        publish();
        barrier_arrive(FILLED + slot, THREADS);
        if (over || begins) break;
        stage = next, next = next == STAGES - 1 ? 0 : next + 1;
    }
    copy_wait();
}

template <bool BACK>
__device__ __forceinline__ void summarize_state(const ForwardArguments& a, const Memory& m, i64 first, i64 end) {
    constexpr i64 STATE = WIDTH * WIDTH;
    int thread = threadIdx.x - GATE_THREADS;
    Reader r = reader_of_thread(a);
    int corner = corner_of(r);
    int local = blockIdx.y, count = (int)(end - first), stage = 0;
    float rest = 1.0f, gone = 0.0f;
    State state;
#pragma unroll
    for (int i = 0; i < 16; i++) state[i][0] = state[i][1] = state[i][2] = state[i][3] = 0.0f;
    for (int i = 0; i < count; i++) {
        int slot = i & 1;
        barrier_wait(FILLED + slot, THREADS);
        int said = *m.said(slot);
        if (said != OVER) {
            settle(state);
            products_begin();
            add_keys(m, r, stage, BACK ? 0 : 1, 0, 4, state);
            products_wait<0>();
            settle(state);
        }
        if (said == BEGINS && a.initial) {
            Span span = span_of(a.spans, BACK ? first + i : end - 1 - i, a.length, a.reverse);
            const float* known = a.initial + ((i64)span.sequence * a.heads + a.first_head + local) * STATE + corner;
#pragma unroll
            for (int j = 0; j < 16; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    state[j][e] =
                        fmaf(known[state_place(j, e)], m.decays(slot, 0)[8 * j + 2 * r.c + (e & 1)], state[j][e]);
        }
        // nothing of earlier tokens is left
        rest = said ? 0.0f : m.decays(slot, 0)[thread & (WIDTH - 1)];
        gone = said == BEGINS ? REPLACED : said ? 1.0f : m.decays(slot, 1)[thread & (WIDTH - 1)];
        if (said) break;
        if (i + 2 < count) barrier_arrive(EMPTIED + slot, THREADS);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    i64 own = ((i64)blockIdx.z * a.segments + blockIdx.x) * gridDim.y + local;
    float* out = a.decay + own * WIDTH * 2 + thread;
    if (thread < WIDTH) out[0] = rest, out[WIDTH] = gone;
    write_state(a.update + own * STATE + corner, state);
}
