//! Rows in 8-bit floats, as the FP8 scorer of sparse attention has them (spec of 2.0, §7.3): the Hadamard transform, then
//! `x = e4m3 * scale`, a scale for each row that is a power of two.
//!
//! Products of such rows are those of the 8-bit floats times two powers of two, so the values as f32 (or bf16, which holds
//! them too) give the scores of the 8-bit floats themselves.

use crate::fp8::e4m3_to_f32;

/// Largest e4m3.
const LARGEST: f32 = 448.0;
/// A row has at least this magnitude, so that zeros have a scale.
const LEAST: f32 = 1e-4;

/// `x = H x / sqrt(n)`, H in Sylvester's order (`H[i][j] = (-1)^popcount(i & j)`); n is a power of two.
fn hadamard(x: &mut [f32]) {
    assert!(x.len().is_power_of_two(), "a row of {} elements", x.len());
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let scale = (x.len() as f32).powf(-0.5);
    x.iter_mut().for_each(|x| *x *= scale);
}

/// `2^ceil(log2(max(max |x|, 1e-4) / 448))`.
fn scale(row: &[f32]) -> f32 {
    let largest = row.iter().fold(LEAST, |max, value| max.max(value.abs()));
    let bits = (largest / LARGEST).to_bits();
    // The power of two at or above: of the exponent, and one more when there is a mantissa.
    f32::from_bits((bits.wrapping_add(0x7f_ffff)) & 0xff80_0000)
}

/// The nearest `e4m3fn`, of two the even one; what is too large takes the largest.
fn f32_to_e4m3(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    if value.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = value.abs().min(LARGEST);
    // Below 2^-6 steps are 2^-9; eight of them are the first normal number.
    if magnitude < 1.0 / 64.0 {
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    // 20 of 23 bits of the mantissa go; a carry goes into the exponent.
    let bits = magnitude.to_bits();
    let rounded = (bits + 0x7_ffff + (bits >> 20 & 1)) >> 20;
    sign | (rounded - (120 << 3)) as u8
}

/// A row, as it is before the transform, in 8-bit floats with their scale. Its length is a power of two.
pub fn quantize(row: &[f32]) -> (Vec<u8>, f32) {
    let mut row = row.to_vec();
    hadamard(&mut row);
    let scale = scale(&row);
    (row.into_iter().map(|value| f32_to_e4m3(value / scale)).collect(), scale)
}

/// The value of an 8-bit float.
pub fn widen(bits: u8) -> f32 {
    e4m3_to_f32(bits)
}

/// Makes a row what its 8-bit floats and their scale stand for.
pub(crate) fn round(row: &mut [f32]) {
    hadamard(row);
    let scale = scale(row);
    row.iter_mut().for_each(|value| *value = e4m3_to_f32(f32_to_e4m3(*value / scale)) * scale);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::{bf16_to_f32, f32_to_bf16};

    #[test]
    fn every_value_comes_back_and_what_lies_between_goes_to_the_nearer() {
        let codes: Vec<u8> = (0..0x7f).collect();
        for pair in codes.windows(2) {
            let [a, b] = [pair[0], pair[1]].map(e4m3_to_f32);
            let middle = f32::midpoint(a, b);
            let even = if pair[0] % 2 == 0 { pair[0] } else { pair[1] };
            for (value, code) in
                [(a, pair[0]), (b, pair[1]), (middle, even), (middle.next_down(), pair[0]), (middle.next_up(), pair[1])]
            {
                assert_eq!(f32_to_e4m3(value), code, "{value}");
                assert_eq!(f32_to_e4m3(-value), code | 0x80, "-{value}");
            }
        }
        assert_eq!([460.0, 1e30, f32::INFINITY].map(f32_to_e4m3), [0x7e; 3]);
        assert_eq!(f32_to_e4m3(f32::NAN) & 0x7f, 0x7f);
    }

    #[test]
    fn scales_are_powers_of_two_that_hold_the_row() {
        for (largest, expected) in [(448.0, 1.0), (448.1, 2.0), (224.0, 0.5), (1.0, 1.0 / 256.0), (0.0, 2f32.powi(-22))]
        {
            assert_eq!(scale(&[0.0, -largest, 0.3 * largest]), expected, "{largest}");
        }
    }

    /// By the definition: `H[i][j] = (-1)^popcount(i & j)`.
    #[test]
    fn the_transform_is_sylvesters_and_its_own_inverse() {
        let row: Vec<f32> = (0..64).map(|i| ((i * 37 % 23) as f32 - 11.0) / 7.0).collect();
        let mut found = row.clone();
        hadamard(&mut found);
        for (i, found) in found.iter().enumerate() {
            let sign = |j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
            let expected: f64 = row.iter().enumerate().map(|(j, x)| sign(j) * f64::from(*x)).sum::<f64>() / 8.0;
            assert!((f64::from(*found) - expected).abs() < 1e-5, "{i}");
        }
        hadamard(&mut found);
        assert!(found.iter().zip(&row).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn a_rounded_row_is_that_of_its_bytes_and_fits_bf16() {
        for factor in [1e-6, 0.01, 1.0, 300.0] {
            let row: Vec<f32> = (0..128).map(|i| factor * ((i * 53 % 97) as f32 - 48.0).powi(3) / 1000.0).collect();
            let (bytes, scale) = quantize(&row);
            let mut rounded = row.clone();
            round(&mut rounded);
            for (value, bits) in rounded.iter().zip(&bytes) {
                assert_eq!(*value, widen(*bits) * scale);
                assert_eq!(*value, bf16_to_f32(f32_to_bf16(*value)));
            }
        }
    }
}
