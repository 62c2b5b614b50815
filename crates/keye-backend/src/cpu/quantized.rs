//! Products with packed weights: eight-bit activations times int8 or int4 weights, from the memory map.
//!
//! A tile of sixteen outputs is one stream of bytes; a kernel multiplies it with up to eight rows of activations at
//! once and keeps their sums in registers. With one row the stream comes from memory and the unpacking hides behind the
//! loads; with many it comes from the cache. What is summed in which order is `coded_rows`' definition.

use super::Isa;
use super::pool::{Pool, SyncPtr};
use crate::Dtype;
use crate::coded_rows::{Code, CodedRows, NarrowRows};
use crate::host::HostTensor;
use crate::packed::{
    BLOCK_COLS, GROUP, INT4_BLOCK, INT4_CODES, INT4_HEAD, INT4_ZEROS, INT8_BLOCK, TILE_ROWS, row_scales, scale_code_at,
    scale_of, tile_bytes,
};
use crate::weight::f16_to_f32;

/// Outputs of a task.
pub(crate) const PANEL: usize = 4 * TILE_ROWS;
/// Rows of activations in a tile.
const ROWS: [usize; 6] = [8, 6, 4, 3, 2, 1];
/// Up to this many rows of activations stay in the first-level cache whole: weights are read as they lie in memory, at its
/// speed. One kernel call takes them all.
const FEW_ROWS: usize = 4;
/// Blocks of columns that a tile runs along before the next one: its rows of activations stay in the first-level cache.
const K_BLOCKS: usize = 16;

/// The rows of `x` in codes.
pub(crate) fn rows<C: Code>(pool: &Pool, isa: Isa, x: &HostTensor) -> CodedRows<C> {
    const ROWS: usize = 8;
    let mut rows = CodedRows::<C>::new(x.rows, x.cols);
    let (cols, groups, offsets) = (rows.cols, rows.groups(), rows.row_offsets());
    let to = (SyncPtr(rows.codes.as_mut_ptr()), SyncPtr(rows.scales.as_mut_ptr()), SyncPtr(rows.offsets.as_mut_ptr()));
    pool.run(x.rows.div_ceil(ROWS), 2 * x.rows * x.cols, |task, _| {
        for row in task * ROWS..x.rows.min((task + 1) * ROWS) {
            // SAFETY: each row belongs to one task.
            let (codes, scales, offsets) = unsafe {
                (
                    std::slice::from_raw_parts_mut(to.0.get().add(row * cols), cols),
                    std::slice::from_raw_parts_mut(to.1.get().add(row * groups), groups),
                    std::slice::from_raw_parts_mut(to.2.get().add(row * offsets), offsets),
                )
            };
            C::of_row(isa, x.row(row), codes, scales, offsets);
        }
    });
    rows
}

/// `sums [m, PANEL]` = rows `m0..m0+m` of `x` times outputs `n0..n0+n` of a packed weight; `n0` is a multiple of
/// [`PANEL`], of the columns of sums the first `n` rounded up to whole tiles are written.
#[allow(clippy::too_many_arguments, reason = "operands of one tile loop")]
pub(super) fn panel(
    kernel: Kernel,
    x: &NarrowRows,
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
    let multiply = |tile: &[u8], first: usize, row: usize, rows: usize, sums: &mut [f32]| {
        let count = K_BLOCKS.min(blocks - first);
        let blocks = match dtype {
            Dtype::Int4 => &tile[INT4_HEAD + first * INT4_BLOCK..][..count * INT4_BLOCK],
            _ => &tile[first * INT8_BLOCK..][..count * INT8_BLOCK],
        };
        let x = Activations { all: x, row: m0 + row, group: first * BLOCK_COLS / GROUP };
        kernel(&Piece { dtype, blocks, x }, rows, sums);
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
                let rows = at_once(&ROWS, m - row);
                for (t, tile) in bytes.chunks_exact(tile).enumerate() {
                    multiply(tile, first, row, rows, &mut sums[row * PANEL + t * TILE_ROWS..]);
                }
                row += rows;
            }
        }
    }
    if dtype == Dtype::Int4 {
        times_row_scales(bytes.chunks_exact(tile), 1.0 / 8.0, &mut sums[..m * PANEL]);
    }
}

/// Outputs of `tiles` times the row scales at the tiles' heads and `factor`.
pub(super) fn times_row_scales<'a>(tiles: impl Iterator<Item = &'a [u8]>, factor: f32, sums: &mut [f32]) {
    for (t, tile) in tiles.enumerate() {
        let scales = row_scales(tile).map(|scale| scale * factor);
        for row in sums.chunks_exact_mut(PANEL) {
            for (sum, scale) in row[t * TILE_ROWS..].iter_mut().zip(&scales) {
                *sum *= scale;
            }
        }
    }
}

/// How many of `left` rows the next tile takes: of the numbers that there is a kernel for, from the largest to 1.
pub(super) fn at_once(numbers: &[usize], left: usize) -> usize {
    numbers.iter().copied().find(|rows| *rows <= left).unwrap_or(1)
}

/// The activations that a piece of a weight is multiplied with.
pub(super) struct Activations<'a, C: Code> {
    pub all: &'a CodedRows<C>,
    /// First of their rows.
    pub row: usize,
    /// Group of the piece's first column.
    pub group: usize,
}

/// Pointers to some rows of activations, from the first group on.
#[cfg(target_arch = "x86_64")]
pub(super) struct Rows<C> {
    pub codes: *const C,
    /// From one row's codes to the next one's.
    pub ld: usize,
    pub scales: *const f32,
    pub offsets: *const i32,
    /// From one row's scales and offsets to the next one's.
    pub groups: usize,
}

impl<C: Code> Activations<'_, C> {
    /// Codes of row number `row`, from the first group on, and the number of its first scale.
    pub(super) fn row(&self, row: usize) -> (&[C], usize) {
        let (x, row) = (self.all, self.row + row);
        let codes = &x.codes[row * x.cols..][..x.cols];
        (&codes[self.group * C::GROUP..], row * x.groups() + self.group)
    }
}

#[cfg(target_arch = "x86_64")]
impl<C: Code> Activations<'_, C> {
    /// Panics unless `rows` rows have `groups` groups from the first on.
    pub(super) fn check(&self, rows: usize, groups: usize) {
        let (x, end) = (self.all, self.row + rows);
        assert!(self.group + groups <= x.groups());
        assert!(x.codes.len() >= end * x.cols && x.scales.len() >= end * x.groups());
        assert!(x.offsets.len() >= end * x.row_offsets());
    }

    /// The rows from number `row` on.
    #[inline(always)]
    pub(super) fn rows(&self, row: usize) -> Rows<C> {
        let x = self.all;
        let (row, groups) = (self.row + row, x.groups());
        let group = row * groups + self.group;
        let offset = if x.row_offsets() == 0 { 0 } else { group };
        Rows {
            codes: x.codes[row * x.cols + self.group * C::GROUP..].as_ptr(),
            ld: x.cols,
            scales: x.scales[group..].as_ptr(),
            offsets: x.offsets[offset..].as_ptr(),
            groups,
        }
    }
}

/// Some blocks of a tile and the activations to multiply them with.
pub(super) struct Piece<'a> {
    pub dtype: Dtype,
    /// Whole blocks of the type.
    pub blocks: &'a [u8],
    pub x: Activations<'a, i8>,
}

#[cfg(target_arch = "x86_64")]
impl Piece<'_> {
    /// Panics unless `rows` rows of activations and of sums are there for all blocks.
    pub(super) fn check(&self, rows: usize, sums: &[f32]) {
        let block = if self.dtype == Dtype::Int4 { INT4_BLOCK } else { INT8_BLOCK };
        assert!(sums.len() >= (rows - 1) * PANEL + TILE_ROWS);
        self.x.check(rows, self.blocks.len() / block * (BLOCK_COLS / GROUP));
    }
}

/// Adds the products of `rows` rows of the piece to `sums`, whose rows are [`PANEL`] apart.
pub(super) type Kernel = fn(&Piece<'_>, rows: usize, sums: &mut [f32]);

/// The fastest kernel that the machine has, of those that `isa` allows.
pub(super) fn kernel(isa: Isa) -> Kernel {
    #[cfg(target_arch = "x86_64")]
    {
        if isa == Isa::Avx512 && is_x86_feature_detected!("avx512vnni") {
            return super::quantized_avx512::piece;
        }
        if isa >= Isa::Avx2 && is_x86_feature_detected!("avxvnni") {
            return super::quantized_vnni256::piece;
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
    let x = piece.x.all;
    let int4 = piece.dtype == Dtype::Int4;
    let block_bytes = if int4 { INT4_BLOCK } else { INT8_BLOCK };
    for row in 0..rows {
        let (codes, first) = piece.x.row(row);
        for (b, block) in piece.blocks.chunks_exact(block_bytes).enumerate() {
            for half in 0..BLOCK_COLS / GROUP {
                let group = 2 * b + half;
                let at = first + group;
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

    /// Those that `kernel` would not choose here too.
    #[cfg(target_arch = "x86_64")]
    fn x86_kernels() -> Vec<(&'static str, Kernel)> {
        if !Isa::available().contains(&Isa::Avx2) {
            return Vec::new();
        }
        let mut kernels = vec![("avx2", super::super::quantized_avx2::piece as Kernel)];
        kernels.extend(super::super::quantized_vnni256::other_encoding().map(|kernel| ("vnni256", kernel)));
        kernels
    }

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
                let run = |isa: Isa, kernel: Kernel| -> Vec<u32> {
                    let rows = rows(&pool, isa, &x);
                    let mut all = Vec::new();
                    for n0 in (0..n).step_by(PANEL) {
                        let mut sums = vec![f32::NAN; m * PANEL];
                        panel(kernel, &rows, 0, m, dtype, &bytes, n0, PANEL.min(n - n0), &mut sums);
                        for row in sums.chunks_exact(PANEL) {
                            all.extend(row[..PANEL.min(n - n0)].iter().map(|v| v.to_bits()));
                        }
                    }
                    all
                };
                let expected = run(Isa::Portable, portable);
                for isa in Isa::available() {
                    assert!(run(isa, kernel(isa)) == expected, "{isa:?} {dtype:?} {m}x{k}x{n}");
                }
                #[cfg(target_arch = "x86_64")]
                for (name, kernel) in x86_kernels() {
                    assert!(run(Isa::Avx2, kernel) == expected, "{name} {dtype:?} {m}x{k}x{n}");
                }
            }
        }
    }
}
