//! Sparse attention: scores of all cached index keys, the highest of them, attention over those.
//!
//! The sum over the index heads is made while a block of 64 keys is scored, so scores are one number per query and key, and
//! only of the queries that are being selected for.

use super::attention::{State, tile_rows, update};
use super::cache::{CpuCache, KvBlock, value_stride};
use super::columns::Row;
use super::isa::{Element, Simd, dispatch};
use super::pool::{Pool, SyncPtr};
use super::{Isa, cache, columns};
use crate::host::HostTensor;
use crate::{AttentionShape, BLOCK_TOKENS, IndexShape, KvDtype, SequenceRows, UNSELECTED, select};

/// Scores that are held at once: 16 MiB.
const SCORES: usize = 1 << 22;
/// Blocks that a task scores: few, so that all threads have some of a single token's.
const BLOCKS: usize = 8;

/// A query row: its row in the step, its sequence, how many keys it sees.
type Query<'a> = (usize, &'a SequenceRows, usize);

/// Positions of the keys that each row attends to: `[rows * top_k]`, ascending, then [`UNSELECTED`].
#[allow(clippy::too_many_arguments, reason = "an operation's operands")]
pub(super) fn select(
    pool: &Pool,
    isa: Isa,
    q: &HostTensor,
    weights: &HostTensor,
    cache: &CpuCache,
    layer: usize,
    plan: &[SequenceRows],
    shape: IndexShape,
) -> Vec<u32> {
    let mut selected = vec![UNSELECTED; q.rows * shape.top_k];
    let mut queries: Vec<Query<'_>> = Vec::new();
    for sequence in plan {
        for (i, row) in sequence.rows.clone().enumerate() {
            let keys = sequence.start + i + 1;
            match keys <= shape.top_k {
                true => select::highest(&vec![0.0; keys], &mut selected[row * shape.top_k..(row + 1) * shape.top_k]),
                false => queries.push((row, sequence, keys)),
            }
        }
    }
    let mut rest = queries.as_slice();
    let mut scores: Vec<f32> = Vec::new();
    while let Some(first) = rest.first() {
        // Rows of a group have the same stride, that of its longest.
        let mut stride = first.2.next_multiple_of(BLOCK_TOKENS);
        let mut count = 1;
        while let Some(query) = rest.get(count) {
            let longest = stride.max(query.2.next_multiple_of(BLOCK_TOKENS));
            if longest * (count + 1) > SCORES {
                break;
            }
            (stride, count) = (longest, count + 1);
        }
        let (group, others) = rest.split_at(count);
        rest = others;
        scores.resize(scores.len().max(count * stride), 0.0);
        let pieces = (stride / BLOCK_TOKENS).div_ceil(BLOCKS);
        let target = SyncPtr(scores.as_mut_ptr());
        let work = count * stride * shape.heads * shape.head_dim;
        pool.run(count * pieces, work, |task, _| {
            let (row, sequence, keys) = group[task / pieces];
            let first = task % pieces * BLOCKS;
            let last = keys.div_ceil(BLOCK_TOKENS).min(first + BLOCKS);
            for block in first..last {
                let at = task / pieces * stride + block * BLOCK_TOKENS;
                // SAFETY: a task writes the blocks first..last of its own query's scores only.
                let out = unsafe { std::slice::from_raw_parts_mut(target.get().add(at), BLOCK_TOKENS) };
                let (q, w) = (q.row(row), weights.row(row));
                match cache.index_block(layer, sequence.block_table[block] as usize) {
                    cache::IndexBlock::F32(keys) => score_f32(isa, q, w, keys, shape.scale, out),
                    cache::IndexBlock::Bf16(keys) => score_bf16(isa, q, w, keys, shape.scale, out),
                }
            }
        });
        let chosen = SyncPtr(selected.as_mut_ptr());
        let all = &scores;
        pool.run(count, count * stride * 8, |task, _| {
            let (row, _, keys) = group[task];
            // SAFETY: each row belongs to one task.
            let out = unsafe { std::slice::from_raw_parts_mut(chosen.get().add(row * shape.top_k), shape.top_k) };
            select::highest(&all[task * stride..task * stride + keys], out);
        });
    }
    selected
}

dispatch! {
    /// `out[s] = scale * sum over heads h of w[h] * max(0, q[h] . key[s])` for the 64 keys of a block, `[width, 64]`.
    fn score_f32(q: &[f32], w: &[f32], keys: &[f32], scale: f32, out: &mut [f32]) = score_of_f32
}
dispatch! {
    /// The same with bf16 keys.
    fn score_bf16(q: &[f32], w: &[f32], keys: &[u16], scale: f32, out: &mut [f32]) = score_of_bf16
}

#[inline(always)]
unsafe fn score_of_f32<S: Simd>(q: &[f32], w: &[f32], keys: &[f32], scale: f32, out: &mut [f32]) {
    // SAFETY: passed on to the caller.
    unsafe { score::<S, f32>(q, w, keys, scale, out) }
}

#[inline(always)]
unsafe fn score_of_bf16<S: Simd>(q: &[f32], w: &[f32], keys: &[u16], scale: f32, out: &mut [f32]) {
    // SAFETY: passed on to the caller.
    unsafe { score::<S, u16>(q, w, keys, scale, out) }
}

/// Vectors of keys that are scored together.
const NV: usize = 4;

#[inline(always)]
unsafe fn score<S: Simd, E: Element>(q: &[f32], w: &[f32], keys: &[E], scale: f32, out: &mut [f32]) {
    let width = q.len() / w.len();
    assert!(keys.len() >= width * BLOCK_TOKENS && out.len() >= BLOCK_TOKENS && q.len() == width * w.len());
    // SAFETY: offsets stay inside the lengths asserted above; the caller guarantees the instruction set.
    unsafe {
        let mut j = 0;
        while j < BLOCK_TOKENS {
            let mut sums = [S::splat(0.0); NV];
            let keys = keys.as_ptr().add(j);
            // As many heads at a time as the registers have room for: they share the loads of keys.
            let mut heads = w.chunks_exact(if S::LANES == 16 { 4 } else { 2 });
            let mut q = q.as_ptr();
            for w in &mut heads {
                match w {
                    [a, b, c, d] => add_heads::<S, E, 4>(q, [*a, *b, *c, *d], width, keys, &mut sums),
                    [a, b] => add_heads::<S, E, 2>(q, [*a, *b], width, keys, &mut sums),
                    _ => {}
                }
                q = q.add(w.len() * width);
            }
            for w in heads.remainder() {
                add_heads::<S, E, 1>(q, [*w], width, keys, &mut sums);
                q = q.add(width);
            }
            for (v, sum) in sums.into_iter().enumerate() {
                S::store(out.as_mut_ptr().add(j + v * S::LANES), S::mul(sum, S::splat(scale)));
            }
            j += NV * S::LANES;
        }
    }
}

/// `sums += w[h] * max(0, q[h] . key)` for H heads in their order.
#[inline(always)]
unsafe fn add_heads<S: Simd, E: Element, const H: usize>(
    q: *const f32,
    w: [f32; H],
    width: usize,
    keys: *const E,
    sums: &mut [S::V; NV],
) {
    // SAFETY: the caller guarantees H heads of q and `width` rows of 64 keys, NV vectors of them readable.
    unsafe {
        let zero = S::splat(0.0);
        let mut dots = [[zero; NV]; H];
        for d in 0..width {
            let mut key = [zero; NV];
            for (v, key) in key.iter_mut().enumerate() {
                *key = E::load::<S>(keys.add(d * BLOCK_TOKENS + v * S::LANES));
            }
            for (h, dots) in dots.iter_mut().enumerate() {
                let q = S::splat(*q.add(h * width + d));
                for (dot, key) in dots.iter_mut().zip(key) {
                    *dot = S::fma(q, key, *dot);
                }
            }
        }
        for (w, dots) in w.into_iter().zip(dots) {
            for (sum, dot) in sums.iter_mut().zip(dots) {
                *sum = S::fma(S::splat(w), S::max(dot, zero), *sum);
            }
        }
    }
}

/// Attention of each row over its selected positions, gathered in blocks of 64 in ascending order: with everything
/// selected the blocks are those of dense attention, and so are the results, bit for bit.
#[allow(clippy::too_many_arguments, reason = "an operation's operands")]
pub(super) fn attend(
    pool: &Pool,
    isa: Isa,
    q: &HostTensor,
    cache: &CpuCache,
    layer: usize,
    plan: &[SequenceRows],
    shape: AttentionShape,
    selected: &[u32],
) -> HostTensor {
    let (hd, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let stride = value_stride(hd);
    let top_k = selected.len() / q.rows.max(1);
    let mut out = HostTensor::zeros(q.rows, q.cols);
    let rows: Vec<(usize, &SequenceRows)> =
        plan.iter().flat_map(|sequence| sequence.rows.clone().map(move |row| (row, sequence))).collect();
    let target = SyncPtr(out.data.as_mut_ptr());
    let work = rows.len() * top_k * hd * 2 * shape.heads;
    pool.run(rows.len() * shape.kv_heads, work, |task, scratch| {
        let (row, sequence) = rows[task / shape.kv_heads];
        let kv_head = task % shape.kv_heads;
        let (buffer, (packed, tile)) = scratch.split(State::len(group, stride), BLOCK_TOKENS * (hd + stride));
        let mut state = State::new(buffer, group, stride);
        let places = &selected[row * top_k..(row + 1) * top_k];
        let places = &places[..places.partition_point(|position| *position != UNSELECTED)];
        let positions = places.iter().map(|position| *position as usize);
        let (q, table) = (&q.row(row)[kv_head * group * hd..][..group * hd], &sequence.block_table);
        if !attend_in_place(isa, q, hd, shape.scale, cache, layer, kv_head, table, positions, &mut state, tile) {
            packed.fill(0.0);
            let (keys, values) = packed.split_at_mut(hd * BLOCK_TOKENS);
            for positions in places.chunks(BLOCK_TOKENS) {
                let token = |i: usize| {
                    let token = positions[i] as usize;
                    let block = sequence.block_table[token / BLOCK_TOKENS] as usize;
                    (cache.block(layer, block, kv_head), token % BLOCK_TOKENS)
                };
                gather(isa, positions.len(), token, hd, keys, values);
                let block = KvBlock::F32 { keys, values };
                for head in (0..group).step_by(tile_rows(isa)) {
                    let counts = &[positions.len(); 4][..tile_rows(isa).min(group - head)];
                    update(isa, &q[head * hd..], hd, head, counts, block, hd, shape.scale, &mut state, tile);
                }
            }
        }
        for head in 0..group {
            let at = row * shape.heads * hd + (kv_head * group + head) * hd;
            // SAFETY: tasks own disjoint (row, key head) rectangles of out.
            let to = unsafe { std::slice::from_raw_parts_mut(target.get().add(at), hd) };
            state.finish(head, stride, to);
        }
    });
    out
}

/// Attention of one token's heads `q`, one behind the other, to the tokens `positions` of a sequence where their rows lie;
/// false where these have to be gathered.
#[allow(clippy::too_many_arguments, reason = "an operation's operands")]
pub(super) fn attend_in_place(
    isa: Isa,
    q: &[f32],
    hd: usize,
    scale: f32,
    cache: &CpuCache,
    layer: usize,
    kv_head: usize,
    block_table: &[u32],
    positions: impl Iterator<Item = usize>,
    state: &mut State<'_>,
    tile: &mut Vec<f32>,
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 && cache.token_major() && cache.dtype() != KvDtype::Int8 && hd.is_multiple_of(32) {
        super::rows_avx512::attend(q, hd, scale, cache, layer, kv_head, block_table, positions, state, tile);
        return true;
    }
    let _ = (isa, q, hd, scale, cache, layer, kv_head, block_table, positions, state, tile);
    false
}

/// Packs the keys and values of `count` tokens, each given as its block, of token-major keys, and its slot there.
pub(super) fn gather<'a>(
    isa: Isa,
    count: usize,
    token: impl Fn(usize) -> (KvBlock<'a>, usize),
    hd: usize,
    keys: &mut [f32],
    values: &mut [f32],
) {
    const ONE_TYPE: &str = "a cache has one type";
    let stride = value_stride(hd);
    if count == 0 {
        return;
    }
    match token(0).0 {
        KvBlock::F32 { .. } => {
            let row = |i| match token(i) {
                (KvBlock::F32 { keys, values }, slot) => row_of(keys, values, [1.0; 2], slot, hd, stride),
                _ => unreachable!("{ONE_TYPE}"),
            };
            columns::pack(isa, count, row, hd, keys, values);
        }
        KvBlock::Bf16 { .. } => {
            let row = |i| match token(i) {
                (KvBlock::Bf16 { keys, values }, slot) => row_of(keys, values, [1.0; 2], slot, hd, stride),
                _ => unreachable!("{ONE_TYPE}"),
            };
            columns::pack(isa, count, row, hd, keys, values);
        }
        KvBlock::Int8 { .. } => {
            let row = |i| match token(i) {
                (KvBlock::Int8 { keys, values, scales }, slot) => {
                    row_of(keys, values, [scales[slot], scales[BLOCK_TOKENS + slot]], slot, hd, stride)
                }
                _ => unreachable!("{ONE_TYPE}"),
            };
            columns::pack(isa, count, row, hd, keys, values);
        }
    }
}

/// The key and the value in `slot` of a block.
fn row_of<'a, T>(
    keys: &'a [T],
    values: &'a [T],
    scales: [f32; 2],
    slot: usize,
    hd: usize,
    stride: usize,
) -> (Row<'a, T>, Row<'a, T>) {
    let key = Row { elements: &keys[slot * hd..(slot + 1) * hd], scale: scales[0] };
    (key, Row { elements: &values[slot * stride..(slot + 1) * stride], scale: scales[1] })
}
