// Training's operations on single elements, and the step of the optimiser.

/// Four elements. Whole arrays begin at a multiple of their size and have room up to one (device.rs).
struct alignas(16) elements4 {
    float at[4];
};

/// `to = a to + b x`; where a is zero `to` is not looked at. A block 1024 elements.
KERNEL(256) train_combine(float a, float* __restrict__ to, float b, const float* __restrict__ x, u64 count) {
    u64 first = (u64)blockIdx.x * 1024 + threadIdx.x;
#pragma unroll
    for (u32 part = 0; part < 4; part++) {
        u64 i = first + 256 * part;
        if (i < count) {
            to[i] = a == 0.0f ? b * x[i] : a * to[i] + b * x[i];
        }
    }
}

/// What a thread has of a matrix of which a block takes 256 columns of 8 rows.
struct Corner {
    u32 row, end, column;
};

DEVICE Corner corner_of(u32 rows, u32 cols) {
    u32 across = (cols + 255) / 256;
    Corner out;
    out.row = blockIdx.x / across * 8;
    out.end = min_of(rows, out.row + 8);
    out.column = blockIdx.x % across * 256 + threadIdx.x;
    return out;
}

/// Adds `row` to every row of x.
KERNEL(256) train_add_row(float* x, const float* row, u32 rows, u32 cols) {
    Corner at = corner_of(rows, cols);
    if (at.column < cols) {
        float added = row[at.column], values[8];
        float* from = x + (u64)at.row * cols + at.column;
#pragma unroll
        for (u32 r = 0; r < 8; r++) {
            values[r] = at.row + r < at.end ? from[(u64)r * cols] : 0.0f;
        }
#pragma unroll
        for (u32 r = 0; r < 8; r++) {
            if (at.row + r < at.end) {
                from[(u64)r * cols] = values[r] + added;
            }
        }
    }
}

/// `row` in every row of `out`.
KERNEL(256) train_repeat(const float* row, float* out, u32 rows, u32 cols) {
    Corner at = corner_of(rows, cols);
    if (at.column < cols) {
        float value = row[at.column];
        for (u32 r = at.row; r < at.end; r++) {
            out[(u64)r * cols + at.column] = value;
        }
    }
}

// Activations, four elements a thread.

DEVICE u64 four_of_thread() {
    return (u64)blockIdx.x * 1024 + threadIdx.x * 4;
}

/// `silu(gate) up`
KERNEL(256) train_silu_mul(const float* gate, const float* up, float* out, u64 count) {
    u64 i = four_of_thread();
    if (i >= count) {
        return;
    }
    elements4 g = vector_at<elements4>(gate + i), u = vector_at<elements4>(up + i), y;
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
        y.at[k] = silu(g.at[k]) * u.at[k];
    }
    vector_at<elements4>(out + i) = y;
}

/// Gate and up become their gradients, from that of their product.
KERNEL(256) train_silu_mul_backward(float* gate, float* up, const float* dproduct, u64 count) {
    u64 i = four_of_thread();
    if (i >= count) {
        return;
    }
    elements4 g = vector_at<elements4>(gate + i), u = vector_at<elements4>(up + i), d = vector_at<elements4>(dproduct + i);
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
        float z = g.at[k], s = 1.0f / (1.0f + expf(-z));
        g.at[k] = d.at[k] * u.at[k] * s * (1.0f + z * (1.0f - s));
        u.at[k] = d.at[k] * z * s;
    }
    vector_at<elements4>(gate + i) = g;
    vector_at<elements4>(up + i) = u;
}

/// Forms are those of `Epilogue`.
KERNEL(256) train_gelu(const float* z, float* out, u64 count, u32 form) {
    u64 i = four_of_thread();
    if (i >= count) {
        return;
    }
    elements4 x = vector_at<elements4>(z + i);
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
        x.at[k] = epilogue(form, x.at[k], z);
    }
    vector_at<elements4>(out + i) = x;
}

DEVICE float gelu_slope(u32 form, float z) {
    if (form == GELU_TANH) {
        float t = tanhf(0.7978845608028654f * (z + 0.044715f * z * z * z));
        float inner = 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * z * z);
        return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * inner;
    }
    return 0.5f * (1.0f + erff(z * 0.7071067811865476f)) + z * 0.3989422804014327f * expf(-0.5f * z * z);
}

/// `dy = dy gelu'(z)`
KERNEL(256) train_gelu_backward(const float* z, float* dy, u64 count, u32 form) {
    u64 i = four_of_thread();
    if (i >= count) {
        return;
    }
    elements4 x = vector_at<elements4>(z + i), d = vector_at<elements4>(dy + i);
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
        d.at[k] *= gelu_slope(form, x.at[k]);
    }
    vector_at<elements4>(dy + i) = d;
}

// The optimiser.

/// `partial[block] =` the sum of squares of its `part` elements, each thread's in order, then in halves.
KERNEL(256) train_square_sums(const float* x, double* partial, u64 count, u64 part) {
    SHARED double room[256];
    u64 first = blockIdx.x * part, end = first + part < count ? first + part : count;
    double sum = 0.0;
#pragma unroll 4
    for (u64 i = first + threadIdx.x; i < end; i += 256) {
        double value = x[i];
        sum += value * value;
    }
    room[threadIdx.x] = sum;
    for (u32 half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            room[threadIdx.x] += room[threadIdx.x + half];
        }
    }
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = room[0];
    }
}

/// Elements that are updated alike, and the first block that does.
struct Update {
    u64 start, count;
    u32 first_block;
    float lr, decay;
    u32 padding;
};

/// AdamW on the elements of all updates, as in training.rs; a block 4096 elements of one update.
KERNEL(256)
train_adamw(
    float* p, const float* g, float* m, float* v, const Update* updates, u32 count, float clip, float beta0,
    float beta1, float correct0, float correct1, float eps) {
    // The last update that begins at this block or before.
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (updates[middle].first_block <= blockIdx.x) {
            low = middle;
        } else {
            high = middle;
        }
    }
    u64 first = (u64)(blockIdx.x - updates[low].first_block) * 4096, all = updates[low].count;
    u64 start = updates[low].start, end = first + 4096 < all ? first + 4096 : all;
    float lr = updates[low].lr, decay = updates[low].decay;
#pragma unroll 2
    for (u64 i = start + first + threadIdx.x; i < start + end; i += 256) {
        float gradient = g[i] * clip;
        float mean = beta0 * m[i] + (1.0f - beta0) * gradient;
        float square = beta1 * v[i] + (1.0f - beta1) * gradient * gradient;
        m[i] = mean;
        v[i] = square;
        p[i] -= lr * (mean * correct0 / (sqrtf(square * correct1) + eps) + decay * p[i]);
    }
}
