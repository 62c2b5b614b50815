//! Operations on rows and their reverses: train_rows.cu.

use super::{Array, Result, matrix, number, rows_of, target, vector};
use crate::Cuda;
use crate::cuda::device::{Arg, Grid, Memory};
use crate::training::{Angles, HeadNorm, Taps, View, ViewMut};

/// No array.
const NONE: Arg = Arg::Address(0);

/// Most slices into which rows are cut to be summed, and rows of a slice at least: a GPU is filled, and what lies between the
/// two launches is small beside the rows.
const SLICES: usize = 128;
const SLICE_ROWS: usize = 16;
/// The same for heads of rows.
const HEAD_SLICES: usize = 1024;
const SLICE_HEADS: usize = 32;

impl Cuda {
    /// Adds to `sums` what `kernel` sums of a slice of the rows, in the order of the slices.
    fn sum_rows(&self, kernel: &'static str, of: &[Arg], rows: usize, sums: &ViewMut<'_, Array>) -> Result<()> {
        let (to, cols) = (target(sums), sums.rows * sums.cols);
        let slice_rows = rows.div_ceil(SLICES).max(SLICE_ROWS);
        let slices = rows.div_ceil(slice_rows);
        let partial = self.device.allocate("training", slices * cols * 4)?;
        let args = [of, &[partial.arg(), number(rows), number(cols), number(slice_rows)]].concat();
        self.device.launch(kernel, Grid::of(cols.div_ceil(256), slices, 256), &args)?;
        self.add_slices(&partial, slices, to, cols)
    }

    fn add_slices(&self, partial: &Memory, slices: usize, to: Arg, cols: usize) -> Result<()> {
        if slices == 0 {
            return Ok(());
        }
        let args = [partial.arg(), to, number(slices), number(cols)];
        self.device.launch("train_add_slices", Grid::of(cols.div_ceil(32), 1, 256), &args)
    }

    pub(super) fn training_column_sums(&self, x: &Array, sums: ViewMut<'_, Array>) -> Result<()> {
        let rows = rows_of(x, sums.rows * sums.cols);
        self.sum_rows("train_column_sums", &[x.arg()], rows, &sums)
    }

    pub(super) fn training_norm(
        &self,
        x: &Array,
        weight: View<'_, Array>,
        bias: Option<View<'_, Array>>,
        eps: f32,
    ) -> Result<(Array, Array)> {
        let cols = weight.rows * weight.cols;
        let rows = rows_of(x, cols);
        let (out, stats) = (Array::room(&self.device, x.len)?, Array::room(&self.device, 2 * rows)?);
        let bias = bias.map_or(NONE, |bias| vector(bias, cols));
        let args = [x.arg(), matrix(weight), bias, out.arg(), stats.arg(), number(cols), Arg::F32(eps)];
        self.device.launch("train_norm", Grid::of(rows, 1, 256), &args)?;
        Ok((out, stats))
    }

    pub(super) fn training_norm_backward(
        &self,
        x: &Array,
        stats: &Array,
        weight: View<'_, Array>,
        centred: bool,
        dy: &Array,
        dx: &mut Array,
    ) -> Result<()> {
        let cols = weight.rows * weight.cols;
        let rows = rows_of(x, cols);
        assert_eq!([stats.len, dy.len, dx.len], [2 * rows, x.len, x.len], "elements");
        let args =
            [x.arg(), stats.arg(), matrix(weight), dy.arg(), dx.arg(), number(cols), Arg::U32(u32::from(centred))];
        self.device.launch("train_norm_backward", Grid::of(rows, 1, 256), &args)
    }

    pub(super) fn training_norm_weight_backward(
        &self,
        x: &Array,
        stats: &Array,
        dy: &Array,
        dw: ViewMut<'_, Array>,
    ) -> Result<()> {
        let rows = rows_of(x, dw.rows * dw.cols);
        assert_eq!([stats.len, dy.len], [2 * rows, x.len], "elements");
        self.sum_rows("train_norm_weight_sums", &[x.arg(), stats.arg(), dy.arg()], rows, &dw)
    }

    pub(super) fn training_split_heads(
        &self,
        x: &Array,
        [heads, d]: [usize; 2],
        norm: Option<HeadNorm<'_, Array>>,
        angles: Option<&Angles<Array>>,
    ) -> Result<Array> {
        let rows = rows_of(x, heads * d);
        let out = Array::room(&self.device, x.len)?;
        let (weight, eps) = of_norm(norm, d);
        let [cosines, sines] = of_angles(angles, rows, d);
        let shape = [number(rows), number(heads), number(d), Arg::F32(eps)];
        let args = [&[x.arg(), weight, cosines, sines, out.arg()][..], &shape].concat();
        self.device.launch("train_split_heads", Grid::of((rows * heads).div_ceil(8), 1, 256), &args)?;
        Ok(out)
    }

    pub(super) fn training_merge_heads(&self, x: &Array, [heads, d]: [usize; 2]) -> Result<Array> {
        let rows = rows_of(x, heads * d);
        let out = Array::room(&self.device, x.len)?;
        let args = [x.arg(), out.arg(), number(rows), number(heads), number(d)];
        self.device.launch("train_merge_heads", Grid::of((rows * heads).div_ceil(8), 1, 256), &args)?;
        Ok(out)
    }

    pub(super) fn training_split_heads_backward(
        &self,
        x: &Array,
        [heads, d]: [usize; 2],
        norm: Option<HeadNorm<'_, Array>>,
        angles: Option<&Angles<Array>>,
        dy: &Array,
        dw: Option<ViewMut<'_, Array>>,
    ) -> Result<Array> {
        let rows = rows_of(dy, heads * d);
        assert!(norm.is_none() || x.len == dy.len, "elements");
        let out = Array::room(&self.device, dy.len)?;
        let (weight, eps) = of_norm(norm, d);
        let [cosines, sines] = of_angles(angles, rows, d);
        let slice = (rows * heads).div_ceil(HEAD_SLICES).max(SLICE_HEADS);
        let slices = (rows * heads).div_ceil(slice);
        // What there is no norm for has no gradient either.
        let dw = dw.filter(|_| norm.is_some()).map(|dw| {
            assert_eq!(dw.rows * dw.cols, d, "width");
            target(&dw)
        });
        let partial = dw.map(|_| self.device.allocate("training", slices * d * 4)).transpose()?;
        let args = [
            x.arg(),
            weight,
            cosines,
            sines,
            dy.arg(),
            out.arg(),
            partial.as_ref().map_or(NONE, Memory::arg),
            number(rows),
            number(heads),
            number(d),
            number(slice),
            Arg::F32(eps),
        ];
        let grid = Grid::of(slices, 1, 256).shared(if partial.is_some() { 8 * d * 4 } else { 0 });
        self.device.launch("train_split_heads_backward", grid, &args)?;
        if let (Some(partial), Some(dw)) = (partial, dw) {
            self.add_slices(&partial, slices, dw, d)?;
        }
        Ok(out)
    }

    pub(super) fn training_gather(&self, from: View<'_, Array>, rows: &[u32]) -> Result<Array> {
        require_rows(rows, from.rows);
        let out = Array::room(&self.device, rows.len() * from.cols)?;
        let index = self.device.upload_u32("rows", rows)?;
        let args = [matrix(from), index.arg(), out.arg(), number(from.cols)];
        self.device.launch("gather_rows", Grid::of(rows.len(), 1, 256), &args)?;
        Ok(out)
    }

    pub(super) fn training_scatter(&self, to: ViewMut<'_, Array>, rows: &[u32], from: &Array) -> Result<()> {
        require_rows(rows, to.rows);
        assert_eq!(rows.len() * to.cols, from.len, "elements");
        let mut seen = vec![false; to.rows];
        assert!(rows.iter().all(|row| !std::mem::replace(&mut seen[*row as usize], true)), "no row is listed twice");
        let index = self.device.upload_u32("rows", rows)?;
        let args = [target(&to), index.arg(), from.arg(), number(to.cols)];
        self.device.launch("train_scatter", Grid::of(rows.len(), 1, 256), &args)
    }

    pub(super) fn training_add_taps(&self, to: ViewMut<'_, Array>, from: View<'_, Array>, taps: &Taps) -> Result<()> {
        assert_eq!((to.cols, to.rows + 1), (from.cols, taps.starts.len()), "columns and rows");
        let ends = (taps.from.len() as u32, taps.weight.len() as u32);
        let last = taps.starts[to.rows];
        assert!(taps.starts.is_sorted() && ends == (last, last), "taps of rows in order");
        require_rows(&taps.from, from.rows);
        let starts = self.device.upload_u32("taps", &taps.starts)?;
        let sources = self.device.upload_u32("taps", &taps.from)?;
        let weights = Array::upload(&self.device, &taps.weight)?;
        let args = [target(&to), matrix(from), starts.arg(), sources.arg(), weights.arg(), number(to.cols)];
        self.device.launch("train_add_taps", Grid::of(to.rows, to.cols.div_ceil(256), 256), &args)
    }

    pub(super) fn training_pixels(&self, bytes: &[u8], side: usize, table: &[[f32; 256]; 3]) -> Result<Array> {
        let patch = 3 * side * side;
        assert!(patch > 0 && bytes.len().is_multiple_of(patch), "whole patches");
        let out = Array::room(&self.device, bytes.len())?;
        let table = Array::upload(&self.device, table.as_flattened())?;
        let bytes = self.device.upload("pixels", bytes)?;
        let args = [bytes.arg(), table.arg(), out.arg(), number(side * side)];
        self.device.launch("train_pixels", Grid::of(out.len / patch, 1, 256), &args)?;
        Ok(out)
    }

    pub(super) fn training_softmax_loss(&self, logits: &mut Array, targets: &[(u32, f32)]) -> Result<Array> {
        let loss = Array::room(&self.device, targets.len())?;
        if targets.is_empty() {
            assert_eq!(logits.len, 0, "a target a row");
            return Ok(loss);
        }
        assert!(logits.len.is_multiple_of(targets.len()), "a target a row");
        let cols = logits.len / targets.len();
        assert!(targets.iter().all(|(token, _)| (*token as usize) < cols), "tokens below {cols}");
        let words: Vec<u32> = targets.iter().flat_map(|(token, weight)| [*token, weight.to_bits()]).collect();
        let words = self.device.upload_u32("targets", &words)?;
        let args = [logits.arg(), words.arg(), loss.arg(), number(cols)];
        self.device.launch("train_softmax_loss", Grid::of(targets.len(), 1, 256), &args)?;
        Ok(loss)
    }
}

/// Nothing is read or written outside of a matrix.
fn require_rows(rows: &[u32], below: usize) {
    assert!(rows.iter().all(|row| (*row as usize) < below), "rows below {below}");
}

fn of_norm(norm: Option<HeadNorm<'_, Array>>, d: usize) -> (Arg, f32) {
    norm.map_or((NONE, 0.0), |norm| (vector(norm.weight, d), norm.eps))
}

fn of_angles(angles: Option<&Angles<Array>>, rows: usize, d: usize) -> [Arg; 2] {
    angles.map_or([NONE; 2], |Angles { half, cos, sin }| {
        assert_eq!((2 * half, cos.len, sin.len), (d, rows * half, rows * half), "angles");
        [cos.arg(), sin.arg()]
    })
}
