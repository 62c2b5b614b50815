//! The product kernels for AVX-512 with VNNI: one register holds sixteen outputs by four columns.

use std::arch::x86_64::*;

use super::quantized::{PANEL, Piece};
use crate::Dtype;
use crate::packed::{BLOCK_COLS, GROUP, INT4_BLOCK, INT4_CODES, INT4_ZEROS, INT8_BLOCK, TILE_ROWS};

/// See [`super::quantized`]; only where AVX-512 with VNNI is.
pub(super) fn piece(piece: &Piece<'_>, rows: usize, sums: &mut [f32]) {
    piece.check(rows, sums);
    macro_rules! by_rows {
        ($type:ident: $($n:literal)*) => {
            match rows {
                // SAFETY: the features are there (the caller's word), and all sizes were checked above.
                $($n => unsafe { tile::<$type, $n>(piece, sums.as_mut_ptr()) },)*
                _ => unreachable!("rows come from at_once"),
            }
        };
    }
    match piece.dtype {
        Dtype::Int4 => by_rows!(Int4: 1 2 3 4 6 8),
        _ => by_rows!(Int8: 1 2 3 4 6 8),
    }
}

/// Blocks of a type that a kernel reads.
trait Block {
    const BYTES: usize;

    /// Scales of both groups.
    unsafe fn scales(block: *const u8) -> [__m512; 2];

    /// What codes of group `half` are offset by.
    unsafe fn zeros(block: *const u8, half: usize) -> __m512i;

    /// Weights of columns 8v to 8v + 4 and of the next four of group `half`, not negative.
    unsafe fn weights(block: *const u8, half: usize, v: usize, zeros: __m512i) -> [__m512i; 2];
}

struct Int4;

impl Block for Int4 {
    const BYTES: usize = INT4_BLOCK;

    #[inline(always)]
    unsafe fn scales(block: *const u8) -> [__m512; 2] {
        // SAFETY: the block is whole; the callers' features.
        unsafe {
            let s = _mm512_cvtepu8_epi32(_mm_loadu_si128(block.cast()));
            let nibbles = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
            let above = _mm512_set1_epi64(block.add(TILE_ROWS).cast::<i64>().read_unaligned());
            let above = _mm512_and_si512(_mm512_srlv_epi32(above, nibbles), _mm512_set1_epi32(15));
            let first = _mm512_and_si512(s, _mm512_set1_epi32(63));
            let second = _mm512_or_si512(_mm512_srli_epi32::<6>(s), _mm512_slli_epi32::<2>(above));
            let exponent = _mm512_set1_epi32(124 << 23);
            let first = _mm512_add_epi32(_mm512_slli_epi32::<19>(first), exponent);
            let second = _mm512_add_epi32(_mm512_slli_epi32::<19>(second), exponent);
            [_mm512_castsi512_ps(first), _mm512_castsi512_ps(second)]
        }
    }

    #[inline(always)]
    unsafe fn zeros(block: *const u8, half: usize) -> __m512i {
        // SAFETY: the block is whole; the callers' features.
        unsafe {
            // Each 128 bits have those of all rows and take their own four, of which each is wanted four times.
            let rows = _mm512_cvtepu8_epi32(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
            let own = _mm512_mullo_epi32(rows, _mm512_set1_epi32(0x0101_0101));
            let z = _mm512_broadcast_i32x4(_mm_loadu_si128(block.add(INT4_ZEROS + 16 * half).cast()));
            _mm512_shuffle_epi8(z, own)
        }
    }

    #[inline(always)]
    unsafe fn weights(block: *const u8, half: usize, v: usize, zeros: __m512i) -> [__m512i; 2] {
        // SAFETY: the block is whole; the callers' features.
        unsafe {
            let codes = _mm512_set1_epi8(0x78);
            let pairs = _mm512_loadu_si512(block.add(INT4_CODES + (4 * half + v) * 64).cast());
            let first = _mm512_and_si512(_mm512_slli_epi16::<3>(pairs), codes);
            let second = _mm512_and_si512(_mm512_srli_epi16::<1>(pairs), codes);
            [_mm512_add_epi8(first, zeros), _mm512_add_epi8(second, zeros)]
        }
    }
}

struct Int8;

impl Block for Int8 {
    const BYTES: usize = INT8_BLOCK;

    #[inline(always)]
    unsafe fn scales(block: *const u8) -> [__m512; 2] {
        // SAFETY: the block is whole; the callers' features.
        unsafe {
            let (first, second) = (_mm256_loadu_si256(block.cast()), _mm256_loadu_si256(block.add(32).cast()));
            [_mm512_cvtph_ps(first), _mm512_cvtph_ps(second)]
        }
    }

    #[inline(always)]
    unsafe fn zeros(_block: *const u8, _half: usize) -> __m512i {
        // SAFETY: the callers' features.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn weights(block: *const u8, half: usize, v: usize, _zeros: __m512i) -> [__m512i; 2] {
        // SAFETY: the block is whole; the callers' features.
        unsafe {
            let at = block.add(64 + (8 * half + 2 * v) * 64);
            [_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(64).cast())]
        }
    }
}

/// `sum = fma(t, S * a, sum)` for all rows and groups.
#[allow(clippy::needless_range_loop, reason = "several arrays are indexed by the same row")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn tile<B: Block, const M: usize>(piece: &Piece<'_>, sums: *mut f32) {
    let x = piece.x.rows(0);
    // SAFETY: `piece` has checked all bounds; blocks are whole.
    unsafe {
        let mut sum = [_mm512_setzero_ps(); M];
        for m in 0..M {
            sum[m] = _mm512_loadu_ps(sums.add(m * PANEL));
        }
        for (b, block) in piece.blocks.chunks_exact(B::BYTES).enumerate() {
            let scales = B::scales(block.as_ptr());
            for half in 0..2 {
                let group = 2 * b + half;
                let mut t = [_mm512_setzero_si512(); M];
                for m in 0..M {
                    t[m] = _mm512_set1_epi32(*x.offsets.add(m * x.groups + group));
                }
                let codes = x.codes.add(group * GROUP);
                let zeros = B::zeros(block.as_ptr(), half);
                for v in 0..4 {
                    let weights = B::weights(block.as_ptr(), half, v, zeros);
                    for n in 0..2 {
                        for m in 0..M {
                            let four = codes.add(m * x.ld + 8 * v + 4 * n).cast::<i32>().read_unaligned();
                            t[m] = _mm512_dpbusd_epi32(t[m], weights[n], _mm512_set1_epi32(four));
                        }
                    }
                }
                for m in 0..M {
                    let a = _mm512_set1_ps(*x.scales.add(m * x.groups + group));
                    sum[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t[m]), _mm512_mul_ps(scales[half], a), sum[m]);
                }
            }
        }
        for m in 0..M {
            _mm512_storeu_ps(sums.add(m * PANEL), sum[m]);
        }
    }
    const { assert!(BLOCK_COLS == 2 * GROUP) };
}
