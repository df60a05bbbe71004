// The fast kernel of the backward pass (backward.cu): shared memory, and the work of each thread.

constexpr int THREADS = 512;
constexpr float SMALLEST_GATE = 1.220703125e-4f;  // 2^-13
// of the largest of the sums it comes from, that the largest gradient by a gate of a channel must be, for digits enough
constexpr float SMALLEST_SHARE = 2.44140625e-4f;  // 2^-12
// a pre-activation of which the decay is 1 and the key nothing
constexpr float OPEN = 300.0f;

// Shared memory: q and f as they came, of two chunks (or of one, and its keys as later queries see them); Q and K; v and
// dy; S and D [128 v, 128 k], over which gradients of Q and K are summed in float32; scores, as two summands, and their
// gradients; numbers. All channels of K but those of q and f as they came are in the order of the states: of 32 pairs of
// channels, pair 4 i + c at place 8 c + i. kernels.py holds the size
constexpr int AT_RAW = 0, AT_Q = 4 * TILE_BYTES, AT_K = AT_Q + TILE_BYTES, AT_V = AT_K + TILE_BYTES, AT_DY = AT_V + TILE_BYTES;
constexpr int STATE_BYTES = 2 * TILE_BYTES, STATE_PANEL = 2 * PANEL_BYTES;
constexpr int AT_STATE = AT_DY + TILE_BYTES, AT_D_STATE = AT_STATE + STATE_BYTES, AT_SCORES = AT_D_STATE + STATE_BYTES;
constexpr int AT_NUMBERS = AT_SCORES + 3 * SCORE_BYTES;
struct Memory {
    char* start;
    __device__ __forceinline__ u32 at(int place) const { return shared_address(start) + place; }
    __device__ __forceinline__ u32 scores(int summand) const { return at(AT_SCORES + summand * SCORE_BYTES); }
    __device__ __forceinline__ float* numbers() const { return (float*)(start + AT_NUMBERS); }
    __device__ __forceinline__ float* beta() const { return numbers(); }
    // the decays across the two halves of the chunk, in the walk's order: N, then M. Spread, like all sums and decays that
    // follow
    __device__ __forceinline__ float* first() const { return numbers() + WIDTH; }
    __device__ __forceinline__ float* second() const { return numbers() + 2 * WIDTH; }
    // decays of groups of tokens and 1 minus them [8, 128] each
    __device__ __forceinline__ float* groups() const { return numbers() + 3 * WIDTH; }
    __device__ __forceinline__ float* lost() const { return groups() + GROUPS * WIDTH; }
    // in their place later: sums of K dK over the tokens of four warps, and [128] of S D
    __device__ __forceinline__ float* key_sums() const { return groups(); }
    __device__ __forceinline__ float* state_sums() const { return groups() + 4 * WIDTH; }
    // in place of sums that are not taken then: how far numbers that are not finite reach, [128]
    __device__ __forceinline__ int* reached() const { return (int*)key_sums(); }
    // what chunks owe to each other, see without_drift; not spread
    __device__ __forceinline__ float* owed() const { return lost() + GROUPS * WIDTH; }
    // of chunks in halves, between `first` and `second`: the decays across the two blocks of 16 tokens around the middle of
    // the chunk, the later one first; those two are then decays across the blocks at its end and start
    __device__ __forceinline__ float* inner(int i) const { return owed() + (1 + i) * WIDTH; }
    // in place of the scores: sums over groups of tokens, two [8, 128]
    __device__ __forceinline__ float* group_sums() const { return (float*)(start + AT_SCORES); }
    __device__ __forceinline__ float* sums(int of_keys) const {
        return (float*)(start + (of_keys ? AT_D_STATE : AT_STATE));
    }
};

// Numbers of channels are moved a little, so that those of half a warp's pairs of channels, which are 16 numbers apart,
// lie in different banks: of a place, and of a piece of 8 among 64
__device__ __forceinline__ int spread(int place) { return place ^ (place >> 2 & 8); }
__device__ __forceinline__ int spread_piece(int n) { return n ^ (n >> 2); }

// Tokens and channels of a thread in the work on columns: 8 tokens, two channels. Computed again by every stage, like
// Product: no register is free to keep it in.
struct Column {
    int group, channel, place, apart;  // `place` of the first channel in the states' order, and spread
    u32 raw_at, own_at;
    __device__ __forceinline__ Column() {
        int thread = thread_index(), lane = thread & 31, half = thread >> 8, pair = (lane & 3) * 8 + (lane >> 2);
        group = thread >> 5 & 7, channel = 64 * half + 2 * lane, place = 64 * half + 2 * pair, apart = spread(place);
        u32 first = half * PANEL_BYTES + 8 * group * 128;
        raw_at = first + lane * 4, own_at = first + pair * 4;
    }
    // of a token in a tile as it came, and in others. Its row is i modulo 8, which is what a piece's place is XORed with
    __device__ __forceinline__ u32 raw(u32 tile, int i) const { return tile + (raw_at ^ (i << 4)) + i * 128; }
    __device__ __forceinline__ u32 own(u32 tile, int i) const { return tile + (own_at ^ (i << 4)) + i * 128; }
    // of a token in a tile of sums
    __device__ __forceinline__ int sum(int i) const { return (8 * group + i) * WIDTH + (apart ^ ((i & 3) << 3)); }
};

// and in products: a warpgroup has 64 of the columns of V and of K of the state's gradient
struct Product {
    int group, warp, v_half, k_half;
    __device__ __forceinline__ Product() {
        // read from one lane, so that the compiler knows that all agree
        int all = __shfl_sync(~0u, thread_index() >> 5, 0);
        group = all >> 2, warp = all & 3, v_half = group & 1, k_half = group >> 1;
    }
    static __device__ __forceinline__ int g() { return (thread_index() & 31) >> 2; }
    static __device__ __forceinline__ int c() { return thread_index() & 3; }
    // in a state as it is in memory [K, V]: of a lane's first number, and of the others from there
    __device__ __forceinline__ int corner() const { return (64 * k_half + 8 * c()) * WIDTH + 64 * v_half + 16 * warp + g(); }
    static __device__ __forceinline__ int place(int n, int e) {
        return (32 * (n & 1) + 2 * (n >> 1) + (e & 1)) * WIDTH + (e & 2 ? 8 : 0);
    }
    // of a lane's first number in the tile of a state, and from there
    __device__ __forceinline__ u32 panel() const {
        return k_half * STATE_PANEL + (64 * v_half + 16 * warp + g()) * 128 + 4 * c();
    }
    static __device__ __forceinline__ u32 panel_place(int n, int e) { return e * 8 * 128 + ((n ^ g()) << 4); }
};
