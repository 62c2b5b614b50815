//! Operations on single elements and the optimiser's step: train_step.cu.

use super::{Array, Result, count, matrix, number, rows_of, vector};
use crate::Cuda;
use crate::cuda::device::{Arg, Grid};
use crate::training::{AdamW, Gelu, Update, View};

/// Elements of a block of AdamW, as in train_step.cu.
const PART: usize = 4096;
/// Most parts whose squares are summed apart.
const SQUARE_PARTS: usize = 1024;

/// As in common.cuh.
pub(super) fn form(form: Gelu) -> Arg {
    Arg::U32(match form {
        Gelu::Tanh => 1,
        Gelu::Erf => 2,
    })
}

/// Blocks of 256 columns of 8 rows.
fn corners(rows: usize, cols: usize) -> Grid {
    Grid::of(rows.div_ceil(8) * cols.div_ceil(256), 1, 256)
}

impl Cuda {
    pub(super) fn training_repeat(&self, x: View<'_, Array>, times: usize) -> Result<Array> {
        let cols = x.rows * x.cols;
        let out = Array::room(&self.device, cols * times)?;
        let args = [matrix(x), out.arg(), number(times), number(cols)];
        self.device.launch("train_repeat", corners(times, cols), &args)?;
        Ok(out)
    }

    pub(super) fn training_add_row(&self, x: &mut Array, row: View<'_, Array>) -> Result<()> {
        let cols = row.rows * row.cols;
        let rows = rows_of(x, cols);
        let args = [x.arg(), vector(row, cols), number(rows), number(cols)];
        self.device.launch("train_add_row", corners(rows, cols), &args)
    }

    pub(super) fn training_square_sum(&self, x: View<'_, Array>) -> Result<f64> {
        let len = x.rows * x.cols;
        let part = len.div_ceil(SQUARE_PARTS).max(PART);
        let parts = len.div_ceil(part);
        let sums = self.device.allocate("sums", parts * 8)?;
        let args = [matrix(x), sums.arg(), count(len), count(part)];
        self.device.launch("train_square_sums", Grid::of(parts, 1, 256), &args)?;
        let sums = sums.download(parts * 8)?;
        Ok(sums.as_chunks::<8>().0.iter().map(|sum| f64::from_le_bytes(*sum)).sum())
    }

    pub(super) fn training_adamw(
        &self,
        [p, m, v]: [&mut Array; 3],
        g: &Array,
        adamw: AdamW,
        updates: &[Update],
    ) -> Result<()> {
        assert_eq!([g.len, m.len, v.len], [p.len; 3], "elements");
        let (mut table, mut blocks, mut done) = (Vec::new(), 0, 0);
        for Update { range, lr, decay } in updates {
            assert!(done <= range.start && range.start <= range.end && range.end <= p.len, "updates in order");
            done = range.end;
            table.extend_from_slice(&(range.start as u64).to_le_bytes());
            table.extend_from_slice(&(range.len() as u64).to_le_bytes());
            for word in [blocks as u32, lr.to_bits(), decay.to_bits(), 0] {
                table.extend_from_slice(&word.to_le_bytes());
            }
            blocks += range.len().div_ceil(PART);
        }
        let table = self.device.upload("updates", &table)?;
        let AdamW { clip, betas, corrections, eps } = adamw;
        let [b0, b1, c0, c1] = [betas[0], betas[1], corrections[0], corrections[1]].map(Arg::F32);
        let args = [
            p.arg(),
            g.arg(),
            m.arg(),
            v.arg(),
            table.arg(),
            number(updates.len()),
            Arg::F32(clip),
            b0,
            b1,
            c0,
            c1,
            Arg::F32(eps),
        ];
        self.device.launch("train_adamw", Grid::of(blocks, 1, 256), &args)
    }
}
