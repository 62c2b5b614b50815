//! The product kernels for AVX-VNNI, the 256-bit dot product of CPUs without AVX-512: one register holds eight outputs by
//! four columns; a tile is two of them.
//!
//! The instruction has a second encoding, of AVX-512 with VL. It is the same in all but its bytes, so the tests run these
//! kernels with it where the first is not there.

use std::arch::x86_64::*;

use super::quantized::{PANEL, Piece};
use super::quantized_avx2::{HalfTile, block_bytes, four, run, scales};
use crate::packed::{GROUP, INT4_CODES, INT4_ZEROS};

/// An encoding of the dot product.
trait Encoding {
    /// `t` plus the products of four unsigned weights and four codes.
    unsafe fn dot(t: __m256i, weights: __m256i, codes: __m256i) -> __m256i;
}

macro_rules! encoding {
    ($name:ident, $dot:ident, $features:literal) => {
        struct $name;

        impl Encoding for $name {
            #[inline(always)]
            unsafe fn dot(t: __m256i, weights: __m256i, codes: __m256i) -> __m256i {
                // SAFETY: registers only; the callers' features.
                unsafe { $dot(t, weights, codes) }
            }
        }

        /// [`tile_in`], compiled for what the encoding needs.
        impl HalfTile for $name {
            #[target_feature(enable = $features)]
            unsafe fn tile<const INT4: bool, const M: usize>(
                piece: &Piece<'_>,
                row: usize,
                half_tile: usize,
                sums: *mut f32,
            ) {
                // SAFETY: the features are enabled here; the callers' bounds.
                unsafe { tile_in::<Self, INT4, M>(piece, row, half_tile, sums) }
            }
        }
    };
}
encoding!(Vex, _mm256_dpbusd_avx_epi32, "avx2,fma,f16c,avxvnni");

/// See [`super::quantized`]; only where AVX-VNNI is.
pub(super) fn piece(piece: &Piece<'_>, rows: usize, sums: &mut [f32]) {
    run::<Vex>(piece, rows, sums);
}

/// The same for the other encoding, if it is here.
#[cfg(test)]
pub(super) fn other_encoding() -> Option<super::quantized::Kernel> {
    encoding!(Evex, _mm256_dpbusd_epi32, "avx2,fma,f16c,avx512vl,avx512vnni");
    let here = is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512vnni");
    here.then_some(run::<Evex> as super::quantized::Kernel)
}

/// Weights of columns 8v to 8v + 4 and of the next four of group `half`, not negative; `zeros` are int4's.
#[inline(always)]
unsafe fn weights<const INT4: bool>(
    block: *const u8,
    half: usize,
    v: usize,
    half_tile: usize,
    zeros: __m256i,
) -> [__m256i; 2] {
    // SAFETY: the block is whole; the callers' features.
    unsafe {
        if INT4 {
            let codes = _mm256_set1_epi8(0x78);
            let pairs = _mm256_loadu_si256(block.add(INT4_CODES + (4 * half + v) * 64 + 32 * half_tile).cast());
            let first = _mm256_and_si256(_mm256_slli_epi16::<3>(pairs), codes);
            let second = _mm256_and_si256(_mm256_srli_epi16::<1>(pairs), codes);
            [_mm256_add_epi8(first, zeros), _mm256_add_epi8(second, zeros)]
        } else {
            let at = block.add(64 + (8 * half + 2 * v) * 64 + 32 * half_tile);
            [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(64).cast())]
        }
    }
}

/// `sum = fma(t, S * a, sum)` for all rows and groups.
#[allow(clippy::needless_range_loop, reason = "several arrays are indexed by the same row")]
#[inline(always)]
unsafe fn tile_in<E: Encoding, const INT4: bool, const M: usize>(
    piece: &Piece<'_>,
    row: usize,
    half_tile: usize,
    sums: *mut f32,
) {
    let x = piece.x.rows(row);
    // SAFETY: `run` has checked all bounds; blocks are whole.
    unsafe {
        for (b, block) in piece.blocks.chunks_exact(block_bytes(INT4)).enumerate() {
            let block = block.as_ptr();
            let scales = scales::<INT4>(block, half_tile);
            for half in 0..2 {
                let group = 2 * b + half;
                let mut t = [_mm256_setzero_si256(); M];
                for m in 0..M {
                    t[m] = _mm256_set1_epi32(*x.offsets.add(m * x.groups + group));
                }
                let mut zeros = _mm256_setzero_si256();
                if INT4 {
                    // Each row's, four times.
                    let z = _mm_loadl_epi64(block.add(INT4_ZEROS + 16 * half + 8 * half_tile).cast());
                    zeros = _mm256_mullo_epi32(_mm256_cvtepu8_epi32(z), _mm256_set1_epi32(0x0101_0101));
                }
                let codes = x.codes.add(group * GROUP);
                for v in 0..4 {
                    let weights = weights::<INT4>(block, half, v, half_tile, zeros);
                    for n in 0..2 {
                        for m in 0..M {
                            t[m] = E::dot(t[m], weights[n], four(codes.add(m * x.ld + 8 * v + 4 * n)));
                        }
                    }
                }
                for m in 0..M {
                    let a = _mm256_mul_ps(scales[half], _mm256_set1_ps(*x.scales.add(m * x.groups + group)));
                    let to = sums.add(m * PANEL);
                    _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(t[m]), a, _mm256_loadu_ps(to)));
                }
            }
        }
    }
}
