//! Activations in eight bits, as int8 and int4 weights are multiplied with.
//!
//! Each [`GROUP`] of a row has a scale of its own, `a = max|x| / 127`, and codes `c = round(x / a)`, ties to even. A product
//! is then, per output, over the groups from left to right,
//!
//! `sum = fma(t_g, S_g * a_g, sum)`,
//!
//! with `t_g` an exact integer, the sum of `c (u - 128)`: for int8 `u` as stored and `S` the f16 scale; for int4 `u = 8q + z`
//! and `S = S(s)`, and the whole times `row_scale / 8`. Integers are exact and the order of the groups is fixed, so every
//! instruction set and every tile gives the same bits.

use crate::host::HostTensor;
use crate::packed::{BLOCK_COLS, GROUP};

/// Rows in eight bits.
#[derive(Debug, Default)]
pub(crate) struct QuantizedRows {
    /// Columns, filled up with zeros to a multiple of [`BLOCK_COLS`].
    pub cols: usize,
    /// `[rows, cols]`
    pub codes: Vec<i8>,
    /// `[rows, cols / GROUP]`
    pub scales: Vec<f32>,
    /// `[rows, cols / GROUP]`: sums of the codes of a group times -128, which stored weights have too much.
    pub offsets: Vec<i32>,
}

impl QuantizedRows {
    /// Room for `rows` rows of `cols` columns.
    pub fn new(rows: usize, cols: usize) -> Self {
        let cols = cols.next_multiple_of(BLOCK_COLS);
        let groups = rows * cols / GROUP;
        Self { cols, codes: vec![0; rows * cols], scales: vec![0.0; groups], offsets: vec![0; groups] }
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.cols / GROUP
    }
}

/// One row; `codes`, `scales` and `offsets` are a row's of [`QuantizedRows`], zeros behind the last column.
pub(crate) fn quantize_row(isa: crate::cpu::Isa, x: &[f32], codes: &mut [i8], scales: &mut [f32], offsets: &mut [i32]) {
    quantize(isa, x, codes, scales, offsets);
}

crate::cpu::isa::dispatch! {
    fn quantize(x: &[f32], codes: &mut [i8], scales: &mut [f32], offsets: &mut [i32]) = quantize_in
}

#[allow(clippy::needless_range_loop, reason = "lanes")]
#[allow(clippy::extra_unused_type_parameters, reason = "plain code, compiled once for each instruction set")]
#[inline(always)]
unsafe fn quantize_in<S>(x: &[f32], codes: &mut [i8], scales: &mut [f32], offsets: &mut [i32]) {
    for (group, x) in x.chunks(GROUP).enumerate() {
        let mut filled = [0.0f32; GROUP];
        let x: &[f32; GROUP] = match x.try_into() {
            Ok(x) => x,
            Err(_) => {
                filled[..x.len()].copy_from_slice(x);
                &filled
            }
        };
        let mut lanes = [0.0f32; 8];
        for c in 0..GROUP / 8 {
            for l in 0..8 {
                let v = x[8 * c + l].abs();
                lanes[l] = if v > lanes[l] { v } else { lanes[l] };
            }
        }
        let largest = lanes.iter().fold(0.0f32, |a, b| if *b > a { *b } else { a });
        let scale = largest / 127.0;
        // What is too small to divide by counts as zero; an infinity keeps its scale and so is not lost.
        let inverse = if scale > f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
        let out: &mut [i8] = &mut codes[group * GROUP..(group + 1) * GROUP];
        let mut sum = 0i32;
        for k in 0..GROUP {
            // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
            let code = (x[k] * inverse + 12_582_912.0).to_bits() as i32 - 0x4b40_0000;
            out[k] = code as i8;
            sum += i32::from(code as i8);
        }
        scales[group] = scale;
        offsets[group] = -128 * sum;
    }
}

/// The values that are multiplied in place of `x`.
pub(crate) fn fake_quantized(x: &HostTensor) -> HostTensor {
    let mut out = x.clone();
    let mut rows = QuantizedRows::new(1, x.cols);
    for row in 0..x.rows {
        quantize_row(crate::cpu::Isa::Portable, x.row(row), &mut rows.codes, &mut rows.scales, &mut rows.offsets);
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
        let mut first: Option<QuantizedRows> = None;
        for isa in Isa::available() {
            let mut rows = QuantizedRows::new(1, x.len());
            quantize_row(isa, &x, &mut rows.codes, &mut rows.scales, &mut rows.offsets);
            assert_eq!((rows.cols, rows.groups()), (128, 4));
            for group in 0..4 {
                let scale = rows.scales[group];
                let mut sum = 0;
                for k in group * GROUP..(group + 1) * GROUP {
                    let value = x.get(k).copied().unwrap_or(0.0);
                    let code = rows.codes[k];
                    assert!((f32::from(code) * scale - value).abs() <= scale * 0.5001, "{k}");
                    sum += i32::from(code);
                }
                assert_eq!(-128 * sum, rows.offsets[group]);
            }
            if let Some(first) = &first {
                assert_eq!((&first.codes, &first.scales), (&rows.codes, &rows.scales));
            }
            first = Some(rows);
        }
    }

    #[test]
    fn zeros_tiny_and_huge() {
        for value in [0.0, 1e-44, 1e-38, 1e38, 3e38] {
            let mut rows = QuantizedRows::new(1, 32);
            quantize_row(Isa::detect(), &[value; 32], &mut rows.codes, &mut rows.scales, &mut rows.offsets);
            let found = f32::from(rows.codes[0]) * rows.scales[0];
            assert!((found - value).abs() <= value * 1e-6 || value < 1e-35, "{value}: {found}");
        }
    }
}
