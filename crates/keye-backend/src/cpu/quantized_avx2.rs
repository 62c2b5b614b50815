//! The product kernels for AVX2: one register holds eight outputs by four columns; a tile is two of them.

use std::arch::x86_64::*;

use super::quantized::{PANEL, Piece, Rows};
use crate::Dtype;
use crate::packed::{GROUP, INT4_BLOCK, INT4_CODES, INT4_ZEROS, INT8_BLOCK, TILE_ROWS};

/// What a set of instructions makes of half a tile.
pub(super) trait HalfTile {
    /// Adds the products of `M` rows from `row` on with the eight outputs of a half to `sums`, rows `PANEL` apart.
    unsafe fn tile<const INT4: bool, const M: usize>(piece: &Piece<'_>, row: usize, half_tile: usize, sums: *mut f32);
}

struct Avx2;

/// See [`super::quantized`]; only where AVX2 and FMA are.
pub(super) fn piece(piece: &Piece<'_>, rows: usize, sums: &mut [f32]) {
    run::<Avx2>(piece, rows, sums);
}

/// All rows and both halves; only where the instructions are.
pub(super) fn run<H: HalfTile>(piece: &Piece<'_>, rows: usize, sums: &mut [f32]) {
    piece.check(rows, sums);
    let mut row = 0;
    while row < rows {
        let at_once = if rows - row >= 4 { 4 } else { 1 };
        for half_tile in 0..2 {
            let sums = sums[row * PANEL + 8 * half_tile..].as_mut_ptr();
            // SAFETY: the features are there (the caller's word), and all sizes were checked above.
            unsafe {
                match (piece.dtype, at_once) {
                    (Dtype::Int4, 4) => H::tile::<true, 4>(piece, row, half_tile, sums),
                    (Dtype::Int4, _) => H::tile::<true, 1>(piece, row, half_tile, sums),
                    (_, 4) => H::tile::<false, 4>(piece, row, half_tile, sums),
                    _ => H::tile::<false, 1>(piece, row, half_tile, sums),
                }
            }
        }
        row += at_once;
    }
}

/// Bytes of a block.
pub(super) const fn block_bytes(int4: bool) -> usize {
    if int4 { INT4_BLOCK } else { INT8_BLOCK }
}

/// Four codes, eight times.
#[inline(always)]
pub(super) unsafe fn four(codes: *const i8) -> __m256i {
    // SAFETY: the callers' bounds.
    unsafe { _mm256_set1_epi32(codes.cast::<i32>().read_unaligned()) }
}

/// Scales of both groups of eight rows of a block.
#[inline(always)]
pub(super) unsafe fn scales<const INT4: bool>(block: *const u8, half_tile: usize) -> [__m256; 2] {
    // SAFETY: the block is whole; the callers' features.
    unsafe {
        if INT4 {
            return int4_scales(block, half_tile);
        }
        let halves = block.add(16 * half_tile);
        let (first, second) = (_mm_loadu_si128(halves.cast()), _mm_loadu_si128(halves.add(32).cast()));
        [_mm256_cvtph_ps(first), _mm256_cvtph_ps(second)]
    }
}

/// Those of an int4 block.
#[inline(always)]
unsafe fn int4_scales(block: *const u8, half_tile: usize) -> [__m256; 2] {
    // SAFETY: the block is whole; the callers' features.
    unsafe {
        let s = _mm256_cvtepu8_epi32(_mm_loadl_epi64(block.add(8 * half_tile).cast()));
        let above = _mm256_set1_epi64x(block.add(TILE_ROWS).cast::<i64>().read_unaligned());
        // Rows 2i and 2i + 1 have nibble i of a word each.
        let nibbles = _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12);
        let above = _mm256_srlv_epi32(above, _mm256_add_epi32(nibbles, _mm256_set1_epi32(16 * half_tile as i32)));
        let above = _mm256_and_si256(above, _mm256_set1_epi32(15));
        let first = _mm256_and_si256(s, _mm256_set1_epi32(63));
        let second = _mm256_or_si256(_mm256_srli_epi32::<6>(s), _mm256_slli_epi32::<2>(above));
        let exponent = _mm256_set1_epi32(124 << 23);
        let first = _mm256_add_epi32(_mm256_slli_epi32::<19>(first), exponent);
        let second = _mm256_add_epi32(_mm256_slli_epi32::<19>(second), exponent);
        [_mm256_castsi256_ps(first), _mm256_castsi256_ps(second)]
    }
}

/// The sums `t` of a group of an int4 block.
#[allow(clippy::needless_range_loop, reason = "several arrays are indexed by the same row")]
#[inline(always)]
unsafe fn int4<const M: usize>(
    block: *const u8,
    half: usize,
    half_tile: usize,
    x: &Rows<i8>,
    b: usize,
) -> [__m256i; M] {
    // SAFETY: the block is whole; the callers' features and bounds.
    unsafe {
        let (low, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
        let z = _mm256_cvtepu8_epi32(_mm_loadl_epi64(block.add(INT4_ZEROS + 16 * half + 8 * half_tile).cast()));
        // Eight pairs of products of at most 15 * 127 stay below 2^15.
        let mut t = [_mm256_setzero_si256(); M];
        let codes = x.codes.add((2 * b + half) * GROUP);
        for v in 0..4 {
            let pairs = _mm256_loadu_si256(block.add(INT4_CODES + (4 * half + v) * 64 + 32 * half_tile).cast());
            let first = _mm256_and_si256(pairs, low);
            let second = _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), low);
            for m in 0..M {
                let codes = codes.add(m * x.ld + 8 * v);
                t[m] = _mm256_add_epi16(t[m], _mm256_maddubs_epi16(first, four(codes)));
                t[m] = _mm256_add_epi16(t[m], _mm256_maddubs_epi16(second, four(codes.add(4))));
            }
        }
        for m in 0..M {
            let offset = *x.offsets.add(m * x.groups + 2 * b + half);
            // |sum of codes| < 2^15, and the upper halves of z are zero: the product of the lower halves.
            let zeros = _mm256_madd_epi16(z, _mm256_set1_epi32(-(offset >> 7)));
            let codes = _mm256_slli_epi32::<3>(_mm256_madd_epi16(t[m], ones));
            t[m] = _mm256_add_epi32(_mm256_add_epi32(codes, zeros), _mm256_set1_epi32(offset));
        }
        t
    }
}

/// The sums `t` of a group of an int8 block.
#[allow(clippy::needless_range_loop, reason = "several arrays are indexed by the same row")]
#[inline(always)]
unsafe fn int8<const M: usize>(
    block: *const u8,
    half: usize,
    half_tile: usize,
    x: &Rows<i8>,
    b: usize,
) -> [__m256i; M] {
    // SAFETY: the block is whole; the callers' features and bounds.
    unsafe {
        let (offset, ones) = (_mm256_set1_epi8(i8::MIN), _mm256_set1_epi16(1));
        let mut t = [_mm256_setzero_si256(); M];
        let codes = x.codes.add((2 * b + half) * GROUP);
        for v in 0..8 {
            let w = _mm256_loadu_si256(block.add(64 + (8 * half + v) * 64 + 32 * half_tile).cast());
            // u - 128 as signed bytes; codes take their signs, so that pairs of 127 * 127 stay below 2^15.
            let w = _mm256_xor_si256(w, offset);
            let magnitude = _mm256_abs_epi8(w);
            for m in 0..M {
                let codes = _mm256_sign_epi8(four(codes.add(m * x.ld + 4 * v)), w);
                let pairs = _mm256_maddubs_epi16(magnitude, codes);
                t[m] = _mm256_add_epi32(t[m], _mm256_madd_epi16(pairs, ones));
            }
        }
        t
    }
}

impl HalfTile for Avx2 {
    /// `sum = fma(t, S * a, sum)` for all rows and groups.
    #[allow(clippy::needless_range_loop, reason = "several arrays are indexed by the same row")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile<const INT4: bool, const M: usize>(piece: &Piece<'_>, row: usize, half_tile: usize, sums: *mut f32) {
        let x = piece.x.rows(row);
        // SAFETY: `piece` has checked all bounds; blocks are whole.
        unsafe {
            for (b, block) in piece.blocks.chunks_exact(block_bytes(INT4)).enumerate() {
                let block = block.as_ptr();
                let scales = scales::<INT4>(block, half_tile);
                let (t0, t1): ([__m256i; M], [__m256i; M]);
                if INT4 {
                    t0 = int4(block, 0, half_tile, &x, b);
                    t1 = int4(block, 1, half_tile, &x, b);
                } else {
                    t0 = int8(block, 0, half_tile, &x, b);
                    t1 = int8(block, 1, half_tile, &x, b);
                }
                for m in 0..M {
                    let (a, to) = (x.scales.add(m * x.groups + 2 * b), sums.add(m * PANEL));
                    let a0 = _mm256_mul_ps(scales[0], _mm256_set1_ps(*a));
                    let a1 = _mm256_mul_ps(scales[1], _mm256_set1_ps(*a.add(1)));
                    let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(t0[m]), a0, _mm256_loadu_ps(to));
                    _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(t1[m]), a1, sum));
                }
            }
        }
    }
}
