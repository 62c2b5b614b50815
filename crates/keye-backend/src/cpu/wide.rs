//! Products with int10 and int12 weights: nearly exact, at half the speed of eight bits and twice that of f32.
//!
//! A task unpacks the weights of [`PANEL`] outputs and some columns into 16-bit integers that stay in the first-level cache
//! while all its rows of activations are multiplied with them. What is summed in which order is `coded_rows`' definition.

use super::Isa;
use super::quantized::{Activations, PANEL, at_once, times_row_scales};
use crate::Dtype;
use crate::coded_rows::WideRows;
use crate::packed::{BLOCK_COLS, TILE_ROWS, tile_bytes};
use crate::wide_tiles::{VECTORS, WIDE_HEAD, block_bytes, unpack_blocks};

/// Blocks of columns that are unpacked at once.
const K_BLOCKS: usize = 2;
/// Unpacked weights of a vector: pairs of columns of all outputs of a panel.
const LANES: usize = 2 * PANEL;
/// Rows of activations in a tile.
const ROWS: [usize; 4] = [6, 4, 2, 1];

/// `sums [m, PANEL]` = rows `m0..m0+m` of `x` times outputs `n0..n0+n` of an int10 or int12 weight; `n0` is a multiple of
/// [`PANEL`], of the columns of sums the first `n` count. `scratch` holds the unpacked weights.
#[allow(clippy::too_many_arguments, reason = "operands of one tile loop")]
pub(crate) fn panel(
    isa: Isa,
    x: &WideRows,
    m0: usize,
    m: usize,
    dtype: Dtype,
    bytes: &[u8],
    n0: usize,
    n: usize,
    sums: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let high = dtype.high_bits().expect("products of other types are elsewhere");
    let (block, tile) = (block_bytes(high), tile_bytes(dtype, x.cols).expect("checked when the weight was loaded"));
    let tiles = bytes[n0 / TILE_ROWS * tile..][..n.div_ceil(TILE_ROWS) * tile].chunks_exact(tile);
    let kernel = kernel(isa);
    scratch.resize(K_BLOCKS * VECTORS * LANES / 2, 0.0);
    // SAFETY: every bit pattern is an i16; align_to_mut only yields correctly aligned elements.
    let (_, weights, _) = unsafe { scratch.align_to_mut::<i16>() };
    // Outputs behind the last tile get whatever is there; it is some numbers.
    sums[..m * PANEL].fill(0.0);
    for first in (0..x.groups()).step_by(K_BLOCKS) {
        let count = K_BLOCKS.min(x.groups() - first);
        let weights = &mut weights[..count * VECTORS * LANES];
        for (t, tile) in tiles.clone().enumerate() {
            let blocks = &tile[WIDE_HEAD + first * block..][..count * block];
            unpack_blocks(isa, high, blocks, LANES, &mut weights[t * 2 * TILE_ROWS..]);
        }
        let mut row = 0;
        while row < m {
            let rows = at_once(&ROWS, m - row);
            let x = Activations { all: x, row: m0 + row, group: first };
            kernel(&Piece { weights, x }, rows, &mut sums[row * PANEL..]);
            row += rows;
        }
    }
    times_row_scales(tiles, 1.0, &mut sums[..m * PANEL]);
}

/// Unpacked weights of some blocks and the activations to multiply them with.
pub(super) struct Piece<'a> {
    /// `[blocks][VECTORS][PANEL][2]`
    pub weights: &'a [i16],
    pub x: Activations<'a, i16>,
}

impl Piece<'_> {
    /// How many blocks.
    pub(super) fn blocks(&self) -> usize {
        self.weights.len() / (VECTORS * LANES)
    }

    /// Panics unless `rows` rows of activations and of sums are there for all blocks.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn check(&self, rows: usize, sums: &[f32]) {
        assert!(sums.len() >= rows * PANEL);
        self.x.check(rows, self.blocks());
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

/// The definition.
fn portable(piece: &Piece<'_>, rows: usize, sums: &mut [f32]) {
    for row in 0..rows {
        let (codes, first) = piece.x.row(row);
        for b in 0..piece.blocks() {
            let codes = &codes[b * BLOCK_COLS..][..BLOCK_COLS];
            let mut t = [0i32; PANEL];
            for (v, pair) in codes.chunks_exact(2).enumerate() {
                let weights = &piece.weights[(b * VECTORS + v) * LANES..][..LANES];
                for (t, w) in t.iter_mut().zip(weights.chunks_exact(2)) {
                    let products = i32::from(w[0]) * i32::from(pair[0]) + i32::from(w[1]) * i32::from(pair[1]);
                    *t = t.wrapping_add(products);
                }
            }
            let scale = piece.x.all.scales[first + b];
            for (sum, t) in sums[row * PANEL..][..PANEL].iter_mut().zip(t) {
                *sum = (t as f32).mul_add(scale, *sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::pool::Pool;
    use crate::cpu::quantized;
    use crate::host::HostTensor;
    use crate::packed::pack_rows;

    /// Every instruction set, number of rows and shape gives the portable kernel's bits, also where all codes are largest.
    #[test]
    fn all_kernels_agree_bit_for_bit() {
        let noise = |n: usize, seed: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 * 1e-3 - 1.0).collect()
        };
        let pool = Pool::new(2).unwrap();
        for (m, k, n) in [(1, 32, 16), (2, 64, 5), (3, 1000, 70), (25, 2100, 64), (7, 72, 33), (13, 1152, 130)] {
            let operands = [(noise(n * k, 1), noise(m * k, 2)), (vec![-1.0; n * k], vec![1.0; m * k])];
            for ((w, values), dtype) in operands.iter().flat_map(|o| [(o, Dtype::Int10), (o, Dtype::Int12)]) {
                let mut bytes = vec![0; dtype.stored_bytes(n, k).unwrap()];
                pack_rows(dtype, n, k, w, &mut bytes).unwrap();
                let w = crate::packed::unpack(dtype, n, k, &bytes).unwrap();
                let x = HostTensor::from_f32(m, k, values);
                let run = |isa: Isa| -> Vec<f32> {
                    let rows = quantized::rows(&pool, isa, &x);
                    let mut all = vec![0.0; m * n];
                    for n0 in (0..n).step_by(PANEL) {
                        let (mut sums, width) = (vec![f32::NAN; m * PANEL], PANEL.min(n - n0));
                        panel(isa, &rows, 0, m, dtype, &bytes, n0, width, &mut sums, &mut Vec::new());
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
                    assert!(bits(run(isa)) == expected, "{isa:?} {dtype:?} {m}x{k}x{n}");
                }
            }
        }
    }
}
