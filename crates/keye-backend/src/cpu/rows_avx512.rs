//! Attention of the heads of one token, with AVX-512, over keys and values that lie a row a token, anywhere.
//!
//! Sixteen keys at a time are turned in registers, so that each lane sums its own key's product from the first dimension to
//! the last, as the kernel over turned blocks does: the same bits, and nothing is written but scores. Turning pays off here
//! when few queries share a key; where many do, blocks are turned once for all of them ([`super::columns`]).

use std::arch::x86_64::*;

use super::attention::{State, soften};
use super::cache::{CpuCache, KvBlock, value_stride};
use super::columns::prefetch;
use super::isa::{Avx512, Element, Simd};
use crate::{BLOCK_TOKENS, KvDtype};

/// Keys that are turned together.
const KEYS: usize = 16;
/// Vectors of a value that are summed together.
const NV: usize = 4;

/// A token's key and value.
type Row<'a, E> = (&'a [E], &'a [E]);

const ONE_TYPE: &str = "a cache has one type";

/// Element of a cached row.
pub(super) trait RowElement: Element {
    /// Dimensions of sixteen keys that are turned together.
    const STEP: usize;

    /// Keys and values of a block of a cache of this type.
    fn of(block: KvBlock<'_>) -> Row<'_, Self>;

    /// `acc[m] += q[m] . key`, a key a lane, over the first `hd` dimensions in their order; rows of q are `hd` apart.
    ///
    /// # Safety
    /// The machine has AVX-512, M rows of q and sixteen keys have `hd` elements, and `hd` is a multiple of [`Self::STEP`].
    unsafe fn add_dots<const M: usize>(q: *const f32, keys: [*const Self; KEYS], hd: usize, acc: &mut [__m512; M]);
}

impl RowElement for f32 {
    const STEP: usize = 16;

    fn of(block: KvBlock<'_>) -> Row<'_, Self> {
        match block {
            KvBlock::F32 { keys, values } => (keys, values),
            _ => unreachable!("{ONE_TYPE}"),
        }
    }

    #[inline(always)]
    unsafe fn add_dots<const M: usize>(q: *const f32, keys: [*const f32; KEYS], hd: usize, acc: &mut [__m512; M]) {
        for d in (0..hd).step_by(Self::STEP) {
            // SAFETY: the caller guarantees `hd` elements of keys and q.
            unsafe {
                let columns = turned(keys.map(|key| _mm512_loadu_si512(key.add(d).cast())));
                for (i, column) in columns.into_iter().enumerate() {
                    let column = _mm512_castsi512_ps(column);
                    for (m, acc) in acc.iter_mut().enumerate() {
                        *acc = _mm512_fmadd_ps(_mm512_set1_ps(*q.add(m * hd + d + i)), column, *acc);
                    }
                }
            }
        }
    }
}

impl RowElement for u16 {
    const STEP: usize = 32;

    fn of(block: KvBlock<'_>) -> Row<'_, Self> {
        match block {
            KvBlock::Bf16 { keys, values } => (keys, values),
            _ => unreachable!("{ONE_TYPE}"),
        }
    }

    #[inline(always)]
    unsafe fn add_dots<const M: usize>(q: *const f32, keys: [*const u16; KEYS], hd: usize, acc: &mut [__m512; M]) {
        for d in (0..hd).step_by(Self::STEP) {
            // SAFETY: the caller guarantees `hd` elements of keys and q.
            unsafe {
                // Two dimensions in each lane.
                let columns = turned(keys.map(|key| _mm512_loadu_si512(key.add(d).cast())));
                for (i, pair) in columns.into_iter().enumerate() {
                    let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pair));
                    let odd = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
                    for (m, acc) in acc.iter_mut().enumerate() {
                        let q = q.add(m * hd + d + 2 * i);
                        *acc = _mm512_fmadd_ps(_mm512_set1_ps(*q), even, *acc);
                        *acc = _mm512_fmadd_ps(_mm512_set1_ps(*q.add(1)), odd, *acc);
                    }
                }
            }
        }
    }
}

/// Sixteen by sixteen: element j of vector i becomes element i of vector j.
#[inline(always)]
unsafe fn turned(r: [__m512i; 16]) -> [__m512i; 16] {
    // SAFETY: the caller guarantees the instruction set.
    unsafe {
        // Four by four within the quarters of four vectors: u[4 g + c] has columns c, c + 4, c + 8, c + 12 of rows 4 g ...
        let mut u = r;
        for g in (0..16).step_by(4) {
            let (a, b) = (_mm512_unpacklo_epi32(r[g], r[g + 1]), _mm512_unpackhi_epi32(r[g], r[g + 1]));
            let (c, d) = (_mm512_unpacklo_epi32(r[g + 2], r[g + 3]), _mm512_unpackhi_epi32(r[g + 2], r[g + 3]));
            u[g] = _mm512_unpacklo_epi64(a, c);
            u[g + 1] = _mm512_unpackhi_epi64(a, c);
            u[g + 2] = _mm512_unpacklo_epi64(b, d);
            u[g + 3] = _mm512_unpackhi_epi64(b, d);
        }
        // Then the quarters.
        let mut out = r;
        for c in 0..4 {
            let low = _mm512_shuffle_i32x4::<0x88>(u[c], u[4 + c]);
            let high = _mm512_shuffle_i32x4::<0x88>(u[8 + c], u[12 + c]);
            out[c] = _mm512_shuffle_i32x4::<0x88>(low, high);
            out[8 + c] = _mm512_shuffle_i32x4::<0xdd>(low, high);
            let low = _mm512_shuffle_i32x4::<0xdd>(u[c], u[4 + c]);
            let high = _mm512_shuffle_i32x4::<0xdd>(u[8 + c], u[12 + c]);
            out[4 + c] = _mm512_shuffle_i32x4::<0x88>(low, high);
            out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(low, high);
        }
        out
    }
}

/// Attention of queries of `hd` dimensions, one behind the other in `q`, to the tokens `positions` of a sequence, in
/// blocks of 64 in their order.
#[allow(clippy::too_many_arguments, reason = "an operation's operands")]
pub(super) fn attend(
    q: &[f32],
    hd: usize,
    scale: f32,
    cache: &CpuCache,
    layer: usize,
    kv_head: usize,
    block_table: &[u32],
    positions: impl Iterator<Item = usize>,
    state: &mut State<'_>,
    tile: &mut Vec<f32>,
) {
    let place =
        |position: usize| (cache.block(layer, block_table[position / BLOCK_TOKENS] as usize, kv_head), position);
    match cache.dtype() {
        KvDtype::F32 => attend_rows::<f32>(q, hd, scale, positions.map(place), state, tile),
        KvDtype::Bf16 => attend_rows::<u16>(q, hd, scale, positions.map(place), state, tile),
        KvDtype::Int8 => unreachable!("rows in eight bits are gathered first"),
    }
}

fn attend_rows<'a, E: RowElement + 'a>(
    q: &[f32],
    hd: usize,
    scale: f32,
    tokens: impl Iterator<Item = (KvBlock<'a>, usize)>,
    state: &mut State<'_>,
    tile: &mut Vec<f32>,
) {
    let stride = value_stride(hd);
    let mut rows = tokens.map(|(block, position)| {
        let ((keys, values), slot) = (E::of(block), position % BLOCK_TOKENS);
        (&keys[slot * hd..][..hd], &values[slot * stride..][..stride])
    });
    // Each row comes from a place of its own: it is asked for while the block before is computed with.
    let mut ask = |block: &mut Vec<Row<'a, E>>| {
        block.clear();
        block.extend(rows.by_ref().take(BLOCK_TOKENS));
        for (key, value) in block {
            prefetch(key);
            prefetch(value);
        }
    };
    let (mut block, mut next) = (Vec::with_capacity(BLOCK_TOKENS), Vec::with_capacity(BLOCK_TOKENS));
    ask(&mut block);
    while !block.is_empty() {
        ask(&mut next);
        update(q, hd, scale, &block, state, tile);
        std::mem::swap(&mut block, &mut next);
    }
}

/// Takes up to 64 tokens, keys `[hd]` and values `[stride]`, into the states of the queries.
fn update<E: RowElement>(
    q: &[f32],
    hd: usize,
    scale: f32,
    rows: &[Row<'_, E>],
    state: &mut State<'_>,
    tile: &mut Vec<f32>,
) {
    let (stride, heads) = (value_stride(hd), q.len() / hd);
    assert!((1..=BLOCK_TOKENS).contains(&rows.len()) && hd.is_multiple_of(E::STEP));
    assert!(rows.iter().all(|(key, value)| key.len() >= hd && value.len() >= stride));
    tile.resize(8 * BLOCK_TOKENS, 0.0);
    let mut head = 0;
    while head < heads {
        let at_once = match heads - head {
            8.. => 8,
            4.. => 4,
            _ => 1,
        };
        let (max, sum) = (&mut state.max[head..head + at_once], &mut state.sum[head..head + at_once]);
        let out = &mut state.out[head * stride..(head + at_once) * stride];
        let q = &q[head * hd..(head + at_once) * hd];
        // SAFETY: the machine has AVX-512, as all who call this made sure; lengths are asserted above.
        unsafe {
            match at_once {
                8 => kernel::<E, 8>(q, hd, scale, rows, max, sum, out, tile),
                4 => kernel::<E, 4>(q, hd, scale, rows, max, sum, out, tile),
                _ => kernel::<E, 1>(q, hd, scale, rows, max, sum, out, tile),
            }
        }
        head += at_once;
    }
}

#[allow(clippy::too_many_arguments, reason = "a kernel's operands")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
unsafe fn kernel<E: RowElement, const M: usize>(
    q: &[f32],
    hd: usize,
    scale: f32,
    rows: &[Row<'_, E>],
    max: &mut [f32],
    sum: &mut [f32],
    out: &mut [f32],
    scores: &mut [f32],
) {
    let (stride, count) = (value_stride(hd), rows.len());
    assert!(count <= BLOCK_TOKENS && scores.len() >= M * BLOCK_TOKENS);
    assert!(max.len() == M && sum.len() == M && out.len() == M * stride && q.len() >= M * hd);
    // SAFETY: keys and values have `hd` and `stride` elements (the caller's word), the rest is asserted above.
    unsafe {
        for first in (0..count).step_by(KEYS) {
            // Beyond the last key the last is repeated.
            let keys = std::array::from_fn(|i| rows[(first + i).min(count - 1)].0.as_ptr());
            let mut acc = [_mm512_setzero_ps(); M];
            E::add_dots::<M>(q.as_ptr(), keys, hd, &mut acc);
            for (m, acc) in acc.into_iter().enumerate() {
                let to = scores.as_mut_ptr().add(m * BLOCK_TOKENS + first);
                _mm512_storeu_ps(to, _mm512_mul_ps(acc, _mm512_set1_ps(scale)));
            }
        }
        soften::<Avx512, M>(&[count; M], max, sum, out, stride, scores);
        let mut d = 0;
        while d < stride {
            let wide = d + NV * Avx512::LANES <= stride;
            // As many queries at a time as the registers have room for.
            for m in (0..M).step_by(4) {
                let (scores, out) = (&scores[m * BLOCK_TOKENS..], out.as_mut_ptr().add(m * stride + d));
                match (M, wide) {
                    (1, true) => weigh::<E, 1, NV>(scores, rows, d, out, stride),
                    (1, false) => weigh::<E, 1, 1>(scores, rows, d, out, stride),
                    (_, true) => weigh::<E, 4, NV>(scores, rows, d, out, stride),
                    (_, false) => weigh::<E, 4, 1>(scores, rows, d, out, stride),
                }
            }
            d += if wide { NV * Avx512::LANES } else { Avx512::LANES };
        }
    }
}

/// `out[m] += sum over j of scores[m][j] * value j [d..]`, V vectors wide; rows of `out` are `ldo` apart.
#[inline(always)]
unsafe fn weigh<E: Element, const M: usize, const V: usize>(
    scores: &[f32],
    rows: &[Row<'_, E>],
    d: usize,
    out: *mut f32,
    ldo: usize,
) {
    // SAFETY: the caller guarantees M rows of 64 scores and of out, and V vectors from d on in each value.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); V]; M];
        for (m, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                *acc = _mm512_loadu_ps(out.add(m * ldo + v * Avx512::LANES));
            }
        }
        for (j, (_, value)) in rows.iter().enumerate() {
            let mut vectors = [_mm512_setzero_ps(); V];
            for (v, vector) in vectors.iter_mut().enumerate() {
                *vector = E::load::<Avx512>(value.as_ptr().add(d + v * Avx512::LANES));
            }
            for (m, acc) in acc.iter_mut().enumerate() {
                let p = _mm512_set1_ps(*scores.as_ptr().add(m * BLOCK_TOKENS + j));
                for (acc, vector) in acc.iter_mut().zip(vectors) {
                    *acc = _mm512_fmadd_ps(p, vector, *acc);
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            for (v, acc) in acc.iter().enumerate() {
                _mm512_storeu_ps(out.add(m * ldo + v * Avx512::LANES), *acc);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Isa, attention, columns};
    use super::*;
    use crate::weight::f32_to_bf16;

    /// Bit for bit what the kernel over turned blocks yields.
    #[test]
    fn rows_in_place_give_the_bits_of_turned_blocks() {
        if Isa::detect() != Isa::Avx512 {
            return;
        }
        fn check<E: RowElement + columns::Cached>(element: impl Fn(f32) -> E) {
            for (hd, heads, count) in [(128, 8, 64), (64, 5, 37), (32, 1, 1), (96, 13, 16)] {
                let stride = value_stride(hd);
                let value = |i: usize| ((i * 7919 % 1009) as f32 - 504.0) / 300.0;
                let keys: Vec<E> = (0..64 * hd).map(|i| element(value(i))).collect();
                let values: Vec<E> = (0..64 * stride).map(|i| element(value(3 * i + 1))).collect();
                let q: Vec<f32> = (0..heads * hd).map(|i| value(5 * i + 2) / 8.0).collect();
                let row = |i: usize| (&keys[i * hd..][..hd], &values[i * stride..][..stride]);
                let mut tile = Vec::new();
                let (mut found, mut expected) =
                    (vec![0.0; State::len(heads, stride)], vec![0.0; State::len(heads, stride)]);
                let mut state = State::new(&mut found, heads, stride);
                let mut turned = State::new(&mut expected, heads, stride);
                // Twice, so that the second meets a state that is not empty.
                for _ in 0..2 {
                    update(&q, hd, 0.3, &(0..count).map(row).collect::<Vec<_>>(), &mut state, &mut tile);
                    let (mut k, mut v) = (vec![0.0; hd * 64], vec![0.0; stride * 64]);
                    let plain = |i: usize| {
                        let (key, value) = row(i);
                        (columns::Row { elements: key, scale: 1.0 }, columns::Row { elements: value, scale: 1.0 })
                    };
                    columns::pack(Isa::Avx512, count, plain, hd, &mut k, &mut v);
                    for head in 0..heads {
                        let block = KvBlock::F32 { keys: &k, values: &v };
                        let q = &q[head * hd..];
                        attention::update(Isa::Avx512, q, hd, head, &[count], block, hd, 0.3, &mut turned, &mut tile);
                    }
                }
                let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(state.out), bits(turned.out), "{hd} {heads} {count}");
                assert_eq!((bits(state.max), bits(state.sum)), (bits(turned.max), bits(turned.sum)));
            }
        }
        check(|value| value);
        check(f32_to_bf16);
    }
}
