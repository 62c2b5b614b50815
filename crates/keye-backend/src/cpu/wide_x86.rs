//! The int16 kernels for AVX-512 with VNNI and for AVX2: pairs of columns are multiplied and summed into 32 bits.

use std::arch::x86_64::*;

use super::quantized::PANEL;
use super::wide::Piece;
use crate::packed::{GROUP, INT16_BLOCK};

/// See [`super::wide`]; only where AVX-512 with VNNI is.
pub(super) fn avx512(piece: &Piece<'_>, rows: usize, sums: &mut [f32]) {
    piece.check(rows, sums);
    let sums = sums.as_mut_ptr();
    macro_rules! by_rows {
        ($($n:literal)*) => {
            match rows {
                // SAFETY: the features are there (the caller's word), and all sizes were checked above.
                $($n => unsafe { tile_512::<$n>(piece, sums) },)*
                _ => unreachable!("panel takes no other number of rows at once"),
            }
        };
    }
    by_rows!(1 2 3 4 6 8);
}

/// See [`super::wide`]; only where AVX2 is. A tile is two halves of eight outputs, two rows at once.
pub(super) fn avx2(piece: &Piece<'_>, rows: usize, sums: &mut [f32]) {
    piece.check(rows, sums);
    for row in (0..rows).step_by(2) {
        for half_tile in 0..2 {
            let sums = sums[row * PANEL + 8 * half_tile..].as_mut_ptr();
            // SAFETY: the features are there (the caller's word), and all sizes were checked above.
            unsafe {
                match rows - row {
                    1 => half_tile_256::<1>(piece, row, half_tile, sums),
                    _ => half_tile_256::<2>(piece, row, half_tile, sums),
                }
            }
        }
    }
}

#[allow(clippy::needless_range_loop, reason = "several arrays are indexed by the same row")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn tile_512<const M: usize>(piece: &Piece<'_>, sums: *mut f32) {
    let ((codes, scales), ld, groups) = (piece.rows(0), piece.x.cols, piece.x.groups());
    // SAFETY: `check` has seen to all bounds; blocks are whole.
    unsafe {
        let mut sum = [_mm512_setzero_ps(); M];
        for m in 0..M {
            sum[m] = _mm512_loadu_ps(sums.add(m * PANEL));
        }
        for (b, block) in piece.blocks.chunks_exact(INT16_BLOCK).enumerate() {
            let block = block.as_ptr();
            for half in 0..2 {
                let group = 2 * b + half;
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(block.add(32 * half).cast()));
                let scale = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits));
                let mut t = [_mm512_setzero_si512(); M];
                let codes = codes.add(group * GROUP);
                for v in 0..16 {
                    let w = _mm512_loadu_si512(block.add(64 + (16 * half + v) * 64).cast());
                    for m in 0..M {
                        let pair = codes.add(m * ld + 2 * v).cast::<i32>().read_unaligned();
                        t[m] = _mm512_dpwssd_epi32(t[m], w, _mm512_set1_epi32(pair));
                    }
                }
                for m in 0..M {
                    let a = _mm512_set1_ps(*scales.add(m * groups + group));
                    sum[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t[m]), _mm512_mul_ps(scale, a), sum[m]);
                }
            }
        }
        for m in 0..M {
            _mm512_storeu_ps(sums.add(m * PANEL), sum[m]);
        }
    }
}

#[allow(clippy::needless_range_loop, reason = "several arrays are indexed by the same row")]
#[target_feature(enable = "avx2,fma")]
unsafe fn half_tile_256<const M: usize>(piece: &Piece<'_>, row: usize, half_tile: usize, sums: *mut f32) {
    let ((codes, scales), ld, groups) = (piece.rows(row), piece.x.cols, piece.x.groups());
    // SAFETY: `check` has seen to all bounds; blocks are whole.
    unsafe {
        let mut sum = [_mm256_setzero_ps(); M];
        for m in 0..M {
            sum[m] = _mm256_loadu_ps(sums.add(m * PANEL));
        }
        for (b, block) in piece.blocks.chunks_exact(INT16_BLOCK).enumerate() {
            let block = block.as_ptr();
            for half in 0..2 {
                let group = 2 * b + half;
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(block.add(32 * half + 16 * half_tile).cast()));
                let scale = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits));
                let mut t = [_mm256_setzero_si256(); M];
                let codes = codes.add(group * GROUP);
                for v in 0..16 {
                    let w = _mm256_loadu_si256(block.add(64 + (16 * half + v) * 64 + 32 * half_tile).cast());
                    for m in 0..M {
                        let pair = codes.add(m * ld + 2 * v).cast::<i32>().read_unaligned();
                        t[m] = _mm256_add_epi32(t[m], _mm256_madd_epi16(w, _mm256_set1_epi32(pair)));
                    }
                }
                for m in 0..M {
                    let a = _mm256_set1_ps(*scales.add(m * groups + group));
                    sum[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(t[m]), _mm256_mul_ps(scale, a), sum[m]);
                }
            }
        }
        for m in 0..M {
            _mm256_storeu_ps(sums.add(m * PANEL), sum[m]);
        }
    }
}
