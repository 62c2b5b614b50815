//! Weights as they come from a checkpoint.

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;

use crate::fp8::Fp8Matrix;
use crate::packed::{self, TILE_ROWS, tile_bytes};
use crate::{BackendError, BlockScales};

/// Element types that backends load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// IEEE half.
    F16,
    /// 8-bit float with 4 bits of exponent, finite (`e4m3fn`), with a scale per block ([`BlockScales`]).
    F8E4M3,
    /// 12 bits with a factor per group, packed in tiles ([`crate::packed`]).
    Int12,
    /// 10 bits with a factor per group, packed in tiles ([`crate::packed`]).
    Int10,
    /// 8 bits with a scale per group, packed in tiles ([`crate::packed`]).
    Int8,
    /// 4 bits with scale and zero point per group, packed in tiles ([`crate::packed`]).
    Int4,
}

impl Dtype {
    /// Bytes of a matrix `[rows, cols]`; `None` when the number overflows.
    pub fn stored_bytes(self, rows: usize, cols: usize) -> Option<usize> {
        match self {
            Self::F32 => rows.checked_mul(cols)?.checked_mul(4),
            Self::Bf16 | Self::F16 => rows.checked_mul(cols)?.checked_mul(2),
            Self::F8E4M3 => rows.checked_mul(cols),
            Self::Int12 | Self::Int10 | Self::Int8 | Self::Int4 => {
                rows.div_ceil(TILE_ROWS).checked_mul(tile_bytes(self, cols)?)
            }
        }
    }

    /// Whether it is packed in tiles.
    pub fn is_packed(self) -> bool {
        matches!(self, Self::Int12 | Self::Int10 | Self::Int8 | Self::Int4)
    }

    /// Bits of the integers that activations become for products with such a weight; `None`: they stay floats. Gates and ups
    /// of a mixture's experts ([`crate::Backend::add_experts`]) have to agree in it, and so have their downs.
    pub fn activation_bits(self) -> Option<u32> {
        match self {
            Self::Int8 | Self::Int4 => Some(8),
            Self::Int12 | Self::Int10 => Some(14),
            Self::F32 | Self::Bf16 | Self::F16 | Self::F8E4M3 => None,
        }
    }

    /// Bits of a code beside its low eight, of types that are multiplied with activations in fourteen bits.
    pub(crate) fn high_bits(self) -> Option<usize> {
        match self {
            Self::Int10 => Some(2),
            Self::Int12 => Some(4),
            _ => None,
        }
    }
}

/// A stored tensor: a slice of a memory map (which it keeps alive) with type and shape.
#[derive(Debug, Clone)]
pub struct WeightSource {
    /// For messages.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Rows (output features of a matrix; 1 for a vector).
    pub rows: usize,
    /// Columns (input features).
    pub cols: usize,
    /// `rows * cols` little-endian elements, row-major; or the tiles of a packed type.
    pub bytes: Bytes,
    /// Factors of the elements, exactly of [`Dtype::F8E4M3`].
    pub scales: Option<BlockScales>,
}

impl WeightSource {
    /// A weight made of computed values.
    pub fn from_f32(name: impl Into<String>, rows: usize, cols: usize, values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        Self { name: name.into(), dtype: Dtype::F32, rows, cols, bytes: Bytes::from(bytes), scales: None }
    }

    /// Checks that the bytes are as many as type and shape say.
    pub fn check(&self) -> Result<(), BackendError> {
        let (rows, cols, dtype) = (self.rows, self.cols, self.dtype);
        if dtype.stored_bytes(rows, cols) != Some(self.bytes.len()) {
            let found = self.bytes.len();
            return Err(self.error(format!("{rows} x {cols} elements of {dtype:?} expected, {found} bytes found")));
        }
        match (dtype, &self.scales) {
            (Dtype::F8E4M3, Some(scales)) => scales.check(rows, cols).map_err(|reason| self.error(reason)),
            (Dtype::F8E4M3, None) => Err(self.error("8-bit floats need their blocks' scales, found none".into())),
            (_, None) => Ok(()),
            (_, Some(_)) => Err(self.error(format!("only 8-bit floats have scales, found them beside {dtype:?}"))),
        }
    }

    fn error(&self, reason: String) -> BackendError {
        BackendError::Weight { name: self.name.clone(), reason }
    }

    /// Some of the rows, in place.
    ///
    /// # Errors
    ///
    /// Rows that are not there; of packed types other than whole tiles.
    pub fn slice_rows(&self, rows: Range<usize>) -> Result<Self, BackendError> {
        self.check()?;
        let unit = self.row_unit();
        let whole_tiles = rows.start.is_multiple_of(unit) && (rows.end.is_multiple_of(unit) || rows.end == self.rows);
        if rows.start > rows.end || rows.end > self.rows || !whole_tiles {
            let reason = format!("rows {rows:?} of {} of {:?}: expected multiples of {unit}", self.rows, self.dtype);
            return Err(self.error(reason));
        }
        let unit_bytes = self.dtype.stored_bytes(unit, self.cols).unwrap_or(0);
        let bytes = self.bytes.slice(rows.start / unit * unit_bytes..rows.end.div_ceil(unit) * unit_bytes);
        let scales =
            self.scales.clone().map(|scales| BlockScales { first_row: scales.first_row + rows.start, ..scales });
        Ok(Self { rows: rows.len(), bytes, scales, ..self.clone() })
    }

    /// The values, widened. Borrows when they are f32 already and aligned.
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        match self.dtype {
            Dtype::F32 => match as_f32(&self.bytes) {
                Some(values) => Cow::Borrowed(values),
                None => self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            },
            Dtype::Bf16 => self.bytes.chunks_exact(2).map(|b| bf16_to_f32(u16::from_le_bytes([b[0], b[1]]))).collect(),
            Dtype::F16 => self.bytes.chunks_exact(2).map(|b| f16_to_f32(u16::from_le_bytes([b[0], b[1]]))).collect(),
            Dtype::F8E4M3 => Fp8Matrix::of(self).map_or_else(Vec::new, |matrix| matrix.widen()).into(),
            Dtype::Int12 | Dtype::Int10 | Dtype::Int8 | Dtype::Int4 => {
                packed::unpack_rows(self.dtype, self.rows, self.cols, &self.bytes).into()
            }
        }
    }
}

/// The bytes as f32, when they are aligned.
pub(crate) fn as_f32(bytes: &[u8]) -> Option<&[f32]> {
    // SAFETY: every bit pattern is an f32; align_to only yields correctly aligned elements.
    let (head, values, tail) = unsafe { bytes.align_to::<f32>() };
    (head.is_empty() && tail.is_empty()).then_some(values)
}

/// The bytes as 16-bit words, when they are aligned.
pub(crate) fn as_u16(bytes: &[u8]) -> Option<&[u16]> {
    // SAFETY: every bit pattern is a u16; align_to only yields correctly aligned elements.
    let (head, values, tail) = unsafe { bytes.align_to::<u16>() };
    (head.is_empty() && tail.is_empty()).then_some(values)
}

/// bf16 is the upper half of an f32.
#[inline(always)]
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds to nearest, ties to even; NaN stays NaN.
#[inline(always)]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return ((bits >> 16) | 0x40) as u16;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// IEEE half to single.
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let exponent = u32::from(bits >> 10) & 0x1f;
    let mantissa = u32::from(bits) & 0x3ff;
    let magnitude = match (exponent, mantissa) {
        (0, m) => return f32::from_bits(sign | (m as f32 * 2f32.powi(-24)).to_bits()),
        (31, m) => 0x7f80_0000 | m << 13,
        (e, m) => (e + 112) << 23 | m << 13,
    };
    f32::from_bits(sign | magnitude)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_widen_exactly() {
        let cases =
            [(0x3c00, 1.0), (0xc000, -2.0), (0x0001, 5.960_464_5e-8), (0x7bff, 65504.0), (0x0400, 6.103_515_6e-5)];
        for (bits, value) in cases {
            assert_eq!(f16_to_f32(bits), value);
        }
        assert!(f16_to_f32(0x7c00).is_infinite() && f16_to_f32(0x7e00).is_nan());
        assert_eq!(f16_to_f32(0x8000).to_bits(), (-0.0f32).to_bits());
    }

    #[test]
    fn bf16_rounds_to_nearest_even() {
        for bits in 0..=u16::MAX {
            let wide = bf16_to_f32(bits);
            if !wide.is_nan() {
                assert_eq!(f32_to_bf16(wide), bits);
            }
        }
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert!(bf16_to_f32(f32_to_bf16(f32::NAN)).is_nan());
    }

    #[test]
    fn sizes_are_checked() {
        let mut weight = WeightSource::from_f32("w", 2, 3, &[0.0; 6]);
        assert!(weight.check().is_ok());
        weight.rows = usize::MAX;
        assert!(weight.check().unwrap_err().to_string().contains("tensor w"));
    }
}
