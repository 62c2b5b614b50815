// Which keys sparse attention attends to: scores of cached index keys, and the highest of them.

/// `scores[row, s] = scale * sum over h of weights[h] * max(0, q[h] . key[s])`; a block has one row and 256 keys.
///
/// `rows[i]` = {row of the step, first entry of its block table, keys in sight}; q in shared memory.
template <class E>
DEVICE void score(
    const float* q, const float* weights, const E* keys, const u32* tables, const u32* rows, float* scores, u32 heads,
    u32 width, u32 stride, float scale) {
    DYNAMIC_SHARED(shared);
    float* query = (float*)shared;
    const u32* row = rows + 3 * blockIdx.y;
    u32 token = blockIdx.x * 256 + threadIdx.x;
    if (blockIdx.x * 256 >= row[2]) {
        return;
    }
    for (u32 i = threadIdx.x; i < heads * width; i += 256) {
        query[i] = q[(u64)row[0] * heads * width + i];
    }
    __syncthreads();
    if (token >= row[2]) {
        return;
    }
    const E* key = keys + ((u64)tables[row[1] + token / BLOCK_TOKENS] * BLOCK_TOKENS + token % BLOCK_TOKENS) * width;
    float sum = 0.0f;
    for (u32 h = 0; h < heads; h++) {
        float dot[4] = {};
        for (u32 first = 0; first < width; first += 4) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 d = first + i;
                dot[i] = d < width ? fmaf(query[h * width + d], widen(key[d]), dot[i]) : dot[i];
            }
        }
        float all = (dot[0] + dot[1]) + (dot[2] + dot[3]);
        sum = fmaf(weights[(u64)row[0] * heads + h], max_of(all, 0.0f), sum);
    }
    scores[(u64)blockIdx.y * stride + token] = sum * scale;
}

KERNEL(256)
score_f32(
    const float* q, const float* weights, const float* keys, const u32* tables, const u32* rows, float* scores,
    u32 heads, u32 width, u32 stride, float scale) {
    score(q, weights, keys, tables, rows, scores, heads, width, stride, scale);
}

KERNEL(256)
score_bf16(
    const float* q, const float* weights, const bf16* keys, const u32* tables, const u32* rows, float* scores,
    u32 heads, u32 width, u32 stride, float scale) {
    score(q, weights, keys, tables, rows, scores, heads, width, stride, scale);
}

/// An integer that orders like the float; both zeros are the same.
DEVICE u32 ordered(float value) {
    u32 bits = __float_as_uint(value + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/// Number of marked threads of the block before this one, and of all; `room` has 8 places.
DEVICE u32 rank(bool marked, u32* room, u32* all) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 votes = __ballot_sync(FULL, marked);
    __syncthreads();
    if (lane == 0) {
        room[warp] = __popc(votes);
    }
    __syncthreads();
    u32 before = 0, sum = 0;
    for (u32 w = 0; w < 8; w++) {
        before += w < warp ? room[w] : 0;
        sum += room[w];
    }
    *all = sum;
    return before + __popc(votes & ((1u << lane) - 1));
}

/// The positions of the `top_k` highest scores, ascending, the lower position among equals, then UNSELECTED; a block a row.
KERNEL(256) select_highest(const float* scores, const u32* rows, u32* selected, u32 stride, u32 top_k) {
    SHARED u32 counts[256];
    SHARED u32 room[8];
    SHARED u32 state[2];
    const u32* row = rows + 3 * blockIdx.x;
    u32 n = row[2];
    const float* score = scores + (u64)blockIdx.x * stride;
    u32* out = selected + (u64)row[0] * top_k;
    if (n <= top_k) {
        for (u32 i = threadIdx.x; i < top_k; i += 256) {
            out[i] = i < n ? i : 0xffffffffu;
        }
        return;
    }
    // The key at rank top_k, eight bits at a time from the top; `left` of those that share its bits so far are chosen.
    u32 prefix = 0, mask = 0, left = top_k;
    for (int shift = 24; shift >= 0; shift -= 8) {
        counts[threadIdx.x] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < n; i += 256) {
            u32 key = ordered(score[i]);
            if ((key & mask) == prefix) {
                atomicAdd(counts + (key >> shift & 255), 1u);
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 above = 0, digit = 255;
            while (above + counts[digit] < left) {
                above += counts[digit];
                digit--;
            }
            state[0] = digit;
            state[1] = left - above;
        }
        __syncthreads();
        prefix |= state[0] << shift;
        mask |= 255u << shift;
        left = state[1];
        __syncthreads();
    }
    u32 written = 0, equals = 0;
    for (u32 first = 0; first < n; first += 256) {
        u32 i = first + threadIdx.x;
        u32 key = i < n ? ordered(score[i]) : 0;
        u32 all;
        bool equal = i < n && key == prefix;
        u32 place_among_equals = equals + rank(equal, room, &all);
        bool chosen = equal ? place_among_equals < left : i < n && key > prefix;
        equals += all;
        u32 place = written + rank(chosen, room, &all);
        written += all;
        if (chosen) {
            out[place] = i;
        }
    }
}

/// Of each row the elements from some bound on, at least `count` (up to 128): `found[row]` = {their number, then column and
/// bits of each, in any order}, at most `room` of them written. A block a row.
///
/// Each thread's largest of its own columns: the `count`-th of these is a bound that `count` elements reach.
KERNEL(256) find_highest(const float* x, u32* found, u32 cols, u32 count, u32 room) {
    SHARED u32 largest[256];
    SHARED u32 state[2];
    const float* row = x + (u64)blockIdx.x * cols;
    u32* out = found + (u64)blockIdx.x * (1 + 2 * room);
    u32 mine = 0;
    for (u32 i = threadIdx.x; i < cols; i += 256) {
        mine = max_of(mine, ordered(row[i]));
    }
    largest[threadIdx.x] = mine;
    if (threadIdx.x == 0) {
        state[1] = 0;
    }
    __syncthreads();
    u32 before = 0;
    for (u32 t = 0; t < 256; t++) {
        before += largest[t] > mine || (largest[t] == mine && t < threadIdx.x);
    }
    if (before == count - 1) {
        state[0] = mine;
    }
    __syncthreads();
    u32 bound = state[0];
    for (u32 i = threadIdx.x; i < cols; i += 256) {
        float value = row[i];
        if (ordered(value) >= bound) {
            u32 place = atomicAdd(state + 1, 1u);
            if (place < room) {
                out[1 + 2 * place] = i;
                out[2 + 2 * place] = __float_as_uint(value);
            }
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        out[0] = state[1];
    }
}
