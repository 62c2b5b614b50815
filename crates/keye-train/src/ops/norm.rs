//! RMSNorm and LayerNorm over rows.

use keye_backend::Isa;
use rayon::prelude::*;

use super::{kernels, rows};
use crate::params::{Gradients, Params, Slot};

/// A norm's weight and, for LayerNorm, bias; without bias it is RMSNorm.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm {
    pub(crate) weight: Slot,
    pub(crate) bias: Option<Slot>,
    pub(crate) eps: f32,
}

/// Mean (0 for RMSNorm) and reciprocal deviation of every row.
pub(crate) type Stats = Vec<[f32; 2]>;

impl Norm {
    /// `[n, d]` to `[n, d]`.
    pub(crate) fn forward(&self, isa: Isa, params: &Params, x: &[f32]) -> (Vec<f32>, Stats) {
        let d = self.weight.len();
        let w = params.get(self.weight);
        let bias = self.bias.map(|bias| params.get(bias));
        let mut y = vec![0.0; x.len()];
        let n = x.len() / d;
        let mut stats = vec![[0.0; 2]; n];
        let tasks = y.par_chunks_mut(32 * d).zip(stats.par_chunks_mut(32)).zip(x.par_chunks(32 * d));
        tasks.for_each(|((y, stats), x)| {
            for ((y, stats), x) in y.chunks_exact_mut(d).zip(stats).zip(x.chunks_exact(d)) {
                *stats = match bias {
                    Some(bias) => kernels::layer_norm(isa, x, w, bias, self.eps, y),
                    None => [0.0, kernels::rms_norm(isa, x, w, self.eps, y)],
                };
            }
        });
        (y, stats)
    }

    /// `dx += ..` and the gradients of weight and bias.
    #[expect(clippy::too_many_arguments, reason = "an operation and its operands")]
    pub(crate) fn backward(
        &self,
        isa: Isa,
        params: &Params,
        gradients: &mut Gradients,
        x: &[f32],
        stats: &Stats,
        dy: &[f32],
        dx: &mut [f32],
    ) {
        let d = self.weight.len();
        let w = params.get(self.weight);
        if let Some(dw) = gradients.get_mut(self.weight) {
            rows::each_column(stats.len(), dw, |row, columns, dw| {
                let range = row * d + columns.start..row * d + columns.end;
                let [mean, r] = stats[row];
                kernels::norm_weight_backward(isa, &x[range.clone()], mean, r, &dy[range], dw);
            });
        }
        if let Some(db) = self.bias.and_then(|bias| gradients.get_mut(bias)) {
            rows::add_column_sums(isa, dy, db);
        }
        let centred = self.bias.is_some();
        rows::each_row(dx, d, |row, dx| {
            let range = row * d..(row + 1) * d;
            let [mean, r] = stats[row];
            kernels::norm_backward(isa, &x[range.clone()], w, mean, r, centred, &dy[range], dx);
        });
    }
}
