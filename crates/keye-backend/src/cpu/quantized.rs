//! Products with packed weights: eight-bit activations times int8 or int4 weights, from the memory map.
//!
//! A tile of sixteen outputs is one stream of bytes; a kernel multiplies it with up to [`MAX_ROWS`] rows of activations at
//! once and keeps their sums in registers. With one row the stream comes from memory and the unpacking hides behind the
//! loads; with many it comes from the cache. What is summed in which order is `quantized_rows`' definition.

use super::Isa;
use super::pool::{Pool, SyncPtr};
use crate::Dtype;
use crate::host::HostTensor;
use crate::packed::{
    BLOCK_COLS, GROUP, INT4_BLOCK, INT4_CODES, INT4_HEAD, INT4_ZEROS, INT8_BLOCK, TILE_ROWS, scale_code_at, scale_of,
    tile_bytes,
};
use crate::quantized_rows::{QuantizedRows, quantize_row};
use crate::weight::f16_to_f32;

/// Outputs of a task.
pub(crate) const PANEL: usize = 4 * TILE_ROWS;
/// Rows of activations in a tile.
const MAX_ROWS: usize = 8;
/// Up to this many rows of activations stay in the first-level cache whole: weights are read as they lie in memory, at its
/// speed. One kernel call takes them all.
const FEW_ROWS: usize = 4;
/// Blocks of columns that a tile runs along before the next one: its rows of activations stay in the first-level cache.
const K_BLOCKS: usize = 16;

/// The rows of `x` in eight bits.
pub(crate) fn quantize(pool: &Pool, isa: Isa, x: &HostTensor) -> QuantizedRows {
    const ROWS: usize = 8;
    let mut rows = QuantizedRows::new(x.rows, x.cols);
    let (cols, groups) = (rows.cols, rows.groups());
    let targets =
        (SyncPtr(rows.codes.as_mut_ptr()), SyncPtr(rows.scales.as_mut_ptr()), SyncPtr(rows.offsets.as_mut_ptr()));
    pool.run(x.rows.div_ceil(ROWS), 2 * x.rows * x.cols, |task, _| {
        for row in task * ROWS..x.rows.min((task + 1) * ROWS) {
            // SAFETY: each row belongs to one task.
            let (codes, scales, offsets) = unsafe {
                (
                    std::slice::from_raw_parts_mut(targets.0.get().add(row * cols), cols),
                    std::slice::from_raw_parts_mut(targets.1.get().add(row * groups), groups),
                    std::slice::from_raw_parts_mut(targets.2.get().add(row * groups), groups),
                )
            };
            quantize_row(isa, x.row(row), codes, scales, offsets);
        }
    });
    rows
}

/// `sums [m, PANEL]` = rows `m0..m0+m` of `x` times outputs `n0..n0+n` of a packed weight; `n0` is a multiple of
/// [`PANEL`], of the columns of sums the first `n` rounded up to whole tiles are written.
#[allow(clippy::too_many_arguments, reason = "operands of one tile loop")]
pub(crate) fn panel(
    isa: Isa,
    x: &QuantizedRows,
    m0: usize,
    m: usize,
    dtype: Dtype,
    bytes: &[u8],
    n0: usize,
    n: usize,
    sums: &mut [f32],
) {
    let tile = tile_bytes(dtype, x.cols).expect("checked when the weight was loaded");
    let blocks = x.cols / BLOCK_COLS;
    sums[..m * PANEL].fill(0.0);
    let tiles = n.div_ceil(TILE_ROWS);
    let bytes = &bytes[n0 / TILE_ROWS * tile..][..tiles * tile];
    let kernel = kernel(isa);
    let multiply = |tile: &[u8], first: usize, row: usize, rows: usize, sums: &mut [f32]| {
        let count = K_BLOCKS.min(blocks - first);
        let blocks = match dtype {
            Dtype::Int4 => &tile[INT4_HEAD + first * INT4_BLOCK..][..count * INT4_BLOCK],
            _ => &tile[first * INT8_BLOCK..][..count * INT8_BLOCK],
        };
        let piece = Piece { dtype, blocks, x, row: m0 + row, first_group: first * BLOCK_COLS / GROUP };
        kernel(&piece, rows, sums);
    };
    if m <= FEW_ROWS {
        for (t, tile) in bytes.chunks_exact(tile).enumerate() {
            for first in (0..blocks).step_by(K_BLOCKS) {
                multiply(tile, first, 0, m, &mut sums[t * TILE_ROWS..]);
            }
        }
    } else {
        for first in (0..blocks).step_by(K_BLOCKS) {
            let mut row = 0;
            while row < m {
                let rows = at_once(m - row);
                for (t, tile) in bytes.chunks_exact(tile).enumerate() {
                    multiply(tile, first, row, rows, &mut sums[row * PANEL + t * TILE_ROWS..]);
                }
                row += rows;
            }
        }
    }
    if dtype == Dtype::Int4 {
        for (t, tile) in bytes.chunks_exact(tile).enumerate() {
            let mut row_scales = [0.0f32; TILE_ROWS];
            for (scale, bytes) in row_scales.iter_mut().zip(tile.chunks_exact(4)) {
                *scale = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) / 8.0;
            }
            for row in 0..m {
                for (sum, scale) in sums[row * PANEL + t * TILE_ROWS..].iter_mut().zip(&row_scales) {
                    *sum *= scale;
                }
            }
        }
    }
}

/// How many of `left` rows the next tile takes: a number that there is a kernel for.
fn at_once(left: usize) -> usize {
    [MAX_ROWS, 6, 4, 3, 2].into_iter().find(|rows| *rows <= left).unwrap_or(1)
}

/// Some blocks of a tile and the activations to multiply them with.
pub(super) struct Piece<'a> {
    pub dtype: Dtype,
    /// Whole blocks of the type.
    pub blocks: &'a [u8],
    pub x: &'a QuantizedRows,
    /// First row of the activations.
    pub row: usize,
    /// Group of the columns of the first block.
    pub first_group: usize,
}

/// Pointers to a piece's rows of activations.
#[cfg(target_arch = "x86_64")]
pub(super) struct Rows {
    pub codes: *const i8,
    /// From one row's codes to the next one's.
    pub ld: usize,
    pub scales: *const f32,
    pub offsets: *const i32,
    /// From one row's scales and offsets to the next one's.
    pub groups: usize,
}

#[cfg(target_arch = "x86_64")]
impl Piece<'_> {
    /// Panics unless `rows` rows of activations and of sums are there for all blocks.
    pub(super) fn check(&self, rows: usize, sums: &[f32]) {
        let x = self.x;
        let groups = self.blocks.len() / if self.dtype == Dtype::Int4 { INT4_BLOCK } else { INT8_BLOCK } * 2;
        assert!(sums.len() >= (rows - 1) * PANEL + TILE_ROWS && self.first_group + groups <= x.groups());
        assert!(x.codes.len() >= (self.row + rows) * x.cols && x.scales.len() >= (self.row + rows) * x.groups());
        assert!(x.offsets.len() == x.scales.len());
    }

    /// The activations from the piece's row number `row` on.
    #[inline(always)]
    pub(super) fn rows(&self, row: usize) -> Rows {
        let x = self.x;
        let (row, groups) = (self.row + row, x.groups());
        let group = row * groups + self.first_group;
        Rows {
            codes: x.codes[row * x.cols + self.first_group * GROUP..].as_ptr(),
            ld: x.cols,
            scales: x.scales[group..].as_ptr(),
            offsets: x.offsets[group..].as_ptr(),
            groups,
        }
    }
}

/// Adds the products of `rows` rows of the piece to `sums`, whose rows are [`PANEL`] apart.
type Kernel = fn(&Piece<'_>, rows: usize, sums: &mut [f32]);

fn kernel(isa: Isa) -> Kernel {
    #[cfg(target_arch = "x86_64")]
    {
        if isa == Isa::Avx512 && is_x86_feature_detected!("avx512vnni") {
            return super::quantized_avx512::piece;
        }
        if isa >= Isa::Avx2 {
            return super::quantized_avx2::piece;
        }
    }
    let _ = isa;
    portable
}

/// The definition, one output at a time.
fn portable(piece: &Piece<'_>, rows: usize, sums: &mut [f32]) {
    let x = piece.x;
    let int4 = piece.dtype == Dtype::Int4;
    let block_bytes = if int4 { INT4_BLOCK } else { INT8_BLOCK };
    for row in 0..rows {
        let codes = &x.codes[(piece.row + row) * x.cols..][..x.cols];
        for (b, block) in piece.blocks.chunks_exact(block_bytes).enumerate() {
            for half in 0..BLOCK_COLS / GROUP {
                let group = piece.first_group + 2 * b + half;
                let at = (piece.row + row) * x.groups() + group;
                let codes = &codes[group * GROUP..][..GROUP];
                for r in 0..TILE_ROWS {
                    let (mut t, scale) = (x.offsets[at], scale_at(piece.dtype, block, half, r));
                    if int4 {
                        let z = i32::from(block[INT4_ZEROS + half * 16 + r]);
                        for (k, code) in codes.iter().enumerate() {
                            let pair = block[INT4_CODES + (half * 4 + k / 8) * 64 + 4 * r + k % 4];
                            let q = i32::from(if k % 8 < 4 { pair & 15 } else { pair >> 4 });
                            t += (8 * q + z) * i32::from(*code);
                        }
                    } else {
                        for (k, code) in codes.iter().enumerate() {
                            let u = block[64 + (half * 8 + k / 4) * 64 + 4 * r + k % 4];
                            t += i32::from(u) * i32::from(*code);
                        }
                    }
                    let sum = &mut sums[row * PANEL + r];
                    *sum = (t as f32).mul_add(scale * x.scales[at], *sum);
                }
            }
        }
    }
}

/// The scale of group `half` of row `r` of a block.
fn scale_at(dtype: Dtype, block: &[u8], half: usize, r: usize) -> f32 {
    if dtype == Dtype::Int4 {
        return scale_of(scale_code_at(block, half, r));
    }
    let d = 2 * (half * 16 + r);
    f16_to_f32(u16::from_le_bytes([block[d], block[d + 1]]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::pack_rows;

    /// Every instruction set, number of rows and shape gives the portable kernel's bits.
    #[test]
    fn all_kernels_agree_bit_for_bit() {
        let noise = |n: usize, seed: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 * 1e-3 - 1.0).collect()
        };
        let pool = Pool::new(2).unwrap();
        for (m, k, n) in [(1, 32, 16), (2, 64, 5), (3, 1000, 70), (25, 2100, 64), (7, 72, 33), (12, 4304, 130)] {
            for dtype in [Dtype::Int4, Dtype::Int8] {
                let mut bytes = vec![0; dtype.stored_bytes(n, k).unwrap()];
                pack_rows(dtype, n, k, &noise(n * k, 1), &mut bytes).unwrap();
                let x = HostTensor::from_f32(m, k, &noise(m * k, 2));
                let run = |isa: Isa| -> Vec<u32> {
                    let rows = quantize(&pool, isa, &x);
                    let mut all = Vec::new();
                    for n0 in (0..n).step_by(PANEL) {
                        let mut sums = vec![f32::NAN; m * PANEL];
                        panel(isa, &rows, 0, m, dtype, &bytes, n0, PANEL.min(n - n0), &mut sums);
                        for row in sums.chunks_exact(PANEL) {
                            all.extend(row[..PANEL.min(n - n0)].iter().map(|v| v.to_bits()));
                        }
                    }
                    all
                };
                let expected = run(Isa::Portable);
                for isa in Isa::available() {
                    assert!(run(isa) == expected, "{isa:?} {dtype:?} {m}x{k}x{n}");
                }
            }
        }
    }
}
