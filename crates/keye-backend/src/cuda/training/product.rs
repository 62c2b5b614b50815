//! Products of training.

use super::Array;
use crate::BackendError;
use crate::cuda::Cuda;
use crate::cuda::device::{Arg, Grid, Memory};
use crate::matmul::Old;
use crate::training::{Operand, Precision, View, ViewMut};

/// Blocks that keep the largest of usual chips busy, in squares of 128 (one a multiprocessor) and of 64 (three).
const BLOCKS: [usize; 2] = [132, 396];
/// Inputs of a slice at least: with fewer, what is stored and added again costs more than a fuller chip saves.
const SLICE: [usize; 2] = [512, 256];
/// Most elements of all slices' results.
const WORKSPACE: usize = 64 << 20;
/// Rows and columns of a result from which on operands are rounded once, before, and the most elements that may be.
const NARROW: usize = 1024;
const NARROWED: usize = 256 << 20;
/// Bytes of shared memory of such a product.
const NARROW_SHARED: usize = 4 * 2 * 128 * (32 + 8) * 2;

/// As in train_product.cu.
const TURNED: [u32; 2] = [1, 2];
const VECTORS: [u32; 2] = [4, 8];
const PAIRS_C: u32 = 16;
const KEEP: u32 = 32;

/// How a product is cut; of its shape alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    /// Width of a block's square of the result.
    square: usize,
    /// Blocks of a slice.
    blocks: usize,
    /// Inputs of a slice: all, or a multiple of a step.
    slice: usize,
    slices: usize,
    /// Whether operands that are to be bf16 are rounded before.
    narrow: bool,
}

impl Cut {
    fn of(m: usize, n: usize, k: usize) -> Self {
        let cut = |i: usize, square: usize| {
            let blocks = m.div_ceil(square) * n.div_ceil(square);
            // Rounded down: another slice that fills a chip in part only would be waited for by all.
            let wanted = (BLOCKS[i] / blocks.max(1)).min(k / SLICE[i]).min(WORKSPACE / (m * n).max(1)).max(1);
            let slice = if wanted == 1 { k } else { k.div_ceil(wanted).next_multiple_of(32) };
            let slices = if wanted == 1 { 1 } else { k.div_ceil(slice) };
            Self { square, blocks, slice, slices, narrow: false }
        };
        let (large, small) = (cut(0, 128), cut(1, 64));
        // Large squares need half the loads; they have to be full, and as many as multiprocessors, nearly.
        let filled = m * n * 4 >= large.blocks * 128 * 128 * 3;
        if !filled || large.blocks * large.slices * 4 < BLOCKS[0] * 3 {
            return small;
        }
        Self { narrow: m.min(n) >= NARROW && (m + n) * k <= NARROWED, ..large }
    }
}

impl Cuda {
    /// `c (+)= a b`; in [`Precision::Bf16`] both operands are rounded.
    pub(in crate::cuda) fn training_product(
        &self,
        precision: Precision,
        a: Operand<'_, Array>,
        b: Operand<'_, Array>,
        c: ViewMut<'_, Array>,
        old: Old,
    ) -> Result<(), BackendError> {
        let ([m, k], [inputs, n]) = (a.shape(), b.shape());
        assert_eq!((k, c.rows, c.cols), (inputs, m, n), "shapes of a product");
        self.cut_product(Cut::of(m, n, k), precision, a, b, c, old)
    }

    fn cut_product(
        &self,
        cut: Cut,
        precision: Precision,
        a: Operand<'_, Array>,
        b: Operand<'_, Array>,
        c: ViewMut<'_, Array>,
        old: Old,
    ) -> Result<(), BackendError> {
        let ([m, k], [_, n]) = (a.shape(), b.shape());
        for operand in [&a, &b] {
            assert!(operand.matrix.range().end <= operand.matrix.array.len, "operands inside their arrays");
        }
        assert!(c.range().end <= c.array.len, "the result inside its array");
        let count = m * n;
        if count == 0 {
            return Ok(());
        }
        let address = |array: &Array, start: usize| array.memory.address() + 4 * start as u64;
        let to = address(c.array, c.start);
        let mut form = 0;
        for (i, operand) in [&a, &b].into_iter().enumerate() {
            let matrix = &operand.matrix;
            form |= if operand.transposed { TURNED[i] } else { 0 };
            form |= if matrix.start.is_multiple_of(4) && matrix.cols.is_multiple_of(4) { VECTORS[i] } else { 0 };
        }
        let keep = old == Old::Keep;
        // These are held until the launches: freeing is ordered behind them.
        let mut workspace = None;
        let result = match cut.slices {
            1 => {
                form |= if c.start.is_multiple_of(2) && n.is_multiple_of(2) { PAIRS_C } else { 0 };
                form |= if keep { KEEP } else { 0 };
                to
            }
            slices => {
                form |= if n.is_multiple_of(2) { PAIRS_C } else { 0 };
                workspace.insert(Array::room(&self.device, slices * count)?).memory.address()
            }
        };
        let (kernel, threads, shared) = match (precision, cut.square) {
            (Precision::Bf16, _) if cut.narrow => ("train_product_narrow", 256, NARROW_SHARED),
            (Precision::Bf16, 128) => ("train_product_bf16_128", 256, 0),
            (Precision::Bf16, _) => ("train_product_bf16_64", 128, 0),
            (Precision::F32, 128) => ("train_product_f32_128", 256, 0),
            (Precision::F32, _) => ("train_product_f32_64", 128, 0),
        };
        let mut operands = [&a, &b].map(|operand| address(operand.matrix.array, operand.matrix.start));
        let mut narrowed = Vec::new();
        if shared > 0 {
            for (i, operand) in [&a, &b].into_iter().enumerate() {
                let memory = self.narrow_rows(&operand.matrix, form & VECTORS[i] != 0)?;
                operands[i] = memory.address();
                narrowed.push(memory);
            }
        }
        let args = [
            Arg::Address(operands[0]),
            Arg::Address(operands[1]),
            Arg::Address(result),
            Arg::U32(m as u32),
            Arg::U32(n as u32),
            Arg::U32(k as u32),
            Arg::U32(cut.slice as u32),
            Arg::U32(form),
        ];
        self.device.launch(kernel, Grid::of(cut.blocks, cut.slices, threads).shared(shared), &args)?;
        if workspace.is_some() {
            let args = [
                Arg::Address(result),
                Arg::Address(to),
                Arg::U64(count as u64),
                Arg::U32(cut.slices as u32),
                Arg::U32(u32::from(keep)),
            ];
            self.device.launch("train_product_sum", Grid::of(count.div_ceil(256), 1, 256), &args)?;
        }
        Ok(())
    }

    /// Rows in bf16, padded with zeros to whole 16 bytes.
    fn narrow_rows(&self, matrix: &View<'_, Array>, vectors: bool) -> Result<Memory, BackendError> {
        let stride = matrix.cols.next_multiple_of(8);
        let memory = self.device.allocate("training", matrix.rows * stride * 2)?;
        let args = [
            Arg::Address(matrix.array.memory.address() + 4 * matrix.start as u64),
            memory.arg(),
            Arg::U32(matrix.rows as u32),
            Arg::U32(matrix.cols as u32),
            Arg::U32(stride as u32),
            Arg::U32(u32::from(vectors)),
        ];
        self.device.launch("train_narrow", Grid::of(matrix.rows.div_ceil(8), 1, 256), &args)?;
        Ok(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_fill_a_chip() {
        // A layer's output, its input's gradient: large squares, all inputs at once.
        assert_eq!(Cut::of(4096, 4096, 1024), Cut { square: 128, blocks: 1024, slice: 1024, slices: 1, narrow: true });
        // A small weight's gradient over many tokens.
        let cut = Cut::of(256, 256, 8192);
        assert!(cut.slices > 1 && cut.slice.is_multiple_of(32) && (cut.slices - 1) * cut.slice < 8192);
        assert!(cut.slices * cut.slice >= 8192 && cut.blocks * cut.slices >= 64, "{cut:?}");
        for (m, n, k) in [(1, 1, 1), (7, 5, 0), (160, 160, 70_000), (1, 5000, 100_000)] {
            let cut = Cut::of(m, n, k);
            assert!(cut.slices >= 1 && cut.slice * cut.slices >= k, "{cut:?}");
            assert!(cut.slices == 1 || (cut.slices - 1) * cut.slice < k, "no slice is empty: {cut:?}");
        }
    }
    /// All ways sum in the same order.
    #[cfg(feature = "cuda-emulator")]
    fn ways_agree(cuda: &Cuda, [m, k, n]: [usize; 3], start: usize, slice: usize) {
        use crate::training::Device;
        let values = |len: usize, seed: usize| -> Vec<f32> {
            let value = |i: usize| if i < start { f32::NAN } else { ((i * 37 + seed) % 101) as f32 / 50.0 - 1.0 };
            (0..start + len).map(value).collect()
        };
        let (x, y, z) = (values(m * k, 1), values(k * n, 2), values(m * n, 3));
        for (form, precision) in (0..4).flat_map(|form| [(form, Precision::F32), (form, Precision::Bf16)]) {
            let turned = [form & 1 != 0, form & 2 != 0];
            let [a, b] = [&x, &y].map(|values| cuda.array(values.clone()).unwrap());
            let product = |square: usize, narrow: bool| {
                let blocks = m.div_ceil(square) * n.div_ceil(square);
                let cut = Cut { square, blocks, slice, slices: k.div_ceil(slice), narrow };
                let mut out = cuda.array(z.clone()).unwrap();
                let [rows, cols] = if turned[0] { [k, m] } else { [m, k] };
                let a = Operand { matrix: View { array: &a, start, rows, cols }, transposed: turned[0] };
                let [rows, cols] = if turned[1] { [n, k] } else { [k, n] };
                let b = Operand { matrix: View { array: &b, start, rows, cols }, transposed: turned[1] };
                let c = ViewMut { array: &mut out, start, rows: m, cols: n };
                cuda.cut_product(cut, precision, a, b, c, Old::Keep).unwrap();
                let bits: Vec<u32> =
                    cuda.values(View::of(&out, 1, z.len())).unwrap().iter().map(|x| x.to_bits()).collect();
                bits
            };
            let small = product(64, false);
            assert_eq!(product(128, false), small, "{precision:?}, transposed {turned:?}");
            assert_eq!(product(128, true), small, "{precision:?}, transposed {turned:?}, rounded before");
            assert!(small[start..].iter().all(|bits| f32::from_bits(*bits).is_finite()));
        }
    }

    #[cfg(feature = "cuda-emulator")]
    #[test]
    fn cuda_products_of_large_squares() {
        use crate::Products;
        let Some(cuda) = Cuda::for_tests(Products::F32) else { return };
        ways_agree(&cuda, [150, 72, 268], 4, 72);
        ways_agree(&cuda, [131, 75, 133], 3, 32);
        let Some(cuda) = Cuda::watched(Products::F32) else { return };
        ways_agree(&cuda, [132, 36, 136], 4, 32);
        ways_agree(&cuda, [129, 35, 65], 1, 35);
    }
}
