//! Weights stored input-major, `[in, out]`: used where they lie, turned a panel at a time as products need them.

use std::ops::Range;

use bytes::Bytes;

use crate::weight::{bf16_to_f32, f16_to_f32};
use crate::{BackendError, Dtype, WeightSource};

/// Some columns of a stored matrix `[in, width]`, as a weight `[out, in]`.
#[derive(Debug, Clone)]
pub(crate) struct InputMajor {
    bytes: Bytes,
    dtype: Dtype,
    /// Columns of the stored matrix.
    width: usize,
    /// The weight's first column in it.
    first: usize,
    inputs: usize,
}

impl InputMajor {
    /// `source` is `[in, width]`; `columns` are the weight's outputs.
    pub(crate) fn of(source: &WeightSource, columns: &Range<usize>) -> Result<Self, BackendError> {
        source.check()?;
        let reason = if !matches!(source.dtype, Dtype::F32 | Dtype::Bf16 | Dtype::F16) {
            format!("an input-major weight of {:?}: expected F32, BF16 or F16", source.dtype)
        } else if columns.is_empty() || columns.end > source.cols {
            format!("columns {columns:?} of {}", source.cols)
        } else {
            let (bytes, dtype) = (source.bytes.clone(), source.dtype);
            return Ok(Self { bytes, dtype, width: source.cols, first: columns.start, inputs: source.rows });
        };
        Err(BackendError::Weight { name: source.name.clone(), reason })
    }

    /// Elements `inputs` of the rows `first..first + out.len() / inputs.len()` of the weight, widened: a row after the other.
    pub(crate) fn widen_rows(&self, first: usize, inputs: Range<usize>, out: &mut [f32]) {
        let length = inputs.len();
        let rows = out.len() / length.max(1);
        let size = if self.dtype == Dtype::F32 { 4 } else { 2 };
        for (i, input) in inputs.enumerate() {
            let at = (input * self.width + self.first + first) * size;
            let bytes = &self.bytes[at..at + rows * size];
            let mut put = |row: usize, value: f32| out[row * length + i] = value;
            match self.dtype {
                Dtype::F32 => {
                    for (row, b) in bytes.as_chunks().0.iter().enumerate() {
                        put(row, f32::from_le_bytes(*b));
                    }
                }
                Dtype::Bf16 => {
                    for (row, b) in bytes.as_chunks().0.iter().enumerate() {
                        put(row, bf16_to_f32(u16::from_le_bytes(*b)));
                    }
                }
                _ => {
                    for (row, b) in bytes.as_chunks().0.iter().enumerate() {
                        put(row, f16_to_f32(u16::from_le_bytes(*b)));
                    }
                }
            }
        }
    }

    /// All of the weight, widened, `rows` rows.
    pub(crate) fn widen(&self, rows: usize) -> Vec<f32> {
        let mut out = vec![0.0; rows * self.inputs];
        self.widen_rows(0, 0..self.inputs, &mut out);
        out
    }
}
