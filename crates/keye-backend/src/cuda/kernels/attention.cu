// Softmax attention: over spans of rows (vision), over the paged cache (causal), over selected positions of it (sparse).
//
// Two ways. `attend_exact_*`: f32 throughout, a warp a row and head, blocks of 64 keys from left to right. `attend_*`: bf16 on
// the matrix cores, a warp 16 items (an item is a row with one of the query heads of a key head), online softmax over blocks
// of 64 keys. There the cached keys of a row are cut into segments of 256 whose results are merged from left to right, in one
// block (prompts) or by a second launch (`merge_segments`, decoding): the same sums either way.

#define SEGMENT_BLOCKS 4
#define LOG2E 1.4426950408889634f

struct Attention {
    const float* q;
    float* out;
    /// Rows `[keys, kv_stride]` of f32 or bf16, or a layer of the cache.
    const void* keys;
    const void* values;
    /// Block tables, one after the other; none: keys are rows.
    const u32* tables;
    /// Positions `[rows, top_k]`; none: all.
    const u32* selected;
    /// What there is to do, see the kernels.
    const u32* work;
    float* partials;
    /// Of the cache's rows in eight bits.
    const float* key_scales;
    const float* value_scales;
    u32 heads, kv_heads, head_dim, kv_stride, top_k;
    /// How many more keys each further row sees: 1 when causal, else 0.
    u32 growth;
    float scale;
};

/// Where key `i` of a row's keys lies; `base` is the first key row, or the first entry of the block table.
DEVICE u64 key_at(const Attention& p, u32 row, u32 base, u32 i, u32 kv_head) {
    if (!p.tables) {
        return (u64)(base + i) * p.kv_stride + kv_head * p.head_dim;
    }
    u32 token = p.selected ? p.selected[(u64)row * p.top_k + i] : i;
    u64 block = p.tables[base + token / BLOCK_TOKENS];
    return ((block * p.kv_heads + kv_head) * BLOCK_TOKENS + token % BLOCK_TOKENS) * p.head_dim;
}

/// The scale of the row that begins at `place`: of rows in eight bits alone.
template <class E>
DEVICE float row_scale(const E*, const float*, u64, u32) {
    return 1.0f;
}

DEVICE float row_scale(const i8*, const float* scales, u64 place, u32 head_dim) {
    // In eighths, which fit 32 bits: a division of 64 bits is a call, and spills. Rows of bytes are whole eighths (`fetch`).
    return scales[(u32)(place >> 3) / (head_dim >> 3)];
}

/// `work[i]` = {row, base, keys}; a block has 4 rows of a head. Shared memory: 8 head_dim + 768 bytes a warp.
template <class E>
DEVICE void attend_exact(const Attention& p, u32 rows) {
    DYNAMIC_SHARED(shared);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, hd = p.head_dim;
    u64* places = (u64*)(shared + warp * (8 * hd + 768));
    float* weights = (float*)(places + 64);
    float* query = weights + 64;
    float* sums = query + hd;
    u32 item = blockIdx.x * 4 + warp;
    if (item >= rows) {
        return;
    }
    u32 row = p.work[3 * item], base = p.work[3 * item + 1], keys = p.work[3 * item + 2];
    u32 head = blockIdx.y, kv_head = head / (p.heads / p.kv_heads);
    u64 at = ((u64)row * p.heads + head) * hd;
    for (u32 d = lane; d < hd; d += 32) {
        query[d] = p.q[at + d];
        sums[d] = 0.0f;
    }
    float infinity = __int_as_float(0x7f800000), largest = -infinity, total = 0.0f;
    for (u32 first = 0; first < keys; first += 64) {
        u32 count = min_of(64, keys - first);
        __syncwarp();
        float score[2];
        for (u32 half = 0; half < 2; half++) {
            u32 i = lane + 32 * half;
            score[half] = -infinity;
            if (i < count) {
                u64 place = key_at(p, row, base, first + i, kv_head);
                places[i] = place;
                const E* key = (const E*)p.keys + place;
                float scale = row_scale(key, p.key_scales, place, hd);
                float dot[4] = {};
                for (u32 c = 0; c < hd; c += 4) {
#pragma unroll
                    for (u32 e = 0; e < 4; e++) {
                        dot[e] = c + e < hd ? fmaf(query[c + e], widen(key[c + e]) * scale, dot[e]) : dot[e];
                    }
                }
                score[half] = ((dot[0] + dot[1]) + (dot[2] + dot[3])) * p.scale;
            }
        }
        float largest_now = max_of(largest, warp_max(max_of(score[0], score[1])));
        float keep = expf(largest - largest_now);
        float sum = 0.0f;
        for (u32 half = 0; half < 2; half++) {
            float weight = expf(score[half] - largest_now);
            weights[lane + 32 * half] = weight;
            sum += weight;
        }
        total = fmaf(total, keep, warp_sum(sum));
        largest = largest_now;
        __syncwarp();
        for (u32 d = lane; d < hd; d += 32) {
            float sum = 0.0f;
            for (u32 i = 0; i < count; i++) {
                const E* value = (const E*)p.values + places[i];
                sum = fmaf(weights[i], widen(value[d]) * row_scale(value, p.value_scales, places[i], hd), sum);
            }
            sums[d] = fmaf(sums[d], keep, sum);
        }
    }
    for (u32 d = lane; d < hd; d += 32) {
        p.out[at + d] = total > 0.0f ? sums[d] / total : 0.0f;
    }
}

KERNEL(128) attend_exact_f32(Attention p, u32 rows) {
    attend_exact<float>(p, rows);
}

KERNEL(128) attend_exact_bf16(Attention p, u32 rows) {
    attend_exact<bf16>(p, rows);
}

KERNEL(128) attend_exact_int8(Attention p, u32 rows) {
    attend_exact<i8>(p, rows);
}

/// Brings 64 keys (or values) of a head into `tile` `[64, HD + 8]`, zeros behind the last key and the last column.
template <int HD, int THREADS>
DEVICE void fetch(
    const Attention& p, const bf16* from, const float*, u16* tile, u32 row, u32 base, u32 first, u32 keys, u32 kv_head) {
#pragma unroll 4
    for (u32 i = threadIdx.x; i < 64 * (HD / 8); i += THREADS) {
        u32 key = i / (HD / 8), column = i % (HD / 8) * 8;
        bool known = first + key < keys && column < p.head_dim;
        u64 place = known ? key_at(p, row, base, first + key, kv_head) + column : 0;
        copy_async(tile + key * (HD + 8) + column, from + place, known);
    }
}

template <int HD, int THREADS>
DEVICE void fetch(
    const Attention& p, const float* from, const float*, u16* tile, u32 row, u32 base, u32 first, u32 keys, u32 kv_head) {
#pragma unroll 4
    for (u32 i = threadIdx.x; i < 64 * (HD / 4); i += THREADS) {
        u32 key = i / (HD / 4), column = i % (HD / 4) * 4;
        words2 out = {0, 0};
        if (first + key < keys && column < p.head_dim) {
            words4 x = vector_at<words4>(from + key_at(p, row, base, first + key, kv_head) + column);
            out.x = narrow2(__uint_as_float(x.x), __uint_as_float(x.y));
            out.y = narrow2(__uint_as_float(x.z), __uint_as_float(x.w));
        }
        vector_at<words2>(tile + key * (HD + 8) + column) = out;
    }
}

template <int HD, int THREADS>
DEVICE void fetch(
    const Attention& p, const i8* from, const float* scales, u16* tile, u32 row, u32 base, u32 first, u32 keys,
    u32 kv_head) {
#pragma unroll 2
    for (u32 i = threadIdx.x; i < 64 * (HD / 8); i += THREADS) {
        u32 key = i / (HD / 8), column = i % (HD / 8) * 8;
        words4 out = {0, 0, 0, 0};
        if (first + key < keys && column < p.head_dim) {
            u64 place = key_at(p, row, base, first + key, kv_head);
            float scale = row_scale(from, scales, place, p.head_dim);
            words2 codes = vector_at<words2>(from + place + column);
            out.x = narrow2((float)(i8)codes.x * scale, (float)(i8)(codes.x >> 8) * scale);
            out.y = narrow2((float)(i8)(codes.x >> 16) * scale, (float)(i8)(codes.x >> 24) * scale);
            out.z = narrow2((float)(i8)codes.y * scale, (float)(i8)(codes.y >> 8) * scale);
            out.w = narrow2((float)(i8)(codes.y >> 16) * scale, (float)(i8)(codes.y >> 24) * scale);
        }
        vector_at<words4>(tile + key * (HD + 8) + column) = out;
    }
}

/// Softmax of a warp's 16 items so far. A lane has items g and g + 8 (g = lane / 4), columns 2t and 2t + 1 of each eight.
template <int HD>
struct State {
    float largest[2], total[2];
    float sums[HD / 8][4];
};

template <int HD>
DEVICE void clear(State<HD>& state) {
    for (int r = 0; r < 2; r++) {
        state.largest[r] = -__int_as_float(0x7f800000);
        state.total[r] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < HD / 8; i++) {
        for (int c = 0; c < 4; c++) {
            state.sums[i][c] = 0.0f;
        }
    }
}

DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}

DEVICE float quad_max(float x) {
    x = max_of(x, __shfl_xor_sync(FULL, x, 1));
    return max_of(x, __shfl_xor_sync(FULL, x, 2));
}

/// Factors of two parts whose largest scores are given, so that they can be added.
DEVICE void merge_factors(float a, float b, float& largest, float& of_a, float& of_b) {
    largest = max_of(a, b);
    of_a = exp2f(a - largest);
    of_b = exp2f(b - largest);
}

/// Attention of the 16 items of each of WARPS warps over blocks `begin..end` of 64 keys. At the end of a segment `close` is
/// called with the state, which begins anew.
template <int HD, int WARPS, class E, class Close>
DEVICE void attend_blocks(
    const Attention& p, u16* shared, const u32 (&query)[HD / 16][4], const u32 (&sight)[2], u32 row, u32 base, u32 keys,
    u32 kv_head, u32 begin, u32 end, State<HD>& state, Close close) {
    constexpr int THREADS = 32 * WARPS;
    u16* key_tile = shared;
    u16* value_tile = shared + 64 * (HD + 8);
    const E* key_rows = (const E*)p.keys;
    const E* value_rows = (const E*)p.values;
    u32 lane = threadIdx.x % 32, t = lane % 4;
    float scale = p.scale * LOG2E, infinity = __int_as_float(0x7f800000);
    clear(state);
    fetch<HD, THREADS>(p, key_rows, p.key_scales, key_tile, row, base, begin * 64, keys, kv_head);
    commit_copies();
    fetch<HD, THREADS>(p, value_rows, p.value_scales, value_tile, row, base, begin * 64, keys, kv_head);
    commit_copies();
    for (u32 block = begin; block < end; block++) {
        wait_copies<1>();
        __syncthreads();
        float s[8][4] = {};
#pragma unroll
        for (u32 c = 0; c < HD / 16; c++) {
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                u32 k[4];
                load_matrices(k, key_tile + (16 * j + lane / 16 * 8 + lane % 8) * (HD + 8) + 16 * c + lane / 8 % 2 * 8);
                mma_bf16(s[2 * j], query[c][0], query[c][1], query[c][2], query[c][3], k[0], k[1]);
                mma_bf16(s[2 * j + 1], query[c][0], query[c][1], query[c][2], query[c][3], k[2], k[3]);
            }
        }
        __syncthreads();
        if (block + 1 < end) {
            fetch<HD, THREADS>(p, key_rows, p.key_scales, key_tile, row, base, block * 64 + 64, keys, kv_head);
        }
        commit_copies();
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            float largest = state.largest[r];
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
#pragma unroll
                for (u32 e = 0; e < 2; e++) {
                    bool seen = block * 64 + 8 * j + 2 * t + e < sight[r];
                    float score = seen ? s[j][2 * r + e] * scale : -infinity;
                    s[j][2 * r + e] = score;
                    largest = max_of(largest, score);
                }
            }
            largest = quad_max(largest);
            // An item that has not seen a key yet keeps its zeros.
            float from = largest == -infinity ? 0.0f : largest;
            float keep = exp2f(state.largest[r] - from);
            float total = state.total[r] * keep;
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
#pragma unroll
                for (u32 e = 0; e < 2; e++) {
                    float weight = exp2f(s[j][2 * r + e] - from);
                    s[j][2 * r + e] = weight;
                    total += weight;
                }
            }
            state.largest[r] = largest;
            state.total[r] = total;
#pragma unroll
            for (u32 i = 0; i < HD / 8; i++) {
                state.sums[i][2 * r] *= keep;
                state.sums[i][2 * r + 1] *= keep;
            }
        }
        wait_copies<1>();
        __syncthreads();
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            u32 a0 = narrow2(s[2 * c][0], s[2 * c][1]), a1 = narrow2(s[2 * c][2], s[2 * c][3]);
            u32 a2 = narrow2(s[2 * c + 1][0], s[2 * c + 1][1]), a3 = narrow2(s[2 * c + 1][2], s[2 * c + 1][3]);
#pragma unroll
            for (u32 d = 0; d < HD / 16; d++) {
                u32 v[4];
                load_matrices_transposed(
                    v, value_tile + (16 * c + lane / 8 % 2 * 8 + lane % 8) * (HD + 8) + 16 * d + lane / 16 * 8);
                mma_bf16(state.sums[2 * d], a0, a1, a2, a3, v[0], v[1]);
                mma_bf16(state.sums[2 * d + 1], a0, a1, a2, a3, v[2], v[3]);
            }
        }
        __syncthreads();
        if (block + 1 < end) {
            fetch<HD, THREADS>(p, value_rows, p.value_scales, value_tile, row, base, block * 64 + 64, keys, kv_head);
        }
        commit_copies();
        if (block + 1 == end || (p.tables && (block + 1) % SEGMENT_BLOCKS == 0)) {
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                state.total[r] = quad_sum(state.total[r]);
            }
            close(state);
            if (block + 1 < end) {
                clear(state);
            }
        }
    }
    wait_copies<0>();
}

/// A warp's queries as operands, rounded to bf16, and how many keys its items see.
template <int HD>
DEVICE void load_query(
    const Attention& p, u32 (&query)[HD / 16][4], u32 (&sight)[2], u32 first_row, u32 rows, u32 first_sight,
    u32 kv_head, u32 first_item) {
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, group = p.heads / p.kv_heads;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        u32 item = first_item + g + 8 * r, row = item / group;
        bool known = row < rows;
        sight[r] = known ? first_sight + row * p.growth : 0;
        const float* q = p.q + ((u64)(first_row + (known ? row : 0)) * p.heads + kv_head * group + item % group) * p.head_dim;
#pragma unroll
        for (u32 c = 0; c < HD / 16; c++) {
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                u32 d = 16 * c + 8 * h + 2 * t;
                floats2 pair = {0.0f, 0.0f};
                if (known && d < p.head_dim) {
                    pair = vector_at<floats2>(q + d);
                }
                query[c][2 * h + r] = narrow2(pair.x, pair.y);
            }
        }
    }
}

/// `work[i]` = {first row, rows, keys that the first sees, base}: 64 items a block, a warp 16. Shared memory: the tiles,
/// then, for cached keys, the merged sums.
template <int HD, class E>
DEVICE void attend_rows(const Attention& p) {
    DYNAMIC_SHARED(shared);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, kv_head = blockIdx.y;
    const u32* work = p.work + 4 * blockIdx.x;
    u32 first_row = work[0], rows = work[1];
    u32 query[HD / 16][4], sight[2];
    load_query<HD>(p, query, sight, first_row, rows, work[2], kv_head, 16 * warp);
    u32 keys = work[2] + (rows - 1) * p.growth;
    // The merged sums lie in shared memory, each lane's its own: merged[i * 128].
    float* merged = (float*)(shared + 4 * 64 * (HD + 8)) + threadIdx.x;
    float largest[2], total[2];
    bool first = true;
    State<HD> state;
    attend_blocks<HD, 4, E>(
        p, (u16*)shared, query, sight, first_row, work[3], keys, kv_head, 0, (keys + 63) / 64, state,
        [&](State<HD>& part) {
            if (!p.tables) {
                return;
            }
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                if (first) {
                    largest[r] = part.largest[r];
                    total[r] = part.total[r];
#pragma unroll
                    for (u32 i = 0; i < HD / 8; i++) {
                        merged[(4 * i + 2 * r) * 128] = part.sums[i][2 * r];
                        merged[(4 * i + 2 * r + 1) * 128] = part.sums[i][2 * r + 1];
                    }
                } else if (part.total[r] > 0.0f) {
                    float a, b;
                    merge_factors(largest[r], part.largest[r], largest[r], a, b);
                    total[r] = fmaf(total[r], a, part.total[r] * b);
#pragma unroll
                    for (u32 i = 0; i < HD / 8; i++) {
#pragma unroll
                        for (u32 e = 2 * r; e < 2 * r + 2; e++) {
                            merged[(4 * i + e) * 128] = fmaf(merged[(4 * i + e) * 128], a, part.sums[i][e] * b);
                        }
                    }
                }
            }
            first = false;
        });
    u32 group = p.heads / p.kv_heads;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        u32 item = 16 * warp + g + 8 * r, row = item / group;
        if (row >= rows) {
            continue;
        }
        float* out = p.out + ((u64)(first_row + row) * p.heads + kv_head * group + item % group) * p.head_dim;
        float all = p.tables ? total[r] : state.total[r];
#pragma unroll
        for (u32 i = 0; i < HD / 8; i++) {
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                u32 d = 8 * i + 2 * t + e;
                float sum = p.tables ? merged[(4 * i + 2 * r + e) * 128] : state.sums[i][2 * r + e];
                if (d < p.head_dim) {
                    out[d] = sum / all;
                }
            }
        }
    }
}

/// `work[i]` = {first row, rows, keys that the first sees, base, segment}: at most 16 items and one segment of their keys a
/// block. To `partials` `[work, kv_heads, 16, HD + 2]`: sums, largest score, total.
template <int HD, class E>
DEVICE void attend_segment(const Attention& p) {
    DYNAMIC_SHARED(shared);
    u32 lane = threadIdx.x, g = lane / 4, t = lane % 4, kv_head = blockIdx.y;
    const u32* work = p.work + 5 * blockIdx.x;
    u32 query[HD / 16][4], sight[2];
    load_query<HD>(p, query, sight, work[0], work[1], work[2], kv_head, 0);
    u32 keys = work[2] + (work[1] - 1) * p.growth, begin = work[4] * SEGMENT_BLOCKS;
    u32 end = min_of(begin + SEGMENT_BLOCKS, (keys + 63) / 64);
    State<HD> state;
    attend_blocks<HD, 1, E>(
        p, (u16*)shared, query, sight, work[0], work[3], keys, kv_head, begin, end, state, [](State<HD>&) {});
    float* out = p.partials + ((u64)blockIdx.x * p.kv_heads + kv_head) * 16 * (HD + 2);
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        float* to = out + (g + 8 * r) * (HD + 2);
#pragma unroll
        for (u32 i = 0; i < HD / 8; i++) {
            to[8 * i + 2 * t] = state.sums[i][2 * r];
            to[8 * i + 2 * t + 1] = state.sums[i][2 * r + 1];
        }
        if (t == 0) {
            to[HD] = state.largest[r];
            to[HD + 1] = state.total[r];
        }
    }
}

/// Merges segments from left to right. `work[i]` = {first row, rows, first part, parts}; a block has one item.
template <int HD>
DEVICE void merge_segments(const Attention& p) {
    const u32* work = p.work + 4 * blockIdx.x;
    u32 kv_head = blockIdx.y, item = blockIdx.z, d = threadIdx.x, group = p.heads / p.kv_heads, row = item / group;
    if (row >= work[1] || d >= p.head_dim) {
        return;
    }
    float largest = 0.0f, total = 0.0f, sum = 0.0f;
    for (u32 i = 0; i < work[3]; i++) {
        const float* part = p.partials + (((u64)(work[2] + i) * p.kv_heads + kv_head) * 16 + item) * (HD + 2);
        if (i == 0) {
            largest = part[HD];
            total = part[HD + 1];
            sum = part[d];
        } else if (part[HD + 1] > 0.0f) {
            float a, b;
            merge_factors(largest, part[HD], largest, a, b);
            total = fmaf(total, a, part[HD + 1] * b);
            sum = fmaf(sum, a, part[d] * b);
        }
    }
    p.out[((u64)(work[0] + row) * p.heads + kv_head * group + item % group) * p.head_dim + d] = sum / total;
}

KERNEL(128) attend_rows_80_bf16(Attention p) {
    attend_rows<80, bf16>(p);
}

KERNEL(128) attend_rows_80_f32(Attention p) {
    attend_rows<80, float>(p);
}

KERNEL(128) attend_rows_128_bf16(Attention p) {
    attend_rows<128, bf16>(p);
}

KERNEL(128) attend_rows_128_f32(Attention p) {
    attend_rows<128, float>(p);
}

KERNEL(32) attend_segment_80_bf16(Attention p) {
    attend_segment<80, bf16>(p);
}

KERNEL(32) attend_segment_80_f32(Attention p) {
    attend_segment<80, float>(p);
}

KERNEL(32) attend_segment_128_bf16(Attention p) {
    attend_segment<128, bf16>(p);
}

KERNEL(32) attend_segment_128_f32(Attention p) {
    attend_segment<128, float>(p);
}

KERNEL(128) attend_rows_80_int8(Attention p) {
    attend_rows<80, i8>(p);
}

KERNEL(128) attend_rows_128_int8(Attention p) {
    attend_rows<128, i8>(p);
}

KERNEL(32) attend_segment_80_int8(Attention p) {
    attend_segment<80, i8>(p);
}

KERNEL(32) attend_segment_128_int8(Attention p) {
    attend_segment<128, i8>(p);
}

KERNEL(128) merge_segments_80(Attention p) {
    merge_segments<80>(p);
}

KERNEL(128) merge_segments_128(Attention p) {
    merge_segments<128>(p);
}
