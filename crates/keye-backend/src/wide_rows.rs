//! Activations in fourteen bits, as int16 weights are multiplied with.
//!
//! As `quantized_rows`, with scales `a = max|x| / 8191` per group and no zero points: per output, over the groups from left
//! to right, `sum = fma(t_g, d_g * a_g, sum)` with `t_g` the exact sum of products of codes, rounded to f32. Products of two
//! such codes, summed over a group, stay below 2^31 in magnitude.

use crate::host::HostTensor;
use crate::packed::{BLOCK_COLS, GROUP, WIDE_MAX};

/// Rows in fourteen bits.
#[derive(Debug, Default)]
pub(crate) struct WideRows {
    /// Columns, filled up with zeros to a multiple of [`BLOCK_COLS`].
    pub cols: usize,
    /// `[rows, cols]`
    pub codes: Vec<i16>,
    /// `[rows, cols / GROUP]`
    pub scales: Vec<f32>,
}

impl WideRows {
    /// Room for `rows` rows of `cols` columns.
    pub fn new(rows: usize, cols: usize) -> Self {
        let cols = cols.next_multiple_of(BLOCK_COLS);
        Self { cols, codes: vec![0; rows * cols], scales: vec![0.0; rows * cols / GROUP] }
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.cols / GROUP
    }
}

/// One row; `codes` and `scales` are a row's of [`WideRows`], zeros behind the last column.
pub(crate) fn quantize_wide_row(isa: crate::cpu::Isa, x: &[f32], codes: &mut [i16], scales: &mut [f32]) {
    quantize(isa, x, codes, scales);
}

crate::cpu::isa::dispatch! {
    fn quantize(x: &[f32], codes: &mut [i16], scales: &mut [f32]) = quantize_in
}

#[allow(clippy::needless_range_loop, reason = "lanes")]
#[allow(clippy::extra_unused_type_parameters, reason = "plain code, compiled once for each instruction set")]
#[inline(always)]
unsafe fn quantize_in<S>(x: &[f32], codes: &mut [i16], scales: &mut [f32]) {
    for (group, x) in x.chunks(GROUP).enumerate() {
        let mut filled = [0.0f32; GROUP];
        filled[..x.len()].copy_from_slice(x);
        let mut lanes = [0.0f32; 8];
        for c in 0..GROUP / 8 {
            for l in 0..8 {
                let v = filled[8 * c + l].abs();
                lanes[l] = if v > lanes[l] { v } else { lanes[l] };
            }
        }
        let largest = lanes.iter().fold(0.0f32, |a, b| if *b > a { *b } else { a });
        let scale = largest / WIDE_MAX;
        // What is too small to divide by counts as zero; an infinity keeps its scale and so is not lost.
        let inverse = if scale > f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
        let codes = &mut codes[group * GROUP..(group + 1) * GROUP];
        for k in 0..GROUP {
            // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
            codes[k] = ((filled[k] * inverse + 12_582_912.0).to_bits() as i32 - 0x4b40_0000) as i16;
        }
        scales[group] = scale;
    }
}

/// The values that are multiplied in place of `x`.
pub(crate) fn fake_wide(x: &HostTensor) -> HostTensor {
    let mut out = x.clone();
    let mut rows = WideRows::new(1, x.cols);
    for row in 0..x.rows {
        quantize_wide_row(crate::cpu::Isa::Portable, x.row(row), &mut rows.codes, &mut rows.scales);
        for (k, value) in out.row_mut(row).iter_mut().enumerate() {
            *value = f32::from(rows.codes[k]) * rows.scales[k / GROUP];
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;

    #[test]
    fn codes_are_the_nearest_on_every_instruction_set() {
        let x: Vec<f32> = (0..100).map(|k| ((k * 7919 % 1009) as f32 - 500.0) * 0.013).collect();
        for isa in Isa::available() {
            let mut rows = WideRows::new(1, x.len());
            quantize_wide_row(isa, &x, &mut rows.codes, &mut rows.scales);
            assert_eq!((rows.cols, rows.groups()), (128, 4));
            for (k, code) in rows.codes.iter().enumerate() {
                let (scale, value) = (rows.scales[k / GROUP], x.get(k).copied().unwrap_or(0.0));
                assert!(code.unsigned_abs() <= 8191 && (f32::from(*code) * scale - value).abs() <= scale * 0.5001);
            }
        }
    }

    #[test]
    fn zeros_tiny_and_huge() {
        for value in [0.0, 1e-44, 1e-38, 1e38, 3e38] {
            let mut rows = WideRows::new(1, 32);
            quantize_wide_row(Isa::detect(), &[value; 32], &mut rows.codes, &mut rows.scales);
            let found = f32::from(rows.codes[0]) * rows.scales[0];
            assert!((found - value).abs() <= value * 1e-6 || value < 1e-33, "{value}: {found}");
        }
    }
}
