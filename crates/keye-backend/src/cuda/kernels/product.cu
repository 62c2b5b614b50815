// Products in f32 on the ordinary cores, and in bf16 on the matrix cores.

#define TILE 64
#define STEP 16

/// 64 slots by 64 outputs a block, 4 by 4 a thread; weights f32 or bf16.
template <class E>
DEVICE void product_exact(const Product& p) {
    SHARED float xs[STEP][TILE + 4];
    SHARED float ws[STEP][TILE + 4];
    Tile tile = tile_of(p, blockIdx.y, TILE);
    if (tile.count == 0) {
        return;
    }
    const float* x = (const float*)p.x;
    const E* w = (const E*)tile.weight;
    u32 n0 = blockIdx.x * TILE, thread = threadIdx.x;
    u32 tx = thread % 16, ty = thread / 16;
    float total[4][4] = {}, sum[4][4] = {};
    u32 steps = (p.k + STEP - 1) / STEP, slice = 1;
    for (u32 step = 0; step < steps; step++) {
        while (slice < SLICES && step == slice_start(slice, steps)) {
            for (int i = 0; i < 4; i++) {
                for (int j = 0; j < 4; j++) {
                    total[i][j] += sum[i][j];
                    sum[i][j] = 0.0f;
                }
            }
            slice++;
        }
        __syncthreads();
        for (u32 i = thread; i < TILE * STEP; i += 256) {
            u32 row = i / STEP, k = step * STEP + i % STEP;
            bool inside = row < tile.count && k < p.k;
            xs[i % STEP][row] = inside ? x[(u64)x_row(p, tile.first + row) * p.x_stride + k] : 0.0f;
            bool known = n0 + row < p.n && k < p.k;
            ws[i % STEP][row] = known ? widen(w[(u64)(n0 + row) * p.w_stride + k]) : 0.0f;
        }
        __syncthreads();
        for (int k = 0; k < STEP; k++) {
            for (int i = 0; i < 4; i++) {
                for (int j = 0; j < 4; j++) {
                    sum[i][j] = fmaf(xs[k][ty * 4 + i], ws[k][tx * 4 + j], sum[i][j]);
                }
            }
        }
    }
    for (u32 i = 0; i < 4; i++) {
        for (u32 j = 0; j < 4; j++) {
            u32 row = ty * 4 + i, output = n0 + tx * 4 + j;
            if (row < tile.count && output < p.n) {
                finish(p, tile.first + row, output, total[i][j] + sum[i][j]);
            }
        }
    }
}

KERNEL(256) product_f32(Product p) {
    product_exact<float>(p);
}

KERNEL(256) product_f32_bf16(Product p) {
    product_exact<bf16>(p);
}

// bf16 rows times bf16 weights. The weight is the first operand of the instruction (16 outputs), the rows are the second (8
// slots). Columns go in steps of 32, to which both are padded with zeros. Of a step lane t of a quad takes the 8 columns from
// 8t on, one load of 16 bytes: the first four are its part of one instruction, the last four that of a second. Which column
// lands in which place of the instruction does not matter as long as both operands agree.

DEVICE void step_bf16(float (&c)[4], const words4& low, const words4& high, const words4& b) {
    mma_bf16(c, low.x, high.x, low.y, high.y, b.x, b.y);
    mma_bf16(c, low.z, high.z, low.w, high.w, b.z, b.w);
}

/// Few slots: 16 MT outputs by 8 NT slots a block, one slice of the columns a warp. Weights stream from memory once a block
/// of slots; `words` gives the lane's part of a step of row `row`, `scale` what a step's sums are multiplied with.
template <int MT, int NT, class Words, class Scale>
DEVICE void product_sliced(const Product& p, const Tile& tile, const u32 (&rows)[2 * MT], Words words, Scale scale) {
    SHARED float sums[SLICES][8 * NT][16 * MT];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 n0 = blockIdx.x * 16 * MT, steps = p.x_stride / 32;
    const u16* x[NT];
    bool known[NT];
#pragma unroll
    for (u32 j = 0; j < NT; j++) {
        u32 slot = 8 * j + g;
        known[j] = slot < tile.count;
        x[j] = (const u16*)p.x + (u64)(known[j] ? x_row(p, tile.first + slot) : 0) * p.x_stride + 8 * t;
    }
    float sum[MT][NT][4] = {};
    u32 end = slice_start(warp + 1, steps);
#pragma unroll (4 / MT)
    for (u32 step = slice_start(warp, steps); step < end; step++) {
        words4 a[2 * MT];
#pragma unroll
        for (u32 i = 0; i < 2 * MT; i++) {
            a[i] = words(rows[i], step);
        }
#pragma unroll
        for (u32 j = 0; j < NT; j++) {
            words4 b = {0, 0, 0, 0};
            if (known[j]) {
                b = vector_at<words4>(x[j] + step * 32);
            }
#pragma unroll
            for (u32 i = 0; i < MT; i++) {
                scale(sum[i][j], rows[2 * i], rows[2 * i + 1], step, a[2 * i], a[2 * i + 1], b);
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
        u32 output = i % (16 * MT), slot = i / (16 * MT);
        float total = 0.0f;
        for (u32 s = 0; s < SLICES; s++) {
            total += sums[s][slot][output];
        }
        if (slot < tile.count && n0 + output < p.n) {
            finish(p, tile.first + slot, n0 + output, total);
        }
    }
}

template <int MT, int NT>
DEVICE void product_bf16(const Product& p) {
    Tile tile = tile_of(p, blockIdx.y, 8 * NT);
    if (tile.count == 0) {
        return;
    }
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, rows[2 * MT];
#pragma unroll
    for (u32 i = 0; i < 2 * MT; i++) {
        rows[i] = min_of(blockIdx.x * 16 * MT + 8 * i + g, p.n - 1);
    }
    const u16* weight = (const u16*)tile.weight + 8 * t;
    product_sliced<MT, NT>(
        p, tile, rows, [&](u32 row, u32 step) { return load_once(weight + (u64)row * p.w_stride + step * 32); },
        [](float (&sum)[4], u32, u32, u32, const words4& low, const words4& high, const words4& b) {
            step_bf16(sum, low, high, b);
        });
}

KERNEL(256) product_bf16_few(Product p) {
    product_bf16<1, 1>(p);
}

KERNEL(256) product_bf16_some(Product p) {
    product_bf16<2, 4>(p);
}

#define MANY 128
#define STAGES 4
#define STAGE_BYTES (2 * MANY * 64)

/// Many slots: 128 outputs by 128 slots a block, 64 by 32 a warp; four steps of columns under way in shared memory.
KERNEL(256) product_bf16_many(Product p) {
    DYNAMIC_SHARED(shared);
    Tile tile = tile_of(p, blockIdx.y, MANY);
    if (tile.count == 0) {
        return;
    }
    u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    u32 n0 = blockIdx.x * MANY, steps = p.x_stride / 32;
    // A thread copies a quarter of the 64 bytes of rows thread / 4 and thread / 4 + 64, of the weight and of x.
    const u16* from[4];
    bool valid[4];
    for (u32 i = 0; i < 2; i++) {
        u32 row = thread / 4 + 64 * i;
        from[i] = (const u16*)tile.weight + (u64)min_of(n0 + row, p.n - 1) * p.w_stride + thread % 4 * 8;
        valid[i] = true;
        valid[2 + i] = row < tile.count;
        u32 source = valid[2 + i] ? x_row(p, tile.first + row) : 0;
        from[2 + i] = (const u16*)p.x + (u64)source * p.x_stride + thread % 4 * 8;
    }
    u32 out_base = warp / 4 * 64, slot_base = warp % 4 * 32;
    float total[4][4][4] = {}, sum[4][4][4] = {};
    for (u32 step = 0; step < STAGES - 1; step++) {
        if (step < steps) {
            for (u32 i = 0; i < 4; i++) {
                u8* to = shared + step * STAGE_BYTES + i * (STAGE_BYTES / 4) + thread * 16;
                copy_async(to, from[i] + step * 32, valid[i]);
            }
        }
        commit_copies();
    }
    u32 slice = 1;
    for (u32 step = 0; step < steps; step++) {
        while (slice < SLICES && step == slice_start(slice, steps)) {
#pragma unroll
            for (u32 i = 0; i < 64; i++) {
                total[i / 16][i / 4 % 4][i % 4] += sum[i / 16][i / 4 % 4][i % 4];
                sum[i / 16][i / 4 % 4][i % 4] = 0.0f;
            }
            slice++;
        }
        wait_copies<STAGES - 2>();
        __syncthreads();
        u32 next = step + STAGES - 1;
        if (next < steps) {
            for (u32 i = 0; i < 4; i++) {
                u8* to = shared + next % STAGES * STAGE_BYTES + i * (STAGE_BYTES / 4) + thread * 16;
                copy_async(to, from[i] + next * 32, valid[i]);
            }
        }
        commit_copies();
        const u8* stage = shared + step % STAGES * STAGE_BYTES + t * 16;
        words4 b[4];
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            b[j] = vector_at<words4>(stage + STAGE_BYTES / 2 + (slot_base + 8 * j + g) * 64);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            words4 low = vector_at<words4>(stage + (out_base + 16 * i + g) * 64);
            words4 high = vector_at<words4>(stage + (out_base + 16 * i + 8 + g) * 64);
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                step_bf16(sum[i][j], low, high, b[j]);
            }
        }
    }
    wait_copies<0>();
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                u32 output = n0 + out_base + 16 * i + g + 8 * (c / 2);
                u32 slot = slot_base + 8 * j + 2 * t + c % 2;
                if (slot < tile.count && output < p.n) {
                    finish(p, tile.first + slot, output, total[i][j][c] + sum[i][j][c]);
                }
            }
        }
    }
}

// 8-bit float weights (e4m3) are widened to bf16, exactly, on their way to the matrix cores. Columns that share a scale come
// in multiples of 32, so a step has one scale an output; scales `[n, columns / w_block]` lie behind the weight's rows.

DEVICE words4 widen_step(words2 codes) {
    words4 out = {
        widen_e4m3(codes.x), widen_e4m3(codes.x >> 16), widen_e4m3(codes.y), widen_e4m3(codes.y >> 16)};
    return out;
}

DEVICE const float* fp8_scales(const Product& p, const void* weight, u32 row) {
    const float* scales = (const float*)((const u8*)weight + (u64)p.n * p.w_stride);
    return scales + (u64)row * ((p.k + p.w_block - 1) / p.w_block);
}

template <int MT, int NT>
DEVICE void product_fp8(const Product& p) {
    Tile tile = tile_of(p, blockIdx.y, 8 * NT);
    if (tile.count == 0) {
        return;
    }
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, rows[2 * MT];
#pragma unroll
    for (u32 i = 0; i < 2 * MT; i++) {
        rows[i] = min_of(blockIdx.x * 16 * MT + 8 * i + g, p.n - 1);
    }
    const u8* weight = (const u8*)tile.weight + 8 * t;
    const float* scales = fp8_scales(p, tile.weight, 0);
    u32 across = (p.k + p.w_block - 1) / p.w_block;
    product_sliced<MT, NT>(
        p, tile, rows,
        [&](u32 row, u32 step) { return widen_step(vector_at<words2>(weight + (u64)row * p.w_stride + step * 32)); },
        [&](float (&sum)[4], u32 first, u32 second, u32 step, const words4& low, const words4& high, const words4& b) {
            float part[4] = {};
            step_bf16(part, low, high, b);
            u32 block = step * 32 / p.w_block;
            float factors[2] = {scales[(u64)first * across + block], scales[(u64)second * across + block]};
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                sum[i] = fmaf(part[i], factors[i / 2], sum[i]);
            }
        });
}

KERNEL(256) product_fp8_few(Product p) {
    product_fp8<1, 1>(p);
}

KERNEL(256) product_fp8_some(Product p) {
    product_fp8<2, 4>(p);
}

#define FP8_OUTPUTS 64
#define FP8_STAGE (FP8_OUTPUTS * 32 + MANY * 64)

/// Many slots: 64 outputs by 128 slots a block, 32 by 32 a warp; four steps of columns under way.
KERNEL(256) product_fp8_many(Product p) {
    DYNAMIC_SHARED(shared);
    Tile tile = tile_of(p, blockIdx.y, MANY);
    if (tile.count == 0) {
        return;
    }
    u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    u32 n0 = blockIdx.x * FP8_OUTPUTS, steps = p.x_stride / 32;
    // A thread copies a quarter of the 64 bytes of rows thread / 4 and thread / 4 + 64 of x, and, up to thread 128, half of the
    // 32 bytes of an output's row.
    const u8* codes = (const u8*)tile.weight + (u64)min_of(n0 + thread / 2 % 64, p.n - 1) * p.w_stride + thread % 2 * 16;
    const u16* from[2];
    bool valid[2];
    for (u32 i = 0; i < 2; i++) {
        u32 row = thread / 4 + 64 * i;
        valid[i] = row < tile.count;
        from[i] = (const u16*)p.x + (u64)(valid[i] ? x_row(p, tile.first + row) : 0) * p.x_stride + thread % 4 * 8;
    }
    auto fetch = [&](u32 step) {
        u8* stage = shared + step % STAGES * FP8_STAGE;
        if (thread < 128) {
            copy_async(stage + thread * 16, codes + step * 32, true);
        }
        for (u32 i = 0; i < 2; i++) {
            copy_async(stage + FP8_OUTPUTS * 32 + i * (MANY * 32) + thread * 16, from[i] + step * 32, valid[i]);
        }
    };
    u32 out_base = warp / 4 * 32, slot_base = warp % 4 * 32;
    const float* scales = fp8_scales(p, tile.weight, 0);
    u32 across = (p.k + p.w_block - 1) / p.w_block, scale_rows[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        scale_rows[i] = min_of(n0 + out_base + 8 * i + g, p.n - 1) * across;
    }
    float total[2][4][4] = {}, sum[2][4][4] = {};
    for (u32 step = 0; step < STAGES - 1; step++) {
        if (step < steps) {
            fetch(step);
        }
        commit_copies();
    }
    u32 slice = 1;
    for (u32 step = 0; step < steps; step++) {
        while (slice < SLICES && step == slice_start(slice, steps)) {
#pragma unroll
            for (u32 i = 0; i < 32; i++) {
                total[i / 16][i / 4 % 4][i % 4] += sum[i / 16][i / 4 % 4][i % 4];
                sum[i / 16][i / 4 % 4][i % 4] = 0.0f;
            }
            slice++;
        }
        wait_copies<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) {
            fetch(step + STAGES - 1);
        }
        commit_copies();
        const u8* stage = shared + step % STAGES * FP8_STAGE;
        words4 b[4];
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            b[j] = vector_at<words4>(stage + FP8_OUTPUTS * 32 + (slot_base + 8 * j + g) * 64 + t * 16);
        }
        u32 block = step * 32 / p.w_block;
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            words4 low = widen_step(vector_at<words2>(stage + (out_base + 16 * i + g) * 32 + t * 8));
            words4 high = widen_step(vector_at<words2>(stage + (out_base + 16 * i + 8 + g) * 32 + t * 8));
            float scale[2] = {scales[scale_rows[2 * i] + block], scales[scale_rows[2 * i + 1] + block]};
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                float part[4] = {};
                step_bf16(part, low, high, b[j]);
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    sum[i][j][c] = fmaf(part[c], scale[c / 2], sum[i][j][c]);
                }
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
                u32 output = n0 + out_base + 16 * i + g + 8 * (c / 2);
                u32 slot = slot_base + 8 * j + 2 * t + c % 2;
                if (slot < tile.count && output < p.n) {
                    finish(p, tile.first + slot, output, total[i][j][c] + sum[i][j][c]);
                }
            }
        }
    }
}

/// Rows of an 8-bit float table as f32; one block a row.
KERNEL(256) embed_fp8(Product p, const u32* ids) {
    u32 row = ids[blockIdx.x];
    const u8* codes = (const u8*)p.weight + (u64)row * p.w_stride;
    const float* scales = fp8_scales(p, p.weight, row);
    for (u32 c = threadIdx.x; c < p.k; c += 256) {
        bf16 value = {(u16)widen_e4m3(codes[c])};
        p.y[(u64)blockIdx.x * p.k + c] = widen(value) * scales[c / p.w_block];
    }
}

/// What follows a product that a library made: `y = epilogue(z + bias)`; one block a row.
KERNEL(256) finish_rows(const float* z, const float* bias, float* y, u32 n, u32 kind) {
    u64 row = (u64)blockIdx.x * n;
    for (u32 c = threadIdx.x; c < n; c += 256) {
        float value = z[row + c] + (bias ? bias[c] : 0.0f);
        y[row + c] = epilogue(kind, value, y + row + c);
    }
}
