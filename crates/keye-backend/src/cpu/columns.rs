//! Rows to columns: keys that are gathered lie a row a token, the kernels of attention want a row a dimension.

use super::Isa;
use super::cache::value_stride;
use crate::BLOCK_TOKENS;
use crate::weight::bf16_to_f32;

/// Rows that are turned together.
pub(super) const AT_ONCE: usize = 8;

/// Element of a cached row.
pub(super) trait Cached: Copy {
    /// Whether a row has a scale; otherwise it is taken as one.
    const SCALED: bool = false;
    fn widen(self) -> f32;
    /// Eight elements.
    ///
    /// # Safety
    /// The machine has AVX2 and eight elements can be read.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256;
}

impl Cached for f32 {
    fn widen(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: passed on to the caller.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(from) }
    }
}

impl Cached for u16 {
    fn widen(self) -> f32 {
        bf16_to_f32(self)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: passed on to the caller.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
}

impl Cached for i8 {
    const SCALED: bool = true;

    fn widen(self) -> f32 {
        f32::from(self)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: passed on to the caller.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }
}

/// A row as it is cached, with its scale.
#[derive(Clone, Copy)]
pub(super) struct Row<'a, T> {
    pub elements: &'a [T],
    pub scale: f32,
}

/// Asks for a row that is going to be read, into the second level of the caches.
pub(super) fn prefetch<T>(row: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        const LINE: usize = 64;
        let start = row.as_ptr().cast::<i8>();
        for at in (0..size_of_val(row)).step_by(LINE) {
            // SAFETY: a hint, which reads nothing; the address is inside the row.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(start.add(at)) };
        }
    }
    let _ = row;
}

/// Puts the keys of up to 64 tokens, `[hd]` each, into the columns of `keys [hd, 64]` and their values, `[stride]` each, into
/// the rows of `values [64, stride]`. What stands behind the last token is unspecified but finite, if it was.
pub(super) fn pack<'a, T: Cached + 'a>(
    isa: Isa,
    count: usize,
    token: impl Fn(usize) -> (Row<'a, T>, Row<'a, T>),
    hd: usize,
    keys: &mut [f32],
    values: &mut [f32],
) {
    let stride = value_stride(hd);
    for first in (0..count).step_by(AT_ONCE) {
        // Beyond the last token the last is repeated.
        let rows: [Row<'_, T>; AT_ONCE] = std::array::from_fn(|i| token((first + i).min(count - 1)).0);
        columns(isa, rows, hd, first, keys);
    }
    for i in 0..count {
        let Row { elements, scale } = token(i).1;
        for (to, value) in values[i * stride..(i + 1) * stride].iter_mut().zip(elements) {
            *to = if T::SCALED { value.widen() * scale } else { value.widen() };
        }
    }
}

fn columns<T: Cached>(isa: Isa, rows: [Row<'_, T>; AT_ONCE], hd: usize, at: usize, keys: &mut [f32]) {
    assert!(
        rows.iter().all(|row| row.elements.len() >= hd)
            && at + AT_ONCE <= BLOCK_TOKENS
            && keys.len() >= hd * BLOCK_TOKENS
    );
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx2 {
        done = hd / 8 * 8;
        // SAFETY: the machine has AVX2; lengths are asserted above.
        unsafe { columns_avx2(rows, done, at, keys) };
    }
    let _ = isa;
    for d in done..hd {
        for (i, row) in rows.iter().enumerate() {
            let value = row.elements[d].widen();
            keys[d * BLOCK_TOKENS + at + i] = if T::SCALED { value * row.scale } else { value };
        }
    }
}

/// Eight by eight.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn columns_avx2<T: Cached>(rows: [Row<'_, T>; AT_ONCE], hd: usize, at: usize, keys: &mut [f32]) {
    use std::arch::x86_64::*;
    for d in (0..hd).step_by(8) {
        // SAFETY: the caller guarantees hd elements a row and `[hd, 64]` keys.
        unsafe {
            let r = rows.map(|row| {
                let values = T::load8(row.elements.as_ptr().add(d));
                if T::SCALED { _mm256_mul_ps(values, _mm256_set1_ps(row.scale)) } else { values }
            });
            let pairs = |a: __m256, b: __m256| (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let ((a0, a1), (a2, a3)) = (pairs(r[0], r[1]), pairs(r[2], r[3]));
            let ((a4, a5), (a6, a7)) = (pairs(r[4], r[5]), pairs(r[6], r[7]));
            let fours = |a: __m256, b: __m256| (_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b));
            let ((b0, b1), (b2, b3)) = (fours(a0, a2), fours(a1, a3));
            let ((b4, b5), (b6, b7)) = (fours(a4, a6), fours(a5, a7));
            let low = |a: __m256, b: __m256| _mm256_permute2f128_ps::<0x20>(a, b);
            let high = |a: __m256, b: __m256| _mm256_permute2f128_ps::<0x31>(a, b);
            let turned = [
                low(b0, b4),
                low(b1, b5),
                low(b2, b6),
                low(b3, b7),
                high(b0, b4),
                high(b1, b5),
                high(b2, b6),
                high(b3, b7),
            ];
            for (i, column) in turned.into_iter().enumerate() {
                _mm256_storeu_ps(keys.as_mut_ptr().add((d + i) * BLOCK_TOKENS + at), column);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain<T>(elements: &[T]) -> Row<'_, T> {
        Row { elements, scale: 1.0 }
    }

    #[test]
    fn keys_become_columns_and_values_stay_rows() {
        for isa in Isa::available() {
            for (hd, count) in [(16, 64), (24, 1), (19, 13), (128, 63)] {
                let stride = value_stride(hd);
                let keys: Vec<f32> = (0..64 * hd).map(|i| i as f32).collect();
                let values: Vec<u16> = (0..64 * stride).map(|i| (i * 7) as u16 & 0x7eff).collect();
                let bits: Vec<u16> = keys.iter().map(|key| (key.to_bits() >> 16) as u16).collect();
                let (mut k, mut v) = (vec![-1.0; hd * 64], vec![-1.0; 64 * stride]);
                let row = |i: usize| (plain(&bits[i * hd..][..hd]), plain(&values[i * stride..][..stride]));
                pack(isa, count, row, hd, &mut k, &mut v);
                for (i, d) in (0..count).flat_map(|i| (0..hd).map(move |d| (i, d))) {
                    assert_eq!(k[d * 64 + i], bf16_to_f32(bits[i * hd + d]), "{isa:?} {hd} {i} {d}");
                    assert_eq!(v[i * stride + d], bf16_to_f32(values[i * stride + d]), "{isa:?} {hd} {i} {d}");
                }
                let row = |i: usize| (plain(&keys[i * hd..][..hd]), plain(&keys[i * hd..][..hd]));
                pack(isa, count, row, hd, &mut k, &mut v);
                assert!((0..count).all(|i| (0..hd).all(|d| k[d * 64 + i] == keys[i * hd + d])), "{isa:?} {hd}");
                let codes: Vec<i8> = (0..64 * stride).map(|i| (i * 11 % 255) as u8 as i8).collect();
                let row = |i: usize| {
                    let part = |width: usize, scale| Row { elements: &codes[i * width..][..width], scale };
                    (part(hd, 0.5 + i as f32), part(stride, 0.25))
                };
                pack(isa, count, row, hd, &mut k, &mut v);
                for (i, d) in (0..count).flat_map(|i| (0..hd).map(move |d| (i, d))) {
                    assert_eq!(k[d * 64 + i], f32::from(codes[i * hd + d]) * (0.5 + i as f32), "{isa:?} {hd} {i} {d}");
                    assert_eq!(v[i * stride + d], f32::from(codes[i * stride + d]) * 0.25, "{isa:?} {hd} {i} {d}");
                }
            }
        }
    }
}
