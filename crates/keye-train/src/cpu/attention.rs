//! Attention inside spans of packed rows, a tile of queries at a time: no more than a tile of scores is ever stored, and
//! the reverse computes them again from the sums that the forward pass kept.

use std::ops::Range;

use keye_backend::Isa;
use keye_backend::matmul::{Matrix, Old, matmul};
use keye_backend::training::{AttentionShape, Span};
use rayon::prelude::*;

use super::kernels;

/// Queries of a tile.
const TILE: usize = 128;

/// An attention with the instructions to compute it with.
pub(super) struct Attention {
    pub(super) isa: Isa,
    pub(super) shape: AttentionShape,
}

impl Attention {
    fn scale(&self) -> f32 {
        (self.shape.d as f32).powf(-0.5)
    }

    /// Tiles of a span: rows of queries, and how many of the span's keys any of them sees.
    fn tiles<'a>(&self, span: &'a Span) -> impl Iterator<Item = (Range<usize>, usize)> + 'a {
        let causal = self.shape.causal;
        span.queries.clone().step_by(TILE).map(move |start| {
            let end = span.queries.end.min(start + TILE);
            (start..end, if causal { end - span.queries.start } else { span.keys.len() })
        })
    }

    /// Keys that a query of a tile sees, of the tile's.
    fn seen(&self, span: &Span, query: usize, keys: usize) -> usize {
        if self.shape.causal { query - span.queries.start + 1 } else { keys }
    }

    /// `q [heads, nq, d]`, `k` and `v [kv_heads, nk, d]`.
    pub(super) fn forward(&self, q: &[f32], k: &[f32], v: &[f32], spans: &[Span]) -> (Vec<f32>, Vec<f32>) {
        let (isa, AttentionShape { heads, kv_heads, d, .. }) = (self.isa, self.shape);
        let (nq, nk) = (q.len() / (heads * d), k.len() / (kv_heads * d));
        let mut out = vec![0.0; q.len()];
        let mut lse = vec![0.0; heads * nq];
        let each = out.par_chunks_mut((nq * d).max(1)).zip(lse.par_chunks_mut(nq.max(1))).enumerate();
        each.for_each(|(head, (out, lse))| {
            let q = &q[head * nq * d..(head + 1) * nq * d];
            let kv = head * kv_heads / heads * nk * d;
            let (k, v) = (&k[kv..kv + nk * d], &v[kv..kv + nk * d]);
            let mut p = Vec::new();
            for span in spans {
                for (rows, keys) in self.tiles(span) {
                    self.scores(q, k, span, &rows, keys, &mut p);
                    for (row, p) in rows.clone().zip(p.chunks_exact_mut(keys)) {
                        let (seen, hidden) = p.split_at_mut(self.seen(span, row, keys));
                        lse[row] = kernels::softmax(isa, seen, self.scale());
                        hidden.fill(0.0);
                    }
                    let v = Matrix::new(&v[span.keys.start * d..(span.keys.start + keys) * d], keys, d);
                    let out = &mut out[rows.start * d..rows.end * d];
                    matmul(isa, Matrix::new(&p, rows.len(), keys), v, out, Old::Replace);
                }
            }
        });
        (out, lse)
    }

    fn scores(&self, q: &[f32], k: &[f32], span: &Span, rows: &Range<usize>, keys: usize, p: &mut Vec<f32>) {
        let (isa, d) = (self.isa, self.shape.d);
        p.resize(rows.len() * keys, 0.0);
        let k = Matrix::new(&k[span.keys.start * d..(span.keys.start + keys) * d], keys, d).t();
        matmul(isa, Matrix::new(&q[rows.start * d..rows.end * d], rows.len(), d), k, p, Old::Replace);
    }

    /// Gradients of q, k and v, shaped like them, from that of the result.
    #[expect(clippy::too_many_arguments, reason = "an operation and its operands")]
    pub(super) fn backward(
        &self,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        spans: &[Span],
        out: &[f32],
        lse: &[f32],
        dout: &[f32],
    ) -> [Vec<f32>; 3] {
        let (isa, AttentionShape { heads, kv_heads, d, .. }) = (self.isa, self.shape);
        let (nq, nk) = (q.len() / (heads * d), k.len() / (kv_heads * d));
        let mut dq = vec![0.0; q.len()];
        let mut dk = vec![0.0; heads * nk * d];
        let mut dv = dk.clone();
        let parts = dq
            .par_chunks_mut((nq * d).max(1))
            .zip(dk.par_chunks_mut((nk * d).max(1)))
            .zip(dv.par_chunks_mut((nk * d).max(1)));
        parts.enumerate().for_each(|(head, ((dq, dk), dv))| {
            let mine = head * nq * d..(head + 1) * nq * d;
            let (q, out, dout) = (&q[mine.clone()], &out[mine.clone()], &dout[mine]);
            let lse = &lse[head * nq..(head + 1) * nq];
            let kv = head * kv_heads / heads * nk * d;
            let (k, v) = (&k[kv..kv + nk * d], &v[kv..kv + nk * d]);
            let (mut p, mut dp) = (Vec::new(), Vec::new());
            for span in spans {
                for (rows, keys) in self.tiles(span) {
                    let kv_rows = span.keys.start * d..(span.keys.start + keys) * d;
                    let q_rows = rows.start * d..rows.end * d;
                    self.scores(q, k, span, &rows, keys, &mut p);
                    dp.resize(p.len(), 0.0);
                    let dout_tile = Matrix::new(&dout[q_rows.clone()], rows.len(), d);
                    matmul(isa, dout_tile, Matrix::new(&v[kv_rows.clone()], keys, d).t(), &mut dp, Old::Replace);
                    for (i, row) in rows.clone().enumerate() {
                        let seen = self.seen(span, row, keys);
                        let (p, hidden) = p[i * keys..(i + 1) * keys].split_at_mut(seen);
                        hidden.fill(0.0);
                        let (dp, hidden) = dp[i * keys..(i + 1) * keys].split_at_mut(seen);
                        hidden.fill(0.0);
                        kernels::probabilities(isa, p, self.scale(), lse[row]);
                        let (out, dout) = (&out[row * d..(row + 1) * d], &dout[row * d..(row + 1) * d]);
                        kernels::softmax_backward(isa, p, dp, kernels::dot(isa, out, dout), self.scale());
                    }
                    let (p, ds) = (Matrix::new(&p, rows.len(), keys), Matrix::new(&dp, rows.len(), keys));
                    matmul(isa, p.t(), dout_tile, &mut dv[kv_rows.clone()], Old::Keep);
                    let q_tile = Matrix::new(&q[q_rows.clone()], rows.len(), d);
                    matmul(isa, ds.t(), q_tile, &mut dk[kv_rows.clone()], Old::Keep);
                    matmul(isa, ds, Matrix::new(&k[kv_rows], keys, d), &mut dq[q_rows], Old::Replace);
                }
            }
        });
        [dq, self.sum_groups(dk), self.sum_groups(dv)]
    }

    /// Adds up what the query heads of a group give to their key/value head.
    fn sum_groups(&self, x: Vec<f32>) -> Vec<f32> {
        let AttentionShape { heads, kv_heads, .. } = self.shape;
        let group = heads / kv_heads;
        if group == 1 {
            return x;
        }
        let size = x.len() / heads;
        let mut out = vec![0.0; kv_heads * size];
        out.par_chunks_mut(size.max(1)).zip(x.par_chunks((group * size).max(1))).for_each(|(out, x)| {
            x.chunks_exact(size).for_each(|x| kernels::add(self.isa, out, x));
        });
        out
    }
}
