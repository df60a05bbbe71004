// What `instructions.cuh` does on a GPU, on a CPU: the CUDA kernels of hgrn2/ops/backends/cuda are compiled as C++ behind this.
//
// Every thread of a program is a fiber; which goes on is drawn by lot whenever one must wait, and in half of the programs
// some warps go on only where few others can. What a GPU may do at once or later (copies to shared memory, products by a
// warpgroup) happens at once or at the last moment, by lot as well: for each, or for a whole program. So code that lacks
// a barrier or a wait gives numbers that depend on the seed, and code that waits for nobody is told.
// Shared memory begins as numbers that are none. What is accessed through its addresses is checked for bounds.

#include <csetjmp>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// all fibers run in one thread
#define __shared__ thread_local

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct int4 { int x, y, z, w; };
struct uint4 { u32 x, y, z, w; };
struct uint3 { u32 x, y, z; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
template <class T> inline T __ldg(const T* p) { return *p; }
inline int __ffs(u32 x) { return __builtin_ffs(x); }
template <class To, class From> inline To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To r;
    memcpy(&r, &x, sizeof r);
    return r;
}
inline u32 __float_as_uint(float x) { return bits_as<u32>(x); }
inline float __uint_as_float(u32 x) { return bits_as<float>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }

constexpr int MOST_SHARED_BYTES = 227 * 1024, MOST_THREADS = 1024, LANES = 32, BARRIERS = 16;
__shared__ __align__(1024) char shared[MOST_SHARED_BYTES];
uint3 blockIdx, gridDim;

namespace machine {
// an address of 0 is none
constexpr u32 SHARED_START = 1024;
constexpr size_t STACK_BYTES = 256 * 1024;

struct Copy { u32 to; const void* from; bool exists; int group; };
struct Fiber {
    uint3 index;
    int number;
    jmp_buf context;
    bool finished, vote;
    std::deque<Copy> copies;
    int copy_group;
};
struct Product { std::function<void()> work; int group; };
struct Warp {
    bool slow = false;
    const char* doing = nullptr;
    int arrived = 0;
    void* arguments[LANES];
    std::deque<Product> products;
    int product_group = 0;
};
struct Barrier {
    int expected = 0, arrived = 0;
    bool all = true;
    std::vector<int> waiting;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<int> ready;
Barrier barriers[BARRIERS];
Fiber* current;
jmp_buf scheduler;
std::function<void()> program;
std::string problem;
u32 shared_bytes, threads;
u64 random_state;
// of a program: what may be done later is done at once, by lot, at the last moment
enum { AT_ONCE, BY_LOT, LATE } habit;

inline u32 draw(u32 below) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (u32)(random_state >> 33) % below;
}

inline bool at_once() { return habit == AT_ONCE || (habit == BY_LOT && draw(2)); }

[[noreturn]] inline void give_up(const std::string& why) {
    if (problem.empty())
        problem = why + " (thread " + std::to_string(current->number) + " of program " + std::to_string(blockIdx.x) +
                  ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
    _longjmp(scheduler, 1);
}

// until somebody says that this thread is ready
__attribute__((noinline)) inline void wait() {
    if (!_setjmp(current->context)) _longjmp(scheduler, 1);
}

// A warp's lanes call this with what each brings along; the last to come does the work for all.
template <class Arguments, class Work>
void together(const char* name, Arguments& own, Work work) {
    Warp& warp = warps[current->number / LANES];
    if (warp.arrived && strcmp(warp.doing, name)) give_up(std::string("lanes part: ") + warp.doing + " and " + name);
    warp.doing = name;
    warp.arguments[current->number % LANES] = &own;
    int lanes = std::min<int>(LANES, threads);
    if (++warp.arrived < lanes) return wait();
    warp.arrived = 0;
    work(warp, (Arguments**)warp.arguments);
    int first = current->number / LANES * LANES;
    for (int i = first; i < first + lanes; i++)
        if (i != current->number) ready.push_back(i);
}

inline bool meet(int id, u32 expected, bool waits, bool vote) {
    Barrier& barrier = barriers[id];
    if (!barrier.arrived) barrier.expected = expected, barrier.all = true;
    if (barrier.expected != (int)expected)
        give_up("barrier " + std::to_string(id) + " waits for two numbers of threads");
    barrier.all &= vote;
    if (++barrier.arrived < barrier.expected) {
        if (!waits) return false;
        barrier.waiting.push_back(current->number);
        wait();
        return current->vote;
    }
    for (int i : barrier.waiting) fibers[i].vote = barrier.all, ready.push_back(i);
    barrier.waiting.clear(), barrier.arrived = 0;
    return barrier.all;
}

inline char* at(u32 address, u32 bytes) {
    if (address < SHARED_START || address + bytes > SHARED_START + shared_bytes || address % bytes)
        give_up("no " + std::to_string(bytes) + " bytes of shared memory at " + std::to_string(address - SHARED_START));
    return shared + (address - SHARED_START);
}

inline void copy_now(const Copy& copy) {
    char* to = at(copy.to, 16);
    if (copy.exists) memcpy(to, copy.from, 16);
    else memset(to, 0, 16);
}
inline void wait_for_copies(int left) {
    auto& copies = current->copies;
    while (!copies.empty() && copies.front().group <= current->copy_group - left - 1) {
        copy_now(copies.front());
        copies.pop_front();
    }
}

// number as the inputs' type holds it
inline float widen(unsigned short x) {
#if BFLOAT16
    return bits_as<float>((u32)x << 16);
#else
    return (float)bits_as<_Float16>(x);
#endif
}
inline unsigned short narrow(float x) {
    if (std::isnan(x)) return 0x7fff;
#if BFLOAT16
    u32 bits = bits_as<u32>(x);
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    return bits_as<unsigned short>((_Float16)x);
#endif
}
inline unsigned short half_of(u32 pair, int which) { return (unsigned short)(pair >> 16 * which); }

inline float without_denormals(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

// of a factor in shared memory that `factor` describes, laid out with rows along the depth or, `turned`, across it
inline float element(u64 factor, bool turned, int index, int depth) {
    auto field = [=](int bit) { return (u32)(factor >> bit & 0x3fff) << 4; };
    u32 start = field(0), leading = field(16), stride = field(32);
    u32 row = turned ? depth : index, column = turned ? index : depth;
    u32 address = start + row / 8 * stride + row % 8 * 128 + column % 64 * 2;
    if (turned) address += column / 64 * leading;
    // a piece's place is XORed with the row of eight: bits of the address itself
    address ^= (address >> 7 & 7) << 4;
    return widen(*(const unsigned short*)at(address, 2));
}

// of a fragment: row and column of one of its numbers
inline float number_of(const u32 (&fragment)[4], int row_high, int column_high, int which) {
    return widen(half_of(fragment[row_high + 2 * column_high], which));
}

template <int N>
struct Sums { float (*d)[4]; const u32 (*a)[4]; u64 left, right; bool add; };

// d [64, 8 N] = or += a [64, 16] b [16, 8 N] of one warp: 16 rows
template <int N>
void multiply_group(const char* name, float (&d)[N][4], const u32 (*a)[4], u64 left, u64 right, bool left_turned,
                    bool right_turned, bool add) {
    Sums<N> own = {d, a, left, right, add};
    int warp_row = current->number / LANES % 4 * 16;
    together(name, own, [&](Warp& warp, Sums<N>** all) {
        std::vector<Sums<N>> lanes;
        for (int i = 0; i < LANES; i++) lanes.push_back(*all[i]);
        auto work = [=] {
            float b[16][8 * N], a[16][16];
            for (int k = 0; k < 16; k++)
                for (int n = 0; n < 8 * N; n++) b[k][n] = element(lanes[0].right, right_turned, n, k);
            for (int row = 0; row < 16; row++)
                for (int k = 0; k < 16; k++) {
                    const Sums<N>& lane = lanes[4 * (row & 7) + k / 2 % 4];
                    a[row][k] = lane.a ? number_of(*lane.a, row / 8, k / 8, k % 2)
                                       : element(lane.left, left_turned, warp_row + row, k);
                }
            for (int row = 0; row < 16; row++) {
                float sums[8 * N] = {};
                for (int k = 0; k < 16; k++)
                    for (int n = 0; n < 8 * N; n++) sums[n] += a[row][k] * b[k][n];
                for (int n = 0; n < 8 * N; n++) {
                    const Sums<N>& lane = lanes[4 * (row & 7) + n / 2 % 4];
                    float& to = lane.d[n / 8][2 * (row / 8) + n % 2];
                    to = lane.add ? to + sums[n] : sums[n];
                }
            }
        };
        warp.products.push_back({work, warp.product_group});
        if (at_once()) {
            for (Product& product : warp.products) product.work();
            warp.products.clear();
        }
    });
}

inline void entry() {
    program();
    current->finished = true;
    wait_for_copies(-1);
    _longjmp(scheduler, 1);
}

inline void run_program() {
    static ucontext_t contexts[MOST_THREADS], back;
    static char* stacks = (char*)mmap(nullptr, STACK_BYTES * MOST_THREADS, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    static volatile u32 started;
    memset(shared, 0xff, sizeof shared);
    for (Barrier& barrier : barriers) barrier = Barrier();
    warps.assign((threads + LANES - 1) / LANES, Warp());
    habit = decltype(habit)(draw(3));
    if (draw(2))
        for (Warp& warp : warps) warp.slow = draw(2);
    fibers.clear(), fibers.resize(threads);
    ready.clear();
    for (u32 i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.index = {i, 0, 0}, fiber.number = i, fiber.finished = false, fiber.copy_group = 0;
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = stacks + STACK_BYTES * i, contexts[i].uc_stack.ss_size = STACK_BYTES;
        contexts[i].uc_link = &back;
        makecontext(&contexts[i], entry, 0);
        ready.push_back(i);
    }
    static bool begun[MOST_THREADS];
    memset(begun, 0, sizeof begun);
    _setjmp(scheduler);
    while (problem.empty() && !ready.empty()) {
        u32 which = draw(ready.size());
        for (int i = 0; i < 16 && warps[ready[which] / LANES].slow; i++) which = draw(ready.size());
        int next = ready[which];
        ready[which] = ready.back(), ready.pop_back();
        current = &fibers[next];
        if (begun[next]) _longjmp(current->context, 1);
        begun[next] = true;
        setcontext(&contexts[next]);
    }
    if (!problem.empty()) return;
    for (Fiber& fiber : fibers)
        if (!fiber.finished) {
            current = &fiber;
            problem = "threads wait for nobody: the first is " + std::to_string(fiber.number);
            for (int i = 0; i < BARRIERS; i++)
                if (barriers[i].arrived)
                    problem += ", barrier " + std::to_string(i) + " has " + std::to_string(barriers[i].arrived) +
                               " of " + std::to_string(barriers[i].expected);
            return;
        }
    for (u32 i = shared_bytes; i < sizeof shared; i++)
        if (shared[i] != (char)0xff) problem = "shared memory is written behind its end";
    for (Warp& warp : warps)
        if (!warp.products.empty()) problem = "a warp ends with products it did not wait for";
}

template <class Arguments>
const char* run(void (*kernel)(Arguments), const void* arguments, const int* grid, int num_threads, int bytes,
                u64 seed) {
    Arguments own = *(const Arguments*)arguments;
    program = [&] { kernel(own); };
    threads = num_threads, shared_bytes = bytes, random_state = seed, problem.clear();
    gridDim = {(u32)grid[0], (u32)grid[1], (u32)grid[2]};
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
                run_program();
                if (!problem.empty()) return problem.c_str();
            }
    return nullptr;
}
}  // namespace machine

#define threadIdx (machine::current->index)
#define RUN(NAME)                                                                                                 \
    extern "C" const char* run_##NAME(const void* arguments, const int* grid, int threads, int bytes, u64 seed) { \
        return machine::run(NAME, arguments, grid, threads, bytes, seed);                                         \
    }

inline void __syncthreads() { machine::meet(0, machine::threads, true, true); }
inline bool __syncthreads_and(bool vote) { return machine::meet(0, machine::threads, true, vote); }
inline void __syncwarp() {
    int none = 0;
    machine::together("syncwarp", none, [](machine::Warp&, int**) {});
}
template <class T, class From>
T exchange_lanes(const char* name, T x, From from) {
    struct { T mine, found; } own = {x, x};
    machine::together(name, own, [&](machine::Warp&, decltype(own)** all) {
        for (int i = 0; i < LANES; i++) {
            int other = from(i);
            all[i]->found = other < 0 || other >= LANES ? all[i]->mine : all[other]->mine;
        }
    });
    return own.found;
}
template <class T> T __shfl_sync(u32, T x, int lane) { return exchange_lanes("shfl", x, [=](int) { return lane; }); }
template <class T> T __shfl_xor_sync(u32, T x, int bit) {
    return exchange_lanes("shfl.xor", x, [=](int i) { return i ^ bit; });
}
template <class T> T __shfl_up_sync(u32, T x, int by) {
    return exchange_lanes("shfl.up", x, [=](int i) { return i - by; });
}
inline u32 __ballot_sync(u32, bool vote) {
    struct { bool vote; u32 all; } own = {vote, 0};
    machine::together("ballot", own, [](machine::Warp&, decltype(own)** all) {
        u32 votes = 0;
        for (int i = 0; i < LANES; i++) votes |= (u32)all[i]->vote << i;
        for (int i = 0; i < LANES; i++) all[i]->all = votes;
    });
    return own.all;
}

inline u32 thread_index() { return threadIdx.x; }
template <int AXIS> inline int block_index() { return AXIS == 0 ? blockIdx.x : AXIS == 1 ? blockIdx.y : blockIdx.z; }
template <int LEFT> inline void give_registers() {}
template <int WANTED> inline void take_registers() {}
inline u32 shared_address(const void* p) { return (u32)((const char*)p - shared) + machine::SHARED_START; }

inline void copy_async(u32 to, const void* from, bool exists) {
    if (exists && (u64)from % 16) machine::give_up("a copy from an address that is no multiple of 16");
    machine::Copy copy = {to, from, exists, machine::current->copy_group};
    if (machine::at_once()) machine::copy_now(copy);
    else machine::current->copies.push_back(copy);
}
inline void copy_commit() { machine::current->copy_group++; }
inline void copy_wait_but_one() { machine::wait_for_copies(1); }
inline void copy_wait() { machine::wait_for_copies(0); }

inline void load_matrices(const char* name, u32 (&r)[4], u32 address, bool transposed) {
    struct { u32* r; u32 address; } own = {r, address};
    machine::together(name, own, [=](machine::Warp&, decltype(own)** all) {
        for (int lane = 0; lane < LANES; lane++)
            for (int matrix = 0; matrix < 4; matrix++) {
                u32 found = 0;
                for (int which = 0; which < 2; which++) {
                    int row = lane / 4, column = lane % 4 * 2 + which;
                    if (transposed) std::swap(row, column);
                    const char* of_row = machine::at(all[8 * matrix + row]->address, 16);
                    found |= (u32)((const unsigned short*)of_row)[column] << 16 * which;
                }
                all[lane]->r[matrix] = found;
            }
    });
}
inline void load_fragment(u32 (&r)[4], u32 address) { load_matrices("ldmatrix", r, address, false); }
inline void load_fragment_transposed(u32 (&r)[4], u32 address) { load_matrices("ldmatrix.trans", r, address, true); }
inline u32 load_shared(u32 address) { return *(const u32*)machine::at(address, 4); }
inline void load_shared(u32 (&r)[4], u32 address) { memcpy(r, machine::at(address, 16), 16); }
inline void store_shared(u32 address, u32 value) { *(u32*)machine::at(address, 4) = value; }
inline unsigned short load_shared_number(u32 address) { return *(const unsigned short*)machine::at(address, 2); }
inline void store_shared_number(u32 address, unsigned short x) { *(unsigned short*)machine::at(address, 2) = x; }

inline u32 pack(float low, float high) { return machine::narrow(low) | (u32)machine::narrow(high) << 16; }
inline void unpack(u32 x, float& low, float& high) {
    low = machine::widen(machine::half_of(x, 0)), high = machine::widen(machine::half_of(x, 1));
}
inline u32 multiply_pairs(u32 a, u32 b) {
    float a0, a1, b0, b1;
    unpack(a, a0, a1), unpack(b, b0, b1);
    return pack(a0 * b0, a1 * b1);
}
inline void note_finite(u32& noted, u32 x) {
    float n0, n1, x0, x1;
    unpack(noted, n0, n1), unpack(x, x0, x1);
    noted = pack(x0 * 0.0f + n0, x1 * 0.0f + n1);
}
inline u32 transpose(u32 x) {
    struct { u32 mine, found; } own = {x, 0};
    machine::together("movmatrix", own, [](machine::Warp&, decltype(own)** all) {
        for (int lane = 0; lane < LANES; lane++) {
            int row = lane / 4, column = lane % 4 * 2;
            u32 low = machine::half_of(all[4 * column + row / 2]->mine, row % 2);
            u32 high = machine::half_of(all[4 * (column + 1) + row / 2]->mine, row % 2);
            all[lane]->found = low | high << 16;
        }
    });
    return own.found;
}
inline void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct { float* d; const u32 (*a)[4]; u32 b[2]; } own = {d, &a, {b0, b1}};
    machine::together("mma", own, [](machine::Warp&, decltype(own)** all) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < LANES; lane++)
            for (int high = 0; high < 2; high++)
                for (int which = 0; which < 2; which++) {
                    int g = lane / 4, column = lane % 4 * 2 + 8 * high + which;
                    right[column][g] = machine::widen(machine::half_of(all[lane]->b[high], which));
                    for (int row = 0; row < 2; row++)
                        left[g + 8 * row][column] = machine::number_of(*all[lane]->a, row, high, which);
                }
        for (int row = 0; row < 16; row++) {
            float sums[8] = {};
            for (int k = 0; k < 16; k++)
                for (int n = 0; n < 8; n++) sums[n] += left[row][k] * right[k][n];
            for (int n = 0; n < 8; n++) all[4 * (row & 7) + n / 2]->d[2 * (row / 8) + n % 2] += sums[n];
        }
    });
}

inline void barrier_arrive(int id, int threads) { machine::meet(id, threads, false, true); }
inline void barrier_wait(int id, int threads) { machine::meet(id, threads, true, true); }
inline bool barrier_all(int id, int threads, bool vote) { return machine::meet(id, threads, true, vote); }

inline float exp2_fast(float x) { return machine::without_denormals(std::exp2(machine::without_denormals(x))); }
inline float reciprocal(float x) { return machine::without_denormals(1.0f / machine::without_denormals(x)); }
inline float minimum(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmin(a, b); }

inline void products_begin() {}
inline void products_commit() {
    int none = 0;
    machine::together("wgmma.commit", none, [](machine::Warp& warp, int**) { warp.product_group++; });
}
template <int LEFT> inline void products_wait() {
    int none = 0;
    machine::together("wgmma.wait", none, [](machine::Warp& warp, int**) {
        while (!warp.products.empty() && warp.products.front().group < warp.product_group - LEFT) {
            warp.products.front().work();
            warp.products.pop_front();
        }
    });
}
inline void publish() {}
template <class T, int N> inline void settle(T (&)[N][4]) {}
inline void multiply_turned(float (&d)[16][4], u64 a, u64 b) {
    machine::multiply_group("wgmma.turned", d, nullptr, a, b, true, true, true);
}
inline void multiply_registers(float (&d)[4][4], const u32 (&a)[4], u64 b, bool add) {
    machine::multiply_group("wgmma.registers", d, &a, 0, b, false, false, add);
}
template <bool A_TURNED, bool B_TURNED> inline void multiply_narrow(float (&d)[4][4], u64 a, u64 b, bool add) {
    machine::multiply_group("wgmma.narrow", d, nullptr, a, b, A_TURNED, B_TURNED, add);
}
template <bool A_TURNED, bool B_TURNED> inline void multiply_wide(float (&d)[8][4], u64 a, u64 b, bool add) {
    machine::multiply_group("wgmma.wide", d, nullptr, a, b, A_TURNED, B_TURNED, add);
}
