//! The product kernels for AVX-512 with VNNI: one register holds sixteen outputs by four columns.

use std::arch::x86_64::*;

use super::quantized::{PANEL, Piece, Rows};
use crate::Dtype;
use crate::packed::{BLOCK_COLS, GROUP, INT4_BLOCK, INT4_CODES, INT4_ZEROS, INT8_BLOCK, TILE_ROWS};

/// See [`super::quantized`]; only where AVX-512 with VNNI is.
pub(super) fn piece(piece: &Piece<'_>, rows: usize, sums: &mut [f32]) {
    piece.check(rows, sums);
    macro_rules! by_rows {
        ($kernel:ident: $($n:literal)*) => {
            match rows {
                // SAFETY: the features are there (the caller's word), and all sizes were checked above.
                $($n => unsafe { $kernel::<$n>(piece, sums.as_mut_ptr()) },)*
                _ => unreachable!("rows come from at_once"),
            }
        };
    }
    match piece.dtype {
        Dtype::Int4 => by_rows!(int4: 1 2 3 4 6 8),
        _ => by_rows!(int8: 1 2 3 4 6 8),
    }
}

/// `sum = fma(t, S * a, sum)` for all rows.
#[inline(always)]
unsafe fn add<const M: usize>(sum: &mut [__m512; M], t: &[__m512i; M], scale: __m512, x: &Rows, group: usize) {
    // SAFETY: the callers' features and bounds.
    unsafe {
        for m in 0..M {
            let a = _mm512_set1_ps(*x.scales.add(m * x.groups + group));
            sum[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t[m]), _mm512_mul_ps(scale, a), sum[m]);
        }
    }
}

#[inline(always)]
unsafe fn four(codes: *const i8) -> __m512i {
    // SAFETY: the callers' bounds.
    unsafe { _mm512_set1_epi32(codes.cast::<i32>().read_unaligned()) }
}

#[allow(clippy::needless_range_loop, reason = "several arrays are indexed by the same row")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn int4<const M: usize>(piece: &Piece<'_>, sums: *mut f32) {
    let x = piece.rows(0);
    let high = _mm512_set1_epi8(0xf0u8 as i8);
    let nibbles = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    // SAFETY: `piece` has checked all bounds; blocks are whole.
    unsafe {
        let mut sum = [_mm512_setzero_ps(); M];
        for m in 0..M {
            sum[m] = _mm512_loadu_ps(sums.add(m * PANEL));
        }
        for (b, block) in piece.blocks.chunks_exact(INT4_BLOCK).enumerate() {
            let block = block.as_ptr();
            let s = _mm512_cvtepu8_epi32(_mm_loadu_si128(block.cast()));
            let above = _mm512_set1_epi64(block.add(TILE_ROWS).cast::<i64>().read_unaligned());
            let above = _mm512_and_si512(_mm512_srlv_epi32(above, nibbles), _mm512_set1_epi32(15));
            let codes = [
                _mm512_and_si512(s, _mm512_set1_epi32(63)),
                _mm512_or_si512(_mm512_srli_epi32::<6>(s), _mm512_slli_epi32::<2>(above)),
            ];
            for half in 0..2 {
                let group = 2 * b + half;
                let bits = _mm512_slli_epi32::<19>(codes[half]);
                let scale = _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(124 << 23)));
                let z = _mm512_cvtepu8_epi32(_mm_loadu_si128(block.add(INT4_ZEROS + 16 * half).cast()));
                let mut t = [_mm512_setzero_si512(); M];
                for m in 0..M {
                    // |sum| < 2^15, and the upper halves of z are zero: the product of the lower halves.
                    t[m] = _mm512_madd_epi16(z, _mm512_set1_epi32(*x.negated_sums.add(m * x.groups + group)));
                }
                let codes = x.codes.add(group * GROUP);
                for v in 0..4 {
                    let pairs = _mm512_loadu_si512(block.add(INT4_CODES + (4 * half + v) * 64).cast());
                    let first = _mm512_and_si512(_mm512_slli_epi16::<4>(pairs), high);
                    let second = _mm512_and_si512(pairs, high);
                    for m in 0..M {
                        t[m] = _mm512_dpbusd_epi32(t[m], first, four(codes.add(m * x.ld + 8 * v)));
                    }
                    for m in 0..M {
                        t[m] = _mm512_dpbusd_epi32(t[m], second, four(codes.add(m * x.ld + 8 * v + 4)));
                    }
                }
                add(&mut sum, &t, scale, &x, group);
            }
        }
        for m in 0..M {
            _mm512_storeu_ps(sums.add(m * PANEL), sum[m]);
        }
    }
    const { assert!(BLOCK_COLS == 2 * GROUP) };
}

#[allow(clippy::needless_range_loop, reason = "several arrays are indexed by the same row")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn int8<const M: usize>(piece: &Piece<'_>, sums: *mut f32) {
    let x = piece.rows(0);
    // SAFETY: `piece` has checked all bounds; blocks are whole.
    unsafe {
        let mut sum = [_mm512_setzero_ps(); M];
        for m in 0..M {
            sum[m] = _mm512_loadu_ps(sums.add(m * PANEL));
        }
        for (b, block) in piece.blocks.chunks_exact(INT8_BLOCK).enumerate() {
            let block = block.as_ptr();
            for half in 0..2 {
                let group = 2 * b + half;
                let scale = _mm512_cvtph_ps(_mm256_loadu_si256(block.add(32 * half).cast()));
                let mut t = [_mm512_setzero_si512(); M];
                for m in 0..M {
                    let sum = _mm512_set1_epi32(*x.negated_sums.add(m * x.groups + group));
                    t[m] = _mm512_slli_epi32::<7>(sum);
                }
                let codes = x.codes.add(group * GROUP);
                for v in 0..8 {
                    let w = _mm512_loadu_si512(block.add(64 + (8 * half + v) * 64).cast());
                    for m in 0..M {
                        t[m] = _mm512_dpbusd_epi32(t[m], w, four(codes.add(m * x.ld + 4 * v)));
                    }
                }
                add(&mut sum, &t, scale, &x, group);
            }
        }
        for m in 0..M {
            _mm512_storeu_ps(sums.add(m * PANEL), sum[m]);
        }
    }
}
