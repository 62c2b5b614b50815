//! Latent attention: all heads attend to one cached row a token, whose leading columns are also the value.
//!
//! Blocks lie token by token, so that scores are dot products along the row and values are read from the same bytes: a
//! block comes from memory once for all query heads of a task.

use std::ops::Range;

use super::Isa;
use super::attention::{State, soften, tile_rows, weigh};
use super::cache::{CpuCache, LatentBlock, value_stride};
use super::isa::{Element, Simd, dispatch};
use super::pool::{Pool, SyncPtr};
use crate::host::HostTensor;
use crate::{BLOCK_TOKENS, LatentShape, SequenceRows};

/// Rows of a sequence per task.
const ROWS: usize = 16;
/// Query heads per task: enough to make much of a block, few enough that one decoded token keeps several cores busy.
const HEADS: usize = 16;
/// Keys whose scores are summed together.
const KEYS: usize = 4;

/// Causal attention of each row over the latent rows of its own sequence.
pub(super) fn attend(
    pool: &Pool,
    isa: Isa,
    q: &HostTensor,
    cache: &CpuCache,
    layer: usize,
    plan: &[SequenceRows],
    shape: LatentShape,
) -> HostTensor {
    let (heads, width, value_dim) = (shape.heads, cache.latent_dim(), shape.value_dim);
    assert!(q.cols == heads * width && value_dim <= width, "{shape:?}, queries {} wide, latent {width}", q.cols);
    let (stride, value_stride) = (value_stride(width), value_stride(value_dim));
    let mut out = HostTensor::zeros(q.rows, heads * value_dim);
    let mut tasks: Vec<(&SequenceRows, Range<usize>, Range<usize>)> = Vec::new();
    let mut work = 0;
    for sequence in plan {
        let count = sequence.rows.len();
        work += count * (sequence.start + count) * (width + value_dim) * heads;
        for first in (0..count).step_by(ROWS) {
            let rows = first..count.min(first + ROWS);
            tasks.extend((0..heads).step_by(HEADS).map(|h| (sequence, rows.clone(), h..heads.min(h + HEADS))));
        }
    }
    let target = SyncPtr(out.data.as_mut_ptr());
    pool.run(tasks.len(), work, |task, scratch| {
        let (sequence, rows, heads) = &tasks[task];
        let group = heads.len();
        let queries = rows.len() * group;
        let (buffer, (gathered, tile)) = scratch.split(State::len(queries, value_stride), queries * stride);
        let state = State::new(buffer, queries, value_stride);
        tile.resize(4 * BLOCK_TOKENS, 0.0);
        for (query, to) in gathered.chunks_exact_mut(stride).enumerate() {
            let (row, head) = (sequence.rows.start + rows.start + query / group, heads.start + query % group);
            to[..width].copy_from_slice(&q.row(row)[head * width..(head + 1) * width]);
            to[width..].fill(0.0);
        }
        let position = |query: usize| sequence.start + rows.start + query / group;
        let blocks = position(queries - 1) / BLOCK_TOKENS + 1;
        for (b, block) in sequence.block_table[..blocks].iter().enumerate() {
            let block = cache.latent_block(layer, *block as usize);
            let first_key = b * BLOCK_TOKENS;
            // Rows before the block do not see it.
            let mut query = first_key.saturating_sub(sequence.start + rows.start) * group;
            while query < queries {
                let n = tile_rows(isa).min(queries - query);
                let mut counts = [0; 4];
                for (i, count) in counts[..n].iter_mut().enumerate() {
                    *count = BLOCK_TOKENS.min(position(query + i) + 1 - first_key);
                }
                let (q, counts) = (&gathered[query * stride..], &counts[..n]);
                let (max, sum) = (&mut state.max[query..query + n], &mut state.sum[query..query + n]);
                let out = &mut state.out[query * value_stride..(query + n) * value_stride];
                match block {
                    LatentBlock::F32(block) => {
                        update_f32(isa, q, stride, counts, block, shape.scale, max, sum, out, tile);
                    }
                    LatentBlock::Bf16(block) => {
                        update_bf16(isa, q, stride, counts, block, shape.scale, max, sum, out, tile);
                    }
                }
                query += n;
            }
        }
        for query in 0..queries {
            let (row, head) = (sequence.rows.start + rows.start + query / group, heads.start + query % group);
            // SAFETY: tasks own disjoint (row, head) rectangles of out.
            let to = unsafe {
                let at = target.get().add((row * shape.heads + head) * value_dim);
                std::slice::from_raw_parts_mut(at, value_dim)
            };
            state.finish(query, value_stride, to);
        }
    });
    out
}

dispatch! {
    /// Takes a block into the running softmax of `counts.len()` queries, `stride` wide as the block's rows; query m sees
    /// the first `counts[m]` keys. `tile` has room for their scores.
    fn update_f32(
        q: &[f32], stride: usize, counts: &[usize], block: &[f32], scale: f32,
        max: &mut [f32], sum: &mut [f32], out: &mut [f32], tile: &mut [f32],
    ) = update_of_f32
}
dispatch! {
    /// The same with rows in bf16.
    fn update_bf16(
        q: &[f32], stride: usize, counts: &[usize], block: &[u16], scale: f32,
        max: &mut [f32], sum: &mut [f32], out: &mut [f32], tile: &mut [f32],
    ) = update_of_bf16
}

macro_rules! kernel_of {
    ($name:ident, $element:ty) => {
        #[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
        #[inline(always)]
        unsafe fn $name<S: Simd>(
            q: &[f32],
            stride: usize,
            counts: &[usize],
            block: &[$element],
            scale: f32,
            max: &mut [f32],
            sum: &mut [f32],
            out: &mut [f32],
            tile: &mut [f32],
        ) {
            // SAFETY: passed on to the caller.
            unsafe {
                match counts.len() {
                    4 => kernel::<S, $element, 4>(q, stride, counts, block, scale, max, sum, out, tile),
                    3 => kernel::<S, $element, 3>(q, stride, counts, block, scale, max, sum, out, tile),
                    2 => kernel::<S, $element, 2>(q, stride, counts, block, scale, max, sum, out, tile),
                    _ => kernel::<S, $element, 1>(q, stride, counts, block, scale, max, sum, out, tile),
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
    stride: usize,
    counts: &[usize],
    block: &[E],
    scale: f32,
    max: &mut [f32],
    sum: &mut [f32],
    out: &mut [f32],
    scores: &mut [f32],
) {
    /// Vectors of a pass over the values' columns.
    const NV: usize = 4;
    let value_stride = out.len() / M;
    assert!(q.len() >= M * stride && block.len() >= BLOCK_TOKENS * stride && value_stride <= stride);
    assert!(stride.is_multiple_of(S::LANES) && value_stride.is_multiple_of(S::LANES));
    assert!(scores.len() >= M * BLOCK_TOKENS);
    // SAFETY: all offsets below stay inside the lengths asserted above; the caller guarantees the instruction set.
    unsafe {
        for j in (0..BLOCK_TOKENS).step_by(KEYS) {
            let mut dots = [[S::splat(0.0); KEYS]; M];
            let mut d = 0;
            while d < stride {
                let mut keys = [S::splat(0.0); KEYS];
                for (i, key) in keys.iter_mut().enumerate() {
                    *key = E::load::<S>(block.as_ptr().add((j + i) * stride + d));
                }
                for (m, dots) in dots.iter_mut().enumerate() {
                    let q = S::load(q.as_ptr().add(m * stride + d));
                    for (dot, key) in dots.iter_mut().zip(keys) {
                        *dot = S::fma(q, key, *dot);
                    }
                }
                d += S::LANES;
            }
            for (m, dots) in dots.iter().enumerate() {
                for (i, dot) in dots.iter().enumerate() {
                    scores[m * BLOCK_TOKENS + j + i] = S::sum(*dot) * scale;
                }
            }
        }
        soften::<S, M>(counts, max, sum, out, value_stride, scores);
        let mut d = 0;
        while d + NV * S::LANES <= value_stride {
            weigh::<S, E, M, NV>(counts, scores, block.as_ptr().add(d), stride, out.as_mut_ptr().add(d), value_stride);
            d += NV * S::LANES;
        }
        while d < value_stride {
            weigh::<S, E, M, 1>(counts, scores, block.as_ptr().add(d), stride, out.as_mut_ptr().add(d), value_stride);
            d += S::LANES;
        }
    }
}
