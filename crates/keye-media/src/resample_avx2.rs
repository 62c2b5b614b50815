//! The integer passes of [`resample`](crate::resample) in AVX2: pairs of taps by `vpmaddwd`, which multiplies 16-bit
//! values and adds two products into 32 bits. Sums of integers do not depend on their order, so the bytes are those of the
//! portable passes.
//!
//! Weights of 22 bits do not fit: they are split, `w = high * 2^11 + low`, and so are the sums.

use std::arch::x86_64::*;

/// Bits of the lower part of a split weight.
const LOW_BITS: i32 = 11;
/// Rows that the horizontal pass takes at once.
const ROWS: usize = 4;
/// Bytes that the vertical pass takes at once.
const LANES: usize = 32;

/// Weights of one dimension in pairs; every output has the same number of them, filled up with zeros.
#[derive(Debug)]
pub(crate) struct Packed {
    /// First input index per output.
    first: Vec<usize>,
    /// Pairs per output, even.
    pairs: usize,
    /// `[outputs, pairs]`, two 16-bit weights each.
    low: Vec<i32>,
    /// The higher parts of split weights, else empty.
    high: Vec<i32>,
    bits: u32,
    /// Bytes of a row that the horizontal pass looks at, some of them behind its end.
    reach: usize,
}

/// Memory of the last rows, which nothing follows that could be read by accident.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Packed {
    /// From the first input index and the weights of every output, with `bits` fraction bits.
    pub(crate) fn new<'a>(outputs: impl Iterator<Item = (usize, &'a [i32])> + Clone, bits: u32) -> Self {
        let taps = outputs.clone().map(|(_, weights)| weights.len()).max().unwrap_or(0);
        let pairs = taps.div_ceil(2).next_multiple_of(2);
        let fits = |weight: &i32| i16::try_from(*weight).is_ok();
        let split = !outputs.clone().all(|(_, weights)| weights.iter().all(fits));
        let pair = |weights: &[i32], k: usize, part: &dyn Fn(i32) -> i32| {
            let at = |i: usize| part(weights.get(i).copied().unwrap_or(0));
            (at(2 * k) & 0xffff) | (at(2 * k + 1) << 16)
        };
        let mut packed =
            Self { first: Vec::new(), pairs, low: Vec::new(), high: Vec::new(), bits, reach: pairs * 2 * 3 + 4 };
        for (first, weights) in outputs {
            packed.first.push(first);
            packed.reach = packed.reach.max(first * 3 + pairs * 2 * 3 + 4);
            for k in 0..pairs {
                if split {
                    packed.low.push(pair(weights, k, &|w| w & ((1 << LOW_BITS) - 1)));
                    packed.high.push(pair(weights, k, &|w| w >> LOW_BITS));
                } else {
                    packed.low.push(pair(weights, k, &|w| w));
                }
            }
        }
        packed
    }

    /// The horizontal pass over rows of `in_w` RGB pixels. `to` has a row of outputs for every row of `from`.
    #[target_feature(enable = "avx2")]
    pub(crate) fn across(&self, from: &[u8], in_w: usize, to: &mut [u8], tail: &mut Tail) {
        let (from_stride, to_stride) = (in_w * 3, self.first.len() * 3);
        let rows = from.len() / from_stride;
        let mut y = 0;
        // What is read behind the end of a row, with weights of zero, is the next row.
        while y + ROWS <= rows && (y + ROWS - 1) * from_stride + self.reach <= from.len() {
            self.four_rows(&from[y * from_stride..], from_stride, &mut to[y * to_stride..][..ROWS * to_stride]);
            y += ROWS;
        }
        let tail_stride = from_stride.max(self.reach);
        tail.to.resize(ROWS * to_stride, 0);
        while y < rows {
            let count = (rows - y).min(ROWS);
            tail.from.clear();
            tail.from.resize(ROWS * tail_stride, 0);
            let sources = from[y * from_stride..].chunks_exact(from_stride).take(count);
            for (row, copy) in sources.zip(tail.from.chunks_exact_mut(tail_stride)) {
                copy[..from_stride].copy_from_slice(row);
            }
            self.four_rows(&tail.from, tail_stride, &mut tail.to);
            to[y * to_stride..][..count * to_stride].copy_from_slice(&tail.to[..count * to_stride]);
            y += count;
        }
    }

    #[target_feature(enable = "avx2")]
    fn four_rows(&self, from: &[u8], from_stride: usize, to: &mut [u8]) {
        match self.high.is_empty() {
            true => self.four_rows_of::<false>(from, from_stride, to),
            false => self.four_rows_of::<true>(from, from_stride, to),
        }
    }

    /// A register has two rows, one in each half; a half has the three sums of a pixel and nothing.
    #[target_feature(enable = "avx2")]
    fn four_rows_of<const SPLIT: bool>(&self, from: &[u8], from_stride: usize, to: &mut [u8]) {
        let to_stride = self.first.len() * 3;
        assert!((ROWS - 1) * from_stride + self.reach <= from.len(), "rows are too short");
        assert_eq!(to.len(), ROWS * to_stride, "four rows of output");
        let low = self.low.chunks_exact(self.pairs);
        let high = if SPLIT { self.high.chunks_exact(self.pairs) } else { self.low.chunks_exact(self.pairs) };

        // Pixels 0 and 1, and 2 and 3, of the 16 bytes: r0 0 r1 0, g0 0 g1 0, b0 0 b1 0, nothing.
        const Z: i8 = -1;
        let pixels_01 = _mm_setr_epi8(0, Z, 3, Z, 1, Z, 4, Z, 2, Z, 5, Z, Z, Z, Z, Z);
        let pixels_23 = _mm_setr_epi8(6, Z, 9, Z, 7, Z, 10, Z, 8, Z, 11, Z, Z, Z, Z, Z);
        let pixels_01 = _mm256_broadcastsi128_si256(pixels_01);
        let pixels_23 = _mm256_broadcastsi128_si256(pixels_23);
        let half = _mm256_set1_epi32((1 << self.bits) >> 1);
        let shift = _mm_cvtsi32_si128(self.bits as i32);

        for (o, ((first, low), high)) in self.first.iter().zip(low).zip(high).enumerate() {
            let mut sums = [half; 2];
            let mut high_sums = [_mm256_setzero_si256(); 2];
            for (g, (low, high)) in low.chunks_exact(2).zip(high.chunks_exact(2)).enumerate() {
                let at = first * 3 + g * 12;
                for half in 0..2 {
                    let upper = 2 * half * from_stride + at;
                    // SAFETY: at + 16 <= first * 3 + pairs * 6 + 4 <= reach (a group is two pairs, 12 bytes), and the
                    // first assertion says that `reach` bytes follow the start of each of the four rows.
                    let four = unsafe {
                        let row = |at: usize| _mm_loadu_si128(from.as_ptr().add(at).cast());
                        _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(row(upper)), row(upper + from_stride))
                    };
                    let (a, b) = (_mm256_shuffle_epi8(four, pixels_01), _mm256_shuffle_epi8(four, pixels_23));
                    let dot = |w: &[i32]| {
                        let a = _mm256_madd_epi16(a, _mm256_set1_epi32(w[0]));
                        _mm256_add_epi32(a, _mm256_madd_epi16(b, _mm256_set1_epi32(w[1])))
                    };
                    sums[half] = _mm256_add_epi32(sums[half], dot(low));
                    if SPLIT {
                        high_sums[half] = _mm256_add_epi32(high_sums[half], dot(high));
                    }
                }
            }
            let finish = |sum, high| {
                let sum = if SPLIT { _mm256_add_epi32(sum, _mm256_slli_epi32::<LOW_BITS>(high)) } else { sum };
                _mm256_sra_epi32(sum, shift)
            };
            let words = _mm256_packs_epi32(finish(sums[0], high_sums[0]), finish(sums[1], high_sums[1]));
            let bytes = _mm256_packus_epi16(words, words);
            let rows_02 = _mm_cvtsi128_si64(_mm256_castsi256_si128(bytes)) as u64;
            let rows_13 = _mm_cvtsi128_si64(_mm256_extracti128_si256::<1>(bytes)) as u64;
            let pixels = [rows_02 as u32, rows_13 as u32, (rows_02 >> 32) as u32, (rows_13 >> 32) as u32];
            for (row, pixel) in to.chunks_exact_mut(to_stride).zip(pixels) {
                match row.get_mut(o * 3..o * 3 + 4) {
                    // The fourth byte is the next pixel's, which comes later.
                    Some(four) => four.copy_from_slice(&pixel.to_le_bytes()),
                    None => row[o * 3..].copy_from_slice(&pixel.to_le_bytes()[..3]),
                }
            }
        }
    }

    /// The vertical pass over rows of `stride` bytes, at least 32. `to` has a row for every output.
    #[target_feature(enable = "avx2")]
    pub(crate) fn down(&self, from: &[u8], to: &mut [u8], stride: usize) {
        match self.high.is_empty() {
            true => self.down_of::<false>(from, to, stride),
            false => self.down_of::<true>(from, to, stride),
        }
    }

    #[target_feature(enable = "avx2")]
    fn down_of<const SPLIT: bool>(&self, from: &[u8], to: &mut [u8], stride: usize) {
        assert!(stride >= LANES && from.len() >= stride, "rows are too short");
        assert_eq!(to.len(), self.first.len() * stride, "a row for every output");
        let last = from.len() / stride - 1;
        let low = self.low.chunks_exact(self.pairs);
        let high = if SPLIT { self.high.chunks_exact(self.pairs) } else { self.low.chunks_exact(self.pairs) };
        let half = _mm256_set1_epi32((1 << self.bits) >> 1);
        let shift = _mm_cvtsi32_si128(self.bits as i32);
        let zero = _mm256_setzero_si256();

        for (((first, low), high), row) in self.first.iter().zip(low).zip(high).zip(to.chunks_exact_mut(stride)) {
            let mut x = 0;
            loop {
                // The last step overlaps the one before it.
                let start = x.min(stride - LANES);
                let mut sums = [half; 4];
                let mut high_sums = [zero; 4];
                for (k, (low, high)) in low.iter().zip(high).enumerate() {
                    // Rows behind the last one have weights of zero.
                    let source = |tap: usize| {
                        let at = (first + tap).min(last) * stride + start;
                        // SAFETY: at + 32 <= (last + 1) * stride <= from.len(), as start <= stride - 32.
                        unsafe { _mm256_loadu_si256(from.as_ptr().add(at).cast()) }
                    };
                    let (a, b) = (source(2 * k), source(2 * k + 1));
                    let (near, far) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
                    let pairs = [
                        _mm256_unpacklo_epi8(near, zero),
                        _mm256_unpackhi_epi8(near, zero),
                        _mm256_unpacklo_epi8(far, zero),
                        _mm256_unpackhi_epi8(far, zero),
                    ];
                    let (low, high) = (_mm256_set1_epi32(*low), _mm256_set1_epi32(*high));
                    for i in 0..4 {
                        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs[i], low));
                        if SPLIT {
                            high_sums[i] = _mm256_add_epi32(high_sums[i], _mm256_madd_epi16(pairs[i], high));
                        }
                    }
                }
                for (sum, high) in sums.iter_mut().zip(high_sums) {
                    if SPLIT {
                        *sum = _mm256_add_epi32(*sum, _mm256_slli_epi32::<LOW_BITS>(high));
                    }
                    *sum = _mm256_sra_epi32(*sum, shift);
                }
                let near = _mm256_packs_epi32(sums[0], sums[1]);
                let far = _mm256_packs_epi32(sums[2], sums[3]);
                // SAFETY: start + 32 <= stride, the length of `row`.
                unsafe {
                    _mm256_storeu_si256(row.as_mut_ptr().add(start).cast(), _mm256_packus_epi16(near, far));
                }
                x += LANES;
                if x >= stride {
                    break;
                }
            }
        }
    }
}
