// What all kernels share: number types, warp and block sums in a fixed order, matrix instructions, asynchronous copies.
//
// Products and sums are never contracted behind our back (the compiler runs with --fmad=false): `fmaf` stands where a fused
// step is meant. No headers are needed, neither CUDA's nor C's. The same text compiles with a C++ compiler for the tests
// without a device; emulate.h then defines what is under KEYE_EMULATED here.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef KEYE_EMULATED
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define DEVICE __device__ __forceinline__
#define SHARED __shared__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]
#define ALIGNED(at, size)
#endif

#define FULL 0xffffffffu

/// Tokens in a block of the KV cache.
#define BLOCK_TOKENS 64

/// bfloat16.
struct bf16 {
    u16 bits;
};

struct alignas(16) words4 {
    u32 x, y, z, w;
};

struct alignas(8) words2 {
    u32 x, y;
};

struct alignas(8) floats2 {
    float x, y;
};

struct alignas(16) floats4 {
    float x, y, z, w;
};

struct alignas(8) ints2 {
    int x, y;
};

/// What lies at an address that is a multiple of its size: on a GPU nothing else can be loaded or stored at once.
template <class T>
DEVICE T& vector_at(void* at) {
    ALIGNED(at, sizeof(T));
    return *(T*)at;
}

template <class T>
DEVICE const T& vector_at(const void* at) {
    ALIGNED(at, sizeof(T));
    return *(const T*)at;
}

DEVICE float min_of(float a, float b) {
    return a < b ? a : b;
}

DEVICE float max_of(float a, float b) {
    return a > b ? a : b;
}

DEVICE u32 min_of(u32 a, u32 b) {
    return a < b ? a : b;
}

DEVICE u32 max_of(u32 a, u32 b) {
    return a > b ? a : b;
}

DEVICE float widen(float x) {
    return x;
}

DEVICE float widen(bf16 x) {
    return __uint_as_float((u32)x.bits << 16);
}

/// To nearest, ties to even; NaN stays NaN.
DEVICE u32 narrow(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (bits >> 16) | 0x40;
    }
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/// Two bf16 in a word, the first in the low half.
DEVICE u32 narrow2(float low, float high) {
#ifdef KEYE_EMULATED
    return narrow(low) | (narrow(high) << 16);
#else
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}

/// Values in eight bits are multiplied with a scale of their row.
DEVICE float widen(i8 x) {
    return (float)x;
}

DEVICE void store(float* to, float x) {
    *to = x;
}

DEVICE void store(bf16* to, float x) {
    to->bits = (u16)narrow(x);
}

DEVICE float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) {
        x += __shfl_xor_sync(FULL, x, step);
    }
    return x;
}

DEVICE float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) {
        x = max_of(x, __shfl_xor_sync(FULL, x, step));
    }
    return x;
}

/// Sum over a block of 256 threads, known to all; `room` has 8 places.
DEVICE float block_sum(float x, float* room) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        room[threadIdx.x / 32] = x;
    }
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < 8; i++) {
        sum += room[i];
    }
    return sum;
}

/// The factor that gives a row's codes, of what the largest code stands for; what is too small to divide by counts as zero.
DEVICE float code_factor(float scale) {
    return scale > 1.17549435e-38f ? 1.0f / scale : 0.0f;
}

/// To nearest, ties to even, for magnitudes below 2^22.
DEVICE int nearest(float x) {
    // Adding 1.5 * 2^23 leaves the integer in the low bits.
    return (int)(__float_as_uint(x + 12582912.0f) - 0x4b400000u);
}

// What follows a product; `old` is what the result's place held.

enum Epilogue { STORE = 0, GELU_TANH = 1, GELU_ERF = 2, ADD = 3, GATE = 4 };

DEVICE float silu(float z) {
    return z / (1.0f + expf(-z));
}

DEVICE float epilogue(u32 kind, float z, const float* at) {
    switch (kind) {
        case GELU_TANH:
            return 0.5f * z * (1.0f + tanhf(0.7978845608028654f * (z + 0.044715f * z * z * z)));
        case GELU_ERF:
            return 0.5f * z * (1.0f + erff(z * 0.7071067811865476f));
        case ADD:
            return *at + z;
        case GATE:
            return silu(*at) * z;
        default:
            return z;
    }
}

/// `y[y_rows[s]] = epilogue(x[x_rows[s]] weight^T + bias)` for slots s; without row lists a slot is its row.
///
/// With `tiles`, tile i of the grid has {expert, first slot, slots} there and the weight is table[expert]; without, the slots
/// 0..m are cut into tiles in order.
struct Product {
    const void* x;
    const void* weight;
    const u64* table;
    const u32* tiles;
    const u32* x_rows;
    const u32* y_rows;
    const float* bias;
    float* y;
    /// Slots, outputs, inputs; elements from one row of x and of the weight to the next.
    u32 m, n, k, x_stride, w_stride;
    u32 kind;
    /// Columns that share a scale of an 8-bit float weight.
    u32 w_block;
    /// Groups' scales of x and negated sums of its codes, for packed weights.
    const float* x_scales;
    const int* x_sums;
};

/// The slots and the weight of tile `tile` of `size` slots.
struct Tile {
    const void* weight;
    u32 first, count;
};

DEVICE Tile tile_of(const Product& p, u32 tile, u32 size) {
    Tile out;
    if (p.tiles) {
        out.first = p.tiles[3 * tile + 1];
        out.count = p.tiles[3 * tile + 2];
        out.weight = out.count ? (const void*)p.table[p.tiles[3 * tile]] : (const void*)0;
    } else {
        out.first = tile * size;
        out.count = out.first < p.m ? min_of(size, p.m - out.first) : 0;
        out.weight = p.weight;
    }
    return out;
}

DEVICE u32 x_row(const Product& p, u32 slot) {
    return p.x_rows ? p.x_rows[slot] : slot;
}

DEVICE void finish(const Product& p, u32 slot, u32 output, float z) {
    if (p.bias) {
        z += p.bias[output];
    }
    float* at = p.y + (u64)(p.y_rows ? p.y_rows[slot] : slot) * p.n + output;
    *at = epilogue(p.kind, z, at);
}

// A product's inputs are cut into eight slices, each summed from left to right, and the slices' sums are added from left to
// right: eight warps can share a row without the result depending on whether they do.

#define SLICES 8

/// Two 8-bit floats (e4m3) in bits 0..16 of a word, as bf16, exactly.
DEVICE u32 widen_e4m3(u32 bytes) {
    u32 spread = (bytes & 0xff) << 8 | (bytes & 0xff00) << 16;
    // Exponent and mantissa at bf16's places stand for 2^-120 of the value, subnormals included.
    u32 scaled = (spread & 0x80008000u) | (spread & 0x7f007f00u) >> 4;
#ifdef KEYE_EMULATED
    bf16 low = {(u16)scaled}, high = {(u16)(scaled >> 16)};
    return narrow2(widen(low) * 1.329227995784916e36f, widen(high) * 1.329227995784916e36f);
#else
    u32 out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(scaled), "r"(0x7b807b80u), "r"(0x80008000u));
    return out;
#endif
}

DEVICE u32 slice_start(u32 slice, u32 steps) {
    return slice * steps / SLICES;
}

#ifndef KEYE_EMULATED

/// `c += a b`: a 16 x 16, b 16 x 8, bf16; c f32.
DEVICE void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// `c = a b`: a 16 x 32, b 32 x 8, int8; c int32.
DEVICE void mma_s8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0));
}

/// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&out)[4], const void* row) {
    u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
}

/// The same, each transposed.
DEVICE void load_matrices_transposed(u32 (&out)[4], const void* row) {
    u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
}

/// 16 bytes to shared memory in the background, or zeros.
DEVICE void copy_async(void* to, const void* from, bool valid) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    u32 bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}

DEVICE void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most `PENDING` of the committed groups are under way.
template <int PENDING>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/// 16 bytes that are read once.
DEVICE words4 load_once(const void* from) {
    words4 out;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "l"(from));
    return out;
}

#else

DEVICE words4 load_once(const void* from) {
    return vector_at<words4>(from);
}

#endif
