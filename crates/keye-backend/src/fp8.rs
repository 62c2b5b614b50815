//! 8-bit floats in blocks: `value = e4m3 * scale[row / block][column / block]`, used where they lie.
//!
//! The widened value is rounded once, in the product with the scale, so all who widen get the same bits.

use std::ops::Range;

use bytes::Bytes;

use crate::cpu::isa::{Simd, dispatch};
use crate::{Dtype, Isa, WeightSource};

/// Scales of the blocks of a matrix of 8-bit floats.
#[derive(Debug, Clone)]
pub struct BlockScales {
    /// `[ceil(rows / block[0]), ceil(cols / block[1])]` little-endian f32 of the whole stored matrix; blocks at the lower
    /// and right edge may be partial.
    pub bytes: Bytes,
    /// Rows and columns of a block.
    pub block: [usize; 2],
    /// Row of the stored matrix that is the weight's first.
    pub first_row: usize,
}

impl BlockScales {
    /// Says what is wrong when there are too few for `[rows, cols]`.
    pub(crate) fn check(&self, rows: usize, cols: usize) -> Result<(), String> {
        let [down, across] = self.block;
        if down == 0 || across == 0 {
            return Err(format!("blocks of {down} x {across} elements"));
        }
        let blocks = self.first_row.checked_add(rows).map(|rows| rows.div_ceil(down));
        let expected = blocks.and_then(|blocks| blocks.checked_mul(cols.div_ceil(across)));
        match expected.and_then(|n| n.checked_mul(4)) {
            Some(bytes) if bytes <= self.bytes.len() => Ok(()),
            _ => Err(format!(
                "{rows} x {cols} elements from row {} in blocks of {down} x {across}: too few scales, {} bytes found",
                self.first_row,
                self.bytes.len()
            )),
        }
    }
}

/// The value of an `e4m3fn`: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinities.
pub(crate) fn e4m3_to_f32(bits: u8) -> f32 {
    // Exponent and mantissa in place of an f32's, 120 too low; subnormals come out right by themselves.
    let magnitude = f32::from_bits(u32::from(bits & 0x7f) << 20) * f32::from_bits((127 + 120) << 23);
    let magnitude = if bits & 0x7f == 0x7f { f32::NAN } else { magnitude };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

/// A matrix of 8-bit floats in the memory map, with its scales.
#[derive(Debug, Clone)]
pub(crate) struct Fp8Matrix {
    cols: usize,
    bytes: Bytes,
    /// From the blocks of the first row on, `across` a row of blocks.
    scales: Vec<f32>,
    across: usize,
    block: [usize; 2],
    /// Rows of the first block that are above the first row.
    above: usize,
}

impl Fp8Matrix {
    /// `None` when the source is of another type or has too few elements or scales.
    pub(crate) fn of(source: &WeightSource) -> Option<Self> {
        let scales = source.scales.as_ref().filter(|_| source.dtype == Dtype::F8E4M3 && source.check().is_ok())?;
        let [down, across] = [scales.block[0], source.cols.div_ceil(scales.block[1])];
        let (first, end) = (scales.first_row / down, (scales.first_row + source.rows).div_ceil(down));
        let bytes = &scales.bytes[4 * first * across..4 * end * across];
        Some(Self {
            cols: source.cols,
            bytes: source.bytes.clone(),
            scales: bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            across,
            block: scales.block,
            above: scales.first_row % down,
        })
    }

    /// Columns `columns` of row `row`, widened into `out`.
    pub(crate) fn widen_into(&self, isa: Isa, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let width = self.block[1];
        let scales = &self.scales[(self.above + row) / self.block[0] * self.across..];
        let mut at = columns.start;
        while at < columns.end {
            let block = at / width;
            let end = columns.end.min((block + 1) * width);
            let bytes = &self.bytes[row * self.cols + at..row * self.cols + end];
            widen(isa, bytes, scales[block], &mut out[at - columns.start..end - columns.start]);
            at = end;
        }
    }

    /// All elements, widened.
    pub(crate) fn widen(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.bytes.len()];
        for (row, out) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.widen_into(Isa::Portable, row, 0..self.cols, out);
        }
        out
    }
}

dispatch! {
    /// `out = e4m3 * scale`
    fn widen(bytes: &[u8], scale: f32, out: &mut [f32]) = widen_bytes
}

#[inline(always)]
unsafe fn widen_bytes<S: Simd>(bytes: &[u8], scale: f32, out: &mut [f32]) {
    // The compiler makes vectors of the instruction set that this is inlined into.
    for (out, bits) in out.iter_mut().zip(bytes) {
        *out = e4m3_to_f32(*bits) * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the definition of the format.
    fn by_the_book(bits: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f64::from(bits & 7));
        let magnitude = match exponent {
            0 => mantissa / 8.0 * 2f64.powi(-6),
            e => (1.0 + mantissa / 8.0) * 2f64.powi(e - 7),
        };
        if bits >> 7 == 1 { -magnitude } else { magnitude }
    }

    #[test]
    fn every_value_is_the_formats() {
        for bits in 0..=255u8 {
            let found = e4m3_to_f32(bits);
            match bits & 0x7f {
                0x7f => assert!(found.is_nan()),
                _ => assert_eq!(f64::from(found), by_the_book(bits), "{bits:#x}"),
            }
        }
        assert_eq!(e4m3_to_f32(0x7e), 448.0);
        assert_eq!(e4m3_to_f32(0x80).to_bits(), (-0.0f32).to_bits());
    }

    #[test]
    fn a_block_has_its_scale_and_edges_are_partial() {
        let (rows, cols) = (11, 13);
        let bytes: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % 127) as u8).collect();
        let scales: Vec<f32> = (0..3 * 3).map(|i| 0.37f32.powi(i) + 0.01).collect();
        let scale_bytes: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let source = WeightSource {
            name: "w".into(),
            dtype: Dtype::F8E4M3,
            rows,
            cols,
            bytes: bytes.clone().into(),
            scales: Some(BlockScales { bytes: scale_bytes.into(), block: [4, 6], first_row: 0 }),
        };
        let value =
            |row: usize, col: usize| by_the_book(bytes[row * cols + col]) as f32 * scales[row / 4 * 3 + col / 6];
        let expected: Vec<f32> = (0..rows * cols).map(|i| value(i / cols, i % cols)).collect();
        assert_eq!(source.to_f32()[..], expected[..]);
        // Rows that begin and end inside of blocks.
        for range in [0..11, 3..4, 5..11, 8..8] {
            let part = source.slice_rows(range.clone()).unwrap();
            assert_eq!(part.to_f32()[..], expected[range.start * cols..range.end * cols], "{range:?}");
        }
        let matrix = Fp8Matrix::of(&source).unwrap();
        for isa in Isa::available() {
            let mut out = [0.0; 9];
            matrix.widen_into(isa, 7, 2..11, &mut out);
            assert_eq!(out[..], expected[7 * cols + 2..7 * cols + 11]);
        }
    }

    #[test]
    fn scales_are_checked() {
        let source = |scales: Option<(usize, [usize; 2], usize)>| WeightSource {
            name: "w".into(),
            dtype: Dtype::F8E4M3,
            rows: 5,
            cols: 6,
            bytes: vec![0; 30].into(),
            scales: scales.map(|(n, block, first_row)| BlockScales { bytes: vec![0; n].into(), block, first_row }),
        };
        assert!(source(Some((4 * 3 * 2, [2, 3], 0))).check().is_ok());
        for wrong in [
            None,
            Some((4 * 3 * 2 - 1, [2, 3], 0)),
            Some((4 * 3 * 2, [2, 3], 2)),
            Some((4 * 3 * 2, [2, 3], usize::MAX)),
            Some((4, [0, 3], 0)),
            Some((4, [9, 0], 0)),
        ] {
            let error = source(wrong).check().unwrap_err().to_string();
            assert!(error.starts_with("tensor w: "), "{error}");
        }
        let plain = WeightSource { dtype: Dtype::Bf16, bytes: vec![0; 60].into(), ..source(Some((24, [2, 3], 0))) };
        assert!(plain.check().unwrap_err().to_string().contains("only 8-bit floats have scales"));
    }
}
