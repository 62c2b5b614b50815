//! Attention in tiles: blocks of 64 keys from left to right with a running maximum and sum, never a score matrix.
//!
//! A block is keys transposed `[head_dim, 64]` and values `[64, stride]`, so that scores and weighted values both run in
//! vectors without sums across lanes. The KV cache stores its blocks that way; the vision tower's are packed as they are
//! needed. What a query row yields depends on its own block sequence only: rows of a tile merely share loads.

#![allow(clippy::needless_range_loop, reason = "a tile indexes several arrays by the same row or column")]

use std::ops::Range;

use super::Isa;
use super::cache::{CpuCache, KvBlock, value_stride};
use super::isa::{Element, Simd, dispatch};
use super::pool::{Pool, SyncPtr};
use super::sparse;
use crate::host::HostTensor;
use crate::{AttentionShape, BLOCK_TOKENS, SequenceRows, Span};

/// Vectors of a pass over a block's keys or a value's columns.
const NV: usize = 4;
/// Query rows of a task that shares packed blocks.
const QUERIES: usize = 512;
/// Rows of a sequence per task in causal attention.
const ROWS: usize = 64;

/// Running softmax of some query rows: maximum and sum per row, weighted values `[rows, stride]`.
pub(super) struct State<'a> {
    pub(super) max: &'a mut [f32],
    pub(super) sum: &'a mut [f32],
    pub(super) out: &'a mut [f32],
}

impl<'a> State<'a> {
    pub(super) fn new(buffer: &'a mut [f32], rows: usize, stride: usize) -> Self {
        let (max, rest) = buffer.split_at_mut(rows);
        let (sum, out) = rest.split_at_mut(rows);
        let out = &mut out[..rows * stride];
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        out.fill(0.0);
        Self { max, sum, out }
    }

    pub(super) fn len(rows: usize, stride: usize) -> usize {
        rows * (stride + 2)
    }

    /// The finished row, written to `to`.
    pub(super) fn finish(&self, row: usize, stride: usize, to: &mut [f32]) {
        let scale = 1.0 / self.sum[row];
        for (to, value) in to.iter_mut().zip(&self.out[row * stride..]) {
            *to = value * scale;
        }
    }
}

/// Bidirectional attention per span.
pub(super) fn spans(
    pool: &Pool,
    isa: Isa,
    q: &HostTensor,
    k: &HostTensor,
    v: &HostTensor,
    shape: AttentionShape,
    spans: &[Span],
) -> HostTensor {
    let (hd, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let stride = value_stride(hd);
    let mut out = HostTensor::zeros(q.rows, q.cols);
    let mut tasks: Vec<(Range<usize>, Range<usize>, usize)> = Vec::new();
    let mut work = 0;
    for span in spans {
        work += span.queries.len() * span.keys.len() * hd * 2 * shape.heads;
        for first in span.queries.clone().step_by(QUERIES) {
            let queries = first..span.queries.end.min(first + QUERIES);
            tasks.extend((0..shape.heads).map(|head| (queries.clone(), span.keys.clone(), head)));
        }
    }
    let target = SyncPtr(out.data.as_mut_ptr());
    pool.run(tasks.len(), work, |task, scratch| {
        let (queries, keys, head) = &tasks[task];
        let rows = queries.len();
        let (buffer, (packed, tile)) = scratch.split(State::len(rows, stride), BLOCK_TOKENS * (hd + stride));
        let mut state = State::new(buffer, rows, stride);
        let (packed_keys, packed_values) = packed.split_at_mut(hd * BLOCK_TOKENS);
        let kv_at = head / group * hd;
        let q = &q.data[queries.start * q.cols + head * hd..];
        for first in keys.clone().step_by(BLOCK_TOKENS) {
            let count = BLOCK_TOKENS.min(keys.end - first);
            pack(k, v, first, count, kv_at, hd, packed_keys, packed_values);
            let block = KvBlock::F32 { keys: packed_keys, values: packed_values };
            for row in (0..rows).step_by(tile_rows(isa)) {
                let counts = &[count; 4][..tile_rows(isa).min(rows - row)];
                let q = &q[row * shape.heads * hd..];
                update(isa, q, shape.heads * hd, row, counts, block, hd, shape.scale, &mut state, tile);
            }
        }
        for row in 0..rows {
            let at = (queries.start + row) * shape.heads * hd + head * hd;
            // SAFETY: tasks own disjoint (query rows, head) rectangles of out.
            let to = unsafe { std::slice::from_raw_parts_mut(target.get().add(at), hd) };
            state.finish(row, stride, to);
        }
    });
    out
}

/// Keys transposed and values padded, zeros behind `count`.
#[allow(clippy::too_many_arguments, reason = "two operands and their place")]
fn pack(
    k: &HostTensor,
    v: &HostTensor,
    first: usize,
    count: usize,
    column: usize,
    hd: usize,
    keys: &mut [f32],
    values: &mut [f32],
) {
    let stride = value_stride(hd);
    if count < BLOCK_TOKENS {
        keys.fill(0.0);
    }
    values.fill(0.0);
    for i in 0..count {
        let k = &k.row(first + i)[column..column + hd];
        for (d, value) in k.iter().enumerate() {
            keys[d * BLOCK_TOKENS + i] = *value;
        }
        values[i * stride..i * stride + hd].copy_from_slice(&v.row(first + i)[column..column + hd]);
    }
}

/// Causal attention over the cache.
pub(super) fn paged(
    pool: &Pool,
    isa: Isa,
    q: &HostTensor,
    cache: &CpuCache,
    layer: usize,
    plan: &[SequenceRows],
    shape: AttentionShape,
) -> HostTensor {
    let (hd, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let stride = value_stride(hd);
    let mut out = HostTensor::zeros(q.rows, q.cols);
    let mut tasks: Vec<(&SequenceRows, Range<usize>, usize)> = Vec::new();
    let mut work = 0;
    for sequence in plan {
        let count = sequence.rows.len();
        work += count * (sequence.start + count) * hd * 2 * shape.heads;
        for first in (0..count).step_by(ROWS) {
            let rows = first..count.min(first + ROWS);
            tasks.extend((0..shape.kv_heads).map(|kv_head| (sequence, rows.clone(), kv_head)));
        }
    }
    let target = SyncPtr(out.data.as_mut_ptr());
    pool.run(tasks.len(), work, |task, scratch| {
        let (sequence, rows, kv_head) = &tasks[task];
        let queries = rows.len() * group;
        let turned = if cache.token_major() { BLOCK_TOKENS * (hd + stride) } else { 0 };
        let (buffer, (second, tile)) = scratch.split(State::len(queries, stride), queries * hd + turned);
        let (gathered, turned) = second.split_at_mut(queries * hd);
        let mut state = State::new(buffer, queries, stride);
        // Queries in order of their position, the heads of a group side by side: they share a key head.
        for (i, row) in rows.clone().enumerate() {
            let from = &q.row(sequence.rows.start + row)[kv_head * group * hd..(kv_head + 1) * group * hd];
            gathered[i * group * hd..(i + 1) * group * hd].copy_from_slice(from);
        }
        let position = |query: usize| sequence.start + rows.start + query / group;
        // Turning blocks for one token's heads costs more than these do.
        let q_heads = &gathered[..queries * hd];
        let (table, positions) = (&sequence.block_table, 0..position(queries - 1) + 1);
        let done = rows.len() == 1
            && sparse::attend_in_place(
                isa,
                q_heads,
                hd,
                shape.scale,
                cache,
                layer,
                *kv_head,
                table,
                positions,
                &mut state,
                tile,
            );
        let blocks = if done { 0 } else { position(queries - 1) / BLOCK_TOKENS + 1 };
        if !done {
            turned.fill(0.0);
        }
        for (b, block) in sequence.block_table[..blocks].iter().enumerate() {
            let mut block = cache.block(layer, *block as usize, *kv_head);
            let first_key = b * BLOCK_TOKENS;
            if cache.token_major() {
                let (keys, values) = turned.split_at_mut(BLOCK_TOKENS * hd);
                let count = BLOCK_TOKENS.min(position(queries - 1) + 1 - first_key);
                sparse::gather(isa, count, |i| (block, i), hd, keys, values);
                block = KvBlock::F32 { keys, values };
            }
            // Rows before the block do not see it.
            let mut query = first_key.saturating_sub(sequence.start + rows.start) * group;
            while query < queries {
                let tile_len = tile_rows(isa).min(queries - query);
                let mut counts = [0; 4];
                for (i, count) in counts[..tile_len].iter_mut().enumerate() {
                    *count = BLOCK_TOKENS.min(position(query + i) + 1 - first_key);
                }
                let q = &gathered[query * hd..];
                update(isa, q, hd, query, &counts[..tile_len], block, hd, shape.scale, &mut state, tile);
                query += tile_len;
            }
        }
        for query in 0..queries {
            let row = sequence.rows.start + rows.start + query / group;
            let at = row * shape.heads * hd + (kv_head * group + query % group) * hd;
            // SAFETY: tasks own disjoint (row, head) rectangles of out.
            let to = unsafe { std::slice::from_raw_parts_mut(target.get().add(at), hd) };
            state.finish(query, stride, to);
        }
    });
    out
}

/// Query rows of a tile: as many as fit the registers.
pub(super) fn tile_rows(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 => 4,
        Isa::Avx2 | Isa::Portable => 2,
    }
}

/// Takes one block into the state of the query rows `row..row+counts.len()`; row i sees the block's first `counts[i]` keys.
#[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
pub(super) fn update(
    isa: Isa,
    q: &[f32],
    ldq: usize,
    row: usize,
    counts: &[usize],
    block: KvBlock<'_>,
    hd: usize,
    scale: f32,
    state: &mut State<'_>,
    tile: &mut Vec<f32>,
) {
    let stride = value_stride(hd);
    let n = counts.len();
    tile.resize(4 * BLOCK_TOKENS, 0.0);
    let (max, sum) = (&mut state.max[row..row + n], &mut state.sum[row..row + n]);
    let out = &mut state.out[row * stride..(row + n) * stride];
    match block {
        KvBlock::F32 { keys, values } => update_f32(isa, q, ldq, counts, keys, values, hd, scale, max, sum, out, tile),
        KvBlock::Bf16 { keys, values } => {
            update_bf16(isa, q, ldq, counts, keys, values, hd, scale, max, sum, out, tile)
        }
        KvBlock::Int8 { .. } => unreachable!("rows in eight bits are gathered first"),
    }
}

dispatch! {
    fn update_f32(
        q: &[f32], ldq: usize, counts: &[usize], keys: &[f32], values: &[f32], hd: usize, scale: f32,
        max: &mut [f32], sum: &mut [f32], out: &mut [f32], tile: &mut [f32],
    ) = update_of_f32
}
dispatch! {
    fn update_bf16(
        q: &[f32], ldq: usize, counts: &[usize], keys: &[u16], values: &[u16], hd: usize, scale: f32,
        max: &mut [f32], sum: &mut [f32], out: &mut [f32], tile: &mut [f32],
    ) = update_of_bf16
}

macro_rules! kernel_of {
    ($name:ident, $element:ty) => {
        #[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
        #[inline(always)]
        unsafe fn $name<S: Simd>(
            q: &[f32],
            ldq: usize,
            counts: &[usize],
            keys: &[$element],
            values: &[$element],
            hd: usize,
            scale: f32,
            max: &mut [f32],
            sum: &mut [f32],
            out: &mut [f32],
            tile: &mut [f32],
        ) {
            // SAFETY: passed on to the caller.
            unsafe {
                match counts.len() {
                    4 => kernel::<S, $element, 4>(q, ldq, counts, keys, values, hd, scale, max, sum, out, tile),
                    3 => kernel::<S, $element, 3>(q, ldq, counts, keys, values, hd, scale, max, sum, out, tile),
                    2 => kernel::<S, $element, 2>(q, ldq, counts, keys, values, hd, scale, max, sum, out, tile),
                    _ => kernel::<S, $element, 1>(q, ldq, counts, keys, values, hd, scale, max, sum, out, tile),
                }
            }
        }
    };
}
kernel_of!(update_of_f32, f32);
kernel_of!(update_of_bf16, u16);

#[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
#[inline(always)]
unsafe fn kernel<S: Simd, E: Element, const M: usize>(
    q: &[f32],
    ldq: usize,
    counts: &[usize],
    keys: &[E],
    values: &[E],
    hd: usize,
    scale: f32,
    max: &mut [f32],
    sum: &mut [f32],
    out: &mut [f32],
    scores: &mut [f32],
) {
    let stride = value_stride(hd);
    assert!(q.len() >= (M - 1) * ldq + hd && keys.len() >= hd * BLOCK_TOKENS && values.len() >= BLOCK_TOKENS * stride);
    assert!(counts.len() == M && max.len() == M && sum.len() == M && out.len() == M * stride);
    assert!(scores.len() >= M * BLOCK_TOKENS);
    // SAFETY: all offsets below stay inside the lengths asserted above; the caller guarantees the instruction set.
    unsafe {
        // scores[m][j] = scale * q[m] . key j
        let mut j = 0;
        while j < BLOCK_TOKENS {
            let mut acc = [[S::splat(0.0); NV]; M];
            for d in 0..hd {
                let mut k = [S::splat(0.0); NV];
                for (v, k) in k.iter_mut().enumerate() {
                    *k = E::load::<S>(keys.as_ptr().add(d * BLOCK_TOKENS + j + v * S::LANES));
                }
                for m in 0..M {
                    let q = S::splat(*q.as_ptr().add(m * ldq + d));
                    for v in 0..NV {
                        acc[m][v] = S::fma(q, k[v], acc[m][v]);
                    }
                }
            }
            for m in 0..M {
                for v in 0..NV {
                    let to = scores.as_mut_ptr().add(m * BLOCK_TOKENS + j + v * S::LANES);
                    S::store(to, S::mul(acc[m][v], S::splat(scale)));
                }
            }
            j += NV * S::LANES;
        }
        soften::<S, M>(counts, max, sum, out, stride, scores);
        // out[m] += sum over j of p[m][j] * value j
        let mut d = 0;
        while d < stride {
            let (left, values, out) = ((stride - d) / S::LANES, values.as_ptr().add(d), out.as_mut_ptr().add(d));
            // Heads of the vision tower, 72 wide, are five or ten vectors.
            d += S::LANES
                * match left {
                    _ if left % 5 == 0 => {
                        weigh::<S, E, M, 5>(counts, scores, values, stride, out, stride);
                        5
                    }
                    NV.. => {
                        weigh::<S, E, M, NV>(counts, scores, values, stride, out, stride);
                        NV
                    }
                    _ => {
                        weigh::<S, E, M, 1>(counts, scores, values, stride, out, stride);
                        1
                    }
                };
        }
    }
}

/// The running softmax takes in the scores of a block: row m's first `counts[m]` become weights, the others 0, and its sum
/// and its row of `out`, `stride` wide, follow the new maximum.
#[inline(always)]
pub(super) unsafe fn soften<S: Simd, const M: usize>(
    counts: &[usize],
    max: &mut [f32],
    sum: &mut [f32],
    out: &mut [f32],
    stride: usize,
    scores: &mut [f32],
) {
    assert!(counts.len() == M && max.len() == M && sum.len() == M && out.len() == M * stride);
    assert!(scores.len() >= M * BLOCK_TOKENS && stride.is_multiple_of(S::LANES));
    // SAFETY: all offsets below stay inside the lengths asserted above; the caller guarantees the instruction set.
    unsafe {
        for m in 0..M {
            let row = &mut scores[m * BLOCK_TOKENS..(m + 1) * BLOCK_TOKENS];
            row[counts[m]..].fill(f32::NEG_INFINITY);
            let mut top = S::splat(f32::NEG_INFINITY);
            let mut i = 0;
            while i < BLOCK_TOKENS {
                top = S::max(S::load(row.as_ptr().add(i)), top);
                i += S::LANES;
            }
            let new_max = f32::max(max[m], S::max_lane(top));
            let mut total = S::splat(0.0);
            let mut i = 0;
            while i < BLOCK_TOKENS {
                let p = S::exp(S::sub(S::load(row.as_ptr().add(i)), S::splat(new_max)));
                S::store(row.as_mut_ptr().add(i), p);
                total = S::add(total, p);
                i += S::LANES;
            }
            let rescale = match max[m] {
                f32::NEG_INFINITY => 0.0,
                // What is usual after the first blocks, without its exponential and its pass over `out`.
                old if old == new_max => {
                    sum[m] += S::sum(total);
                    continue;
                }
                old => (old - new_max).exp(),
            };
            max[m] = new_max;
            sum[m] = sum[m] * rescale + S::sum(total);
            let mut i = 0;
            while i < stride {
                let to = out.as_mut_ptr().add(m * stride + i);
                S::store(to, S::mul(S::load(to), S::splat(rescale)));
                i += S::LANES;
            }
        }
    }
}

/// `out[m] += sum over j < counts[m] of scores[m][j] * value j`, V vectors wide; rows of values and of out are `ldv` and `ldo`
/// apart.
///
/// Values that a row does not see are left out of its sum, since a weight of zero does not take away NaN and infinity: a
/// block's unused slots hold what its last owner wrote.
#[inline(always)]
pub(super) unsafe fn weigh<S: Simd, E: Element, const M: usize, const V: usize>(
    counts: &[usize],
    scores: &[f32],
    values: *const E,
    ldv: usize,
    out: *mut f32,
    ldo: usize,
) {
    let (mut all, mut any) = (BLOCK_TOKENS, 0);
    for count in counts {
        (all, any) = (all.min(*count), any.max(*count));
    }
    // SAFETY: the caller guarantees M counts, M rows of scores and of out, V vectors wide, and as many rows of values as the
    // largest count.
    unsafe {
        let mut acc = [[S::splat(0.0); V]; M];
        for (m, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                *acc = S::load(out.add(m * ldo + v * S::LANES));
            }
        }
        for j in 0..all {
            let value = value_at::<S, E, V>(values.add(j * ldv));
            for m in 0..M {
                let p = S::splat(*scores.as_ptr().add(m * BLOCK_TOKENS + j));
                for v in 0..V {
                    acc[m][v] = S::fma(p, value[v], acc[m][v]);
                }
            }
        }
        for j in all..any {
            let value = value_at::<S, E, V>(values.add(j * ldv));
            for m in 0..M {
                if j < counts[m] {
                    let p = S::splat(*scores.as_ptr().add(m * BLOCK_TOKENS + j));
                    for v in 0..V {
                        acc[m][v] = S::fma(p, value[v], acc[m][v]);
                    }
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            for (v, acc) in acc.iter().enumerate() {
                S::store(out.add(m * ldo + v * S::LANES), *acc);
            }
        }
    }
}

/// V vectors of a value.
#[inline(always)]
unsafe fn value_at<S: Simd, E: Element, const V: usize>(from: *const E) -> [S::V; V] {
    // SAFETY: the caller guarantees V vectors and the instruction set.
    unsafe {
        let mut value = [S::splat(0.0); V];
        for (v, value) in value.iter_mut().enumerate() {
            *value = E::load::<S>(from.add(v * S::LANES));
        }
        value
    }
}
