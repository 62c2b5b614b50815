// Training's operations on rows and their reverses: norms, heads, gathers, taps, sums of columns, pixels, the loss.
//
// Sums over rows are made in two launches: a block sums a slice of the rows, whose number depends on shapes alone, then the
// slices' sums are added in order. Nothing depends on which block is first.
//
// What is read is never what is written by others; where the compiler would otherwise wait for a store before the next load,
// pointers are marked as not meeting, or loads come first by hand.

/// Reciprocal root of a mean of squares.
DEVICE float reciprocal_root(float sum, u32 count, float eps) {
    return 1.0f / sqrtf(sum / (float)count + eps);
}

// Sums over rows.

/// `partial[slice, column] = sum of term(row, place of the element)` over the slice's rows; a block 256 columns of a slice.
template <class Term>
DEVICE void sum_slice(float* partial, u32 rows, u32 cols, u32 slice_rows, Term term) {
    u32 column = blockIdx.x * 256 + threadIdx.x;
    u32 first = blockIdx.y * slice_rows, end = min_of(rows, first + slice_rows);
    if (column >= cols) {
        return;
    }
    float sum = 0.0f;
#pragma unroll 4
    for (u32 row = first; row < end; row++) {
        sum += term(row, (u64)row * cols + column);
    }
    partial[(u64)blockIdx.y * cols + column] = sum;
}

KERNEL(256) train_column_sums(const float* x, float* partial, u32 rows, u32 cols, u32 slice_rows) {
    sum_slice(partial, rows, cols, slice_rows, [&](u32, u64 at) { return x[at]; });
}

/// Of the gradient of a norm's weight: `dy (x - mean) r`; stats `[rows, 2]`: mean and r.
KERNEL(256)
train_norm_weight_sums(
    const float* x, const float* stats, const float* dy, float* partial, u32 rows, u32 cols, u32 slice_rows) {
    sum_slice(partial, rows, cols, slice_rows, [&](u32 row, u64 at) {
        floats2 mean_r = vector_at<floats2>(stats + 2 * (u64)row);
        return dy[at] * ((x[at] - mean_r.x) * mean_r.y);
    });
}

/// `sums[column] +=` the slices' sums; a block 32 columns, its eight warps an eighth of the slices each.
KERNEL(256) train_add_slices(const float* partial, float* sums, u32 slices, u32 cols) {
    SHARED float room[8][32];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (column < cols) {
        u32 end = slice_start(warp + 1, slices);
#pragma unroll 4
        for (u32 slice = slice_start(warp, slices); slice < end; slice++) {
            sum += partial[(u64)slice * cols + column];
        }
    }
    room[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < cols) {
        float all = room[0][lane];
        for (u32 w = 1; w < 8; w++) {
            all += room[w][lane];
        }
        sums[column] += all;
    }
}

// Norms.

/// LayerNorm where there is a bias, else RMSNorm, and each row's mean (0) and reciprocal deviation; one block a row.
KERNEL(256)
train_norm(
    const float* __restrict__ x, const float* weight, const float* bias, float* __restrict__ out, float* stats,
    u32 cols, float eps) {
    SHARED float room[8];
    const float* row = x + (u64)blockIdx.x * cols;
    float mean = 0.0f;
    if (bias) {
        float sum = 0.0f;
        for (u32 c = threadIdx.x; c < cols; c += 256) {
            sum += row[c];
        }
        mean = block_sum(sum, room) / (float)cols;
    }
    float squares = 0.0f;
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        float v = row[c] - mean;
        squares = fmaf(v, v, squares);
    }
    float r = reciprocal_root(block_sum(squares, room), cols, eps);
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        float y = (row[c] - mean) * r * weight[c];
        out[(u64)blockIdx.x * cols + c] = bias ? y + bias[c] : y;
    }
    if (threadIdx.x == 0) {
        floats2 mean_r = {mean, r};
        vector_at<floats2>(stats + 2 * (u64)blockIdx.x) = mean_r;
    }
}

/// `dx += r (g - [centred] mean(g) - xhat mean(g xhat))` with `g = dy weight`, `xhat = (x - mean) r`; one block a row.
KERNEL(256)
train_norm_backward(
    const float* x, const float* stats, const float* weight, const float* dy, float* dx, u32 cols, u32 centred) {
    SHARED float room[8];
    u64 first = (u64)blockIdx.x * cols;
    floats2 mean_r = vector_at<floats2>(stats + 2 * (u64)blockIdx.x);
    float mean = mean_r.x, r = mean_r.y;
    float sum_g = 0.0f, sum_gx = 0.0f;
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        float g = dy[first + c] * weight[c];
        sum_g += g;
        sum_gx = fmaf(g, (x[first + c] - mean) * r, sum_gx);
    }
    float mean_g = centred ? block_sum(sum_g, room) / (float)cols : 0.0f;
    float mean_gx = block_sum(sum_gx, room) / (float)cols;
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        float g = dy[first + c] * weight[c], xhat = (x[first + c] - mean) * r;
        dx[first + c] += r * (g - mean_g - xhat * mean_gx);
    }
}

// Heads: [rows, heads * d] to [heads, rows, d] and back, a warp a row and head.

/// A warp's head of a row: where it lies among rows, and among heads.
struct Head {
    u32 row;
    u64 of_row, of_head;
};

DEVICE Head head_of(u64 item, u32 rows, u32 heads, u32 d) {
    Head out;
    out.row = (u32)(item / heads);
    u64 head = item % heads;
    out.of_row = item * d;
    out.of_head = (head * rows + out.row) * d;
    return out;
}

/// Each head normalised where there is a weight, then turned where there are angles `[rows, d / 2]`.
KERNEL(256)
train_split_heads(
    const float* __restrict__ x, const float* weight, const float* cosines, const float* sines,
    float* __restrict__ out, u32 rows, u32 heads, u32 d, float eps) {
    u64 item = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    u32 lane = threadIdx.x % 32, half = d / 2;
    if (item >= (u64)rows * heads) {
        return;
    }
    Head at = head_of(item, rows, heads, d);
    const float* from = x + at.of_row;
    float* to = out + at.of_head;
    float r = 1.0f;
    if (weight) {
        float squares = 0.0f;
        for (u32 c = lane; c < d; c += 32) {
            squares = fmaf(from[c], from[c], squares);
        }
        r = reciprocal_root(warp_sum(squares), d, eps);
    }
    auto value = [&](u32 c) { return weight ? from[c] * r * weight[c] : from[c]; };
    if (!cosines) {
        for (u32 c = lane; c < d; c += 32) {
            to[c] = value(c);
        }
        return;
    }
    for (u32 j = lane; j < half; j += 32) {
        float a = value(j), b = value(j + half);
        float cosine = cosines[(u64)at.row * half + j], sine = sines[(u64)at.row * half + j];
        to[j] = a * cosine - b * sine;
        to[j + half] = b * cosine + a * sine;
    }
}

/// [heads, rows, d] to [rows, heads * d].
KERNEL(256) train_merge_heads(const float* __restrict__ x, float* __restrict__ out, u32 rows, u32 heads, u32 d) {
    u64 item = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    if (item >= (u64)rows * heads) {
        return;
    }
    Head at = head_of(item, rows, heads, d);
    for (u32 c = threadIdx.x % 32; c < d; c += 32) {
        out[at.of_row + c] = x[at.of_head + c];
    }
}

/// A column of the gradient before the turn, of that behind it; the turn's inverse.
DEVICE float turned_back(const float* dy, const float* cosines, const float* sines, u32 half, u32 c) {
    if (!cosines) {
        return dy[c];
    }
    u32 j = c < half ? c : c - half;
    float cosine = cosines[j], sine = sines[j];
    return c < half ? dy[j] * cosine + dy[j + half] * sine : dy[j + half] * cosine - dy[j] * sine;
}

/// The reverse of train_split_heads. A block takes `slice` heads in order, its warps each the eighth; with `partial` it
/// writes there `[block, d]` what its heads add to the gradient of the weight.
KERNEL(256)
train_split_heads_backward(
    const float* x, const float* weight, const float* cosines, const float* sines, const float* dy, float* dx,
    float* partial, u32 rows, u32 heads, u32 d, u32 slice, float eps) {
    DYNAMIC_SHARED(shared);
    float* sums = (float*)shared;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = d / 2;
    if (partial) {
        for (u32 c = lane; c < d; c += 32) {
            sums[warp * d + c] = 0.0f;
        }
    }
    u64 first = (u64)blockIdx.x * slice, all = (u64)rows * heads;
    u64 end = first + slice < all ? first + slice : all;
    for (u64 item = first + warp; item < end; item += 8) {
        Head at = head_of(item, rows, heads, d);
        const float* from = x + at.of_row;
        const float* gradient = dy + at.of_head;
        float* to = dx + at.of_row;
        const float* cosine = cosines ? cosines + (u64)at.row * half : cosines;
        const float* sine = cosines ? sines + (u64)at.row * half : sines;
        if (!weight) {
            for (u32 c = lane; c < d; c += 32) {
                to[c] = turned_back(gradient, cosine, sine, half, c);
            }
            continue;
        }
        float squares = 0.0f;
        for (u32 c = lane; c < d; c += 32) {
            squares = fmaf(from[c], from[c], squares);
        }
        float r = reciprocal_root(warp_sum(squares), d, eps);
        float sum = 0.0f;
        for (u32 c = lane; c < d; c += 32) {
            float g = turned_back(gradient, cosine, sine, half, c), xhat = from[c] * r;
            if (partial) {
                sums[warp * d + c] += g * xhat;
            }
            sum = fmaf(g * weight[c], xhat, sum);
        }
        float mean = warp_sum(sum) / (float)d;
        for (u32 c = lane; c < d; c += 32) {
            float g = turned_back(gradient, cosine, sine, half, c);
            to[c] = r * (g * weight[c] - from[c] * r * mean);
        }
    }
    if (partial) {
        __syncthreads();
        for (u32 c = threadIdx.x; c < d; c += 256) {
            float sum = sums[c];
            for (u32 w = 1; w < 8; w++) {
                sum += sums[w * d + c];
            }
            partial[(u64)blockIdx.x * d + c] = sum;
        }
    }
}

// Rows that are listed. Rows that are gathered: gather_rows in rows.cu.

/// Row i of `from` to row rows[i]; one block a row.
KERNEL(256) train_scatter(float* __restrict__ to, const u32* rows, const float* __restrict__ from, u32 cols) {
    float* row = to + (u64)rows[blockIdx.x] * cols;
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        row[c] = from[(u64)blockIdx.x * cols + c];
    }
}

/// Adds weighted rows to a row, in order: those from starts[row] to starts[row + 1]; a block 256 columns of a row.
KERNEL(256)
train_add_taps(
    float* to, const float* from, const u32* starts, const u32* sources, const float* weights, u32 cols) {
    u32 column = blockIdx.y * 256 + threadIdx.x;
    u32 first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    if (column >= cols || first == end) {
        return;
    }
    float* at = to + (u64)blockIdx.x * cols + column;
    float sum = *at;
#pragma unroll 4
    for (u32 tap = first; tap < end; tap++) {
        sum += weights[tap] * from[(u64)sources[tap] * cols + column];
    }
    *at = sum;
}

/// Bytes of patches [patches, 3, area] by a table [3, 256]; one block a patch.
KERNEL(256) train_pixels(const u8* bytes, const float* table, float* out, u32 area) {
    u64 first = (u64)blockIdx.x * 3 * area;
    for (u32 i = threadIdx.x; i < 3 * area; i += 256) {
        out[first + i] = table[i / area * 256 + bytes[first + i]];
    }
}

// The loss.

/// Of a row of logits and a target {token, weight}: `-log softmax(row)[token]`; the row becomes
/// `weight (softmax(row) - onehot(token))`. One block a row, which reads it twice.
KERNEL(256) train_softmax_loss(float* logits, const u32* targets, float* loss, u32 cols) {
    SHARED float room[8];
    float* row = logits + (u64)blockIdx.x * cols;
    u32 token = targets[2 * (u64)blockIdx.x];
    float weight = __uint_as_float(targets[2 * (u64)blockIdx.x + 1]);
    float logit = row[token];
    // The sum of exponentials goes along with the largest so far, four columns at a time. A NaN is never the largest, but
    // is in the sum.
    const float lowest = -3.402823466e38f;
    float largest = lowest, sum = 0.0f;
    for (u32 c = threadIdx.x; c < cols; c += 1024) {
        float x[4], higher = largest;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            x[i] = c + 256 * i < cols ? row[c + 256 * i] : -__uint_as_float(0x7f800000u);
            higher = max_of(x[i], higher);
        }
        if (higher > largest) {
            sum *= expf(largest - higher);
            largest = higher;
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            sum += expf(x[i] - largest);
        }
    }
    float of_warp = warp_max(largest);
    if (threadIdx.x % 32 == 0) {
        room[threadIdx.x / 32] = of_warp;
    }
    __syncthreads();
    float top = room[0];
    for (u32 w = 1; w < 8; w++) {
        top = max_of(top, room[w]);
    }
    // All have read `room` and their logits behind the barriers of the sum.
    float total = block_sum(sum * expf(largest - top), room);
    float factor = 1.0f / total;
    for (u32 c = threadIdx.x; c < cols; c += 1024) {
        float x[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            x[i] = c + 256 * i < cols ? row[c + 256 * i] : 0.0f;
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float p = expf(x[i] - top) * factor;
            if (c + 256 * i < cols) {
                row[c + 256 * i] = weight * (c + 256 * i == token ? p - 1.0f : p);
            }
        }
    }
    if (threadIdx.x == 0) {
        loss[blockIdx.x] = logf(total) + (top - logit);
    }
}
