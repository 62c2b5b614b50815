//! The CPU as a device that trains: plain loops on all threads of the current `rayon` pool.
//!
//! Every sum has an order that depends on shapes alone, so results do not depend on the number of threads.

mod attention;
mod heads;
pub(crate) mod kernels;
mod rows;

use std::borrow::Cow;

use keye_backend::matmul::{Matrix, Old, par_matmul, par_matmul_bf16};
use keye_backend::training::{
    AdamW, Angles, AttentionShape, Device, Gelu, HeadNorm, Operand, Precision, Span, Taps, Update, View, ViewMut,
};
use keye_backend::{BackendError, Isa};
use rayon::prelude::*;

use attention::Attention;

/// Elements of a task.
const PART: usize = 1 << 13;

/// The CPU, with one of its instruction sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu {
    /// The instructions.
    pub isa: Isa,
}

impl Cpu {
    /// With the best instructions that the machine has.
    pub fn detect() -> Self {
        Self { isa: Isa::detect() }
    }
}

type Floats = Vec<f32>;

fn read<'a>(x: &View<'a, Floats>) -> &'a [f32] {
    &x.array[x.range()]
}

fn write<'a>(x: ViewMut<'a, Floats>) -> &'a mut [f32] {
    let range = x.range();
    &mut x.array[range]
}

fn matrix<'a>(x: &Operand<'a, Floats>) -> Matrix<'a> {
    let stored = Matrix::new(read(&x.matrix), x.matrix.rows, x.matrix.cols);
    if x.transposed { stored.t() } else { stored }
}

impl Device for Cpu {
    type Array = Floats;
    type Spans = Vec<Span>;

    fn lanes(&self) -> usize {
        rayon::current_num_threads()
    }

    fn host(&self) -> Isa {
        self.isa
    }

    fn len(&self, x: &Floats) -> usize {
        x.len()
    }

    fn array(&self, values: Vec<f32>) -> Result<Floats, BackendError> {
        Ok(values)
    }

    fn zeros(&self, len: usize) -> Result<Floats, BackendError> {
        Ok(vec![0.0; len])
    }

    fn values<'a>(&self, x: View<'a, Floats>) -> Result<Cow<'a, [f32]>, BackendError> {
        Ok(read(&x).into())
    }

    fn repeat(&self, x: View<'_, Floats>, times: usize) -> Result<Floats, BackendError> {
        Ok(read(&x).repeat(times))
    }

    fn clear(&self, x: &mut Floats) -> Result<(), BackendError> {
        x.fill(0.0);
        Ok(())
    }

    fn combine(&self, a: f32, to: ViewMut<'_, Floats>, b: f32, x: View<'_, Floats>) -> Result<(), BackendError> {
        let (to, x) = (write(to), read(&x));
        assert_eq!(to.len(), x.len(), "elements");
        rows::each_part(to, |at, to| kernels::combine(self.isa, a, to, b, &x[at..at + to.len()]));
        Ok(())
    }

    fn add_row(&self, x: &mut Floats, row: View<'_, Floats>) -> Result<(), BackendError> {
        let row = read(&row);
        rows::each_row(x, row.len(), |_, x| kernels::add(self.isa, x, row));
        Ok(())
    }

    fn add_column_sums(&self, x: &Floats, sums: ViewMut<'_, Floats>) -> Result<(), BackendError> {
        let sums = write(sums);
        let cols = sums.len();
        rows::each_column(x.len() / cols, sums, |row, columns, sums| {
            kernels::add(self.isa, sums, &x[row * cols + columns.start..row * cols + columns.end]);
        });
        Ok(())
    }

    fn product(
        &self,
        precision: Precision,
        a: Operand<'_, Floats>,
        b: Operand<'_, Floats>,
        c: ViewMut<'_, Floats>,
        old: Old,
    ) -> Result<(), BackendError> {
        match precision {
            Precision::F32 => par_matmul(self.isa, matrix(&a), matrix(&b), write(c), old),
            Precision::Bf16 => par_matmul_bf16(self.isa, matrix(&a), matrix(&b), write(c), old),
        }
        Ok(())
    }

    fn norm(
        &self,
        x: &Floats,
        weight: View<'_, Floats>,
        bias: Option<View<'_, Floats>>,
        eps: f32,
    ) -> Result<(Floats, Floats), BackendError> {
        let (w, bias) = (read(&weight), bias.as_ref().map(read));
        let d = w.len();
        let (mut y, mut stats) = (vec![0.0; x.len()], vec![0.0; x.len() / d * 2]);
        let tasks = y.par_chunks_mut(32 * d).zip(stats.par_chunks_mut(32 * 2)).zip(x.par_chunks(32 * d));
        tasks.for_each(|((y, stats), x)| {
            for ((y, stats), x) in y.chunks_exact_mut(d).zip(stats.as_chunks_mut().0).zip(x.chunks_exact(d)) {
                *stats = match bias {
                    Some(bias) => kernels::layer_norm(self.isa, x, w, bias, eps, y),
                    None => [0.0, kernels::rms_norm(self.isa, x, w, eps, y)],
                };
            }
        });
        Ok((y, stats))
    }

    fn norm_backward(
        &self,
        x: &Floats,
        stats: &Floats,
        weight: View<'_, Floats>,
        centred: bool,
        dy: &Floats,
        dx: &mut Floats,
    ) -> Result<(), BackendError> {
        let w = read(&weight);
        let d = w.len();
        rows::each_row(dx, d, |row, dx| {
            let range = row * d..(row + 1) * d;
            let (mean, r) = (stats[2 * row], stats[2 * row + 1]);
            kernels::norm_backward(self.isa, &x[range.clone()], w, mean, r, centred, &dy[range], dx);
        });
        Ok(())
    }

    fn norm_weight_backward(
        &self,
        x: &Floats,
        stats: &Floats,
        dy: &Floats,
        dw: ViewMut<'_, Floats>,
    ) -> Result<(), BackendError> {
        let dw = write(dw);
        let d = dw.len();
        rows::each_column(stats.len() / 2, dw, |row, columns, dw| {
            let range = row * d + columns.start..row * d + columns.end;
            let (mean, r) = (stats[2 * row], stats[2 * row + 1]);
            kernels::norm_weight_backward(self.isa, &x[range.clone()], mean, r, &dy[range], dw);
        });
        Ok(())
    }

    fn split_heads(
        &self,
        x: &Floats,
        heads: usize,
        d: usize,
        norm: Option<HeadNorm<'_, Floats>>,
        angles: Option<&Angles<Floats>>,
    ) -> Result<Floats, BackendError> {
        let norm = norm.map(|norm| (read(&norm.weight), norm.eps));
        Ok(heads::split(self.isa, x, heads, d, norm, angles))
    }

    fn merge_heads(&self, x: &Floats, heads: usize, d: usize) -> Result<Floats, BackendError> {
        Ok(heads::merge(x, heads, d))
    }

    fn split_heads_backward(
        &self,
        x: &Floats,
        heads: usize,
        d: usize,
        norm: Option<HeadNorm<'_, Floats>>,
        angles: Option<&Angles<Floats>>,
        dy: Floats,
        dw: Option<ViewMut<'_, Floats>>,
    ) -> Result<Floats, BackendError> {
        let norm = norm.map(|norm| (read(&norm.weight), norm.eps));
        Ok(heads::split_backward(self.isa, x, heads, d, norm, angles, dy, dw.map(write)))
    }

    fn spans(&self, spans: Vec<Span>) -> Result<Vec<Span>, BackendError> {
        Ok(spans)
    }

    fn attention(
        &self,
        shape: AttentionShape,
        q: &Floats,
        k: &Floats,
        v: &Floats,
        spans: &Vec<Span>,
    ) -> Result<(Floats, Floats), BackendError> {
        Ok(Attention { isa: self.isa, shape }.forward(q, k, v, spans))
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        q: &Floats,
        k: &Floats,
        v: &Floats,
        spans: &Vec<Span>,
        out: &Floats,
        lse: &Floats,
        dout: &Floats,
    ) -> Result<[Floats; 3], BackendError> {
        Ok(Attention { isa: self.isa, shape }.backward(q, k, v, spans, out, lse, dout))
    }

    fn silu_mul(&self, gate: &Floats, up: &Floats) -> Result<Floats, BackendError> {
        let mut product = vec![0.0; gate.len()];
        rows::each_part(&mut product, |at, a| {
            let part = at..at + a.len();
            kernels::silu_mul(self.isa, &gate[part.clone()], &up[part], a);
        });
        Ok(product)
    }

    fn silu_mul_backward(&self, gate: &mut Floats, up: &mut Floats, dproduct: &Floats) -> Result<(), BackendError> {
        rows::each_pair(gate, up, |at, gate, up| {
            kernels::silu_mul_backward(self.isa, gate, up, &dproduct[at..at + gate.len()]);
        });
        Ok(())
    }

    fn gelu(&self, form: Gelu, z: &Floats) -> Result<Floats, BackendError> {
        let mut y = vec![0.0; z.len()];
        rows::each_part(&mut y, |at, y| {
            let z = &z[at..at + y.len()];
            match form {
                Gelu::Tanh => kernels::gelu_tanh(self.isa, z, y),
                Gelu::Erf => kernels::gelu_erf(self.isa, z, y),
            }
        });
        Ok(y)
    }

    fn gelu_backward(&self, form: Gelu, z: &Floats, dy: &mut Floats) -> Result<(), BackendError> {
        rows::each_part(dy, |at, dy| {
            let z = &z[at..at + dy.len()];
            match form {
                Gelu::Tanh => kernels::gelu_tanh_backward(self.isa, z, dy),
                Gelu::Erf => kernels::gelu_erf_backward(self.isa, z, dy),
            }
        });
        Ok(())
    }

    fn gather(&self, from: View<'_, Floats>, rows: &[u32]) -> Result<Floats, BackendError> {
        let (values, d) = (read(&from), from.cols);
        let mut out = vec![0.0; rows.len() * d];
        rows::each_row(&mut out, d, |i, out| out.copy_from_slice(&values[rows[i] as usize * d..][..d]));
        Ok(out)
    }

    fn scatter(&self, to: ViewMut<'_, Floats>, rows: &[u32], from: &Floats) -> Result<(), BackendError> {
        let d = to.cols;
        let to = write(to);
        for (row, from) in rows.iter().zip(from.chunks_exact(d)) {
            to[*row as usize * d..][..d].copy_from_slice(from);
        }
        Ok(())
    }

    fn add_taps(&self, to: ViewMut<'_, Floats>, from: View<'_, Floats>, taps: &Taps) -> Result<(), BackendError> {
        let (values, d) = (read(&from), from.cols);
        assert_eq!(to.cols, d, "columns");
        rows::each_row(write(to), d, |row, to| {
            for at in taps.starts[row] as usize..taps.starts[row + 1] as usize {
                let from = &values[taps.from[at] as usize * d..][..d];
                kernels::add_scaled(self.isa, to, from, taps.weight[at]);
            }
        });
        Ok(())
    }

    fn pixels(&self, bytes: &[u8], side: usize, table: &[[f32; 256]; 3]) -> Result<Floats, BackendError> {
        let plane = side * side;
        let mut out = vec![0.0; bytes.len()];
        out.par_chunks_mut(3 * plane).zip(bytes.par_chunks(3 * plane)).for_each(|(out, bytes)| {
            for ((out, bytes), table) in out.chunks_mut(plane).zip(bytes.chunks(plane)).zip(table) {
                out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = table[*byte as usize]);
            }
        });
        Ok(out)
    }

    fn softmax_loss(&self, logits: &mut Floats, targets: &[(u32, f32)]) -> Result<Floats, BackendError> {
        if targets.is_empty() {
            return Ok(Vec::new());
        }
        let vocab = logits.len() / targets.len();
        let rows = logits.par_chunks_mut(vocab).zip(targets);
        Ok(rows
            .map(|(row, (token, weight))| {
                let logit = row[*token as usize];
                let lse = kernels::softmax(self.isa, row, 1.0);
                row[*token as usize] -= 1.0;
                row.iter_mut().for_each(|p| *p *= weight);
                lse - logit
            })
            .collect())
    }

    fn square_sum(&self, x: View<'_, Floats>) -> Result<f64, BackendError> {
        let parts = read(&x).par_chunks(PART).map(|x| x.iter().map(|x| f64::from(*x).powi(2)).sum());
        Ok(parts.collect::<Vec<f64>>().iter().sum())
    }

    fn adamw(
        &self,
        p: &mut Floats,
        g: &Floats,
        m: &mut Floats,
        v: &mut Floats,
        AdamW { clip, betas, corrections: [m_scale, v_scale], eps }: AdamW,
        updates: &[Update],
    ) -> Result<(), BackendError> {
        let [mut p, mut m, mut v] = [&mut p[..], &mut m[..], &mut v[..]];
        let mut done = 0;
        let mut jobs = Vec::with_capacity(updates.len());
        for update in updates {
            let (skipped, taken) = (update.range.start - done, update.range.len());
            done = update.range.end;
            let part = [&mut p, &mut m, &mut v].map(|rest| {
                let (_, from) = std::mem::take(rest).split_at_mut(skipped);
                let (part, left) = from.split_at_mut(taken);
                *rest = left;
                part
            });
            jobs.push((update, part));
        }
        jobs.into_par_iter().for_each(|(update, [p, m, v])| {
            let g = &g[update.range.clone()];
            kernels::adamw(self.isa, p, g, m, v, clip, betas, m_scale, v_scale, eps, update.lr, update.decay);
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use keye_backend::conformance::training;

    use super::*;

    #[test]
    fn every_instruction_set_agrees_with_plain_formulas() {
        // Far from zero GELUs are off by 1e-7 of what went in, which of a single small value is more.
        for isa in Isa::available() {
            let checks = training::run(&Cpu { isa }, 2e-4).unwrap();
            let failed: Vec<_> = checks.iter().filter(|check| !check.passed()).collect();
            assert!(checks.len() > 50 && failed.is_empty(), "{isa:?}: {failed:#?}");
        }
    }
}
