//! Activations in fourteen bits, as int10 and int12 weights are multiplied with.
//!
//! Each [`BLOCK_COLS`] of a row have a scale `a = max|x| / 8191` and codes `c = round(x / a)`, ties to even. A product is
//! then, per output, over the blocks from left to right, `sum = fma(t_b, a_b, sum)`, with `t_b` the exact sum of
//! `c * f * q` of a block, rounded to f32; and the whole times the weights' row scale.

use crate::host::HostTensor;
use crate::packed::BLOCK_COLS;
use crate::spare::WIDE_CODES;

/// The largest code: 64 products with weights below 2^12 fit 32 bits.
const WIDE_MAX: f32 = 8191.0;

/// Rows in fourteen bits.
#[derive(Debug, Default)]
pub(crate) struct WideRows {
    /// Columns, filled up with zeros to a multiple of [`BLOCK_COLS`].
    pub cols: usize,
    /// `[rows, cols]`
    pub codes: Vec<i16>,
    /// `[rows, cols / BLOCK_COLS]`
    pub scales: Vec<f32>,
}

impl WideRows {
    /// Room for `rows` rows of `cols` columns, with whatever is in it.
    pub fn new(rows: usize, cols: usize) -> Self {
        let cols = cols.next_multiple_of(BLOCK_COLS);
        Self { cols, codes: WIDE_CODES.stale(rows * cols), scales: vec![0.0; rows * cols / BLOCK_COLS] }
    }

    /// Blocks of a row.
    pub fn blocks(&self) -> usize {
        self.cols / BLOCK_COLS
    }
}

impl Drop for WideRows {
    fn drop(&mut self) {
        WIDE_CODES.give(std::mem::take(&mut self.codes));
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
    for (block, x) in x.chunks(BLOCK_COLS).enumerate() {
        let mut filled = [0.0f32; BLOCK_COLS];
        filled[..x.len()].copy_from_slice(x);
        let mut lanes = [0.0f32; 8];
        for c in 0..BLOCK_COLS / 8 {
            for l in 0..8 {
                let v = filled[8 * c + l].abs();
                lanes[l] = if v > lanes[l] { v } else { lanes[l] };
            }
        }
        let largest = lanes.iter().fold(0.0f32, |a, b| if *b > a { *b } else { a });
        let scale = largest / WIDE_MAX;
        // What is too small to divide by counts as zero; an infinity keeps its scale and so is not lost.
        let inverse = if scale > f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
        let codes = &mut codes[block * BLOCK_COLS..(block + 1) * BLOCK_COLS];
        for k in 0..BLOCK_COLS {
            // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
            codes[k] = ((filled[k] * inverse + 12_582_912.0).to_bits() as i32 - 0x4b40_0000) as i16;
        }
        scales[block] = scale;
    }
}

/// The values that are multiplied in place of `x`.
pub(crate) fn fake_wide(x: &HostTensor) -> HostTensor {
    let mut out = x.clone();
    let mut rows = WideRows::new(1, x.cols);
    for row in 0..x.rows {
        quantize_wide_row(crate::cpu::Isa::Portable, x.row(row), &mut rows.codes, &mut rows.scales);
        for (k, value) in out.row_mut(row).iter_mut().enumerate() {
            *value = f32::from(rows.codes[k]) * rows.scales[k / BLOCK_COLS];
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
            assert_eq!((rows.cols, rows.blocks()), (128, 2));
            for (k, code) in rows.codes.iter().enumerate() {
                let (scale, value) = (rows.scales[k / BLOCK_COLS], x.get(k).copied().unwrap_or(0.0));
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
