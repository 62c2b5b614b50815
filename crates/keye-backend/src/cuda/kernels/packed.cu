// Products with packed weights: int8 rows times int4 or int8 weights on the matrix cores.
//
// A group (32 columns) is one instruction, whose sums are exact integers (packed.rs, coded_rows.rs); per output and slot
// `sum = fma(t_g, S_g * a_g, sum)` over the groups of a slice.
//
// On the device a matrix is three parts, one after the other, with tiles of 16 outputs and blocks of 64 columns:
//   codes    [tile, block] of 512 (int4) or 1024 (int8) bytes in the order in which lanes take them
//   scales   [tile, block, 16] words: int4 {s0, s1, z0, z1} bytes (z: zero points in eighths), int8 {d0, d1} halves
//   heads    [tile, 16] f32: row scales (int4 only)
// Lane l (g = l / 4, t = l % 4) has columns 8t..8t+8 of a group of outputs g and g + 8. For int4 it takes words
// {group 0 g, group 0 g + 8, group 1 g, group 1 g + 8}, columns 8t..8t+4 in the low and 8t+4..8t+8 in the high halves of the
// bytes; for int8, per group, {g first four columns, g + 8 first four, g last four, g + 8 last four}.
//
// Rows of x are stored [row, block, t, group, 8], so that a lane's 16 bytes are its part of both groups.

struct Packed {
    const u8* codes;
    const u32* scales;
    const float* heads;
};

DEVICE u32 packed_blocks(u32 k) {
    return (k + 63) / 64;
}

DEVICE Packed packed_of(const void* weight, u32 n, u32 k, u32 code_bytes) {
    u64 tiles = (n + 15) / 16, blocks = packed_blocks(k);
    Packed out;
    out.codes = (const u8*)weight;
    out.scales = (const u32*)(out.codes + tiles * blocks * code_bytes);
    out.heads = (const float*)(out.scales + tiles * blocks * 16);
    return out;
}

/// From the layout of files, `count` blocks of tiles that each begin with `head` bytes; a block of 32 threads a block.
KERNEL(32) repack_int4(const u8* from, u8* to, u32 n, u32 k) {
    u32 blocks = packed_blocks(k), tile = blockIdx.x / blocks, block = blockIdx.x % blocks;
    u32 lane = threadIdx.x, g = lane / 4, t = lane % 4;
    Packed out = packed_of(to, n, k, 512);
    const u8* source = from + (u64)tile * ((64 + (u64)blocks * 568 + 63) / 64 * 64);
    if (block == 0 && lane < 16) {
        ((float*)out.heads)[tile * 16 + lane] = ((const float*)source)[lane];
    }
    source += 64 + (u64)block * 568;
    const u32* words = (const u32*)(source + 56);
    u32* codes = (u32*)out.codes + (u64)blockIdx.x * 128 + lane * 4;
    for (u32 i = 0; i < 4; i++) {
        codes[i] = words[(i / 2 * 4 + t) * 16 + g + i % 2 * 8];
    }
    if (lane < 16) {
        u32 above = source[16 + lane % 2 * 4 + lane / 4] >> (lane / 2 % 2 * 4) & 15;
        u32 s0 = source[lane] & 63, s1 = source[lane] >> 6 | above << 2;
        u32 z0 = (128 - source[24 + lane]) & 0xff, z1 = (128 - source[40 + lane]) & 0xff;
        ((u32*)out.scales)[(u64)blockIdx.x * 16 + lane] = s0 | s1 << 8 | z0 << 16 | z1 << 24;
    }
}

KERNEL(32) repack_int8(const u8* from, u8* to, u32 n, u32 k) {
    u32 lane = threadIdx.x, g = lane / 4, t = lane % 4;
    Packed out = packed_of(to, n, k, 1024);
    const u8* source = from + (u64)blockIdx.x * 1088;
    const u32* words = (const u32*)(source + 64);
    u32* codes = (u32*)out.codes + (u64)blockIdx.x * 256;
    for (u32 i = 0; i < 8; i++) {
        u32 group = i / 4, last = i / 2 % 2, row = g + i % 2 * 8;
        // From 1..=255 about 128 to -127..=127.
        codes[group * 128 + lane * 4 + i % 4] = words[(8 * group + 2 * t + last) * 16 + row] ^ 0x80808080u;
    }
    if (lane < 16) {
        const u16* d = (const u16*)source;
        ((u32*)out.scales)[(u64)blockIdx.x * 16 + lane] = d[lane] | (u32)d[16 + lane] << 16;
    }
}

/// `S(s)`.
DEVICE float int4_scale(u32 s) {
    return __uint_as_float(((s & 0xff) << 19) + (124u << 23));
}

DEVICE float half_to_float(u32 bits) {
    u32 magnitude = bits & 0x7fff;
    // The exponent moves from bias 15 to 127 by an exact product, subnormal halves included.
    float value = __uint_as_float(magnitude << 13) * 5.192296858534828e33f;
    return bits & 0x8000 ? -value : value;
}

/// Rows in eight bits, one warp a group of 32 columns: scale `max|x| / 127`, codes to nearest even, the sum of them negated.
KERNEL(256) quantize_rows(const float* x, i8* codes, float* scales, int* sums, u32 cols, u32 padded) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, groups = padded / 32;
    u32 group = blockIdx.y * 8 + warp;
    if (group >= groups) {
        return;
    }
    u64 row = blockIdx.x;
    u32 k = group * 32 + lane;
    float value = k < cols ? x[row * cols + k] : 0.0f;
    float scale = warp_max(fabsf(value)) / 127.0f;
    int code = (int)(i8)nearest(value * code_factor(scale));
    int sum = code;
    for (int step = 16; step > 0; step /= 2) {
        sum += __shfl_xor_sync(FULL, sum, step);
    }
    codes[row * padded + group / 2 * 64 + lane / 8 * 16 + group % 2 * 8 + lane % 8] = (i8)code;
    if (lane == 0) {
        scales[row * groups + group] = scale;
        sums[row * groups + group] = -sum;
    }
}

/// The largest magnitude of the block of 64 columns that a warp's group of 32 is of.
DEVICE float block_max(const float* row, u32 group, u32 lane, u32 cols, float value) {
    u32 k = (group ^ 1) * 32 + lane;
    float other = k < cols ? row[k] : 0.0f;
    return warp_max(max_of(fabsf(value), fabsf(other)));
}

/// Rows rounded to fourteen bits, one warp a group of 32 columns: `code * scale` with scale `max|x| / 8191` of its block.
KERNEL(256) round_rows_wide(const float* x, float* out, u32 cols) {
    u32 group = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, k = group * 32 + lane;
    u64 at = (u64)blockIdx.x * cols + k;
    float value = k < cols ? x[at] : 0.0f;
    float scale = block_max(x + at - k, group, lane, cols, value) / 8191.0f;
    if (k < cols) {
        out[at] = (float)nearest(value * code_factor(scale)) * scale;
    }
}

/// One block of 64 columns: 16 outputs by 8 slots. `words` are the lane's codes: 4 of int4, 8 of int8.
template <bool INT4>
DEVICE void step_packed(
    float (&sum)[4], const u32* words, const words4& b, u32 low, u32 high, const float (&a)[2][2],
    const int (&negated)[2][2]) {
#pragma unroll
    for (u32 group = 0; group < 2; group++) {
        u32 b0 = group ? b.z : b.x, b1 = group ? b.w : b.y;
        int dot[4];
        float s[2];
        int zero[2];
        if (INT4) {
            u32 first = words[2 * group], second = words[2 * group + 1];
            mma_s8(dot, first & 0x0f0f0f0fu, second & 0x0f0f0f0fu, first >> 4 & 0x0f0f0f0fu,
                   second >> 4 & 0x0f0f0f0fu, b0, b1);
            s[0] = int4_scale(low >> (8 * group));
            s[1] = int4_scale(high >> (8 * group));
            zero[0] = (int)(low >> (16 + 8 * group) & 0xff);
            zero[1] = (int)(high >> (16 + 8 * group) & 0xff);
        } else {
            const u32* w = words + 4 * group;
            mma_s8(dot, w[0], w[1], w[2], w[3], b0, b1);
            s[0] = half_to_float(low >> (16 * group) & 0xffff);
            s[1] = half_to_float(high >> (16 * group) & 0xffff);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            int t = INT4 ? 8 * dot[i] + zero[i / 2] * negated[i % 2][group] : dot[i];
            sum[i] = fmaf((float)t, s[i / 2] * a[i % 2][group], sum[i]);
        }
    }
}

/// Few slots: 16 MT outputs by 8 NT slots a block, one slice of the columns a warp.
template <bool INT4, int MT, int NT>
DEVICE void packed_sliced(const Product& p) {
    SHARED float sums[SLICES][8 * NT][16 * MT];
    Tile tile = tile_of(p, blockIdx.y, 8 * NT);
    if (tile.count == 0) {
        return;
    }
    constexpr u32 BYTES = INT4 ? 512 : 1024;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 blocks = packed_blocks(p.k), groups = 2 * blocks, tiles = (p.n + 15) / 16;
    Packed w = packed_of(tile.weight, p.n, p.k, BYTES);
    const u8* x[NT];
    bool known[NT];
    // Scales are those of the slots of the lane's results, 2t and 2t + 1.
    u32 scale_row[NT][2];
#pragma unroll
    for (u32 j = 0; j < NT; j++) {
        u32 slot = 8 * j + g;
        known[j] = slot < tile.count;
        x[j] = (const u8*)p.x + (u64)(known[j] ? x_row(p, tile.first + slot) : 0) * p.x_stride + 16 * t;
#pragma unroll
        for (u32 e = 0; e < 2; e++) {
            scale_row[j][e] = x_row(p, tile.first + min_of(8 * j + 2 * t + e, tile.count - 1)) * groups;
        }
    }
    float sum[MT][NT][4] = {};
    u32 end = slice_start(warp + 1, blocks);
#pragma unroll (NT == 1 ? 2 : 1)
    for (u32 block = slice_start(warp, blocks); block < end; block++) {
        u32 words[MT][8], scales[MT][2];
#pragma unroll
        for (u32 i = 0; i < MT; i++) {
            u64 at = (u64)min_of(blockIdx.x * MT + i, tiles - 1) * blocks + block;
            words4 first = load_once(w.codes + at * BYTES + lane * 16);
            words[i][0] = first.x;
            words[i][1] = first.y;
            words[i][2] = first.z;
            words[i][3] = first.w;
            if (!INT4) {
                words4 second = load_once(w.codes + at * BYTES + 512 + lane * 16);
                words[i][4] = second.x;
                words[i][5] = second.y;
                words[i][6] = second.z;
                words[i][7] = second.w;
            }
            scales[i][0] = w.scales[at * 16 + g];
            scales[i][1] = w.scales[at * 16 + g + 8];
        }
#pragma unroll
        for (u32 j = 0; j < NT; j++) {
            words4 b = {0, 0, 0, 0};
            if (known[j]) {
                b = vector_at<words4>(x[j] + block * 64);
            }
            float a[2][2];
            int negated[2][2] = {};
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                u32 at = scale_row[j][e] + 2 * block;
                floats2 pair = vector_at<floats2>(p.x_scales + at);
                a[e][0] = pair.x;
                a[e][1] = pair.y;
                if (INT4) {
                    ints2 both = vector_at<ints2>(p.x_sums + at);
                    negated[e][0] = both.x;
                    negated[e][1] = both.y;
                }
            }
#pragma unroll
            for (u32 i = 0; i < MT; i++) {
                step_packed<INT4>(sum[i][j], words[i], b, scales[i][0], scales[i][1], a, negated);
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < MT; i++) {
#pragma unroll
        for (u32 j = 0; j < NT; j++) {
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                sums[warp][8 * j + 2 * t + c % 2][16 * i + g + 8 * (c / 2)] = sum[i][j][c];
            }
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < 128 * MT * NT; i += 256) {
        u32 output = i % (16 * MT), slot = i / (16 * MT), n = blockIdx.x * 16 * MT + output;
        float total = 0.0f;
        for (u32 s = 0; s < SLICES; s++) {
            total += sums[s][slot][output];
        }
        if (slot < tile.count && n < p.n) {
            finish(p, tile.first + slot, n, INT4 ? total * (w.heads[n] / 8.0f) : total);
        }
    }
}

KERNEL(256) product_int4_few(Product p) {
    packed_sliced<true, 1, 1>(p);
}

KERNEL(256) product_int8_few(Product p) {
    packed_sliced<false, 1, 1>(p);
}

KERNEL(256) product_int4_some(Product p) {
    packed_sliced<true, 2, 4>(p);
}

KERNEL(256) product_int8_some(Product p) {
    packed_sliced<false, 2, 4>(p);
}

#define OUTPUTS 64
#define SLOTS 128
#define STAGES 3

/// Bytes of a stage: codes and scales of 4 tiles, codes of 128 slots, their scales and sums.
template <bool INT4>
struct Stage {
    static constexpr u32 codes = 4 * (INT4 ? 512 : 1024);
    static constexpr u32 scales = codes;
    static constexpr u32 x = scales + 4 * 64;
    static constexpr u32 x_scales = x + SLOTS * 64;
    static constexpr u32 x_sums = x_scales + SLOTS * 8;
    static constexpr u32 bytes = x_sums + SLOTS * 8;
};

/// Brings a block of 64 columns into a stage.
template <bool INT4>
DEVICE void fetch(const Product& p, const Packed& w, const Tile& tile, u8* stage, u32 block, u32 blocks) {
    typedef Stage<INT4> At;
    u32 thread = threadIdx.x, tiles = (p.n + 15) / 16;
    constexpr u32 per_tile = INT4 ? 32 : 64;
    for (u32 i = thread; i < 4 * per_tile; i += 256) {
        u32 row = blockIdx.x * 4 + i / per_tile;
        const u8* from = w.codes + ((u64)min_of(row, tiles - 1) * blocks + block) * (16 * per_tile) + i % per_tile * 16;
        copy_async(stage + i * 16, from, row < tiles);
    }
    if (thread < 16) {
        u32 row = blockIdx.x * 4 + thread / 4;
        const u32* from = w.scales + ((u64)min_of(row, tiles - 1) * blocks + block) * 16 + thread % 4 * 4;
        copy_async(stage + At::scales + thread * 16, from, row < tiles);
    }
    for (u32 i = thread; i < SLOTS * 4; i += 256) {
        bool known = i / 4 < tile.count;
        u32 row = x_row(p, tile.first + (known ? i / 4 : 0));
        const u8* from = (const u8*)p.x + (u64)row * p.x_stride + block * 64 + i % 4 * 16;
        copy_async(stage + At::x + i * 16, from, known);
    }
    // Eight bytes a slot are too few for the copies above.
    if (thread < SLOTS) {
        bool known = thread < tile.count;
        u64 at = (u64)x_row(p, tile.first + (known ? thread : 0)) * 2 * blocks + 2 * block;
        vector_at<floats2>(stage + At::x_scales + thread * 8) = vector_at<floats2>(p.x_scales + at);
        vector_at<ints2>(stage + At::x_sums + thread * 8) = vector_at<ints2>(p.x_sums + at);
    }
}

/// Many slots: 64 outputs by 128 slots a block; a warp has 32 outputs and 32 slots.
template <bool INT4>
DEVICE void packed_many(const Product& p) {
    typedef Stage<INT4> At;
    DYNAMIC_SHARED(shared);
    Tile tile = tile_of(p, blockIdx.y, SLOTS);
    if (tile.count == 0) {
        return;
    }
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 blocks = packed_blocks(p.k);
    Packed w = packed_of(tile.weight, p.n, p.k, INT4 ? 512 : 1024);
    u32 tile_base = warp / 4 * 2, slot_base = warp % 4 * 32;
    float total[2][4][4] = {}, sum[2][4][4] = {};
    for (u32 block = 0; block < STAGES - 1; block++) {
        if (block < blocks) {
            fetch<INT4>(p, w, tile, shared + block * At::bytes, block, blocks);
        }
        commit_copies();
    }
    u32 slice = 1;
    for (u32 block = 0; block < blocks; block++) {
        while (slice < SLICES && block == slice_start(slice, blocks)) {
#pragma unroll
            for (u32 i = 0; i < 32; i++) {
                total[i / 16][i / 4 % 4][i % 4] += sum[i / 16][i / 4 % 4][i % 4];
                sum[i / 16][i / 4 % 4][i % 4] = 0.0f;
            }
            slice++;
        }
        wait_copies<STAGES - 2>();
        __syncthreads();
        if (block + STAGES - 1 < blocks) {
            u32 next = block + STAGES - 1;
            fetch<INT4>(p, w, tile, shared + next % STAGES * At::bytes, next, blocks);
        }
        commit_copies();
        const u8* stage = shared + block % STAGES * At::bytes;
        u32 words[2][8], scales[2][2];
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u8* codes = stage + (tile_base + i) * (INT4 ? 512 : 1024) + lane * 16;
            words4 first = vector_at<words4>(codes);
            words[i][0] = first.x;
            words[i][1] = first.y;
            words[i][2] = first.z;
            words[i][3] = first.w;
            if (!INT4) {
                words4 second = vector_at<words4>(codes + 512);
                words[i][4] = second.x;
                words[i][5] = second.y;
                words[i][6] = second.z;
                words[i][7] = second.w;
            }
            const u32* s = (const u32*)(stage + At::scales) + (tile_base + i) * 16;
            scales[i][0] = s[g];
            scales[i][1] = s[g + 8];
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            words4 b = vector_at<words4>(stage + At::x + (slot_base + 8 * j + g) * 64 + 16 * t);
            float a[2][2];
            int negated[2][2] = {};
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                u32 slot = slot_base + 8 * j + 2 * t + e;
                floats2 pair = vector_at<floats2>(stage + At::x_scales + slot * 8);
                a[e][0] = pair.x;
                a[e][1] = pair.y;
                if (INT4) {
                    ints2 both = vector_at<ints2>(stage + At::x_sums + slot * 8);
                    negated[e][0] = both.x;
                    negated[e][1] = both.y;
                }
            }
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                step_packed<INT4>(sum[i][j], words[i], b, scales[i][0], scales[i][1], a, negated);
            }
        }
    }
    wait_copies<0>();
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                u32 n = blockIdx.x * OUTPUTS + (tile_base + i) * 16 + g + 8 * (c / 2);
                u32 slot = slot_base + 8 * j + 2 * t + c % 2;
                if (slot < tile.count && n < p.n) {
                    float z = total[i][j][c] + sum[i][j][c];
                    finish(p, tile.first + slot, n, INT4 ? z * (w.heads[n] / 8.0f) : z);
                }
            }
        }
    }
}

KERNEL(256) product_int4_many(Product p) {
    packed_many<true>(p);
}

KERNEL(256) product_int8_many(Product p) {
    packed_many<false>(p);
}

/// Element (row, col) of a packed matrix.
template <bool INT4>
DEVICE float packed_element(const Packed& w, u32 blocks, u32 row, u32 col) {
    u64 at = (u64)(row / 16) * blocks + col / 64;
    u32 r = row % 16, group = col % 64 / 32, t = col % 32 / 8, last = col % 8 / 4, byte = col % 4;
    u32 lane = r % 8 * 4 + t, upper = r / 8;
    u32 scale = w.scales[at * 16 + r];
    if (INT4) {
        u32 code = w.codes[at * 512 + lane * 16 + (2 * group + upper) * 4 + byte] >> (4 * last) & 15;
        float zero = (float)(scale >> (16 + 8 * group) & 0xff) / 8.0f;
        return w.heads[row] * int4_scale(scale >> (8 * group)) * ((float)code - zero);
    }
    i8 code = (i8)w.codes[at * 1024 + group * 512 + lane * 16 + (2 * last + upper) * 4 + byte];
    return half_to_float(scale >> (16 * group) & 0xffff) * (float)code;
}

KERNEL(256) embed_int4(const u8* table, const u32* ids, float* out, u32 rows, u32 cols) {
    Packed w = packed_of(table, rows, cols, 512);
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        out[(u64)blockIdx.x * cols + c] = packed_element<true>(w, packed_blocks(cols), ids[blockIdx.x], c);
    }
}

KERNEL(256) embed_int8(const u8* table, const u32* ids, float* out, u32 rows, u32 cols) {
    Packed w = packed_of(table, rows, cols, 1024);
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        out[(u64)blockIdx.x * cols + c] = packed_element<false>(w, packed_blocks(cols), ids[blockIdx.x], c);
    }
}
