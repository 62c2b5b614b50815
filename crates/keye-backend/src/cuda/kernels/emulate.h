// What kernels use of CUDA, on fibers: bits, shuffles and votes, matrix instructions, asynchronous copies, atomics.

/// Stops where a GPU would: an access of several words has to be aligned to its size.
#define ALIGNED(at, size) emu::require_aligned(at, size)

namespace emu {

static inline void require_aligned(const void* at, size_t size) {
    if ((uintptr_t)at % size) {
        fprintf(stderr, "%zu bytes at %p, which is not a multiple of that\n", size, at);
        abort();
    }
}

}  // namespace emu

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
    emu::Device device;
    emu::together([](emu::Warp& w) { w.orders++; });
}
static inline unsigned emu_exchange(unsigned value, unsigned from) {
    emu::Device device;
    unsigned lane = emu::here.current % 32;
    emu::warps[emu::here.current / 32].operands[lane][0] = value;
    emu::warps[emu::here.current / 32].operands[lane][1] = from;
    emu::Warp& warp = emu::together([](emu::Warp& w) {
        for (int l = 0; l < 32; l++) w.results[l][0] = w.operands[w.operands[l][1] % 32][0];
    });
    return warp.results[lane][0];
}
template <class T>
static inline T __shfl_xor_sync(unsigned, T value, int mask) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    bits = emu_exchange(bits, (emu::here.current % 32) ^ mask);
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
    int lane = emu::here.current % 32;
    unsigned bits;
    memcpy(&bits, &value, 4);
    bits = emu_exchange(bits, lane < distance ? lane : lane - distance);
    memcpy(&value, &bits, 4);
    return value;
}
static inline unsigned __ballot_sync(unsigned, bool vote) {
    emu::Device device;
    emu::warps[emu::here.current / 32].operands[emu::here.current % 32][0] = vote;
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
    emu::Device device;
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
    emu::Device device;
    unsigned lane = emu::here.current % 32;
    unsigned* mine = emu::warps[emu::here.current / 32].operands[lane];
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
    emu::Device device;
    unsigned lane = emu::here.current % 32;
    unsigned* mine = emu::warps[emu::here.current / 32].operands[lane];
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
    emu::Device device;
    unsigned lane = emu::here.current % 32;
    ALIGNED(row, 16);
    emu::touch(row, 16, false);
    emu::warps[emu::here.current / 32].rows[lane] = row;
    emu::Warp& warp = emu::together([transposed](emu::Warp& w) {
        for (int l = 0; l < 32; l++) {
            for (int m = 0; m < 4; m++) {
                auto at = [&](int r, int c) { return (unsigned)((const uint16_t*)w.rows[8 * m + r])[c]; };
                int g = l / 4, t = l % 4;
                unsigned low = transposed ? at(2 * t, g) : at(g, 2 * t);
                unsigned high = transposed ? at(2 * t + 1, g) : at(g, 2 * t + 1);
                w.results[l][m] = low | high << 16;
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
    emu::Device device;
    ALIGNED(to, 16);
    ALIGNED(from, 16);
    emu::touch(to, 16, true);
    if (valid) emu::touch(from, 16, false);
    EmuCopy copy = {to, {0}, emu_committed[emu::here.current]};
    if (valid) memcpy(copy.data, from, 16);
    memset(to, 0xff, 16);
    emu_copies[emu::here.current].push_back(copy);
}
static inline void commit_copies() {
    emu::Device device;
    emu_committed[emu::here.current]++;
}
template <int PENDING>
static inline void wait_copies() {
    emu::Device device;
    std::vector<EmuCopy>& copies = emu_copies[emu::here.current];
    unsigned done = emu_committed[emu::here.current];
    size_t n = 0;
    while (n < copies.size() && copies[n].group + PENDING < done) n++;
    for (size_t i = 0; i < n; i++) {
        emu::touch(copies[i].to, 16, true);
        memcpy(copies[i].to, copies[i].data, 16);
    }
    copies.erase(copies.begin(), copies.begin() + n);
}
