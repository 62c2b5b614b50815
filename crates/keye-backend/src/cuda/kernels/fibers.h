// For tests without a GPU: a block's threads as fibers on one CPU thread, which give way where threads wait for each other.
//
// Blocks run one after the other, in ascending order in one launch and in descending order in the next. Within a block each
// warp runs as far as it gets before another begins, from the first, from the last or from any, or all go step by step: what
// relies on an order without waiting gives different results. What warps do together is computed when the last lane arrives.
// A kernel in which some lanes of a warp never arrive, or some threads miss a barrier, ends with a status instead of a
// result. Shared memory is NaN when a block begins; behind it lies a page that may not be touched.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <utility>
#include <vector>

#define KEYE_EMULATED 1
#define KERNEL(threads) static void
#define DEVICE static inline
#define SHARED static
#define DYNAMIC_SHARED(name) u8* name = emu::here.dynamic
#define __device__
#define __forceinline__ inline
#define threadIdx (emu::Dim3{emu::here.current, 0, 0})
#define blockIdx emu::here.block_index
#define blockDim emu::here.block_dim
#define gridDim emu::here.grid_dim
#define __syncthreads emu::wait_block
#define EXPORT(name) \
    extern "C" int emu_##name(void** args, const unsigned* grid, unsigned threads, unsigned shared) { \
        return emu::launch(#name, name, args, grid, threads, shared); \
    } \
    extern "C" unsigned emu_##name##_sizes(unsigned* out) { \
        return emu::argument_sizes(name, out); \
    }

namespace emu {

struct Dim3 {
    unsigned x, y, z;
};

/// What kernels read of the launch; `current` is the thread that runs.
static struct Here {
    unsigned current;
    Dim3 block_dim, grid_dim, block_index;
    unsigned char* dynamic;
    /// Whether the kernel's own code runs, whose loads and stores watch.h looks at.
    bool in_kernel;
} here;

/// Registers that a call has to keep, saved on the fiber's own stack.
extern "C" void emu_switch(void** save, void* load);
asm(".text\n.type emu_switch,@function\nemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");

struct Fiber {
    void* context;
    bool done;
};

/// What the lanes of a warp bring to a common step. `steps` counts these, `orders` those that order memory.
struct Warp {
    unsigned arrived, steps, orders, lanes;
    unsigned operands[32][8];
    const void* rows[32];
    unsigned results[32][4];
};

static const unsigned STACK = 128 * 1024;
static std::vector<Fiber> fibers;
static std::vector<char*> stacks;
static std::vector<Warp> warps;
static void* scheduler;
static unsigned alive, at_barrier, barriers, progress, blocks_run, launches;
static void (*body)(void*);
static void* arguments;
static unsigned char *room, *room_end;

/// What the device does, while it lives: not the kernel's code.
struct Device {
    bool before;
    Device() : before(here.in_kernel) {
        here.in_kernel = false;
        stay();
    }
    ~Device() {
        stay();
        here.in_kernel = before;
    }
    /// Keeps the compiler from moving loads and stores across.
    static void stay() { asm volatile("" ::: "memory"); }
};

static void give_way() {
    emu_switch(&fibers[here.current].context, scheduler);
}

static void entry() {
    auto run = body;
    void* with = arguments;
    here.in_kernel = true;
    run(with);
    here.in_kernel = false;
    Device::stay();
    fibers[here.current].done = true;
    alive--;
    progress++;
    // Those that wait may have waited for this one alone; it is no longer counted.
    if (alive && at_barrier == alive) {
        at_barrier = 0;
        barriers++;
    }
    give_way();
    abort();
}

static void wait_block() {
    Device device;
    unsigned before = barriers;
    if (++at_barrier == alive) {
        at_barrier = 0;
        barriers++;
        progress++;
        return;
    }
    while (barriers == before) give_way();
}

/// Waits for the other lanes; the last to arrive runs `compute`.
template <class F>
static Warp& together(F compute) {
    Warp& warp = warps[here.current / 32];
    unsigned before = warp.steps;
    if (++warp.arrived == warp.lanes) {
        compute(warp);
        warp.arrived = 0;
        warp.steps++;
        progress++;
    } else {
        while (warp.steps == before) give_way();
    }
    return warp;
}

static unsigned random_below(unsigned n) {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)((state >> 33) % n);
}

/// Runs each thread of a warp until it waits.
static void run_warp(unsigned warp, unsigned order) {
    unsigned lanes = warps[warp].lanes, first = order == 2 ? random_below(lanes) : 0;
    for (unsigned i = 0; i < lanes; i++) {
        unsigned lane = order == 1 ? lanes - 1 - i : (first + i) % lanes, thread = warp * 32 + lane;
        if (fibers[thread].done) continue;
        here.current = thread;
        emu_switch(&scheduler, fibers[thread].context);
    }
}

static bool run_block(unsigned threads) {
    fibers.resize(threads);
    warps.assign((threads + 31) / 32, Warp());
    unsigned count = (unsigned)warps.size();
    for (unsigned w = 0; w < count; w++) warps[w].lanes = threads - w * 32 < 32 ? threads - w * 32 : 32;
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
    at_barrier = barriers = 0;
    unsigned order = blocks_run++ % 4;
    while (alive) {
        unsigned before = progress, first = order == 2 ? random_below(count) : 0;
        for (unsigned i = 0; i < count; i++) {
            unsigned warp = order == 1 ? count - 1 - i : (first + i) % count, seen;
            do {
                seen = progress;
                run_warp(warp, order);
            } while (order != 3 && seen != progress);
        }
        if (before == progress) return false;
    }
    return true;
}

/// Writes the bytes of a kernel's arguments, up to 32 of them; returns how many there are.
template <class... A>
static unsigned argument_sizes(void (*)(A...), unsigned* out) {
    unsigned sizes[] = {(unsigned)sizeof(A)...};
    memcpy(out, sizes, sizeof sizes);
    return sizeof...(A);
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

}  // namespace emu
