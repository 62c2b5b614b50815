//! Products of plain f32 matrices whose operands are rounded to bf16 first and whose sums are f32: mixed precision.
//!
//! Pairs of neighbours along k lie together, as `vdpbf16ps` takes them. Both operands are packed. The order of every sum is
//! fixed by k as in [`super::matmul`]; machines without the instruction round the same way but add in the order of f32 products.

#![allow(clippy::needless_range_loop, reason = "a tile indexes several arrays by the same row or column")]

use super::Isa;
use super::matmul::{Matrix, Old, check, in_chunks, matmul};
use crate::weight::{bf16_to_f32, f32_to_bf16};

/// `c (+)= a b` with both rounded to bf16, on the threads of the current `rayon` pool; c is `[a.rows, b.cols]`.
pub fn par_matmul_bf16(isa: Isa, a: Matrix<'_>, b: Matrix<'_>, c: &mut [f32], old: Old) {
    check(&a, &b, c);
    if c.is_empty() {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if has_bf16(isa) && a.cols > 0 {
        return in_chunks(a, b.cols, c, |first, c| avx512::rows(a, first, b, c, old));
    }
    let (a_values, b_values) = (rounded(a.data), rounded(b.data));
    let (a, b) = (Matrix { data: &a_values, ..a }, Matrix { data: &b_values, ..b });
    in_chunks(a, b.cols, c, |first, c| matmul(isa, a.below(first, c.len() / b.cols), b, c, old));
}

/// Whether the machine multiplies bf16 in pairs.
fn has_bf16(isa: Isa) -> bool {
    #[cfg(target_arch = "x86_64")]
    return isa == Isa::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    return isa != Isa::Portable;
}

/// To the nearest bf16, halves to even.
pub(super) fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|value| bf16_to_f32(f32_to_bf16(*value))).collect()
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;
    use std::cell::RefCell;

    use super::{Matrix, Old};

    /// Pairs of k whose products with a block of columns stay in the second-level cache.
    const PAIRS: usize = 384;
    /// Columns of a packed block.
    const N_BLOCK: usize = 256;
    /// Rows of a tile.
    const MR: usize = 12;
    /// Columns of a tile: two vectors.
    const NR: usize = 32;
    /// 32-bit lanes of a vector: as many pairs.
    const LANES: usize = 16;

    thread_local! {
        static PACKED: RefCell<[Vec<u32>; 2]> = RefCell::default();
    }

    /// Rows of the result from `first` on, as many as c holds. The machine has `avx512bf16`.
    pub(super) fn rows(a: Matrix<'_>, first: usize, b: Matrix<'_>, c: &mut [f32], old: Old) {
        PACKED.with_borrow_mut(|[packed_a, packed_b]| {
            packed_a.resize(LANES * PAIRS, 0);
            packed_b.resize(N_BLOCK * PAIRS, 0);
            for n0 in (0..b.cols).step_by(N_BLOCK) {
                for k0 in (0..a.cols).step_by(2 * PAIRS) {
                    let block = Block { first, n0, nb: N_BLOCK.min(b.cols - n0), k0, kb: (2 * PAIRS).min(a.cols - k0) };
                    let add = old == Old::Keep || k0 > 0;
                    // SAFETY: the caller has asked for the instructions.
                    unsafe { multiply(&a, &b, &block, packed_a, packed_b, c, add) };
                }
            }
        });
    }

    /// The part of a product: columns `n0..n0+nb` of the result, summed over `k0..k0+kb`.
    struct Block {
        first: usize,
        n0: usize,
        nb: usize,
        k0: usize,
        kb: usize,
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn multiply(
        a: &Matrix<'_>,
        b: &Matrix<'_>,
        block: &Block,
        packed_a: &mut [u32],
        packed_b: &mut [u32],
        c: &mut [f32],
        add: bool,
    ) {
        let pairs = block.kb.div_ceil(2);
        for (panel, to) in packed_b.chunks_mut(NR * pairs).take(block.nb.div_ceil(NR)).enumerate() {
            let width = NR.min(block.nb - panel * NR);
            let col = block.n0 + panel * NR;
            match b.col_stride {
                1 => {
                    interleave(b.data, block.k0 * b.row_stride + col, b.row_stride, block.kb, width.min(LANES), to, NR);
                    let rest = width.saturating_sub(LANES);
                    let at = block.k0 * b.row_stride + col + LANES;
                    interleave(b.data, at, b.row_stride, block.kb, rest, &mut to[LANES..], NR);
                }
                _ => {
                    let mut column = [0u32; PAIRS];
                    for j in 0..NR {
                        if j < width {
                            let at = (col + j) * b.col_stride + block.k0;
                            narrow(&b.data[at..at + block.kb], &mut column[..pairs]);
                        } else {
                            column[..pairs].fill(0);
                        }
                        to[j..].iter_mut().step_by(NR).zip(&column[..pairs]).for_each(|(to, pair)| *to = *pair);
                    }
                }
            }
        }
        let (n, rows) = (b.cols, c.len() / b.cols);
        let mut tile_c = [0.0f32; MR * NR];
        for r0 in (0..rows).step_by(MR) {
            let m = MR.min(rows - r0);
            let row = block.first + r0;
            let (row_stride, pair_stride) = match a.col_stride {
                1 => {
                    for r in 0..MR {
                        // Rows behind the last repeat it; what they give is dropped.
                        let at = (row + r.min(m - 1)) * a.row_stride + block.k0;
                        narrow(&a.data[at..at + block.kb], &mut packed_a[r * pairs..(r + 1) * pairs]);
                    }
                    (pairs, 1)
                }
                _ => {
                    interleave(a.data, block.k0 * a.col_stride + row, a.col_stride, block.kb, m, packed_a, LANES);
                    (1, LANES)
                }
            };
            assert!(packed_a.len() > (MR - 1) * row_stride + (pairs - 1) * pair_stride);
            for (panel, w) in packed_b.chunks(NR * pairs).take(block.nb.div_ceil(NR)).enumerate() {
                let width = NR.min(block.nb - panel * NR);
                let at = r0 * n + block.n0 + panel * NR;
                let whole = m == MR && width == NR;
                if !whole && add {
                    for r in 0..m {
                        tile_c[r * NR..r * NR + width].copy_from_slice(&c[at + r * n..at + r * n + width]);
                    }
                }
                let (out, ldc) = if whole { (&mut c[at..], n) } else { (&mut tile_c[..], NR) };
                assert!(out.len() >= (MR - 1) * ldc + NR && w.len() == NR * pairs);
                // SAFETY: the assertions above cover every element that the tile touches.
                unsafe {
                    tile(packed_a.as_ptr(), row_stride, pair_stride, w.as_ptr(), pairs, out.as_mut_ptr(), ldc, add)
                };
                if !whole {
                    for r in 0..m {
                        c[at + r * n..at + r * n + width].copy_from_slice(&tile_c[r * NR..r * NR + width]);
                    }
                }
            }
        }
    }

    /// Neighbours of a row of values, rounded, in pairs; a last one without a neighbour gets a zero.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn narrow(values: &[f32], to: &mut [u32]) {
        assert!(to.len() == values.len().div_ceil(2));
        let (whole, rest) = values.as_chunks::<{ 2 * LANES }>();
        let (to, to_rest) = to.split_at_mut(whole.len() * LANES);
        for (values, to) in whole.iter().zip(to.as_chunks_mut::<LANES>().0) {
            // SAFETY: 32 values become 16 pairs.
            unsafe {
                let (low, high) = (_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values.as_ptr().add(LANES)));
                let pairs: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(to.as_mut_ptr().cast(), pairs);
            }
        }
        if !rest.is_empty() {
            let mut last = [0.0; 2 * LANES];
            last[..rest.len()].copy_from_slice(rest);
            let mut pairs = [0; LANES];
            narrow(&last, &mut pairs);
            to_rest.copy_from_slice(&pairs[..to_rest.len()]);
        }
    }

    /// Rows `stride` apart from `at` on, `k` of them, `width` values of each (at most 16): two rows at a time, their values
    /// in pairs, 16 pairs at every `pitch` of the result. Behind `width` there is anything finite, behind the last row zeros.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn interleave(from: &[f32], at: usize, stride: usize, k: usize, width: usize, to: &mut [u32], pitch: usize) {
        let pairs = k.div_ceil(2);
        assert!(to.len() >= (pairs - 1) * pitch + LANES);
        let order = std::array::from_fn::<u16, 32, _>(|i| (i / 2 + i % 2 * 16) as u16);
        // SAFETY: 32 numbers of 16 bits.
        let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
        let paired = |even: __m512, odd: __m512| {
            // SAFETY: bits stay bits.
            let halves: __m512i = unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even)) };
            _mm512_permutexvar_epi16(order, halves)
        };
        // Rows of which 16 values can be read where they lie.
        let last = from.len().checked_sub(at + LANES).map_or(0, |room| room / stride + 1).min(k);
        let whole = if width == 0 { 0 } else { last / 2 };
        for pair in 0..whole {
            // SAFETY: rows below `last` hold 16 values, and the result has room by the assertion.
            unsafe {
                let even = from.as_ptr().add(at + 2 * pair * stride);
                let pairs = paired(_mm512_loadu_ps(even), _mm512_loadu_ps(even.add(stride)));
                _mm512_storeu_si512(to.as_mut_ptr().add(pair * pitch).cast(), pairs);
            }
        }
        for pair in whole..pairs {
            let row = |k0: usize| {
                let mut row = [0.0; LANES];
                if k0 < k && width > 0 {
                    row[..width].copy_from_slice(&from[at + k0 * stride..at + k0 * stride + width]);
                }
                // SAFETY: 16 values.
                unsafe { _mm512_loadu_ps(row.as_ptr()) }
            };
            let pairs = paired(row(2 * pair), row(2 * pair + 1));
            let to = &mut to[pair * pitch..pair * pitch + LANES];
            // SAFETY: 16 pairs.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), pairs) };
        }
    }

    #[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn tile(
        x: *const u32,
        row_stride: usize,
        pair_stride: usize,
        w: *const u32,
        pairs: usize,
        c: *mut f32,
        ldc: usize,
        add: bool,
    ) {
        // SAFETY: the caller guarantees the elements.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); 2]; MR];
            for i in 0..pairs {
                let w0: __m512bh = std::mem::transmute(_mm512_loadu_si512(w.add(i * NR).cast()));
                let w1: __m512bh = std::mem::transmute(_mm512_loadu_si512(w.add(i * NR + LANES).cast()));
                for r in 0..MR {
                    let v = _mm512_set1_epi32(*x.add(r * row_stride + i * pair_stride) as i32);
                    let v: __m512bh = std::mem::transmute(v);
                    acc[r][0] = _mm512_dpbf16_ps(acc[r][0], w0, v);
                    acc[r][1] = _mm512_dpbf16_ps(acc[r][1], w1, v);
                }
            }
            for r in 0..MR {
                for half in 0..2 {
                    let at = c.add(r * ldc + half * LANES);
                    let sum = if add { _mm512_add_ps(_mm512_loadu_ps(at), acc[r][half]) } else { acc[r][half] };
                    _mm512_storeu_ps(at, sum);
                }
            }
        }
    }
}
