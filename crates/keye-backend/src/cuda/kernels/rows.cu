// Operations on rows: gathers, embeddings, norms, rotations, writes into the KV cache, conversions.

/// Row i of `out` is row index[i] of x; one block a row.
KERNEL(256) gather_rows(const float* x, const u32* index, float* out, u32 cols) {
    const float* from = x + (u64)index[blockIdx.x] * cols;
    float* to = out + (u64)blockIdx.x * cols;
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        to[c] = from[c];
    }
}

/// Bytes as the numbers they stand for.
KERNEL(256) widen_u8(const u8* x, float* out, u64 count) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < count) {
        out[i] = (float)x[i];
    }
}

/// Rows of f32 to rows of bf16 of `stride` elements, zeros behind the last column; one block a row.
KERNEL(256) narrow_rows(const float* x, u16* out, u32 cols, u32 stride) {
    const float* from = x + (u64)blockIdx.x * cols;
    u32* to = (u32*)(out + (u64)blockIdx.x * stride);
    for (u32 i = threadIdx.x; i < stride / 2; i += 256) {
        u32 c = 2 * i;
        to[i] = narrow2(c < cols ? from[c] : 0.0f, c + 1 < cols ? from[c + 1] : 0.0f);
    }
}

template <class E>
DEVICE void embed_rows(const E* table, const u32* ids, float* out, u32 cols, u32 stride) {
    const E* from = table + (u64)ids[blockIdx.x] * stride;
    float* to = out + (u64)blockIdx.x * cols;
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        to[c] = widen(from[c]);
    }
}

KERNEL(256) embed_f32(const float* table, const u32* ids, float* out, u32 cols, u32 stride) {
    embed_rows(table, ids, out, cols, stride);
}

KERNEL(256) embed_bf16(const bf16* table, const u32* ids, float* out, u32 cols, u32 stride) {
    embed_rows(table, ids, out, cols, stride);
}

template <class E>
DEVICE void add_taps(
    float* x, const E* table, const u32* index, const float* weights, u32 cols, u32 taps, u32 stride) {
    u64 row = blockIdx.x;
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        float sum = 0.0f;
        for (u32 t = 0; t < taps; t++) {
            sum = fmaf(weights[row * taps + t], widen(table[(u64)index[row * taps + t] * stride + c]), sum);
        }
        x[row * cols + c] += sum;
    }
}

/// `x[i] += sum over t of weights[i, t] * table[index[i, t]]`; one block a row.
KERNEL(256)
add_weighted_rows_f32(
    float* x, const float* table, const u32* index, const float* weights, u32 cols, u32 taps, u32 stride) {
    add_taps(x, table, index, weights, cols, taps, stride);
}

KERNEL(256)
add_weighted_rows_bf16(
    float* x, const bf16* table, const u32* index, const float* weights, u32 cols, u32 taps, u32 stride) {
    add_taps(x, table, index, weights, cols, taps, stride);
}

/// `(x - mean) / sqrt(var + eps) * gamma + beta`; one block a row.
KERNEL(256) layer_norm(const float* x, const float* gamma, const float* beta, float* out, u32 cols, float eps) {
    SHARED float room[8];
    const float* row = x + (u64)blockIdx.x * cols;
    float sum = 0.0f;
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        sum += row[c];
    }
    float mean = block_sum(sum, room) / (float)cols;
    float squares = 0.0f;
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        float v = row[c] - mean;
        squares = fmaf(v, v, squares);
    }
    float scale = 1.0f / sqrtf(block_sum(squares, room) / (float)cols + eps);
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        out[(u64)blockIdx.x * cols + c] = (row[c] - mean) * scale * gamma[c] + beta[c];
    }
}

/// `x / sqrt(mean(x^2) + eps) * gamma`; one block a row.
KERNEL(256) rms_norm(const float* x, const float* gamma, float* out, u32 cols, float eps) {
    SHARED float room[8];
    const float* row = x + (u64)blockIdx.x * cols;
    float squares = 0.0f;
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        squares = fmaf(row[c], row[c], squares);
    }
    float scale = 1.0f / sqrtf(block_sum(squares, room) / (float)cols + eps);
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        out[(u64)blockIdx.x * cols + c] = row[c] * scale * gamma[c];
    }
}

/// Rotates the halves of each head; angles `[rows, head_dim]`: cosines, then sines. One block a row.
KERNEL(256) rope(float* x, const float* angles, u32 heads, u32 head_dim) {
    u32 half = head_dim / 2;
    const float* angle = angles + (u64)blockIdx.x * head_dim;
    float* row = x + (u64)blockIdx.x * heads * head_dim;
    for (u32 i = threadIdx.x; i < heads * half; i += 256) {
        float* head = row + i / half * head_dim;
        u32 j = i % half;
        float a = head[j], b = head[j + half];
        float cosine = angle[j], sine = angle[half + j];
        head[j] = a * cosine - b * sine;
        head[j + half] = b * cosine + a * sine;
    }
}

/// Place of a token's head in a layer of the cache: `[block, head, token, head_dim]`.
DEVICE u64 cache_at(u32 slot, u32 head, u32 heads, u32 head_dim) {
    return (((u64)(slot / BLOCK_TOKENS) * heads + head) * BLOCK_TOKENS + slot % BLOCK_TOKENS) * head_dim;
}

/// One head of a row by one warp: norm where gamma is given, rotation; `put` takes each lane's columns and their values.
template <class Put>
DEVICE void norm_rotate(const float* x, const float* gamma, float eps, const float* angle, u32 head_dim, Put put) {
    u32 lane = threadIdx.x % 32, half = head_dim / 2;
    float scale = 1.0f;
    if (gamma) {
        float squares = 0.0f;
        for (u32 d = lane; d < head_dim; d += 32) {
            squares = fmaf(x[d], x[d], squares);
        }
        scale = 1.0f / sqrtf(warp_sum(squares) / (float)head_dim + eps);
    }
    for (u32 j = lane; j < half; j += 32) {
        float a = x[j], b = x[j + half];
        if (gamma) {
            a = a * scale * gamma[j];
            b = b * scale * gamma[j + half];
        }
        float cosine = angle[j], sine = angle[half + j];
        put(j, a * cosine - b * sine);
        put(j + half, b * cosine + a * sine);
    }
}

/// Norm and rotation of q in place and of k into the cache, v into the cache; a warp a row and head, a block 8 warps:
/// heads of q, then of k, then of v.
template <class E>
DEVICE void norm_rope_write(
    float* q, const float* k, const float* v, const float* q_gamma, const float* k_gamma, float eps,
    const float* angles, E* keys, E* values, const u32* slots, u32 heads, u32 kv_heads, u32 head_dim) {
    u64 row = blockIdx.x;
    u32 head = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    const float* angle = angles + row * head_dim;
    if (head < heads) {
        float* at = q + (row * heads + head) * head_dim;
        norm_rotate(at, q_gamma, eps, angle, head_dim, [&](u32 d, float value) { at[d] = value; });
    } else if (head < heads + kv_heads) {
        u32 h = head - heads;
        E* to = keys + cache_at(slots[row], h, kv_heads, head_dim);
        const float* from = k + (row * kv_heads + h) * head_dim;
        norm_rotate(from, k_gamma, eps, angle, head_dim, [&](u32 d, float value) { store(to + d, value); });
    } else if (head < heads + 2 * kv_heads) {
        u32 h = head - heads - kv_heads;
        E* to = values + cache_at(slots[row], h, kv_heads, head_dim);
        for (u32 d = lane; d < head_dim; d += 32) {
            store(to + d, v[(row * kv_heads + h) * head_dim + d]);
        }
    }
}

KERNEL(256)
norm_rope_write_f32(
    float* q, const float* k, const float* v, const float* q_gamma, const float* k_gamma, float eps,
    const float* angles, float* keys, float* values, const u32* slots, u32 heads, u32 kv_heads, u32 head_dim) {
    norm_rope_write(q, k, v, q_gamma, k_gamma, eps, angles, keys, values, slots, heads, kv_heads, head_dim);
}

KERNEL(256)
norm_rope_write_bf16(
    float* q, const float* k, const float* v, const float* q_gamma, const float* k_gamma, float eps,
    const float* angles, bf16* keys, bf16* values, const u32* slots, u32 heads, u32 kv_heads, u32 head_dim) {
    norm_rope_write(q, k, v, q_gamma, k_gamma, eps, angles, keys, values, slots, heads, kv_heads, head_dim);
}

/// Codes of a row of which each lane has the values that `each` hands on, and its scale `max|x| / 127`.
template <class Each>
DEVICE void store_row(i8* to, float* scale_at, Each each) {
    float largest = 0.0f;
    each([&](u32, float value) { largest = max_of(largest, fabsf(value)); });
    float scale = warp_max(largest) / 127.0f, factor = code_factor(scale);
    each([&](u32 d, float value) { to[d] = (i8)nearest(value * factor); });
    if (threadIdx.x % 32 == 0) {
        *scale_at = scale;
    }
}

/// As norm_rope_write, keys and values in eight bits with a scale for each head's row, `[block, head, token]`.
KERNEL(256)
norm_rope_write_int8(
    float* q, const float* k, const float* v, const float* q_gamma, const float* k_gamma, float eps,
    const float* angles, i8* keys, i8* values, const u32* slots, u32 heads, u32 kv_heads, u32 head_dim,
    float* key_scales, float* value_scales) {
    u64 row = blockIdx.x;
    u32 head = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    const float* angle = angles + row * head_dim;
    if (head < heads) {
        float* at = q + (row * heads + head) * head_dim;
        norm_rotate(at, q_gamma, eps, angle, head_dim, [&](u32 d, float value) { at[d] = value; });
    } else if (head < heads + kv_heads) {
        u32 h = head - heads;
        const float* from = k + (row * kv_heads + h) * head_dim;
        store_row(
            keys + cache_at(slots[row], h, kv_heads, head_dim), key_scales + cache_at(slots[row], h, kv_heads, 1),
            [&](auto put) { norm_rotate(from, k_gamma, eps, angle, head_dim, put); });
    } else if (head < heads + 2 * kv_heads) {
        u32 h = head - heads - kv_heads;
        const float* from = v + (row * kv_heads + h) * head_dim;
        store_row(
            values + cache_at(slots[row], h, kv_heads, head_dim), value_scales + cache_at(slots[row], h, kv_heads, 1),
            [&](auto put) {
                for (u32 d = lane; d < head_dim; d += 32) {
                    put(d, from[d]);
                }
            });
    }
}

/// Index keys into the cache `[block, token, width]`; one block a row.
KERNEL(256) write_index_f32(const float* x, float* keys, const u32* slots, u32 width) {
    for (u32 d = threadIdx.x; d < width; d += 256) {
        keys[(u64)slots[blockIdx.x] * width + d] = x[(u64)blockIdx.x * width + d];
    }
}

KERNEL(256) write_index_bf16(const float* x, bf16* keys, const u32* slots, u32 width) {
    for (u32 d = threadIdx.x; d < width; d += 256) {
        store(keys + (u64)slots[blockIdx.x] * width + d, x[(u64)blockIdx.x * width + d]);
    }
}
