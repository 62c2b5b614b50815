//! Packed weights: int4, int8, int10 and int12 with scales per group, in tiles that every instruction set reads in place.
//!
//! A matrix `[rows, cols]` is stored as tiles of [`TILE_ROWS`] rows, one after the other; the last is filled up with rows
//! of zeros. A tile runs along the columns in blocks of [`BLOCK_COLS`], the last filled up with zeros. Groups are
//! [`GROUP`] columns of one row, so a block has two groups of each row. All integers are little-endian; every tile is filled
//! up to a multiple of 64 bytes, a cache line.
//!
//! `Int4`, [`INT4_BLOCK`] bytes a block after a head of 64 bytes a tile: 4.44 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | head: 64 | row scales `f32[16]` |
//! | block: 16 | by row, scale code `s` of group 0 in the low six bits, the low two bits of group 1's above |
//! | 8 | the high four bits of group 1's scale codes: row `r` in byte `4 * (r % 2) + r / 4`, from bit `4 * (r / 2 % 2)` on |
//! | 32 | `z u8[2][16]`: 128 less the zero point in eighths of a step, of group 0, then of group 1, by row |
//! | 512 | `q`: 8 vectors of 64 bytes; byte `4*r + b` of vector `v` has column `8v + b` of row `r` in its low, column `8v + 4 + b` in its high four bits |
//!
//! `weight = row_scale/8 * S(s) * (8q + z - 128)`, `z` in 1..=128, with `S(s) = (1 + (s mod 16)/16) * 2^(floor(s/16) - 3)`.
//!
//! `Int8`, [`INT8_BLOCK`] bytes a block, no head: 8.5 bits a weight.
//!
//! | bytes | what |
//! |---|---|
//! | block: 64 | `d f16[2][16]`: scales of group 0, then of group 1, by row |
//! | 1024 | `u`: 16 vectors of 64 bytes; byte `4*r + b` of vector `v` has column `4v + b` of row `r` |
//!
//! `weight = d * (u - 128)`, `u` in 1..=255.
//!
//! `Int10` and `Int12`, 1296 and 1552 bytes a block after a head of 64 bytes a tile: 10.1 and 12.1 bits a weight, for what
//! eight bits lose too much of. The codes have `h` = 2 or 4 bits beside the low eight.
//!
//! | bytes | what |
//! |---|---|
//! | head: 64 | row scales `f32[16]` |
//! | block: 16 | by row, factors: `f - 1` of group 0 in the low, of group 1 in the high four bits |
//! | 1024 | low eight bits of `q`: 32 vectors of 32 bytes; byte `2*r + b` of vector `v` is column `2v + b` of row `r` |
//! | 128 h | high bits: byte `2*r + b` of vector `w` has those of vectors `8/h * w`, .. from its low bits on |
//!
//! `weight = row_scale * f * q`, `q` in -511..=511 and `f` in 1..=8 (int10), `q` in -2047..=2047 and `f` in 1..=2 (int12):
//! `f * q` is an integer below 2^12, which kernels multiply with codes of 14 bits; such products of 64 columns fit 32 bits.
//!
//! Why so: sixteen rows by four columns are one 64-byte operand of an int8 dot product, whose sixteen sums belong to
//! sixteen outputs, so that nothing is summed across lanes and one row of activations is broadcast. A tile is one stream.
//! `8q + z` fits eight bits without a sign, like int8's `u`, so that both are multiplied alike.
//! The scale of an int4 group in six bits of floating point is within 3 % of the one searched for, over a range of 16 below
//! the row's largest; searching codes, scale and zero point together takes back what that loses.

use crate::packed_search::{search_int4, search_int8};
use crate::weight::f16_to_f32;
use crate::{BackendError, Dtype, wide_tiles};

/// Version of the layout.
pub const PACKED_VERSION: u32 = 2;
/// Rows of a tile.
pub const TILE_ROWS: usize = 16;
/// Columns of a block.
pub const BLOCK_COLS: usize = 64;
/// Columns that share a scale.
pub const GROUP: usize = 32;
/// Tiles are multiples of this many bytes.
const LINE: usize = 64;
/// Bytes of the head of an int4 tile.
pub const INT4_HEAD: usize = 64;
/// Bytes of an int4 block.
pub const INT4_BLOCK: usize = 568;
/// Where zero points and codes of an int4 block begin.
pub(crate) const INT4_ZEROS: usize = 24;
pub(crate) const INT4_CODES: usize = 56;
/// Bytes of an int8 block.
pub const INT8_BLOCK: usize = 1088;

/// A value that cannot be packed.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("row {row}, column {col} is {value}; only finite values can be packed")]
pub struct NotFinite {
    /// Counted within the rows given.
    pub row: usize,
    /// Column.
    pub col: usize,
    /// What was found.
    pub value: f32,
}

/// Bytes of one tile of `cols` columns; `None` when `dtype` is not packed or the number overflows.
pub fn tile_bytes(dtype: Dtype, cols: usize) -> Option<usize> {
    let (head, block) = head_and_block(dtype)?;
    cols.div_ceil(BLOCK_COLS).checked_mul(block)?.checked_add(head)?.checked_next_multiple_of(LINE)
}

/// Bytes of a tile's head and of each of its blocks; `None` when `dtype` is not packed.
pub(crate) fn head_and_block(dtype: Dtype) -> Option<(usize, usize)> {
    match dtype {
        Dtype::Int4 => Some((INT4_HEAD, INT4_BLOCK)),
        Dtype::Int8 => Some((0, INT8_BLOCK)),
        _ => Some((wide_tiles::WIDE_HEAD, wide_tiles::block_bytes(dtype.high_bits()?))),
    }
}

/// Packs `values [rows, cols]` into whole tiles. A tensor may be packed in slices of rows, each but the last a multiple of
/// [`TILE_ROWS`]; the result does not depend on how.
///
/// Scales, zero points and codes of each group are searched together for the least squared error.
///
/// # Panics
/// When `dtype` is not packed, or `out` is not the tiles' size ([`tile_bytes`]).
pub fn pack_rows(dtype: Dtype, rows: usize, cols: usize, values: &[f32], out: &mut [u8]) -> Result<(), NotFinite> {
    assert_eq!(values.len(), rows * cols, "values");
    let tile = tile_bytes(dtype, cols).expect("a packed type of a size that fits");
    assert_eq!(out.len(), rows.div_ceil(TILE_ROWS) * tile, "room for the tiles");
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        return Err(NotFinite { row: at / cols, col: at % cols, value: values[at] });
    }
    let isa = crate::cpu::Isa::detect();
    for (values, out) in values.chunks(TILE_ROWS * cols).zip(out.chunks_exact_mut(tile)) {
        match dtype {
            Dtype::Int4 => pack_int4(isa, cols, values, out),
            Dtype::Int8 => pack_int8(isa, cols, values, out),
            _ => wide_tiles::pack(isa, dtype.high_bits().expect("the other packed types"), cols, values, out),
        }
    }
    Ok(())
}

/// The values `[rows, cols]` of packed tiles.
pub fn unpack(dtype: Dtype, rows: usize, cols: usize, bytes: &[u8]) -> Result<Vec<f32>, BackendError> {
    let error = |reason: String| BackendError::Weight { name: "packed".into(), reason };
    if dtype.stored_bytes(rows, cols) != Some(bytes.len()) || tile_bytes(dtype, cols).is_none() {
        return Err(error(format!("{dtype:?} [{rows}, {cols}] has not {} bytes", bytes.len())));
    }
    Ok(unpack_rows(dtype, rows, cols, bytes))
}

/// The values `[rows, cols]` of packed tiles whose size has been checked.
pub(crate) fn unpack_rows(dtype: Dtype, rows: usize, cols: usize, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; rows * cols];
    for (row, out) in out.chunks_exact_mut(cols.max(1)).enumerate() {
        unpack_row(dtype, cols, bytes, row, out);
    }
    out
}

/// The values of row `row` of packed tiles; `out` has `cols` elements.
pub(crate) fn unpack_row(dtype: Dtype, cols: usize, bytes: &[u8], row: usize, out: &mut [f32]) {
    let tile = tile_bytes(dtype, cols).expect("checked when the weight was loaded");
    let bytes = &bytes[row / TILE_ROWS * tile..][..tile];
    let r = row % TILE_ROWS;
    if let Some(high) = dtype.high_bits() {
        return wide_tiles::unpack_row(high, bytes, r, out);
    }
    for (block, out) in out.chunks_mut(BLOCK_COLS).enumerate() {
        if dtype == Dtype::Int4 {
            let row_scale = f32_at(bytes, 4 * r);
            let bytes = &bytes[INT4_HEAD + block * INT4_BLOCK..][..INT4_BLOCK];
            for (k, out) in out.iter_mut().enumerate() {
                let group = k / GROUP;
                let (s, z) = (scale_code_at(bytes, group, r), bytes[INT4_ZEROS + group * 16 + r]);
                let pair = bytes[INT4_CODES + k / 8 * 64 + 4 * r + k % 4];
                let q = if k % 8 < 4 { pair & 15 } else { pair >> 4 };
                *out = row_scale * scale_of(s) * (f32::from(q) + (f32::from(z) - 128.0) / 8.0);
            }
        } else {
            let bytes = &bytes[block * INT8_BLOCK..][..INT8_BLOCK];
            for (k, out) in out.iter_mut().enumerate() {
                let at = 2 * (k / GROUP * 16 + r);
                let d = f16_to_f32(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
                *out = d * (f32::from(bytes[64 + k / 4 * 64 + 4 * r + k % 4]) - 128.0);
            }
        }
    }
}

/// The scale code of a group of row `r` of an int4 block.
pub(crate) fn scale_code_at(block: &[u8], group: usize, r: usize) -> u8 {
    let (byte, shift) = high_scale_bits(r);
    if group == 0 { block[r] & 63 } else { block[r] >> 6 | (block[byte] >> shift & 15) << 2 }
}

/// Byte and bit where the high four bits of row `r`'s second scale code lie.
fn high_scale_bits(r: usize) -> (usize, usize) {
    (TILE_ROWS + 4 * (r % 2) + r / 4, 4 * (r / 2 % 2))
}

/// `S(s)` of the layout.
pub(crate) fn scale_of(s: u8) -> f32 {
    f32::from_bits((u32::from(s) << 19) + (124 << 23))
}

/// The code whose `S` is nearest to `ratio`, within the range.
pub(crate) fn scale_code(ratio: f32) -> u8 {
    let code = (ratio.max(0.0).to_bits().saturating_add(1 << 18) >> 19) as i64 - (124 << 4);
    code.clamp(0, 63) as u8
}

/// The row scales at the head of a tile.
pub(crate) fn row_scales(tile: &[u8]) -> [f32; TILE_ROWS] {
    std::array::from_fn(|r| f32_at(tile, 4 * r))
}

pub(crate) fn f32_at(bytes: &[u8], at: usize) -> f32 {
    f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Weights that share a scale.
pub(crate) type Group = [f32; GROUP];

/// Group `group` of row `r` of `values [_, cols]`, zeros where there is nothing.
pub(crate) fn group_of(values: &[f32], cols: usize, r: usize, group: usize) -> Group {
    let mut out = [0.0; GROUP];
    let start = group * GROUP;
    if (r + 1) * cols <= values.len() && start < cols {
        let n = GROUP.min(cols - start);
        out[..n].copy_from_slice(&values[r * cols + start..][..n]);
    }
    out
}

fn pack_int4(isa: crate::cpu::Isa, cols: usize, values: &[f32], out: &mut [u8]) {
    out.fill(0);
    for r in 0..TILE_ROWS.min(values.len() / cols) {
        let range = |x: &Group| x.iter().fold((0.0f32, 0.0f32), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
        let widest = (0..cols.div_ceil(GROUP))
            .map(|group| {
                let (lo, hi) = range(&group_of(values, cols, r, group));
                hi / 12.0 - lo / 12.0
            })
            .fold(0.0, f32::max);
        let row_scale = widest / scale_of(63);
        // Smaller ones cannot be divided by; their row is zero.
        if row_scale < f32::MIN_POSITIVE * 1024.0 {
            continue;
        }
        out[4 * r..4 * r + 4].copy_from_slice(&row_scale.to_le_bytes());
        for group in 0..cols.div_ceil(GROUP) {
            let block = &mut out[INT4_HEAD + group / 2 * INT4_BLOCK..][..INT4_BLOCK];
            let half = group % 2;
            let found = search_int4(isa, &group_of(values, cols, r, group), row_scale);
            if half == 0 {
                block[r] |= found.s;
            } else {
                let (byte, shift) = high_scale_bits(r);
                block[r] |= found.s << 6;
                block[byte] |= found.s >> 2 << shift;
            }
            block[INT4_ZEROS + half * 16 + r] = found.z;
            for (k, q) in found.q.iter().enumerate() {
                let k = half * GROUP + k;
                block[INT4_CODES + k / 8 * 64 + 4 * r + k % 4] |= if k % 8 < 4 { *q } else { *q << 4 };
            }
        }
    }
}

fn pack_int8(isa: crate::cpu::Isa, cols: usize, values: &[f32], out: &mut [u8]) {
    for (number, block) in out.chunks_exact_mut(INT8_BLOCK).enumerate() {
        block[..64].fill(0);
        block[64..].fill(128);
        for r in 0..TILE_ROWS.min(values.len() / cols) {
            for half in 0..2 {
                let (d, q) = search_int8(isa, &group_of(values, cols, r, 2 * number + half));
                block[2 * (half * 16 + r)..][..2].copy_from_slice(&d.to_le_bytes());
                for (k, q) in q.iter().enumerate() {
                    let k = half * GROUP + k;
                    block[64 + k / 4 * 64 + 4 * r + k % 4] = (i16::from(*q) + 128) as u8;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Normal numbers, the same every time.
    fn normal(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 + 0.5) / (1u64 << 24) as f32
        };
        (0..n).map(|_| (-2.0 * uniform().ln()).sqrt() * (std::f32::consts::TAU * uniform()).cos() * 0.02).collect()
    }

    fn packed(dtype: Dtype, rows: usize, cols: usize, values: &[f32]) -> Vec<u8> {
        let mut out = vec![0xAA; dtype.stored_bytes(rows, cols).unwrap()];
        pack_rows(dtype, rows, cols, values, &mut out).unwrap();
        out
    }

    fn relative_error(values: &[f32], found: &[f32]) -> f64 {
        let error: f64 = values.iter().zip(found).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        (error / values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>()).sqrt()
    }

    #[test]
    fn errors_of_normal_weights() {
        let (rows, cols) = (48, 4096);
        let values = normal(rows * cols, 1);
        // ggml's Q4_K: 0.0719, Q8_0: 0.0054.
        let bounds = [(Dtype::Int4, 0.0710), (Dtype::Int8, 0.0054), (Dtype::Int10, 0.0015), (Dtype::Int12, 0.0005)];
        for (dtype, bound) in bounds {
            let found = unpack(dtype, rows, cols, &packed(dtype, rows, cols, &values)).unwrap();
            let error = relative_error(&values, &found);
            assert!(error < bound, "{dtype:?}: {error}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(Dtype::Int4.stored_bytes(4096, 4096), Some(256 * (64 + 64 * 568)));
        assert_eq!(Dtype::Int8.stored_bytes(17, 65), Some(2 * 2 * 1088));
        assert_eq!(Dtype::Int4.stored_bytes(usize::MAX, usize::MAX), None);
        let bits = |dtype: Dtype| dtype.stored_bytes(12288, 4096).unwrap() as f64 * 8.0 / (12288.0 * 4096.0);
        assert!(bits(Dtype::Int4) < 4.446 && bits(Dtype::Int10) < 10.14 && bits(Dtype::Int8) == 8.5);
    }

    #[test]
    fn odd_shapes_hostile_values_and_slices() {
        for (rows, cols) in [(1, 1), (3, 33), (17, 64), (40, 100), (16, 4304)] {
            let mut values = normal(rows * cols, (rows * cols) as u64);
            for dtype in [Dtype::Int4, Dtype::Int8, Dtype::Int10, Dtype::Int12] {
                let whole = packed(dtype, rows, cols, &values);
                let found = unpack(dtype, rows, cols, &whole).unwrap();
                assert!(relative_error(&values, &found) < 0.1, "{rows} {cols} {dtype:?}");
                let tile = tile_bytes(dtype, cols).unwrap();
                for (at, values) in values.chunks(16 * cols).enumerate() {
                    assert_eq!(packed(dtype, values.len() / cols, cols, values), whole[at * tile..(at + 1) * tile]);
                }
            }
            values[rows * cols - 1] = f32::NAN;
            let mut out = vec![0; Dtype::Int4.stored_bytes(rows, cols).unwrap()];
            let error = pack_rows(Dtype::Int4, rows, cols, &values, &mut out).unwrap_err();
            assert_eq!((error.row, error.col), (rows - 1, cols - 1));
        }
        for extreme in [0.0, 1e-42, 1e-30, 1e30, f32::MAX, -f32::MAX] {
            for dtype in [Dtype::Int4, Dtype::Int8, Dtype::Int10, Dtype::Int12] {
                let values = vec![extreme; 64];
                let found = unpack(dtype, 1, 64, &packed(dtype, 1, 64, &values)).unwrap();
                assert!(found.iter().all(|v| v.is_finite()), "{extreme} {dtype:?}");
            }
        }
        assert!(unpack(Dtype::Int4, 16, 64, &[0; 3]).is_err());
        assert!(unpack(Dtype::F32, 1, 1, &[0; 4]).is_err());
    }

    #[test]
    fn exact_where_it_can_be() {
        // Sixteen levels with a zero among them.
        let values: Vec<f32> = (0..64).map(|k| (k % 16) as f32 - 6.0).collect();
        let found = unpack(Dtype::Int4, 1, 64, &packed(Dtype::Int4, 1, 64, &values)).unwrap();
        assert!(relative_error(&values, &found) < 0.02);
        let values: Vec<f32> = (0..64).map(|k| ((k * 37) % 255) as f32 - 127.0).collect();
        let mut values = values;
        (values[0], values[32]) = (127.0, -127.0);
        assert_eq!(unpack(Dtype::Int8, 1, 64, &packed(Dtype::Int8, 1, 64, &values)).unwrap(), values);
    }

    #[test]
    fn codes_are_the_nearest_scale() {
        for s in 0..=63 {
            assert_eq!(scale_code(scale_of(s)), s);
        }
        assert_eq!((scale_of(0), scale_of(63)), (1.0 / 8.0, 1.9375));
        assert_eq!((scale_code(0.0), scale_code(1e-9), scale_code(9.0), scale_code(f32::MAX)), (0, 0, 63, 63));
    }
}
