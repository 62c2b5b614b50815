//! The kernels of int10 and int12 for AVX-512 with VNNI and for AVX2: pairs of columns are multiplied and summed into 32 bits.

use std::arch::x86_64::*;

use super::quantized::{PANEL, Rows};
use super::wide::Piece;
use crate::packed::{BLOCK_COLS, TILE_ROWS};
use crate::wide_tiles::VECTORS;

/// Tiles of a panel.
const TILES: usize = PANEL / TILE_ROWS;

/// See [`super::wide`]; only where AVX-512 with VNNI is.
pub(super) fn avx512(piece: &Piece<'_>, rows: usize, sums: &mut [f32]) {
    piece.check(rows, sums);
    let sums = sums.as_mut_ptr();
    macro_rules! by_rows {
        ($($n:literal)*) => {
            match rows {
                // SAFETY: the features are there (the caller's word), and all sizes were checked above.
                $($n => unsafe { panel_512::<$n>(piece, sums) },)*
                _ => unreachable!("panel takes no other number of rows at once"),
            }
        };
    }
    by_rows!(1 2 4 6);
}

/// See [`super::wide`]; only where AVX2 is. A panel is four pieces of sixteen outputs, two rows at once.
pub(super) fn avx2(piece: &Piece<'_>, rows: usize, sums: &mut [f32]) {
    piece.check(rows, sums);
    for row in (0..rows).step_by(2) {
        for tile in 0..TILES {
            let sums = sums[row * PANEL + TILE_ROWS * tile..].as_mut_ptr();
            // SAFETY: the features are there (the caller's word), and all sizes were checked above.
            unsafe {
                match rows - row {
                    1 => tile_256::<1>(piece, row, tile, sums),
                    _ => tile_256::<2>(piece, row, tile, sums),
                }
            }
        }
    }
}

/// `sum` plus products of pairs. The compiler makes two instructions of the intrinsic in long loops, which are slower by half.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dpwssd(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: registers only; the features are enabled here.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {}, {}, {}",
            inout(zmm_reg) sum, in(zmm_reg) a, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

#[allow(clippy::needless_range_loop, reason = "several arrays are indexed by the same row")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn panel_512<const M: usize>(piece: &Piece<'_>, sums: *mut f32) {
    let Rows { codes, ld, scales, groups, .. } = piece.x.rows(0);
    let weights = piece.weights.as_ptr();
    // SAFETY: `check` has seen to all bounds; blocks are whole.
    unsafe {
        for b in 0..piece.blocks() {
            let mut t = [[_mm512_setzero_si512(); TILES]; M];
            let (codes, weights) = (codes.add(b * BLOCK_COLS), weights.add(b * VECTORS * 2 * PANEL));
            for v in 0..VECTORS {
                let mut w = [_mm512_setzero_si512(); TILES];
                for n in 0..TILES {
                    w[n] = _mm512_loadu_si512(weights.add(v * 2 * PANEL + 2 * TILE_ROWS * n).cast());
                }
                for m in 0..M {
                    let pair = _mm512_set1_epi32(codes.add(m * ld + 2 * v).cast::<i32>().read_unaligned());
                    for n in 0..TILES {
                        t[m][n] = dpwssd(t[m][n], w[n], pair);
                    }
                }
            }
            for m in 0..M {
                let a = _mm512_set1_ps(*scales.add(m * groups + b));
                for n in 0..TILES {
                    let sum = sums.add(m * PANEL + n * TILE_ROWS);
                    _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(t[m][n]), a, _mm512_loadu_ps(sum)));
                }
            }
        }
    }
}

#[allow(clippy::needless_range_loop, reason = "several arrays are indexed by the same row")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_256<const M: usize>(piece: &Piece<'_>, row: usize, tile: usize, sums: *mut f32) {
    let Rows { codes, ld, scales, groups, .. } = piece.x.rows(row);
    let weights = piece.weights.as_ptr();
    // SAFETY: `check` has seen to all bounds; blocks are whole.
    unsafe {
        for b in 0..piece.blocks() {
            let mut t = [[_mm256_setzero_si256(); 2]; M];
            let codes = codes.add(b * BLOCK_COLS);
            let weights = weights.add(b * VECTORS * 2 * PANEL + 2 * TILE_ROWS * tile);
            for v in 0..VECTORS {
                let w = weights.add(v * 2 * PANEL);
                let w = [_mm256_loadu_si256(w.cast()), _mm256_loadu_si256(w.add(TILE_ROWS).cast())];
                for m in 0..M {
                    let pair = _mm256_set1_epi32(codes.add(m * ld + 2 * v).cast::<i32>().read_unaligned());
                    for half in 0..2 {
                        t[m][half] = _mm256_add_epi32(t[m][half], _mm256_madd_epi16(w[half], pair));
                    }
                }
            }
            for m in 0..M {
                let a = _mm256_set1_ps(*scales.add(m * groups + b));
                for half in 0..2 {
                    let sum = sums.add(m * PANEL + 8 * half);
                    _mm256_storeu_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(t[m][half]), a, _mm256_loadu_ps(sum)));
                }
            }
        }
    }
}
