//! Columns of stored matrices, copied: for a device that has a part of a product's inputs. Rows lie together and are used
//! in place ([`WeightSource::slice_rows`]); columns do not, and kernels read a weight's rows as streams.

use std::ops::Range;

use bytes::Bytes;

use crate::packed::{BLOCK_COLS, TILE_ROWS, head_and_block};
use crate::{BackendError, BlockScales, WeightSource};

/// A cache line: where tiles of packed types begin.
const ALIGN: usize = 64;

impl WeightSource {
    /// Multiples at which [`WeightSource::slice_rows`] may cut.
    pub fn row_unit(&self) -> usize {
        if self.dtype.is_packed() { TILE_ROWS } else { 1 }
    }

    /// Multiples at which [`WeightSource::copy_columns`] may cut: blocks of packed types and of scales.
    pub fn column_unit(&self) -> usize {
        match &self.scales {
            _ if self.dtype.is_packed() => BLOCK_COLS,
            Some(scales) => scales.block[1].max(1),
            None => 1,
        }
    }

    /// Some of the columns, as a matrix `[rows, columns]` of its own; all of them are used in place.
    ///
    /// # Errors
    ///
    /// Columns that are not there, or cut a block ([`WeightSource::column_unit`]); no memory.
    pub fn copy_columns(&self, columns: Range<usize>) -> Result<Self, BackendError> {
        self.check()?;
        let unit = self.column_unit();
        let whole =
            columns.start.is_multiple_of(unit) && (columns.end.is_multiple_of(unit) || columns.end == self.cols);
        if columns.is_empty() || columns.end > self.cols || !whole {
            let reason =
                format!("columns {columns:?} of {} of {:?}: expected multiples of {unit}", self.cols, self.dtype);
            return Err(BackendError::Weight { name: self.name.clone(), reason });
        }
        if columns == (0..self.cols) {
            return Ok(self.clone());
        }
        // A line is a row, or a tile of rows: its head, its blocks of columns, and what fills it up.
        let line_of = |cols: usize| self.dtype.stored_bytes(self.row_unit(), cols).unwrap_or(0);
        let (head, block, width) = match head_and_block(self.dtype) {
            Some((head, block)) => (head, block, BLOCK_COLS),
            None => (0, line_of(1), 1),
        };
        let (line, new_line) = (line_of(self.cols), line_of(columns.len()));
        let part = head + columns.start / width * block..head + columns.end.div_ceil(width) * block;
        let size = new_line * (self.bytes.len() / line);
        let mut copy: Vec<u8> = Vec::new();
        copy.try_reserve_exact(size + ALIGN - 1).map_err(|_| BackendError::Memory {
            what: format!("a part of {}", self.name),
            bytes: size as u64,
            remedy: "take a quantised model or fewer ranks (--tp)",
        })?;
        let first = copy.as_ptr().align_offset(ALIGN).min(ALIGN - 1);
        copy.resize(first, 0);
        for (i, line) in self.bytes.chunks_exact(line).enumerate() {
            copy.extend_from_slice(&line[..head]);
            copy.extend_from_slice(&line[part.clone()]);
            copy.resize(first + (i + 1) * new_line, 0);
        }
        let scales = self.scales.as_ref().map(|scales| {
            let blocks = columns.start / unit..columns.end.div_ceil(unit);
            let across = self.cols.div_ceil(unit);
            let rows = scales.bytes.chunks_exact(4 * across);
            let bytes: Vec<u8> = rows.flat_map(|row| &row[4 * blocks.start..4 * blocks.end]).copied().collect();
            BlockScales { bytes: bytes.into(), ..scales.clone() }
        });
        Ok(Self { cols: columns.len(), bytes: Bytes::from(copy).slice(first..), scales, ..self.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;
    use crate::packed::{pack_rows, tile_bytes};

    /// A stored matrix of some values.
    fn source(dtype: Dtype, rows: usize, cols: usize) -> WeightSource {
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 256.0).collect();
        let bytes = match dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::Bf16 => values.iter().flat_map(|v| crate::weight::f32_to_bf16(*v).to_le_bytes()).collect(),
            Dtype::F16 => (0..rows * cols).flat_map(|i| (0x3000 + i as u16 % 0x800).to_le_bytes()).collect(),
            Dtype::F8E4M3 => (0..rows * cols).map(|i| (i * 37 % 127) as u8).collect(),
            packed => {
                let mut bytes = vec![0; rows.div_ceil(TILE_ROWS) * tile_bytes(packed, cols).unwrap()];
                pack_rows(packed, rows, cols, &values, &mut bytes).unwrap();
                bytes
            }
        };
        let scales = (dtype == Dtype::F8E4M3).then(|| BlockScales {
            bytes: (0..rows.div_ceil(7) * cols.div_ceil(24)).flat_map(|i| (0.5 + i as f32).to_le_bytes()).collect(),
            block: [7, 24],
            first_row: 0,
        });
        WeightSource { name: "w".into(), dtype, rows, cols, bytes: bytes.into(), scales }
    }

    #[test]
    fn columns_have_the_values_of_the_whole() {
        let (rows, cols) = (21, 200);
        let unpacked = [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::F8E4M3];
        for dtype in unpacked.into_iter().chain([Dtype::Int12, Dtype::Int10, Dtype::Int8, Dtype::Int4]) {
            let whole = source(dtype, rows, cols);
            let values = whole.to_f32();
            let unit = whole.column_unit();
            for columns in [0..cols, 0..unit, unit..2 * unit, 2 * unit..cols] {
                let part = whole.copy_columns(columns.clone()).unwrap();
                part.check().unwrap();
                let expected: Vec<f32> = values.chunks(cols).flat_map(|row| row[columns.clone()].to_vec()).collect();
                assert_eq!(part.to_f32()[..], expected[..], "{dtype:?} {columns:?}");
                // Rows of columns, as a second cut makes them.
                let below = part.slice_rows(16..rows).unwrap();
                assert_eq!(below.to_f32()[..], expected[16 * columns.len()..], "{dtype:?} {columns:?}");
            }
        }
    }

    #[test]
    fn a_cut_block_is_refused_with_the_figures() {
        for (dtype, columns, multiple) in
            [(Dtype::Int4, 32..64, 64), (Dtype::F8E4M3, 0..30, 24), (Dtype::Bf16, 9..9, 1)]
        {
            let error = source(dtype, 16, 200).copy_columns(columns).unwrap_err().to_string();
            assert!(
                error.starts_with("tensor w: columns") && error.ends_with(&format!("multiples of {multiple}")),
                "{error}"
            );
        }
        assert!(source(Dtype::F32, 2, 8).copy_columns(4..9).is_err());
    }
}
