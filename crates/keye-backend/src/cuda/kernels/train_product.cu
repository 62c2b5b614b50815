// Products of training: `c (+)= a b` of f32 matrices in memory, each plain or transposed as it lies there. Two precisions: plain
// f32, and bf16 on the matrix cores, where operands are rounded on their way to shared memory.
//
// A block has a square of c, 128 or 64 wide, and a slice of the inputs. While a step of inputs is multiplied the next one's loads
// are under way to registers; two steps lie in shared memory. Where the squares are too few for a chip, inputs are cut into
// slices, each with its own square in a workspace, which `train_product_sum` adds in order: the sums depend on shapes alone.

/// Inputs of a step.
#define STEP_BF16 32
#define STEP_F32 16

/// What a product's `form` says: operands lie transposed; their loads may be of 16 bytes; c's stores of 8; c is added to.
enum Form { TURNED_A = 1, TURNED_B = 2, VECTORS_A = 4, VECTORS_B = 8, PAIRS_C = 16, KEEP = 32 };

/// A block's part of a product.
struct Square {
    /// First row and column of c.
    u32 row, column;
    /// Inputs from `begin` to `end`.
    u32 begin, end;
    float* c;
};

/// Neighbouring blocks share rows of a and columns of b: squares go down eight at a time, then to the right.
template <int SIZE>
DEVICE Square square_of(float* c, u32 m, u32 n, u32 k, u32 slice) {
    u32 down = (m + SIZE - 1) / SIZE, across = (n + SIZE - 1) / SIZE, group = blockIdx.x / (8 * across);
    u32 inside = blockIdx.x % (8 * across), height = min_of(8, down - 8 * group);
    Square out;
    out.row = (8 * group + inside % height) * SIZE;
    out.column = inside / height * SIZE;
    out.begin = blockIdx.y * slice;
    out.end = min_of(out.begin + slice, k);
    out.c = c + (u64)blockIdx.y * m * n;
    return out;
}

/// A thread's part of a step of one operand: SIZE rows of a (columns of b) from `first` on, STEP inputs from `input` on, by 2 SIZE
/// threads. ALONG: inputs lie side by side in memory, else the rows of a (columns of b) do. Zeros behind the ends.
template <int SIZE, int STEP, bool ALONG>
DEVICE void fetch_part(
    float (&out)[STEP / 2], const float* from, u32 stride, u32 first, u32 limit, u32 input, u32 end, bool vectors) {
    const u32 WIDE = (ALONG ? STEP : SIZE) / 4;
#pragma unroll
    for (u32 v = 0; v < STEP / 8; v++) {
        u32 i = threadIdx.x + v * 2 * SIZE;
        u32 row = i / WIDE + (ALONG ? first : input), column = i % WIDE * 4 + (ALONG ? input : first);
        bool known = row < (ALONG ? limit : end);
        u32 columns = ALONG ? end : limit;
        const float* at = from + (u64)row * stride + column;
        if (vectors) {
            floats4 four = {0.0f, 0.0f, 0.0f, 0.0f};
            if (known && column < columns) {
                four = vector_at<floats4>(at);
            }
            out[4 * v] = four.x;
            out[4 * v + 1] = four.y;
            out[4 * v + 2] = four.z;
            out[4 * v + 3] = four.w;
        } else {
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                out[4 * v + e] = known && column + e < columns ? at[e] : 0.0f;
            }
        }
    }
}

// In shared memory a step of bf16 lies as in memory, rows padded so that eight of them begin in different banks; loads of
// matrices transpose where that is needed.

template <int SIZE, bool ALONG>
struct Room {
    static const u32 STRIDE = (ALONG ? STEP_BF16 : SIZE) + 8;
};

/// Elements of a step of one operand, whichever way it lies.
#define ROOM_BF16(size) ((size) * (STEP_BF16 + 8))

template <int SIZE, bool ALONG>
DEVICE void put_bf16(u16* tile, const float (&part)[STEP_BF16 / 2]) {
    const u32 WIDE = (ALONG ? STEP_BF16 : SIZE) / 4;
#pragma unroll
    for (u32 v = 0; v < STEP_BF16 / 8; v++) {
        u32 i = threadIdx.x + v * 2 * SIZE;
        words2 four = {narrow2(part[4 * v], part[4 * v + 1]), narrow2(part[4 * v + 2], part[4 * v + 3])};
        vector_at<words2>(tile + i / WIDE * Room<SIZE, ALONG>::STRIDE + i % WIDE * 4) = four;
    }
}

/// 16 rows of a from `row` on by 16 inputs from `input` on, as the instruction takes them.
template <int SIZE, bool ALONG>
DEVICE void load_a(u32 (&out)[4], const u16* tile, u32 row, u32 input) {
    u32 lane = threadIdx.x % 32;
    if (ALONG) {
        load_matrices(out, tile + (row + lane % 16) * Room<SIZE, ALONG>::STRIDE + input + lane / 16 * 8);
    } else {
        u32 down = input + lane % 8 + lane / 16 * 8;
        load_matrices_transposed(out, tile + down * Room<SIZE, ALONG>::STRIDE + row + lane / 8 % 2 * 8);
    }
}

/// The same of 16 columns of b: two operands of the instruction.
template <int SIZE, bool ALONG>
DEVICE void load_b(u32 (&out)[4], const u16* tile, u32 column, u32 input) {
    u32 lane = threadIdx.x % 32;
    if (ALONG) {
        u32 down = column + lane % 8 + lane / 16 * 8;
        load_matrices(out, tile + down * Room<SIZE, ALONG>::STRIDE + input + lane / 8 % 2 * 8);
    } else {
        load_matrices_transposed(out, tile + (input + lane % 16) * Room<SIZE, ALONG>::STRIDE + column + lane / 16 * 8);
    }
}

/// Where a warp's part of a square begins: SIZE / 2 rows by 32 columns.
template <int SIZE>
DEVICE u32 warp_row() {
    return threadIdx.x / 32 / (SIZE / 32) * (SIZE / 2);
}

template <int SIZE>
DEVICE u32 warp_column() {
    return threadIdx.x / 32 % (SIZE / 32) * 32;
}

/// Adds a step's products to a warp's part.
template <int SIZE, bool ALONG_A, bool ALONG_B>
DEVICE void add_step(float (&sum)[SIZE / 32][4][4], const u16* tile_a, const u16* tile_b) {
#pragma unroll
    for (u32 half = 0; half < STEP_BF16; half += 16) {
        u32 right[2][4];
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            load_b<SIZE, ALONG_B>(right[j], tile_b, warp_column<SIZE>() + 16 * j, half);
        }
#pragma unroll
        for (u32 i = 0; i < SIZE / 32; i++) {
            u32 left[4];
            load_a<SIZE, ALONG_A>(left, tile_a, warp_row<SIZE>() + 16 * i, half);
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                mma_bf16(
                    sum[i][j], left[0], left[1], left[2], left[3], right[j / 2][j % 2 * 2],
                    right[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
}

template <int SIZE>
DEVICE void store_square(const float (&sum)[SIZE / 32][4][4], const Square& square, u32 m, u32 n, u32 form) {
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    u32 first_row = square.row + warp_row<SIZE>() + g, first_column = square.column + warp_column<SIZE>() + 2 * t;
#pragma unroll
    for (u32 i = 0; i < SIZE / 32; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                u32 row = first_row + 16 * i + 8 * r, column = first_column + 8 * j;
                float* at = square.c + (u64)row * n + column;
                float first = sum[i][j][2 * r], second = sum[i][j][2 * r + 1];
                if (row >= m || column >= n) {
                    continue;
                }
                if (form & PAIRS_C) {
                    if (form & KEEP) {
                        floats2 old = vector_at<floats2>(at);
                        first += old.x;
                        second += old.y;
                    }
                    floats2 pair = {first, second};
                    vector_at<floats2>(at) = pair;
                    continue;
                }
                at[0] = form & KEEP ? at[0] + first : first;
                if (column + 1 < n) {
                    at[1] = form & KEEP ? at[1] + second : second;
                }
            }
        }
    }
}

/// SIZE by SIZE a block of 2 SIZE threads, SIZE / 2 by 32 a warp.
template <int SIZE, bool ALONG_A, bool ALONG_B>
DEVICE void multiply_bf16(
    u16* shared, const float* a, const float* b, const Square& square, u32 m, u32 n, u32 k, u32 form) {
    const u32 ROOM = ROOM_BF16(SIZE);
    float sum[SIZE / 32][4][4] = {};
    float part_a[STEP_BF16 / 2], part_b[STEP_BF16 / 2];
    auto fetch = [&](u32 input) {
        fetch_part<SIZE, STEP_BF16, ALONG_A>(
            part_a, a, ALONG_A ? k : m, square.row, m, input, square.end, form & VECTORS_A);
        fetch_part<SIZE, STEP_BF16, ALONG_B>(
            part_b, b, ALONG_B ? k : n, square.column, n, input, square.end, form & VECTORS_B);
    };
    auto put = [&](u32 stage) {
        put_bf16<SIZE, ALONG_A>(shared + 2 * stage * ROOM, part_a);
        put_bf16<SIZE, ALONG_B>(shared + (2 * stage + 1) * ROOM, part_b);
    };
    fetch(square.begin);
    put(0);
    __syncthreads();
    u32 stage = 0;
    for (u32 input = square.begin; input < square.end; input += STEP_BF16) {
        bool more = input + STEP_BF16 < square.end;
        if (more) {
            fetch(input + STEP_BF16);
        }
        add_step<SIZE, ALONG_A, ALONG_B>(sum, shared + 2 * stage * ROOM, shared + (2 * stage + 1) * ROOM);
        stage ^= 1;
        if (more) {
            put(stage);
        }
        __syncthreads();
    }
    store_square<SIZE>(sum, square, m, n, form);
}

/// `c (+)= a b`, c `[m, n]`, k inputs, `slice` of them for blocks of one y: a multiple of a step, or all.
template <int SIZE>
DEVICE void product_bf16(
    u16* shared, const float* a, const float* b, float* c, u32 m, u32 n, u32 k, u32 slice, u32 form) {
    Square square = square_of<SIZE>(c, m, n, k, slice);
    switch (form & (TURNED_A | TURNED_B)) {
        case 0:
            return multiply_bf16<SIZE, true, false>(shared, a, b, square, m, n, k, form);
        case TURNED_A:
            return multiply_bf16<SIZE, false, false>(shared, a, b, square, m, n, k, form);
        case TURNED_B:
            return multiply_bf16<SIZE, true, true>(shared, a, b, square, m, n, k, form);
        default:
            return multiply_bf16<SIZE, false, true>(shared, a, b, square, m, n, k, form);
    }
}

KERNEL(256) train_product_bf16_128(
    const float* a, const float* b, float* c, u32 m, u32 n, u32 k, u32 slice, u32 form) {
    __attribute__((aligned(16))) SHARED u16 room[4 * ROOM_BF16(128)];
    product_bf16<128>(room, a, b, c, m, n, k, slice, form);
}

KERNEL(128) train_product_bf16_64(
    const float* a, const float* b, float* c, u32 m, u32 n, u32 k, u32 slice, u32 form) {
    __attribute__((aligned(16))) SHARED u16 room[4 * ROOM_BF16(64)];
    product_bf16<64>(room, a, b, c, m, n, k, slice, form);
}

// Large products read every operand many times, from the second cache mostly. There f32 would take twice the time, so such
// operands are rounded once, to rows that are padded to whole 16 bytes, and come to shared memory by asynchronous copies, three
// steps ahead. The sums are the same to the bit.

/// Rows of f32 as bf16 with `stride` elements each, zeros behind the last column; one warp a row.
KERNEL(256) train_narrow(const float* from, u16* to, u32 rows, u32 cols, u32 stride, u32 vectors) {
    u32 row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) {
        return;
    }
    const float* in = from + (u64)row * cols;
    u16* out = to + (u64)row * stride;
    for (u32 column = threadIdx.x % 32 * 8; column < stride; column += 256) {
        float part[8];
        if (vectors) {
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                floats4 four = {0.0f, 0.0f, 0.0f, 0.0f};
                if (column + 4 * h < cols) {
                    four = vector_at<floats4>(in + column + 4 * h);
                }
                part[4 * h] = four.x;
                part[4 * h + 1] = four.y;
                part[4 * h + 2] = four.z;
                part[4 * h + 3] = four.w;
            }
        } else {
#pragma unroll
            for (u32 e = 0; e < 8; e++) {
                part[e] = column + e < cols ? in[column + e] : 0.0f;
            }
        }
        words4 eight = {
            narrow2(part[0], part[1]), narrow2(part[2], part[3]), narrow2(part[4], part[5]), narrow2(part[6], part[7])};
        vector_at<words4>(out + column) = eight;
    }
}

#define COPY_STAGES 4

/// Begins to bring a step of one operand: 128 rows of a (columns of b) by 32 inputs.
template <bool ALONG>
DEVICE void copy_step(u16* tile, const u16* from, u32 stride, u32 first, u32 limit, u32 input, u32 end) {
    const u32 ACROSS = (ALONG ? STEP_BF16 : 128) / 8;
#pragma unroll
    for (u32 v = 0; v < 2; v++) {
        u32 i = threadIdx.x + 256 * v, down = i / ACROSS, across = i % ACROSS * 8;
        u32 row = down + (ALONG ? first : input), column = across + (ALONG ? input : first);
        bool known = row < (ALONG ? limit : end) && column < stride;
        copy_async(
            tile + down * Room<128, ALONG>::STRIDE + across, known ? from + (u64)row * stride + column : from, known);
    }
}

template <bool ALONG_A, bool ALONG_B>
DEVICE void multiply_narrow(
    u16* shared, const u16* a, const u16* b, const Square& square, u32 m, u32 n, u32 k, u32 form) {
    const u32 ROOM = ROOM_BF16(128);
    u32 stride_a = ((ALONG_A ? k : m) + 7) / 8 * 8, stride_b = ((ALONG_B ? k : n) + 7) / 8 * 8;
    float sum[4][4][4] = {};
    u32 steps = (square.end - square.begin + STEP_BF16 - 1) / STEP_BF16;
    auto fetch = [&](u32 step) {
        if (step < steps) {
            u16* tile = shared + step % COPY_STAGES * 2 * ROOM;
            u32 input = square.begin + step * STEP_BF16;
            copy_step<ALONG_A>(tile, a, stride_a, square.row, m, input, square.end);
            copy_step<ALONG_B>(tile + ROOM, b, stride_b, square.column, n, input, square.end);
        }
        commit_copies();
    };
    for (u32 step = 0; step < COPY_STAGES - 1; step++) {
        fetch(step);
    }
    for (u32 step = 0; step < steps; step++) {
        wait_copies<COPY_STAGES - 2>();
        __syncthreads();
        fetch(step + COPY_STAGES - 1);
        const u16* tile = shared + step % COPY_STAGES * 2 * ROOM;
        add_step<128, ALONG_A, ALONG_B>(sum, tile, tile + ROOM);
    }
    wait_copies<0>();
    store_square<128>(sum, square, m, n, form);
}

/// As `train_product_bf16_128`, of operands that `train_narrow` made.
KERNEL(256) train_product_narrow(
    const u16* a, const u16* b, float* c, u32 m, u32 n, u32 k, u32 slice, u32 form) {
    DYNAMIC_SHARED(shared);
    u16* room = (u16*)shared;
    Square square = square_of<128>(c, m, n, k, slice);
    switch (form & (TURNED_A | TURNED_B)) {
        case 0:
            return multiply_narrow<true, false>(room, a, b, square, m, n, k, form);
        case TURNED_A:
            return multiply_narrow<false, false>(room, a, b, square, m, n, k, form);
        case TURNED_B:
            return multiply_narrow<true, true>(room, a, b, square, m, n, k, form);
        default:
            return multiply_narrow<false, true>(room, a, b, square, m, n, k, form);
    }
}

/// To `[inputs, SIZE + 4]`, whichever way it lies in memory.
template <int SIZE, bool ALONG>
DEVICE void put_f32(float* tile, const float (&part)[STEP_F32 / 2]) {
    const u32 WIDE = (ALONG ? STEP_F32 : SIZE) / 4;
#pragma unroll
    for (u32 v = 0; v < STEP_F32 / 8; v++) {
        u32 i = threadIdx.x + v * 2 * SIZE, row = i / WIDE, column = i % WIDE * 4;
        if (ALONG) {
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                tile[(column + e) * (SIZE + 4) + row] = part[4 * v + e];
            }
        } else {
            floats4 four = {part[4 * v], part[4 * v + 1], part[4 * v + 2], part[4 * v + 3]};
            vector_at<floats4>(tile + row * (SIZE + 4) + column) = four;
        }
    }
}

/// SIZE by SIZE a block of 2 SIZE threads; a thread has twice 4 rows, each of SIZE / 16 columns, four side by side.
template <int SIZE, bool ALONG_A, bool ALONG_B>
DEVICE void multiply_f32(
    float* shared, const float* a, const float* b, const Square& square, u32 m, u32 n, u32 k, u32 form) {
    const u32 ROOM = STEP_F32 * (SIZE + 4);
    u32 first_row = threadIdx.x / 16 * 4, first_column = threadIdx.x % 16 * 4;
    float sum[8][SIZE / 16] = {};
    float part_a[STEP_F32 / 2], part_b[STEP_F32 / 2];
    auto fetch = [&](u32 input) {
        fetch_part<SIZE, STEP_F32, ALONG_A>(
            part_a, a, ALONG_A ? k : m, square.row, m, input, square.end, form & VECTORS_A);
        fetch_part<SIZE, STEP_F32, ALONG_B>(
            part_b, b, ALONG_B ? k : n, square.column, n, input, square.end, form & VECTORS_B);
    };
    auto put = [&](u32 stage) {
        put_f32<SIZE, ALONG_A>(shared + 2 * stage * ROOM, part_a);
        put_f32<SIZE, ALONG_B>(shared + (2 * stage + 1) * ROOM, part_b);
    };
    fetch(square.begin);
    put(0);
    __syncthreads();
    u32 stage = 0;
    for (u32 input = square.begin; input < square.end; input += STEP_F32) {
        bool more = input + STEP_F32 < square.end;
        if (more) {
            fetch(input + STEP_F32);
        }
        const float *tile_a = shared + 2 * stage * ROOM + first_row, *tile_b = shared + (2 * stage + 1) * ROOM + first_column;
#pragma unroll 4
        for (u32 i = 0; i < STEP_F32; i++) {
            float left[8], right[SIZE / 16];
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                floats4 four = vector_at<floats4>(tile_a + i * (SIZE + 4) + h * (SIZE / 2));
                left[4 * h] = four.x;
                left[4 * h + 1] = four.y;
                left[4 * h + 2] = four.z;
                left[4 * h + 3] = four.w;
            }
#pragma unroll
            for (u32 h = 0; h < SIZE / 64; h++) {
                floats4 four = vector_at<floats4>(tile_b + i * (SIZE + 4) + h * 64);
                right[4 * h] = four.x;
                right[4 * h + 1] = four.y;
                right[4 * h + 2] = four.z;
                right[4 * h + 3] = four.w;
            }
#pragma unroll
            for (u32 r = 0; r < 8; r++) {
#pragma unroll
                for (u32 s = 0; s < SIZE / 16; s++) {
                    sum[r][s] = fmaf(left[r], right[s], sum[r][s]);
                }
            }
        }
        stage ^= 1;
        if (more) {
            put(stage);
        }
        __syncthreads();
    }
#pragma unroll
    for (u32 r = 0; r < 8; r++) {
        u32 row = square.row + first_row + r % 4 + r / 4 * (SIZE / 2);
#pragma unroll
        for (u32 s = 0; s < SIZE / 16; s++) {
            u32 column = square.column + first_column + s % 4 + s / 4 * 64;
            if (row < m && column < n) {
                float* at = square.c + (u64)row * n + column;
                *at = form & KEEP ? *at + sum[r][s] : sum[r][s];
            }
        }
    }
}

template <int SIZE>
DEVICE void product_f32(
    float* shared, const float* a, const float* b, float* c, u32 m, u32 n, u32 k, u32 slice, u32 form) {
    Square square = square_of<SIZE>(c, m, n, k, slice);
    switch (form & (TURNED_A | TURNED_B)) {
        case 0:
            return multiply_f32<SIZE, true, false>(shared, a, b, square, m, n, k, form);
        case TURNED_A:
            return multiply_f32<SIZE, false, false>(shared, a, b, square, m, n, k, form);
        case TURNED_B:
            return multiply_f32<SIZE, true, true>(shared, a, b, square, m, n, k, form);
        default:
            return multiply_f32<SIZE, false, true>(shared, a, b, square, m, n, k, form);
    }
}

KERNEL(256) train_product_f32_128(
    const float* a, const float* b, float* c, u32 m, u32 n, u32 k, u32 slice, u32 form) {
    __attribute__((aligned(16))) SHARED float room[4 * STEP_F32 * (128 + 4)];
    product_f32<128>(room, a, b, c, m, n, k, slice, form);
}

KERNEL(128) train_product_f32_64(
    const float* a, const float* b, float* c, u32 m, u32 n, u32 k, u32 slice, u32 form) {
    __attribute__((aligned(16))) SHARED float room[4 * STEP_F32 * (64 + 4)];
    product_f32<64>(room, a, b, c, m, n, k, slice, form);
}

/// `c (+)=` the sum of `slices` parts `[count]`, in order; one element a thread.
KERNEL(256) train_product_sum(const float* parts, float* c, u64 count, u32 slices, u32 keep) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= count) {
        return;
    }
    float sum = 0.0f;
#pragma unroll 4
    for (u32 s = 0; s < slices; s++) {
        sum += parts[s * count + i];
    }
    c[i] = keep ? c[i] + sum : sum;
}
