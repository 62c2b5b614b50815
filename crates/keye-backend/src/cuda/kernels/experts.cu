// Mixtures of experts: choosing, sorting slots by expert for the grouped products, and summing what the experts say.

/// The `count` most probable of `n` experts of a row and their weights; one warp a row, 8 rows a block.
///
/// Equal probabilities go to the lower number. `scratch` is `[rows, n]`.
KERNEL(256)
route_rows(const float* logits, float* scratch, u32* chosen, float* weights, u32 rows, u32 n, u32 count, u32 normalise) {
    u32 row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) {
        return;
    }
    const float* z = logits + (u64)row * n;
    float* probability = scratch + (u64)row * n;
    float largest = -__int_as_float(0x7f800000);
    for (u32 e = lane; e < n; e += 32) {
        largest = max_of(largest, z[e]);
    }
    largest = warp_max(largest);
    float sum = 0.0f;
    for (u32 e = lane; e < n; e += 32) {
        float value = expf(z[e] - largest);
        probability[e] = value;
        sum += value;
    }
    float total = warp_sum(sum);
    for (u32 e = lane; e < n; e += 32) {
        probability[e] = probability[e] / total;
    }
    float taken = 0.0f;
    for (u32 i = 0; i < count; i++) {
        // Each lane's own candidates are its own writes; -1 marks what is taken.
        float best = -2.0f;
        u32 which = 0;
        for (u32 e = lane; e < n; e += 32) {
            if (probability[e] > best) {
                best = probability[e];
                which = e;
            }
        }
        for (int step = 16; step > 0; step /= 2) {
            float other = __shfl_xor_sync(FULL, best, step);
            u32 number = __shfl_xor_sync(FULL, which, step);
            if (other > best || (other == best && number < which)) {
                best = other;
                which = number;
            }
        }
        taken += best;
        if (which % 32 == lane) {
            probability[which] = -1.0f;
        }
        if (lane == 0) {
            chosen[(u64)row * count + i] = which;
            weights[(u64)row * count + i] = best;
        }
    }
    if (lane == 0 && normalise) {
        for (u32 i = 0; i < count; i++) {
            weights[(u64)row * count + i] = weights[(u64)row * count + i] / taken;
        }
    }
}

/// Sorts slots by expert and cuts them into tiles of at most `size`: `order[place]` is a slot, `rows[place]` its row, `tiles`
/// {expert, first place, places} with zero places behind the last. One block; `counts` has `experts` places.
KERNEL(256)
sort_slots(
    const u32* chosen, u32 slots, u32 per_row, u32 experts, u32 size, u32 most, u32* counts, u32* order, u32* rows,
    u32* tiles) {
    for (u32 e = threadIdx.x; e < experts; e += 256) {
        counts[e] = 0;
    }
    __syncthreads();
    for (u32 s = threadIdx.x; s < slots; s += 256) {
        atomicAdd(counts + chosen[s], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 place = 0, tile = 0;
        for (u32 e = 0; e < experts; e++) {
            u32 count = counts[e];
            for (u32 done = 0; done < count; done += size) {
                tiles[3 * tile] = e;
                tiles[3 * tile + 1] = place + done;
                tiles[3 * tile + 2] = min_of(size, count - done);
                tile++;
            }
            counts[e] = place;
            place += count;
        }
        for (; tile < most; tile++) {
            tiles[3 * tile] = tiles[3 * tile + 1] = tiles[3 * tile + 2] = 0;
        }
    }
    __syncthreads();
    // The order within an expert is left to chance: no result depends on it.
    for (u32 s = threadIdx.x; s < slots; s += 256) {
        u32 place = atomicAdd(counts + chosen[s], 1u);
        order[place] = s;
        rows[place] = s / per_row;
    }
}

/// `y[i] += sum over t of weights[i, t] * results[per_row * i + t]`, from left to right; one block a row.
KERNEL(256) combine_experts(const float* results, const float* weights, float* y, u32 cols, u32 per_row) {
    u64 row = blockIdx.x;
    for (u32 c = threadIdx.x; c < cols; c += 256) {
        float sum = 0.0f;
        for (u32 t = 0; t < per_row; t++) {
            sum = fmaf(weights[row * per_row + t], results[(row * per_row + t) * cols + c], sum);
        }
        y[row * cols + c] += sum;
    }
}
