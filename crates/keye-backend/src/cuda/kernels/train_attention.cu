// Attention of training, in f32, and its reverse. Nothing larger than a square of scores, 64 by 64, is stored.
//
// A block walks over squares. Whatever is multiplied comes to shared memory in chunks of 64 rows by 32 columns of a head, two
// at a time, while the two before are used: a walk is one long row of steps, and each begins with a barrier and with the
// copies of the next. A thread (tx, ty) of 16 by 16 has of a square the rows 4 ty to 4 ty + 3 and the columns tx, tx + 16, tx + 32,
// tx + 48; of results, the same rows and of each chunk the columns 2 tx and 2 tx + 1. Every sum has one order.

/// Rows and columns of a square; columns of a chunk, and elements from one row of it to the next.
#define SIDE 64
#define WIDE 32
#define CHUNK_STRIDE 36
#define SQUARE_STRIDE 68

#define CHUNK (SIDE * CHUNK_STRIDE)
#define SQUARE (SIDE * SQUARE_STRIDE)
/// Two stages of two chunks.
#define STAGES (4 * CHUNK)

/// `q`, `out`, `dout` `[heads, nq, d]`; `k`, `v` `[kv_heads, nk, d]`; `lse`, `delta` `[heads, nq]`.
struct Heads {
    u32 heads, kv_heads, nq, nk, d;
    bool causal, vectors;
    float scale;
};

/// `flags`: 1: query i of a span sees its keys 0 to i; 2: a head's width allows copies of 16 bytes.
DEVICE Heads heads_of(u32 heads, u32 kv_heads, u32 nq, u32 nk, u32 d, u32 flags, float scale) {
    Heads out = {heads, kv_heads, nq, nk, d, (flags & 1) != 0, (flags & 2) != 0, scale};
    return out;
}

/// Rows `[rows, d]` of a head, from some row on.
struct Rows {
    const float* from;
    u32 count;
};

DEVICE Rows rows_of(const float* x, u64 first, u32 count, u32 d) {
    Rows out = {x + first * d, min_of(count, SIDE)};
    return out;
}

/// Brings columns `32 c` to `32 c + 31` of up to 64 rows to `chunk`, zeros where there are none.
DEVICE void bring(float* chunk, const Rows& rows, u32 c, const Heads& p) {
    if (p.vectors) {
#pragma unroll
        for (u32 v = 0; v < 2; v++) {
            u32 i = threadIdx.x + 256 * v, row = i / 8, column = i % 8 * 4;
            bool known = row < rows.count && WIDE * c + column < p.d;
            copy_async(
                chunk + row * CHUNK_STRIDE + column, known ? rows.from + (u64)row * p.d + WIDE * c + column : rows.from,
                known);
        }
        return;
    }
    for (u32 i = threadIdx.x; i < SIDE * WIDE; i += 256) {
        u32 row = i / WIDE, column = i % WIDE;
        bool known = row < rows.count && WIDE * c + column < p.d;
        chunk[row * CHUNK_STRIDE + column] = known ? rows.from[(u64)row * p.d + WIDE * c + column] : 0.0f;
    }
}

/// `square += x y^T` of two chunks, the first `width` columns.
DEVICE void add_scores(float (&square)[4][4], const float* x, const float* y, u32 width) {
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    x += 4 * ty * CHUNK_STRIDE;
    y += tx * CHUNK_STRIDE;
#pragma unroll 1
    for (u32 column = 0; column < width; column += 4) {
        floats4 left[4], right[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            left[i] = vector_at<floats4>(x + i * CHUNK_STRIDE + column);
            right[i] = vector_at<floats4>(y + 16 * i * CHUNK_STRIDE + column);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                float sum = fmaf(left[i].x, right[j].x, square[i][j]);
                sum = fmaf(left[i].y, right[j].y, sum);
                sum = fmaf(left[i].z, right[j].z, sum);
                square[i][j] = fmaf(left[i].w, right[j].w, sum);
            }
        }
    }
}

/// `sums += square x` of a square in shared memory and a chunk, whose first `rows` rows count.
DEVICE void add_weighted(float (&sums)[4][2], const float* square, const float* x, u32 rows) {
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    square += 4 * ty * SQUARE_STRIDE;
    x += 2 * tx;
#pragma unroll 1
    for (u32 row = 0; row < rows; row += 4) {
        floats4 weight[4];
        floats2 value[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            weight[i] = vector_at<floats4>(square + i * SQUARE_STRIDE + row);
            value[i] = vector_at<floats2>(x + (row + i) * CHUNK_STRIDE);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const float w[4] = {weight[i].x, weight[i].y, weight[i].z, weight[i].w};
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                sums[i][0] = fmaf(w[e], value[e].x, sums[i][0]);
                sums[i][1] = fmaf(w[e], value[e].y, sums[i][1]);
            }
        }
    }
}

/// A thread's part of a square, to shared memory.
DEVICE void put_square(float* square, const float (&part)[4][4]) {
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            square[(4 * ty + i) * SQUARE_STRIDE + tx + 16 * j] = part[i][j];
        }
    }
}

DEVICE void clear_square(float (&part)[4][4]) {
#pragma unroll
    for (u32 i = 0; i < 16; i++) {
        part[i / 4][i % 4] = 0.0f;
    }
}

/// Over the 16 threads that share rows.
DEVICE float row_max(float x) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
        x = max_of(x, __shfl_xor_sync(FULL, x, step));
    }
    return x;
}

DEVICE float row_sum(float x) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
        x += __shfl_xor_sync(FULL, x, step);
    }
    return x;
}

/// Stores a thread's part of the first `count` rows of `to [rows, d]`, row i multiplied with `factors[i]`.
template <int NC>
DEVICE void store_rows(float* to, u32 count, const float (&sums)[NC][4][2], const float (&factors)[4], const Heads& p) {
    u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (4 * ty + i >= count) {
            continue;
        }
        float* row = to + (u64)(4 * ty + i) * p.d;
#pragma unroll
        for (u32 c = 0; c < NC; c++) {
            u32 column = WIDE * c + 2 * tx;
            floats2 pair = {sums[c][i][0] * factors[i], sums[c][i][1] * factors[i]};
            if (p.vectors) {
                if (column < p.d) {
                    vector_at<floats2>(row + column) = pair;
                }
                continue;
            }
            if (column < p.d) {
                row[column] = pair.x;
            }
            if (column + 1 < p.d) {
                row[column + 1] = pair.y;
            }
        }
    }
}

/// Queries of a block: `tiles[i]` = {first query, queries, its place in the span, the span's first key, its keys}. Those
/// with the most keys come last in a span, and begin first.
struct Queries {
    u32 first, count, place, keys_first, keys;
};

DEVICE Queries queries_of(const u32* tiles, bool causal) {
    const u32* tile = tiles + 5 * (gridDim.x - 1 - blockIdx.x);
    Queries out = {tile[0], tile[1], tile[2], tile[3], tile[4]};
    if (causal) {
        out.keys = min_of(out.keys, out.place + out.count);
    }
    return out;
}

/// How many of the span's keys row `i` of a tile sees.
DEVICE u32 sight_of(const Queries& queries, u32 i, bool causal) {
    return causal ? min_of(queries.keys, queries.place + i + 1) : queries.keys;
}

/// Columns of chunk c that count, in fours: behind them are zeros.
DEVICE u32 width_of(u32 c, u32 d) {
    return min_of(WIDE, d - WIDE * c);
}

/// 64 queries of a head a block, NC chunks a head: `out` and `lse`.
template <int NC>
DEVICE void attend(
    const float* q, const float* k, const float* v, const u32* tiles, float* out, float* lse, const Heads& p) {
    DYNAMIC_SHARED(shared);
    float *stages = (float*)shared, *weights = stages + STAGES;
    u32 head = blockIdx.y, tx = threadIdx.x % 16, ty = threadIdx.x / 16, chunks = (p.d + WIDE - 1) / WIDE;
    Queries queries = queries_of(tiles, p.causal);
    u64 first_query = (u64)head * p.nq + queries.first;
    u64 first_key = (u64)(head / (p.heads / p.kv_heads)) * p.nk + queries.keys_first;
    Rows query = rows_of(q, first_query, queries.count, p.d);
    u32 squares = (queries.keys + SIDE - 1) / SIDE, steps = 2 * chunks;
    // Step s of square i: scores of chunk s, then values of chunk s - chunks.
    auto fetch = [&](u32 square, u32 s, u32 stage) {
        float* to = stages + stage * 2 * CHUNK;
        u32 key = square * SIDE;
        Rows keys = rows_of(s < chunks ? k : v, first_key + key, queries.keys - key, p.d);
        if (s < chunks) {
            bring(to, query, s, p);
        }
        bring(to + CHUNK, keys, s < chunks ? s : s - chunks, p);
        commit_copies();
    };
    float infinity = __int_as_float(0x7f800000);
    float largest[4], total[4], sums[NC][4][2] = {}, square[4][4];
    u32 sight[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        largest[i] = -infinity;
        total[i] = 0.0f;
        sight[i] = sight_of(queries, 4 * ty + i, p.causal);
    }
    u32 stage = 0;
    if (squares) {
        fetch(0, 0, 0);
    }
    // The next step's copies begin when all threads are done with the step before.
    auto begin = [&](u32 at, u32 s) {
        const float* chunk = stages + stage * 2 * CHUNK;
        wait_copies<0>();
        __syncthreads();
        stage ^= 1;
        s++;
        if (s == steps) {
            s = 0;
            at++;
        }
        if (at < squares) {
            fetch(at, s, stage);
        }
        return chunk;
    };
    for (u32 at = 0; at < squares; at++) {
        clear_square(square);
#pragma unroll 1
        for (u32 c = 0; c < chunks; c++) {
            const float* chunk = begin(at, c);
            add_scores(square, chunk, chunk + CHUNK, width_of(c, p.d));
        }
        float keep[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float most = largest[i];
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                bool seen = at * SIDE + tx + 16 * j < sight[i];
                square[i][j] = seen ? square[i][j] * p.scale : -infinity;
                most = max_of(most, square[i][j]);
            }
            most = row_max(most);
            float sum = 0.0f;
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                square[i][j] = expf(square[i][j] - most);
                sum += square[i][j];
            }
            keep[i] = expf(largest[i] - most);
            total[i] = fmaf(total[i], keep[i], row_sum(sum));
            largest[i] = most;
        }
        put_square(weights, square);
#pragma unroll
        for (u32 c = 0; c < NC; c++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                sums[c][i][0] *= keep[i];
                sums[c][i][1] *= keep[i];
            }
            if (c < chunks) {
                const float* chunk = begin(at, chunks + c);
                add_weighted(sums[c], weights, chunk + CHUNK, min_of(SIDE, queries.keys - at * SIDE));
            }
        }
    }
    float factors[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        factors[i] = total[i] > 0.0f ? 1.0f / total[i] : 0.0f;
        if (tx == 0 && 4 * ty + i < queries.count) {
            lse[first_query + 4 * ty + i] = largest[i] + logf(total[i]);
        }
    }
    store_rows<NC>(out + first_query * p.d, queries.count, sums, factors, p);
}

/// The sum of `out dout` of every row of every head; one warp a row.
KERNEL(256) train_attention_delta(const float* out, const float* dout, float* delta, u32 rows, u32 d) {
    u32 row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) {
        return;
    }
    float sum = 0.0f;
    for (u32 c = threadIdx.x % 32; c < d; c += 32) {
        sum = fmaf(out[(u64)row * d + c], dout[(u64)row * d + c], sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        delta[row] = sum;
    }
}

/// Gradients of 64 queries of a head.
template <int NC>
DEVICE void reverse_queries(
    const float* q, const float* k, const float* v, const u32* tiles, const float* lse, const float* delta,
    const float* dout, float* dq, const Heads& p) {
    DYNAMIC_SHARED(shared);
    float *stages = (float*)shared, *scores = stages + STAGES;
    u32 head = blockIdx.y, tx = threadIdx.x % 16, ty = threadIdx.x / 16, chunks = (p.d + WIDE - 1) / WIDE;
    Queries queries = queries_of(tiles, p.causal);
    u64 first_query = (u64)head * p.nq + queries.first;
    u64 first_key = (u64)(head / (p.heads / p.kv_heads)) * p.nk + queries.keys_first;
    u32 squares = (queries.keys + SIDE - 1) / SIDE, steps = 3 * chunks;
    // A chunk each of queries and keys; of the result's gradients and values; of keys again.
    auto fetch = [&](u32 square, u32 s, u32 stage) {
        float* to = stages + stage * 2 * CHUNK;
        u32 key = square * SIDE, part = s / chunks, c = s - part * chunks;
        if (part < 2) {
            bring(to, rows_of(part ? dout : q, first_query, queries.count, p.d), c, p);
        }
        bring(to + CHUNK, rows_of(part == 1 ? v : k, first_key + key, queries.keys - key, p.d), c, p);
        commit_copies();
    };
    float sums[NC][4][2] = {}, square[4][4], change[4][4], row_lse[4], row_delta[4];
    u32 sight[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        bool known = 4 * ty + i < queries.count;
        sight[i] = known ? sight_of(queries, 4 * ty + i, p.causal) : 0;
        row_lse[i] = known ? lse[first_query + 4 * ty + i] : 0.0f;
        row_delta[i] = known ? delta[first_query + 4 * ty + i] : 0.0f;
    }
    u32 stage = 0;
    if (squares) {
        fetch(0, 0, 0);
    }
    auto begin = [&](u32 at, u32 s) {
        const float* chunk = stages + stage * 2 * CHUNK;
        wait_copies<0>();
        __syncthreads();
        stage ^= 1;
        s++;
        if (s == steps) {
            s = 0;
            at++;
        }
        if (at < squares) {
            fetch(at, s, stage);
        }
        return chunk;
    };
    for (u32 at = 0; at < squares; at++) {
        clear_square(square);
        clear_square(change);
#pragma unroll 1
        for (u32 c = 0; c < chunks; c++) {
            const float* chunk = begin(at, c);
            add_scores(square, chunk, chunk + CHUNK, width_of(c, p.d));
        }
#pragma unroll 1
        for (u32 c = 0; c < chunks; c++) {
            const float* chunk = begin(at, chunks + c);
            add_scores(change, chunk, chunk + CHUNK, width_of(c, p.d));
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                bool seen = at * SIDE + tx + 16 * j < sight[i];
                float weight = seen ? expf(square[i][j] * p.scale - row_lse[i]) : 0.0f;
                change[i][j] = weight * (change[i][j] - row_delta[i]) * p.scale;
            }
        }
        put_square(scores, change);
#pragma unroll
        for (u32 c = 0; c < NC; c++) {
            if (c < chunks) {
                const float* chunk = begin(at, 2 * chunks + c);
                add_weighted(sums[c], scores, chunk + CHUNK, min_of(SIDE, queries.keys - at * SIDE));
            }
        }
    }
    const float factors[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    store_rows<NC>(dq + first_query * p.d, queries.count, sums, factors, p);
}

/// A square on the way of `reverse_keys`: a query head and up to 64 queries of a span that has the block's keys.
struct Visit {
    /// Which of the tile's spans, which head of the group.
    u32 span, head;
    /// First query, queries up to the span's end, the first one's place in the span.
    u32 query, queries, place;
    /// The place of the block's first key in the span.
    u32 key_place;
};

/// Gradients of 64 keys and values of a key head. `tiles[i]` = {first key, keys, first of its spans, spans}, `spans[i]` =
/// {first query, queries, first key}; walks over a tile's spans, the group's heads and those queries that see any of the keys.
template <int NC>
DEVICE void reverse_keys(
    const float* q, const float* k, const float* v, const u32* tiles, const u32* spans, const float* lse,
    const float* delta, const float* dout, float* dk, float* dv, const Heads& p) {
    DYNAMIC_SHARED(shared);
    float *stages = (float*)shared, *weights = stages + STAGES, *scores = weights + SQUARE;
    u32 kv_head = blockIdx.y, tx = threadIdx.x % 16, ty = threadIdx.x / 16, chunks = (p.d + WIDE - 1) / WIDE;
    const u32* tile = tiles + 4 * blockIdx.x;
    u32 first = tile[0], count = tile[1], group = p.heads / p.kv_heads, steps = 3 * chunks;
    spans += 3 * tile[2];
    u32 last_span = tile[3];
    u64 first_key = (u64)kv_head * p.nk + first;
    // The first square of a span's head; queries before the tile's first key do not see it.
    auto enter = [&](Visit& visit) {
        const u32* span = spans + 3 * visit.span;
        visit.key_place = first - span[2];
        visit.place = p.causal ? visit.key_place / SIDE * SIDE : 0;
        visit.query = span[0] + visit.place;
        visit.queries = span[1] > visit.place ? span[1] - visit.place : 0;
    };
    // To the next square, if there is one. Spans without queries that see the keys are passed.
    auto settle = [&](Visit& visit) {
        while (visit.span < last_span) {
            enter(visit);
            if (visit.queries) {
                return;
            }
            visit.head = 0;
            visit.span++;
        }
    };
    auto advance = [&](Visit& visit) {
        if (visit.queries > SIDE) {
            visit.queries -= SIDE;
            visit.query += SIDE;
            visit.place += SIDE;
            return;
        }
        visit.head++;
        if (visit.head == group) {
            visit.head = 0;
            visit.span++;
        }
        settle(visit);
    };
    float key_sums[NC][4][2] = {}, value_sums[NC][4][2] = {}, square[4][4], change[4][4];
    Visit now = {}, next = {};
    settle(now);
    // A chunk each of keys and queries; of values and the result's gradients; of queries again.
    auto fetch = [&](bool stay, u32 s, u32 stage) {
        float* to = stages + stage * 2 * CHUNK;
        u32 part = s / chunks, c = s - part * chunks;
        u32 head = stay ? now.head : next.head, query = stay ? now.query : next.query;
        u64 row = (u64)(kv_head * group + head) * p.nq + query;
        if (part < 2) {
            bring(to, rows_of(part ? v : k, first_key, count, p.d), c, p);
        }
        bring(to + CHUNK, rows_of(part == 1 ? dout : q, row, stay ? now.queries : next.queries, p.d), c, p);
        commit_copies();
    };
    u32 stage = 0;
    if (now.span < last_span) {
        fetch(true, 0, 0);
    }
    auto begin = [&](u32 s) {
        const float* chunk = stages + stage * 2 * CHUNK;
        wait_copies<0>();
        __syncthreads();
        stage ^= 1;
        s++;
        if (s < steps || next.span < last_span) {
            fetch(s < steps, s < steps ? s : 0, stage);
        }
        return chunk;
    };
    while (now.span < last_span) {
        next = now;
        advance(next);
        u32 queries = min_of(SIDE, now.queries);
        clear_square(square);
        clear_square(change);
#pragma unroll 1
        for (u32 c = 0; c < chunks; c++) {
            const float* chunk = begin(c);
            add_scores(square, chunk, chunk + CHUNK, width_of(c, p.d));
        }
        u64 row = (u64)(kv_head * group + now.head) * p.nq + now.query;
        float row_delta[4];
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 query = tx + 16 * j;
            bool known = query < queries;
            float row_lse = known ? lse[row + query] : 0.0f;
            row_delta[j] = known ? delta[row + query] : 0.0f;
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                bool seen = known && (!p.causal || now.key_place + 4 * ty + i <= now.place + query);
                square[i][j] = seen ? expf(square[i][j] * p.scale - row_lse) : 0.0f;
            }
        }
        put_square(weights, square);
#pragma unroll
        for (u32 c = 0; c < NC; c++) {
            if (c < chunks) {
                const float* chunk = begin(chunks + c);
                add_scores(change, chunk, chunk + CHUNK, width_of(c, p.d));
                add_weighted(value_sums[c], weights, chunk + CHUNK, queries);
            }
        }
#pragma unroll
        for (u32 i = 0; i < 16; i++) {
            change[i / 4][i % 4] = square[i / 4][i % 4] * (change[i / 4][i % 4] - row_delta[i % 4]) * p.scale;
        }
        put_square(scores, change);
#pragma unroll
        for (u32 c = 0; c < NC; c++) {
            if (c < chunks) {
                const float* chunk = begin(2 * chunks + c);
                add_weighted(key_sums[c], scores, chunk + CHUNK, queries);
            }
        }
        now = next;
    }
    const float factors[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    store_rows<NC>(dk + first_key * p.d, count, key_sums, factors, p);
    store_rows<NC>(dv + first_key * p.d, count, value_sums, factors, p);
}

KERNEL(256) train_attention_32(
    const float* q, const float* k, const float* v, const u32* tiles, float* out, float* lse, u32 heads, u32 kv_heads,
    u32 nq, u32 nk, u32 d, u32 flags, float scale) {
    attend<1>(q, k, v, tiles, out, lse, heads_of(heads, kv_heads, nq, nk, d, flags, scale));
}

KERNEL(256) train_attention_queries_32(
    const float* q, const float* k, const float* v, const u32* tiles, const float* lse, const float* delta,
    const float* dout, float* dq, u32 heads, u32 kv_heads, u32 nq, u32 nk, u32 d, u32 flags, float scale) {
    reverse_queries<1>(q, k, v, tiles, lse, delta, dout, dq, heads_of(heads, kv_heads, nq, nk, d, flags, scale));
}

KERNEL(256) train_attention_keys_32(
    const float* q, const float* k, const float* v, const u32* tiles, const u32* spans, const float* lse,
    const float* delta, const float* dout, float* dk, float* dv, u32 heads, u32 kv_heads, u32 nq, u32 nk, u32 d,
    u32 flags, float scale) {
    reverse_keys<1>(
        q, k, v, tiles, spans, lse, delta, dout, dk, dv, heads_of(heads, kv_heads, nq, nk, d, flags, scale));
}

KERNEL(256) train_attention_64(
    const float* q, const float* k, const float* v, const u32* tiles, float* out, float* lse, u32 heads, u32 kv_heads,
    u32 nq, u32 nk, u32 d, u32 flags, float scale) {
    attend<2>(q, k, v, tiles, out, lse, heads_of(heads, kv_heads, nq, nk, d, flags, scale));
}

KERNEL(256) train_attention_queries_64(
    const float* q, const float* k, const float* v, const u32* tiles, const float* lse, const float* delta,
    const float* dout, float* dq, u32 heads, u32 kv_heads, u32 nq, u32 nk, u32 d, u32 flags, float scale) {
    reverse_queries<2>(q, k, v, tiles, lse, delta, dout, dq, heads_of(heads, kv_heads, nq, nk, d, flags, scale));
}

KERNEL(256) train_attention_keys_64(
    const float* q, const float* k, const float* v, const u32* tiles, const u32* spans, const float* lse,
    const float* delta, const float* dout, float* dk, float* dv, u32 heads, u32 kv_heads, u32 nq, u32 nk, u32 d,
    u32 flags, float scale) {
    reverse_keys<2>(
        q, k, v, tiles, spans, lse, delta, dout, dk, dv, heads_of(heads, kv_heads, nq, nk, d, flags, scale));
}

KERNEL(256) train_attention_96(
    const float* q, const float* k, const float* v, const u32* tiles, float* out, float* lse, u32 heads, u32 kv_heads,
    u32 nq, u32 nk, u32 d, u32 flags, float scale) {
    attend<3>(q, k, v, tiles, out, lse, heads_of(heads, kv_heads, nq, nk, d, flags, scale));
}

KERNEL(256) train_attention_queries_96(
    const float* q, const float* k, const float* v, const u32* tiles, const float* lse, const float* delta,
    const float* dout, float* dq, u32 heads, u32 kv_heads, u32 nq, u32 nk, u32 d, u32 flags, float scale) {
    reverse_queries<3>(q, k, v, tiles, lse, delta, dout, dq, heads_of(heads, kv_heads, nq, nk, d, flags, scale));
}

KERNEL(256) train_attention_keys_96(
    const float* q, const float* k, const float* v, const u32* tiles, const u32* spans, const float* lse,
    const float* delta, const float* dout, float* dk, float* dv, u32 heads, u32 kv_heads, u32 nq, u32 nk, u32 d,
    u32 flags, float scale) {
    reverse_keys<3>(
        q, k, v, tiles, spans, lse, delta, dout, dk, dv, heads_of(heads, kv_heads, nq, nk, d, flags, scale));
}

KERNEL(256) train_attention_128(
    const float* q, const float* k, const float* v, const u32* tiles, float* out, float* lse, u32 heads, u32 kv_heads,
    u32 nq, u32 nk, u32 d, u32 flags, float scale) {
    attend<4>(q, k, v, tiles, out, lse, heads_of(heads, kv_heads, nq, nk, d, flags, scale));
}

KERNEL(256) train_attention_queries_128(
    const float* q, const float* k, const float* v, const u32* tiles, const float* lse, const float* delta,
    const float* dout, float* dq, u32 heads, u32 kv_heads, u32 nq, u32 nk, u32 d, u32 flags, float scale) {
    reverse_queries<4>(q, k, v, tiles, lse, delta, dout, dq, heads_of(heads, kv_heads, nq, nk, d, flags, scale));
}

KERNEL(256) train_attention_keys_128(
    const float* q, const float* k, const float* v, const u32* tiles, const u32* spans, const float* lse,
    const float* delta, const float* dout, float* dk, float* dv, u32 heads, u32 kv_heads, u32 nq, u32 nk, u32 d,
    u32 flags, float scale) {
    reverse_keys<4>(
        q, k, v, tiles, spans, lse, delta, dout, dk, dv, heads_of(heads, kv_heads, nq, nk, d, flags, scale));
}
