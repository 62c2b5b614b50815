//! Products of plain f32 matrices, either side transposed: what a reverse pass needs beside the products with weights.
//!
//! A tile of the result stays in registers while k runs; rows of `a` are read in place, columns of `b` are packed. The
//! order of every sum is fixed by k: blocks of `K_BLOCK` from left to right, one element after the other inside, so a
//! result does not depend on threads or on how rows were cut.

#![allow(clippy::needless_range_loop, reason = "a tile indexes several arrays by the same row or column")]

use std::cell::RefCell;

use rayon::prelude::*;

use super::Isa;
use super::isa::{Simd, dispatch};

pub use super::matmul_bf16::par_matmul_bf16;

/// Elements of k whose products with a block of columns stay in the second-level cache.
const K_BLOCK: usize = 384;
/// Columns of a packed block.
const N_BLOCK: usize = 256;
/// Rows of a tile with 32 registers; 16 registers hold half.
const MR_WIDE: usize = 12;
const MR: usize = 6;
/// Most columns of a tile: two vectors.
const NR: usize = 32;
/// Rows of a task.
const CHUNK: std::ops::Range<usize> = 8 * MR_WIDE..512;
/// Multiply-adds below which other threads cost more than they save.
const SMALL: usize = 1 << 17;

/// A matrix in memory: element (r, c) is `data[r * row_stride + c * col_stride]`; one of the strides is 1.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows one after the other. `data` has to hold `rows * cols` elements.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "elements of a {rows}x{cols} matrix");
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The transposed matrix, in place.
    #[must_use]
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// `count` rows from `first` on.
    pub(super) fn below(self, first: usize, count: usize) -> Self {
        Self { data: &self.data[first * self.row_stride..], rows: count, ..self }
    }
}

/// What becomes of the result's old contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Old {
    /// `c = a b`
    Replace,
    /// `c = c + a b`
    Keep,
}

/// `c (+)= a b` on the calling thread; c is `[a.rows, b.cols]`, rows one after the other.
pub fn matmul(isa: Isa, a: Matrix<'_>, b: Matrix<'_>, c: &mut [f32], old: Old) {
    check(&a, &b, c);
    if !c.is_empty() {
        rows(isa, a, 0, b, c, old);
    }
}

/// The same on the threads of the current `rayon` pool, with the same result to the bit.
pub fn par_matmul(isa: Isa, a: Matrix<'_>, b: Matrix<'_>, c: &mut [f32], old: Old) {
    check(&a, &b, c);
    if c.is_empty() {
        return;
    }
    in_chunks(a, b.cols, c, |first, c| rows(isa, a, first, b, c, old));
}

/// Calls `part` with the first row and the result's rows of every task of a product.
pub(super) fn in_chunks(a: Matrix<'_>, n: usize, c: &mut [f32], part: impl Fn(usize, &mut [f32]) + Sync) {
    let threads = rayon::current_num_threads();
    if threads == 1 || a.rows * a.cols * n < SMALL {
        return part(0, c);
    }
    // Two tasks a thread, unless they are so small that packing columns for each would cost more than a thread that waits.
    let wanted = a.rows.div_ceil(2 * threads);
    let chunk = if wanted < CHUNK.start { a.rows.div_ceil(threads).max(4 * MR_WIDE) } else { wanted.min(CHUNK.end) };
    let chunk = chunk.next_multiple_of(MR_WIDE);
    c.par_chunks_mut(chunk * n).enumerate().for_each(|(i, c)| part(i * chunk, c));
}

pub(super) fn check(a: &Matrix<'_>, b: &Matrix<'_>, c: &[f32]) {
    assert_eq!(a.cols, b.rows, "inner dimensions");
    assert_eq!(c.len(), a.rows * b.cols, "elements of the result");
}

#[derive(Default)]
struct Packed {
    a: Vec<f32>,
    b: Vec<f32>,
}

thread_local! {
    static PACKED: RefCell<Packed> = RefCell::default();
}

/// Rows of the result from `first` on, as many as c holds.
fn rows(isa: Isa, a: Matrix<'_>, first: usize, b: Matrix<'_>, c: &mut [f32], old: Old) {
    let (n, k) = (b.cols, a.cols);
    if k == 0 {
        if old == Old::Replace {
            c.fill(0.0);
        }
        return;
    }
    PACKED.with_borrow_mut(|packed| {
        packed.a.resize(MR_WIDE * K_BLOCK, 0.0);
        packed.b.resize(N_BLOCK * K_BLOCK, 0.0);
        for n0 in (0..n).step_by(N_BLOCK) {
            for k0 in (0..k).step_by(K_BLOCK) {
                let block = Block { first, n0, nb: N_BLOCK.min(n - n0), k0, kb: K_BLOCK.min(k - k0) };
                let add = old == Old::Keep || k0 > 0;
                multiply(isa, &a, &b, &block, &mut packed.a, &mut packed.b, c, add);
            }
        }
    });
}

/// The part of a product: columns `n0..n0+nb` of the result, summed over `k0..k0+kb`.
pub(crate) struct Block {
    first: usize,
    n0: usize,
    nb: usize,
    k0: usize,
    kb: usize,
}

dispatch! {
    fn multiply(
        a: &Matrix<'_>, b: &Matrix<'_>, block: &Block, packed_a: &mut [f32], packed_b: &mut [f32], c: &mut [f32], add: bool,
    ) = multiply_block
}

#[inline(always)]
unsafe fn multiply_block<S: Simd>(
    a: &Matrix<'_>,
    b: &Matrix<'_>,
    block: &Block,
    packed_a: &mut [f32],
    packed_b: &mut [f32],
    c: &mut [f32],
    add: bool,
) {
    let nr = 2 * S::LANES;
    pack_columns(b, block, nr, packed_b);
    let rows = c.len() / b.cols;
    // SAFETY: passed on from the caller.
    unsafe {
        if S::LANES == 16 {
            panels::<S, MR_WIDE>(a, b.cols, block, packed_a, packed_b, c, rows, add);
        } else {
            panels::<S, MR>(a, b.cols, block, packed_a, packed_b, c, rows, add);
        }
    }
}

/// Columns of b in panels of `nr`, row after row in each, zeros behind the last.
#[inline(always)]
fn pack_columns(b: &Matrix<'_>, block: &Block, nr: usize, packed: &mut [f32]) {
    for (panel, to) in packed.chunks_mut(nr * block.kb).take(block.nb.div_ceil(nr)).enumerate() {
        let first = block.n0 + panel * nr;
        let width = nr.min(block.nb - panel * nr);
        if width < nr {
            to.fill(0.0);
        }
        if b.col_stride == 1 {
            for (k, to) in to.chunks_exact_mut(nr).enumerate() {
                let at = (block.k0 + k) * b.row_stride + first;
                to[..width].copy_from_slice(&b.data[at..at + width]);
            }
        } else {
            for col in 0..width {
                let at = (first + col) * b.col_stride + block.k0;
                for (k, value) in b.data[at..at + block.kb].iter().enumerate() {
                    to[k * nr + col] = *value;
                }
            }
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "operands of one tile loop")]
#[inline(always)]
unsafe fn panels<S: Simd, const M: usize>(
    a: &Matrix<'_>,
    n: usize,
    block: &Block,
    packed_a: &mut [f32],
    packed_b: &[f32],
    c: &mut [f32],
    rows: usize,
    add: bool,
) {
    let nr = 2 * S::LANES;
    let kb = block.kb;
    let mut tile_c = [0.0f32; MR_WIDE * NR];
    for r0 in (0..rows).step_by(M) {
        let m = M.min(rows - r0);
        let row = block.first + r0;
        let in_place = a.col_stride == 1 && m == M;
        if !in_place {
            for r in 0..M {
                // Rows behind the last repeat it; what they give is dropped.
                let at = (row + r.min(m - 1)) * a.row_stride + block.k0 * a.col_stride;
                for k in 0..kb {
                    packed_a[k * M + r] = a.data[at + k * a.col_stride];
                }
            }
        }
        let (x, row_stride, k_stride) = match in_place {
            true => (&a.data[row * a.row_stride + block.k0..], a.row_stride, 1),
            false => (&packed_a[..], 1, M),
        };
        assert!(x.len() > (M - 1) * row_stride + (kb - 1) * k_stride);
        for (panel, w) in packed_b.chunks(nr * kb).take(block.nb.div_ceil(nr)).enumerate() {
            assert!(w.len() == nr * kb);
            let width = nr.min(block.nb - panel * nr);
            let at = r0 * n + block.n0 + panel * nr;
            let whole = m == M && width == nr;
            if !whole && add {
                for r in 0..m {
                    tile_c[r * NR..r * NR + width].copy_from_slice(&c[at + r * n..at + r * n + width]);
                }
            }
            let (out, ldc) = if whole { (&mut c[at..], n) } else { (&mut tile_c[..], NR) };
            assert!(out.len() >= (M - 1) * ldc + nr);
            // SAFETY: the assertions above cover every element that the tile touches.
            unsafe { tile::<S, M>(x.as_ptr(), row_stride, k_stride, w.as_ptr(), kb, out.as_mut_ptr(), ldc, add) };
            if !whole {
                for r in 0..m {
                    c[at + r * n..at + r * n + width].copy_from_slice(&tile_c[r * NR..r * NR + width]);
                }
            }
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
#[inline(always)]
unsafe fn tile<S: Simd, const M: usize>(
    x: *const f32,
    row_stride: usize,
    k_stride: usize,
    w: *const f32,
    k: usize,
    c: *mut f32,
    ldc: usize,
    add: bool,
) {
    // SAFETY: the caller guarantees the elements and the instruction set.
    unsafe {
        let mut acc = [[S::splat(0.0); 2]; M];
        for i in 0..k {
            let w0 = S::load(w.add(i * 2 * S::LANES));
            let w1 = S::load(w.add(i * 2 * S::LANES + S::LANES));
            for r in 0..M {
                let v = S::splat(*x.add(r * row_stride + i * k_stride));
                acc[r][0] = S::fma(v, w0, acc[r][0]);
                acc[r][1] = S::fma(v, w1, acc[r][1]);
            }
        }
        for r in 0..M {
            for half in 0..2 {
                let at = c.add(r * ldc + half * S::LANES);
                let sum = if add { S::add(S::load(at), acc[r][half]) } else { acc[r][half] };
                S::store(at, sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..n).map(next).collect()
    }

    type Product = fn(Isa, Matrix<'_>, Matrix<'_>, &mut [f32], Old);

    /// `first` and `others` are to give what `operand` of both matrices gives in f64, and the same to the bit wherever an operand
    /// lies and on any number of threads.
    fn check_products(first: Product, others: &[Product], operand: fn(&[f32]) -> Vec<f32>) {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let sizes = [
            (1, 1, 1),
            (5, 3, 7),
            (12, 32, 32),
            (13, 400, 33),
            (130, 801, 290),
            (3, 0, 4),
            (25, 9, 257),
            (700, 65, 48),
        ];
        for (m, k, n) in sizes {
            let (a, b, start) = (values(m * k, 1), values(k * n, 2), values(m * n, 3));
            let (at, bt): (Vec<f32>, Vec<f32>) = (
                (0..k * m).map(|i| a[i % m * k + i / m]).collect(),
                (0..n * k).map(|i| b[i % k * n + i / k]).collect(),
            );
            let (exact_a, exact_b) = (operand(&a), operand(&b));
            let (a, b) = (Matrix::new(&a, m, k), Matrix::new(&b, k, n));
            let (at, bt) = (Matrix::new(&at, k, m).t(), Matrix::new(&bt, n, k).t());
            for isa in Isa::available() {
                for old in [Old::Replace, Old::Keep] {
                    let mut plain = start.clone();
                    first(isa, a, b, &mut plain, old);
                    for r in 0..m {
                        for c in 0..n {
                            let sum: f64 =
                                (0..k).map(|i| f64::from(exact_a[r * k + i]) * f64::from(exact_b[i * n + c])).sum();
                            let want = sum + if old == Old::Keep { f64::from(start[r * n + c]) } else { 0.0 };
                            assert!((f64::from(plain[r * n + c]) - want).abs() < 1e-4, "{isa:?} {m} {k} {n} {r} {c}");
                        }
                    }
                    for (a, b) in [(a, b), (a, bt), (at, b), (at, bt)] {
                        for other in others {
                            let mut c = start.clone();
                            pool.install(|| other(isa, a, b, &mut c, old));
                            assert_eq!(c, plain, "{isa:?}: threads, or where an operand lies, changed a sum");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn products_equal_their_definition_and_do_not_depend_on_threads() {
        check_products(matmul, &[matmul, par_matmul], <[f32]>::to_vec);
    }

    #[test]
    fn so_do_those_of_values_rounded_to_bf16() {
        check_products(par_matmul_bf16, &[par_matmul_bf16], super::super::matmul_bf16::rounded);
    }
}
