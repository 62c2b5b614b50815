// Looks at every load and store of the kernels, as compute-sanitizer's racecheck and initcheck do on a GPU. With KEYE_WATCHED
// the compiler calls what is here for each (-fsanitize=thread, without its library); otherwise there is nothing here.
//
// Two accesses to a byte, one of them a store, are a race unless an order is known: the same thread; a barrier of the block
// between them; `__syncwarp` between them for threads of a warp (other steps that lanes take together order a store behind a
// load only); different launches. Shared memory has to be stored to by its own block before it is loaded.

namespace emu {

#ifndef KEYE_WATCHED

static inline void touch(const void*, size_t, bool) {}
static inline void begin_watch(const char*) {}
static inline bool complained() {
    return false;
}

#else

#define UNWATCHED __attribute__((no_sanitize("thread")))

/// Who last stored or loaded: the block's number among all that ever ran, its barriers so far, the warp's steps so far; other
/// lanes or warps as well.
struct Mark {
    uint64_t serial : 32, barriers : 14, steps : 8, thread : 8, lanes : 1, warps : 1;
};

struct Byte {
    Mark store, load;
};

static const unsigned PAGE = 4096, TABLE = 1 << 18;

/// Marks of 4096 bytes.
struct Page {
    uintptr_t number;
    Byte bytes[PAGE];
};

static Page* pages[TABLE];
static const char* kernel_name;
static unsigned first_block, complaints;
extern "C" char __bss_start __attribute__((visibility("hidden")));
extern "C" char _end __attribute__((visibility("hidden")));

UNWATCHED static Page* page_of(uintptr_t number) {
    unsigned at = (unsigned)(number * 0x9e3779b97f4a7c15u >> 46);
    while (pages[at] && pages[at]->number != number) at = (at + 1) % TABLE;
    if (!pages[at]) {
        pages[at] = (Page*)calloc(1, sizeof(Page));
        pages[at]->number = number;
    }
    return pages[at];
}

UNWATCHED static void complain(const char* what, const void* at, unsigned other) {
    if (complaints++ < 4) {
        fprintf(
            stderr, "%s: %s at %p: block %u %u %u, thread %u, and thread %u\n", kernel_name, what, at,
            here.block_index.x, here.block_index.y, here.block_index.z, here.current, other);
    }
}

/// Whether nothing orders `mark` before now; `steps` are those of the warp that would.
UNWATCHED static inline bool unordered(const Mark& mark, unsigned steps, bool shared) {
    if (mark.serial < first_block || (shared && mark.serial != blocks_run)) return false;
    if (mark.serial != blocks_run) return true;
    if (mark.barriers != (barriers & 0x3fff)) return false;
    if (mark.thread == here.current && !mark.lanes && !mark.warps) return false;
    return mark.warps || mark.thread / 32 != here.current / 32 || mark.steps == (steps & 0xff);
}

UNWATCHED static void look(const void* address, size_t size, bool store) {
    uintptr_t at = (uintptr_t)address;
    uintptr_t stack = (uintptr_t)stacks[here.current];
    if (at - stack < STACK || at - (uintptr_t)&here < sizeof here) return;
    bool shared = at - (uintptr_t)room < (uintptr_t)(room_end - room) ||
                  at - (uintptr_t)&__bss_start < (uintptr_t)(&_end - &__bss_start);
    const Warp& warp = warps[here.current / 32];
    Mark now = {blocks_run, barriers, warp.orders, here.current, 0, 0};
    Page* page = nullptr;
    for (size_t step, end = at + size; at < end; at += step) {
        if (!page || at % PAGE == 0) page = page_of(at / PAGE);
        Byte& byte = page->bytes[at % PAGE];
        // Words whose bytes have the same marks, as nearly all have, are looked at once.
        bool word = at % 4 == 0 && end - at >= 4 && !memcmp(&byte, &byte + 1, 3 * sizeof byte);
        step = word ? 4 : 1;
        if (unordered(byte.store, warp.orders, shared)) {
            const char* what = store ? "two stores without an order" : "a load without an order behind a store";
            complain(what, (void*)at, byte.store.thread);
            return;
        }
        if (store) {
            if (unordered(byte.load, warp.steps, shared)) {
                complain("a store without an order behind a load", (void*)at, byte.load.thread);
                return;
            }
            byte.store = now;
        } else {
            if (shared && byte.store.serial != blocks_run) {
                complain("a load of shared memory that the block has not stored to", (void*)at, here.current);
                return;
            }
            Mark load = now;
            load.steps = warp.steps;
            const Mark& last = byte.load;
            if (last.serial == load.serial && last.barriers == load.barriers) {
                bool same_warp = last.thread / 32 == load.thread / 32;
                load.warps = last.warps || !same_warp;
                load.lanes = same_warp && last.steps == load.steps && (last.lanes || last.thread != load.thread);
            }
            byte.load = load;
        }
        for (size_t i = 1; i < step; i++) (&byte)[i] = byte;
    }
}

UNWATCHED static inline void look_of_kernel(const void* at, size_t size, bool store) {
    if (!here.in_kernel) return;
    here.in_kernel = false;
    look(at, size, store);
    here.in_kernel = true;
}

/// What the device itself does for a thread: asynchronous copies, matrices.
static void touch(const void* at, size_t size, bool store) {
    look(at, size, store);
}

static void begin_watch(const char* name) {
    kernel_name = name;
    complaints = 0;
    first_block = blocks_run + 1;
}

static bool complained() {
    return complaints > 0;
}

#endif

}  // namespace emu

#ifdef KEYE_WATCHED

#define WATCH(size) \
    extern "C" UNWATCHED void __tsan_read##size(void* at) { \
        emu::look_of_kernel(at, size, false); \
    } \
    extern "C" UNWATCHED void __tsan_write##size(void* at) { \
        emu::look_of_kernel(at, size, true); \
    } \
    extern "C" UNWATCHED void __tsan_unaligned_read##size(void* at) { \
        emu::look_of_kernel(at, size, false); \
    } \
    extern "C" UNWATCHED void __tsan_unaligned_write##size(void* at) { \
        emu::look_of_kernel(at, size, true); \
    }
WATCH(1)
WATCH(2)
WATCH(4)
WATCH(8)
WATCH(16)

extern "C" UNWATCHED void __tsan_read_range(void* at, unsigned long size) {
    emu::look_of_kernel(at, size, false);
}
extern "C" UNWATCHED void __tsan_write_range(void* at, unsigned long size) {
    emu::look_of_kernel(at, size, true);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit(void*) {}

#endif

namespace emu {

/// 0: done; 1: threads waited for others that never came; 2: watch.h complained.
template <class... A>
static int launch(
    const char* name, void (*kernel)(A...), void** args, const unsigned* grid, unsigned threads, unsigned shared) {
    Call<A...> call{kernel, args};
    body = Call<A...>::body;
    arguments = &call;
    here.grid_dim = Dim3{grid[0], grid[1], grid[2]};
    here.block_dim = Dim3{threads, 1, 1};
    // One place for good: as large as any, its end before a page without access.
    static const size_t ROOM = 256 * 1024;
    if (!room) {
        room = (unsigned char*)mmap(nullptr, ROOM + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        room_end = room + ROOM;
        if (room == MAP_FAILED || mprotect(room_end, 4096, PROT_NONE)) abort();
    }
    if (shared > ROOM) return 1;
    here.dynamic = room_end - (shared + 127) / 128 * 128;
    begin_watch(name);
    uint64_t blocks = (uint64_t)grid[0] * grid[1] * grid[2];
    bool descending = launches++ % 2;
    for (uint64_t i = 0; i < blocks; i++) {
        uint64_t block = descending ? blocks - 1 - i : i;
        uint64_t row = block / grid[0];
        here.block_index = Dim3{(unsigned)(block % grid[0]), (unsigned)(row % grid[1]), (unsigned)(row / grid[1])};
        memset(here.dynamic, 0xff, shared);
        if (!run_block(threads)) return 1;
        if (complained()) return 2;
    }
    return 0;
}

}  // namespace emu
