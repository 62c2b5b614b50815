//! Products with int16 weights: nearly exact, at half the speed of eight bits and twice that of f32.
//!
//! Tiles, tasks and sums are those of `quantized`; what is summed in which order is `wide_rows`' definition.

use super::Isa;
use super::pool::{Pool, SyncPtr};
use super::quantized::{PANEL, at_once};
use crate::Dtype;
use crate::host::HostTensor;
use crate::packed::{BLOCK_COLS, GROUP, INT16_BLOCK, TILE_ROWS, tile_bytes};
use crate::weight::bf16_to_f32;
use crate::wide_rows::{WideRows, quantize_wide_row};

/// Blocks of columns that a tile runs along before the next one.
const K_BLOCKS: usize = 9;

/// The rows of `x` in fourteen bits.
pub(crate) fn quantize(pool: &Pool, isa: Isa, x: &HostTensor) -> WideRows {
    const ROWS: usize = 8;
    let mut rows = WideRows::new(x.rows, x.cols);
    let (cols, groups) = (rows.cols, rows.groups());
    let targets = (SyncPtr(rows.codes.as_mut_ptr()), SyncPtr(rows.scales.as_mut_ptr()));
    pool.run(x.rows.div_ceil(ROWS), 2 * x.rows * x.cols, |task, _| {
        for row in task * ROWS..x.rows.min((task + 1) * ROWS) {
            // SAFETY: each row belongs to one task.
            let (codes, scales) = unsafe {
                (
                    std::slice::from_raw_parts_mut(targets.0.get().add(row * cols), cols),
                    std::slice::from_raw_parts_mut(targets.1.get().add(row * groups), groups),
                )
            };
            quantize_wide_row(isa, x.row(row), codes, scales);
        }
    });
    rows
}

/// `sums [m, PANEL]` = rows `m0..m0+m` of `x` times outputs `n0..n0+n` of an int16 weight; `n0` is a multiple of [`PANEL`],
/// of the columns of sums the first `n` rounded up to whole tiles are written.
#[allow(clippy::too_many_arguments, reason = "operands of one tile loop")]
pub(crate) fn panel(isa: Isa, x: &WideRows, m0: usize, m: usize, bytes: &[u8], n0: usize, n: usize, sums: &mut [f32]) {
    let tile = tile_bytes(Dtype::Int16, x.cols).expect("checked when the weight was loaded");
    let blocks = x.cols / BLOCK_COLS;
    sums[..m * PANEL].fill(0.0);
    let bytes = &bytes[n0 / TILE_ROWS * tile..][..n.div_ceil(TILE_ROWS) * tile];
    let kernel = kernel(isa);
    for first in (0..blocks).step_by(K_BLOCKS) {
        let count = K_BLOCKS.min(blocks - first);
        let mut row = 0;
        while row < m {
            let rows = at_once(m - row);
            for (t, tile) in bytes.chunks_exact(tile).enumerate() {
                let blocks = &tile[first * INT16_BLOCK..][..count * INT16_BLOCK];
                let piece = Piece { blocks, x, row: m0 + row, first_group: first * BLOCK_COLS / GROUP };
                kernel(&piece, rows, &mut sums[row * PANEL + t * TILE_ROWS..]);
            }
            row += rows;
        }
    }
}

/// Some blocks of a tile and the activations to multiply them with.
pub(super) struct Piece<'a> {
    /// Whole blocks.
    pub blocks: &'a [u8],
    pub x: &'a WideRows,
    /// First row of the activations.
    pub row: usize,
    /// Group of the columns of the first block.
    pub first_group: usize,
}

#[cfg(target_arch = "x86_64")]
impl Piece<'_> {
    /// Panics unless `rows` rows of activations and of sums are there for all blocks.
    pub(super) fn check(&self, rows: usize, sums: &[f32]) {
        let x = self.x;
        let groups = self.blocks.len() / INT16_BLOCK * 2;
        assert!(sums.len() >= (rows - 1) * PANEL + TILE_ROWS && self.first_group + groups <= x.groups());
        assert!(x.codes.len() >= (self.row + rows) * x.cols && x.scales.len() >= (self.row + rows) * x.groups());
    }

    /// Codes and scales from the piece's row number `row` on.
    pub(super) fn rows(&self, row: usize) -> (*const i16, *const f32) {
        let (x, row) = (self.x, self.row + row);
        let codes = x.codes[row * x.cols + self.first_group * GROUP..].as_ptr();
        (codes, x.scales[row * x.groups() + self.first_group..].as_ptr())
    }
}

/// Adds the products of `rows` rows of the piece to `sums`, whose rows are [`PANEL`] apart.
type Kernel = fn(&Piece<'_>, rows: usize, sums: &mut [f32]);

fn kernel(isa: Isa) -> Kernel {
    #[cfg(target_arch = "x86_64")]
    {
        if isa == Isa::Avx512 && is_x86_feature_detected!("avx512vnni") {
            return super::wide_x86::avx512;
        }
        if isa >= Isa::Avx2 {
            return super::wide_x86::avx2;
        }
    }
    let _ = isa;
    portable
}

/// The definition, one output at a time.
fn portable(piece: &Piece<'_>, rows: usize, sums: &mut [f32]) {
    let x = piece.x;
    for row in 0..rows {
        let codes = &x.codes[(piece.row + row) * x.cols..][..x.cols];
        for (b, block) in piece.blocks.chunks_exact(INT16_BLOCK).enumerate() {
            for half in 0..BLOCK_COLS / GROUP {
                let group = piece.first_group + 2 * b + half;
                let codes = &codes[group * GROUP..][..GROUP];
                for r in 0..TILE_ROWS {
                    let d = 2 * (half * 16 + r);
                    let mut t = 0;
                    for (k, code) in codes.iter().enumerate() {
                        let at = 64 + (half * 16 + k / 2) * 64 + 4 * r + 2 * (k % 2);
                        t += i32::from(i16::from_le_bytes([block[at], block[at + 1]])) * i32::from(*code);
                    }
                    let scale = bf16_to_f32(u16::from_le_bytes([block[d], block[d + 1]]));
                    let sum = &mut sums[row * PANEL + r];
                    *sum = (t as f32).mul_add(scale * x.scales[(piece.row + row) * x.groups() + group], *sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::pack_rows;

    /// Every instruction set, number of rows and shape gives the portable kernel's bits, also where all codes are largest.
    #[test]
    fn all_kernels_agree_bit_for_bit() {
        let noise = |n: usize, seed: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 * 1e-3 - 1.0).collect()
        };
        let pool = Pool::new(2).unwrap();
        for (m, k, n) in [(1, 32, 16), (2, 64, 5), (3, 1000, 70), (25, 2100, 64), (7, 72, 33), (13, 1152, 130)] {
            for (w, values) in [(noise(n * k, 1), noise(m * k, 2)), (vec![-1.0; n * k], vec![1.0; m * k])] {
                let mut bytes = vec![0; Dtype::Int16.stored_bytes(n, k).unwrap()];
                pack_rows(Dtype::Int16, n, k, &w, &mut bytes).unwrap();
                let x = HostTensor::from_f32(m, k, &values);
                let run = |isa: Isa| -> Vec<f32> {
                    let rows = quantize(&pool, isa, &x);
                    let mut all = vec![0.0; m * n];
                    for n0 in (0..n).step_by(PANEL) {
                        let (mut sums, width) = (vec![f32::NAN; m * PANEL], PANEL.min(n - n0));
                        panel(isa, &rows, 0, m, &bytes, n0, width, &mut sums);
                        for (row, sums) in sums.chunks_exact(PANEL).enumerate() {
                            all[row * n + n0..][..width].copy_from_slice(&sums[..width]);
                        }
                    }
                    all
                };
                let expected = run(Isa::Portable);
                for (i, found) in expected.iter().enumerate() {
                    let exact: f64 =
                        (0..k).map(|j| f64::from(values[i / n * k + j]) * f64::from(w[i % n * k + j])).sum();
                    assert!((f64::from(*found) - exact).abs() < 1e-4 * k as f64, "{m}x{k}x{n}: {found} for {exact}");
                }
                let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                let expected = bits(expected);
                for isa in Isa::available() {
                    assert!(bits(run(isa)) == expected, "{isa:?} {m}x{k}x{n}");
                }
            }
        }
    }
}
