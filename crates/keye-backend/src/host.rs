//! Activations in host memory, shared by the two CPU backends.

use std::ops::Range;

use bytes::Bytes;

use crate::fp8::Fp8Matrix;
use crate::input_major::InputMajor;
use crate::spare::FLOATS;
use crate::weight::{as_f32, as_u16, bf16_to_f32};
use crate::{BackendError, Dtype, Isa, WeightSource, packed};

/// Rows of f32 activations, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) data: Vec<f32>,
}

impl HostTensor {
    pub(crate) fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: FLOATS.zeros(rows * cols) }
    }

    /// With whatever is in it, for whom writes all of it.
    pub(crate) fn stale(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: FLOATS.stale(rows * cols) }
    }

    /// The same elements in other rows.
    pub(crate) fn reshape(mut self, rows: usize, cols: usize) -> Self {
        assert_eq!(self.data.len(), rows * cols, "elements");
        Self { rows, cols, data: std::mem::take(&mut self.data) }
    }

    pub(crate) fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Self {
        assert_eq!(values.len(), rows * cols);
        Self { rows, cols, data: values.to_vec() }
    }

    pub(crate) fn from_u8(rows: usize, cols: usize, values: &[u8]) -> Self {
        assert_eq!(values.len(), rows * cols);
        Self { rows, cols, data: values.iter().map(|v| f32::from(*v)).collect() }
    }

    pub(crate) fn slice_rows(&self, rows: Range<usize>) -> Self {
        let mut out = Self::stale(rows.len(), self.cols);
        out.data.copy_from_slice(&self.data[rows.start * self.cols..rows.end * self.cols]);
        out
    }

    pub(crate) fn copy_rows(&self, from: Range<usize>, to: &mut Self, at: usize) {
        assert_eq!(self.cols, to.cols);
        let target = at * to.cols..(at + from.len()) * to.cols;
        to.data[target].copy_from_slice(&self.data[from.start * self.cols..from.end * self.cols]);
    }

    pub(crate) fn gather_rows(&self, index: &[u32], group: usize) -> Self {
        let mut data = Vec::with_capacity(index.len() * self.cols);
        for row in index {
            data.extend_from_slice(self.row(*row as usize));
        }
        Self { rows: index.len() / group, cols: group * self.cols, data }
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.cols..(row + 1) * self.cols]
    }

    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.cols..(row + 1) * self.cols]
    }
}

impl Drop for HostTensor {
    fn drop(&mut self) {
        FLOATS.give(std::mem::take(&mut self.data));
    }
}

/// A weight in host memory. f32, bf16, 8-bit floats and packed types are used where they lie; f16 is widened when it is loaded.
#[derive(Debug, Clone)]
pub struct HostWeight {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    data: WeightData,
}

#[derive(Debug, Clone)]
enum WeightData {
    MappedF32(Bytes),
    MappedBf16(Bytes),
    OwnedF32(Vec<f32>),
    OwnedBf16(Vec<u16>),
    Fp8(Fp8Matrix),
    InputMajor(InputMajor),
    Packed(Dtype, Bytes),
}

/// The elements of a weight.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u16]),
    Fp8(&'a Fp8Matrix),
    InputMajor(&'a InputMajor),
    /// Tiles of a packed type.
    Packed(Dtype, &'a [u8]),
}

impl HostWeight {
    pub(crate) fn load(source: &WeightSource) -> Result<Self, BackendError> {
        source.check()?;
        let data = match source.dtype {
            _ if source.rows == 1 => WeightData::OwnedF32(source.to_f32().into_owned()),
            Dtype::F32 if as_f32(&source.bytes).is_some() => WeightData::MappedF32(source.bytes.clone()),
            Dtype::Bf16 if as_u16(&source.bytes).is_some() => WeightData::MappedBf16(source.bytes.clone()),
            Dtype::Bf16 => {
                WeightData::OwnedBf16(source.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect())
            }
            Dtype::Int12 | Dtype::Int10 | Dtype::Int8 | Dtype::Int4 => {
                WeightData::Packed(source.dtype, source.bytes.clone())
            }
            Dtype::F8E4M3 => WeightData::Fp8(Fp8Matrix::of(source).expect("the source was checked above")),
            Dtype::F32 | Dtype::F16 => WeightData::OwnedF32(source.to_f32().into_owned()),
        };
        Ok(Self { rows: source.rows, cols: source.cols, data })
    }

    /// Columns of a stored matrix `[in, width]` as a weight `[out, in]`.
    pub(crate) fn load_columns(source: &WeightSource, columns: Range<usize>) -> Result<Self, BackendError> {
        let data = WeightData::InputMajor(InputMajor::of(source, &columns)?);
        Ok(Self { rows: columns.len(), cols: source.rows, data })
    }

    pub(crate) fn elements(&self) -> Elements<'_> {
        match &self.data {
            // Alignment was checked when the weight was loaded, so the fallback to an empty slice is never taken.
            WeightData::MappedF32(bytes) => Elements::F32(as_f32(bytes).unwrap_or(&[])),
            WeightData::MappedBf16(bytes) => Elements::Bf16(as_u16(bytes).unwrap_or(&[])),
            WeightData::OwnedF32(values) => Elements::F32(values),
            WeightData::OwnedBf16(values) => Elements::Bf16(values),
            WeightData::Fp8(matrix) => Elements::Fp8(matrix),
            WeightData::InputMajor(matrix) => Elements::InputMajor(matrix),
            WeightData::Packed(dtype, bytes) => Elements::Packed(*dtype, bytes),
        }
    }

    /// Its type, if it is packed.
    pub(crate) fn packed(&self) -> Option<Dtype> {
        match self.data {
            WeightData::Packed(dtype, _) => Some(dtype),
            _ => None,
        }
    }

    /// The elements of a vector (a weight of one row). Vectors are widened when they are loaded.
    pub(crate) fn vector(&self) -> &[f32] {
        match self.elements() {
            Elements::F32(values) => values,
            Elements::Bf16(_) | Elements::Fp8(_) | Elements::InputMajor(_) | Elements::Packed(..) => {
                unreachable!("vectors are widened when they are loaded")
            }
        }
    }

    /// Row `row`, widened into `out`.
    pub(crate) fn widen_row(&self, row: usize, out: &mut [f32]) {
        let range = row * self.cols..(row + 1) * self.cols;
        match self.elements() {
            Elements::F32(values) => out.copy_from_slice(&values[range]),
            Elements::Bf16(values) => {
                for (out, bits) in out.iter_mut().zip(&values[range]) {
                    *out = bf16_to_f32(*bits);
                }
            }
            Elements::Fp8(matrix) => matrix.widen_into(Isa::Portable, row, 0..self.cols, out),
            Elements::InputMajor(matrix) => matrix.widen_rows(row, 0..self.cols, out),
            Elements::Packed(dtype, bytes) => packed::unpack_row(dtype, self.cols, bytes, row, out),
        }
    }

    /// All elements, widened.
    pub(crate) fn widen(&self) -> Vec<f32> {
        match self.elements() {
            Elements::F32(values) => values.to_vec(),
            Elements::Bf16(values) => values.iter().map(|bits| bf16_to_f32(*bits)).collect(),
            Elements::Fp8(matrix) => matrix.widen(),
            Elements::InputMajor(matrix) => matrix.widen(self.rows),
            Elements::Packed(dtype, bytes) => packed::unpack_rows(dtype, self.rows, self.cols, bytes),
        }
    }
}
