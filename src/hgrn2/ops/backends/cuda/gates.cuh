// What a gate warp works on: gates of 16 tokens and half of the channels.

// Which part of a chunk a gate warp works on, and where its lane's two channels are in the first 8 rows of a tile
struct Place {
    int warp, lane, g, c, block, half;
    u32 column;
    __device__ __forceinline__ u32 row(u32 tile, int i) const {
        // 16 block + i is i modulo 8, which is what a piece's place is XORed with
        return tile + ((column ^ ((i & 7) << 4)) + i * 128);
    }
};

// Computed again by every stage: few registers are free to keep it in
__device__ __forceinline__ Place place_of_thread() {
    u32 thread = thread_index();
    Place at;
    at.warp = thread >> 5, at.lane = thread & 31;
    at.g = at.lane >> 2, at.c = at.lane & 3, at.block = at.warp & 3, at.half = at.warp >> 2;
    at.column = at.half * PANEL_BYTES + ((at.lane >> 2) << 4) + 4 * (at.lane & 3);
    return at;
}

// What a lane of a gate warp holds: 16 tokens x 2 channels
struct Gates {
    float q[16][2], k[16][2], decay[16][2];
    // of the 16 x 16 scores of the warp's tokens: [row g, col 2c], [g, 2c + 1], [g + 8, 2c + 8], [g + 8, 2c + 9], and
    // [g + 8, 2c], [g + 8, 2c + 1]
    float scores[4], cross[2];
};

// Decays and keys of the warp's 16 tokens, and where a lane finds what belongs to them.
__device__ __forceinline__ Place read_gates(const Memory& m, int stage, int left, Gates& x) {
    Place at = place_of_thread();
    u32 tile = m.tile(stage, 1) + at.block * 16 * 128;
    float2 beta = *(const float2*)(m.beta() + 64 * at.half + 2 * at.lane);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float z0, z1;
        unpack(load_shared(at.row(tile, i)), z0, z1);
        tied_gate(z0, beta.x, x.decay[i][0], x.k[i][0]);
        tied_gate(z1, beta.y, x.decay[i][1], x.k[i][1]);
    }
    left -= 16 * at.block;
    if (left < 16) {
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (i >= left) x.decay[i][0] = x.decay[i][1] = 1.0f, x.k[i][0] = x.k[i][1] = 0.0f;
    }
    return at;
}

// The same, and their product of decays and 1 minus it, to shared memory; returns the product.
__device__ __forceinline__ float2 open_gates(const Memory& m, int stage, int left, Gates& x) {
    Place at = read_gates(m, stage, left, x);
    float2 product = make_float2(1.0f, 1.0f), lost = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        product.x *= x.decay[i][0], product.y *= x.decay[i][1];
        lost.x = fmaf(lost.x, x.decay[i][0], lost_of(x.k[i][0])), lost.y = fmaf(lost.y, x.decay[i][1], lost_of(x.k[i][1]));
    }
    int place = at.block * WIDTH + 64 * at.half + 2 * at.lane;
    *(float2*)(m.blocks() + place) = product;
    *(float2*)(m.lost() + place) = lost;
    return product;
}
