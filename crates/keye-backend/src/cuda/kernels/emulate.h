// Runs the kernels on a CPU, for tests: the threads of a block are fibers that give way where threads wait for each other.
//
// Blocks run one after the other. What warps do together (shuffles, votes, matrix instructions) is computed when the last
// lane arrives. Threads run in ascending order in one block and in descending order in the next, so that what relies on an order
// without waiting gives different results; behind shared memory lies a page that may not be touched. A kernel in which some lanes of a warp never arrive stops with a message instead of a result.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <vector>

#define KEYE_EMULATED 1
#define KERNEL(threads) static void
#define DEVICE static inline
#define SHARED static
#define DYNAMIC_SHARED(name) u8* name = emu::dynamic
#define __device__
#define __forceinline__ inline

namespace emu {

struct Dim3 {
    unsigned x, y, z;
};

/// Registers that a call has to keep, saved on the fiber's own stack.
extern "C" void emu_switch(void** save, void* load);
asm(".text\n.type emu_switch,@function\nemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");

struct Fiber {
    void* stack_top;
    void* context;
    bool done;
};

/// What the lanes of a warp bring to a common step.
struct Warp {
    unsigned arrived, epoch, lanes;
    unsigned operands[32][8];
    const void* rows[32];
    unsigned results[32][4];
};

static const unsigned STACK = 128 * 1024;
static std::vector<Fiber> fibers;
static std::vector<char*> stacks;
static std::vector<Warp> warps;
static void* scheduler;
static unsigned current, alive, at_barrier, barrier_epoch, progress, blocks_run;
static unsigned char* dynamic;
static Dim3 block_dim, grid_dim, block_index;
static void (*body)(void*);
static void* arguments;

static void give_way() {
    emu_switch(&fibers[current].context, scheduler);
}

static void entry() {
    body(arguments);
    fibers[current].done = true;
    alive--;
    progress++;
    give_way();
    abort();
}

static void wait_block() {
    unsigned epoch = barrier_epoch;
    if (++at_barrier == alive) {
        at_barrier = 0;
        barrier_epoch++;
        progress++;
        return;
    }
    while (barrier_epoch == epoch) give_way();
}

/// Waits for the other lanes; the last to arrive runs `compute`.
template <class F>
static Warp& together(F compute) {
    Warp& warp = warps[current / 32];
    unsigned epoch = warp.epoch;
    if (++warp.arrived == warp.lanes) {
        compute(warp);
        warp.arrived = 0;
        warp.epoch++;
        progress++;
    } else {
        while (warp.epoch == epoch) give_way();
    }
    return warp;
}

static bool run_block(unsigned threads) {
    fibers.resize(threads);
    warps.assign((threads + 31) / 32, Warp());
    for (unsigned w = 0; w < warps.size(); w++) warps[w].lanes = threads - w * 32 < 32 ? threads - w * 32 : 32;
    while (stacks.size() < threads) stacks.push_back((char*)aligned_alloc(64, STACK));
    for (unsigned t = 0; t < threads; t++) {
        void** top = (void**)(stacks[t] + STACK - 64);
        *--top = nullptr;
        *--top = (void*)entry;
        for (int i = 0; i < 6; i++) *--top = nullptr;
        fibers[t].context = top;
        fibers[t].done = false;
    }
    alive = threads;
    at_barrier = 0;
    blocks_run++;
    while (alive) {
        unsigned before = progress;
        for (unsigned i = 0; i < threads; i++) {
            unsigned t = blocks_run % 2 ? threads - 1 - i : i;
            if (fibers[t].done) continue;
            current = t;
            emu_switch(&scheduler, fibers[t].context);
        }
        if (before == progress) return false;
    }
    return true;
}

template <class... A>
struct Call {
    void (*kernel)(A...);
    void** args;
    template <size_t... I>
    void go(std::index_sequence<I...>) {
        kernel(*(A*)args[I]...);
    }
    static void body(void* self) {
        ((Call*)self)->go(std::index_sequence_for<A...>());
    }
};

template <class... A>
static int launch(void (*kernel)(A...), void** args, const unsigned* grid, unsigned threads, unsigned shared) {
    Call<A...> call{kernel, args};
    body = Call<A...>::body;
    arguments = &call;
    grid_dim = Dim3{grid[0], grid[1], grid[2]};
    block_dim = Dim3{threads, 1, 1};
    // One place for good: as large as any, its end before a page without access.
    static const size_t ROOM = 256 * 1024, PAGE = 4096;
    static unsigned char* room = (unsigned char*)mmap(nullptr, ROOM + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED || shared > ROOM || mprotect(room + ROOM, PAGE, PROT_NONE)) return 1;
    dynamic = room + ROOM - (shared + 127) / 128 * 128;
    memset(dynamic, 0xcd, shared);
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                block_index = Dim3{x, y, z};
                if (!run_block(threads)) return 1;
            }
    return 0;
}

}  // namespace emu

#define threadIdx (emu::Dim3{emu::current, 0, 0})
#define blockIdx emu::block_index
#define blockDim emu::block_dim
#define gridDim emu::grid_dim
#define __syncthreads emu::wait_block
#define EXPORT(name) \
    extern "C" int emu_##name(void** args, const unsigned* grid, unsigned threads, unsigned shared) { \
        return emu::launch(name, args, grid, threads, shared); \
    }

static inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline float __int_as_float(int bits) {
    return __uint_as_float((unsigned)bits);
}
static inline void __syncwarp() {
    emu::together([](emu::Warp&) {});
}
static inline unsigned emu_exchange(unsigned value, unsigned from) {
    unsigned lane = emu::current % 32;
    emu::warps[emu::current / 32].operands[lane][0] = value;
    emu::warps[emu::current / 32].operands[lane][1] = from;
    emu::Warp& warp = emu::together([](emu::Warp& w) {
        for (int l = 0; l < 32; l++) w.results[l][0] = w.operands[w.operands[l][1] % 32][0];
    });
    return warp.results[lane][0];
}
template <class T>
static inline T __shfl_xor_sync(unsigned, T value, int mask) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    bits = emu_exchange(bits, (emu::current % 32) ^ mask);
    memcpy(&value, &bits, 4);
    return value;
}
template <class T>
static inline T __shfl_sync(unsigned, T value, int from) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    bits = emu_exchange(bits, from);
    memcpy(&value, &bits, 4);
    return value;
}
template <class T>
static inline T __shfl_up_sync(unsigned, T value, int distance) {
    int lane = emu::current % 32;
    unsigned bits;
    memcpy(&bits, &value, 4);
    bits = emu_exchange(bits, lane < distance ? lane : lane - distance);
    memcpy(&value, &bits, 4);
    return value;
}
static inline unsigned __ballot_sync(unsigned, bool vote) {
    emu::warps[emu::current / 32].operands[emu::current % 32][0] = vote;
    emu::Warp& warp = emu::together([](emu::Warp& w) {
        w.results[0][0] = 0;
        for (int l = 0; l < 32; l++) w.results[0][0] |= w.operands[l][0] << l;
    });
    return warp.results[0][0];
}
static inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
static inline unsigned atomicAdd(unsigned* at, unsigned x) {
    unsigned old = *at;
    *at += x;
    return old;
}
static inline float exp2f_approx(float x) {
    return exp2f(x);
}

// The fragments' layout is that of the PTX manual: lane l has row g = l / 4 and t = l % 4.

static inline void mma_bf16(
    float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    unsigned lane = emu::current % 32;
    unsigned* mine = emu::warps[emu::current / 32].operands[lane];
    unsigned values[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(mine, values, sizeof values);
    emu::Warp& warp = emu::together([](emu::Warp& w) {
        static float a[16][16], b[16][8];
        auto half = [](unsigned word, int high) { return __uint_as_float(high ? word & 0xffff0000u : word << 16); };
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4;
            for (int h = 0; h < 2; h++) {
                a[g][2 * t + h] = half(w.operands[l][0], h);
                a[g + 8][2 * t + h] = half(w.operands[l][1], h);
                a[g][2 * t + 8 + h] = half(w.operands[l][2], h);
                a[g + 8][2 * t + 8 + h] = half(w.operands[l][3], h);
                b[2 * t + h][g] = half(w.operands[l][4], h);
                b[2 * t + 8 + h][g] = half(w.operands[l][5], h);
            }
        }
        for (int row = 0; row < 16; row++) {
            double sums[8] = {};
            for (int k = 0; k < 16; k++)
                for (int col = 0; col < 8; col++) sums[col] += (double)a[row][k] * b[k][col];
            for (int col = 0; col < 8; col++)
                w.results[row % 8 * 4 + col / 2][row / 8 * 2 + col % 2] = __float_as_uint((float)sums[col]);
        }
    });
    for (int i = 0; i < 4; i++) c[i] += __uint_as_float(warp.results[lane][i]);
}

static inline void mma_s8(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    unsigned lane = emu::current % 32;
    unsigned* mine = emu::warps[emu::current / 32].operands[lane];
    unsigned values[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(mine, values, sizeof values);
    emu::Warp& warp = emu::together([](emu::Warp& w) {
        static int a[16][32], b[32][8];
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4;
            for (int i = 0; i < 4; i++) {
                auto byte = [&](int operand) { return (int)(signed char)(w.operands[l][operand] >> (8 * i)); };
                a[g][4 * t + i] = byte(0);
                a[g + 8][4 * t + i] = byte(1);
                a[g][4 * t + 16 + i] = byte(2);
                a[g + 8][4 * t + 16 + i] = byte(3);
                b[4 * t + i][g] = byte(4);
                b[4 * t + 16 + i][g] = byte(5);
            }
        }
        for (int row = 0; row < 16; row++) {
            int sums[8] = {};
            for (int k = 0; k < 32; k++)
                for (int col = 0; col < 8; col++) sums[col] += a[row][k] * b[k][col];
            for (int col = 0; col < 8; col++)
                w.results[row % 8 * 4 + col / 2][row / 8 * 2 + col % 2] = (unsigned)sums[col];
        }
    });
    for (int i = 0; i < 4; i++) c[i] = (int)warp.results[lane][i];
}

static inline void emu_matrices(unsigned (&out)[4], const void* row, bool transposed) {
    unsigned lane = emu::current % 32;
    if ((uintptr_t)row % 16) {
        fprintf(stderr, "a matrix row at an odd address\n");
        abort();
    }
    emu::warps[emu::current / 32].rows[lane] = row;
    emu::Warp& warp = emu::together([transposed](emu::Warp& w) {
        for (int l = 0; l < 32; l++) {
            for (int m = 0; m < 4; m++) {
                auto at = [&](int r, int c) { return (unsigned)((const uint16_t*)w.rows[8 * m + r])[c]; };
                int g = l / 4, t = l % 4;
                w.results[l][m] = transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
            }
        }
    });
    for (int m = 0; m < 4; m++) out[m] = warp.results[lane][m];
}
static inline void load_matrices(unsigned (&out)[4], const void* row) {
    emu_matrices(out, row, false);
}
static inline void load_matrices_transposed(unsigned (&out)[4], const void* row) {
    emu_matrices(out, row, true);
}

/// Arrives when it is waited for, and not before: until then the place holds rubbish.
struct EmuCopy {
    void* to;
    unsigned char data[16];
    unsigned group;
};
static std::vector<EmuCopy> emu_copies[1024];
static unsigned emu_committed[1024];

static inline void copy_async(void* to, const void* from, bool valid) {
    if ((uintptr_t)to % 16 || (valid && (uintptr_t)from % 16)) {
        fprintf(stderr, "an asynchronous copy between odd addresses\n");
        abort();
    }
    EmuCopy copy = {to, {0}, emu_committed[emu::current]};
    if (valid) memcpy(copy.data, from, 16);
    memset(to, 0xcd, 16);
    emu_copies[emu::current].push_back(copy);
}
static inline void commit_copies() {
    emu_committed[emu::current]++;
}
template <int PENDING>
static inline void wait_copies() {
    std::vector<EmuCopy>& copies = emu_copies[emu::current];
    unsigned done = emu_committed[emu::current];
    size_t n = 0;
    while (n < copies.size() && copies[n].group + PENDING < done) n++;
    for (size_t i = 0; i < n; i++) memcpy(copies[i].to, copies[i].data, 16);
    copies.erase(copies.begin(), copies.begin() + n);
}
