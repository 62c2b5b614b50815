//! Next-token cross entropy, some rows of logits at a time, forward and reverse in one go.

use keye_backend::Isa;
use keye_backend::matmul::{Matrix, Old, par_matmul};
use rayon::prelude::*;

use super::decoder::Decoder;
use crate::ops::{kernels, rows};
use crate::params::{Gradients, Params};

/// Rows whose logits exist at a time.
const ROWS: usize = 512;

/// The rows that predict a target: `(row of the hidden state, token, weight)`.
pub(crate) fn targets(ids: &[u32], weights: &[f32]) -> Vec<(usize, u32, f32)> {
    (1..ids.len()).filter(|i| weights[*i] != 0.0).map(|i| (i - 1, ids[i], weights[i])).collect()
}

/// `sum w_i (-log softmax(lm_head(norm(x_i)))[token_i])` over targets; with gradients also that of x `[n, H]` (zero where a
/// row predicts nothing), all gradients times `scale`.
pub(crate) fn cross_entropy(
    isa: Isa,
    params: &Params,
    mut gradients: Option<&mut Gradients>,
    decoder: &Decoder,
    x: &[f32],
    targets: &[(usize, u32, f32)],
    scale: f32,
) -> (f64, Option<Vec<f32>>) {
    let h = decoder.config.hidden_size;
    let vocab = decoder.config.vocab_size;
    let head = params.get(decoder.lm_head);
    let mut dx = gradients.is_some().then(|| vec![0.0; x.len()]);
    let mut sum = 0.0;
    for chunk in targets.chunks(ROWS) {
        let n = chunk.len();
        let taken: Vec<f32> = chunk.iter().flat_map(|(row, ..)| &x[row * h..(row + 1) * h]).copied().collect();
        let (normed, stats) = decoder.norm.forward(isa, params, &taken);
        let mut logits = vec![0.0; n * vocab];
        let normed_rows = Matrix::new(&normed, n, h);
        par_matmul(isa, normed_rows, Matrix::new(head, vocab, h).t(), &mut logits, Old::Replace);
        // Logits become the gradient of the logits.
        let losses: Vec<f64> = logits
            .par_chunks_mut(vocab)
            .zip(chunk)
            .map(|(row, (_, token, weight))| {
                let logit = row[*token as usize];
                let lse = kernels::softmax(isa, row, 1.0);
                row[*token as usize] -= 1.0;
                row.iter_mut().for_each(|p| *p *= weight * scale);
                f64::from(*weight) * f64::from(lse - logit)
            })
            .collect();
        sum += losses.iter().sum::<f64>();
        let (Some(gradients), Some(dx)) = (gradients.as_deref_mut(), &mut dx) else { continue };
        let dlogits = Matrix::new(&logits, n, vocab);
        if let Some(dw) = gradients.get_mut(decoder.lm_head) {
            par_matmul(isa, dlogits.t(), normed_rows, dw, Old::Keep);
        }
        let mut dnormed = vec![0.0; n * h];
        par_matmul(isa, dlogits, Matrix::new(head, vocab, h), &mut dnormed, Old::Replace);
        let mut dtaken = vec![0.0; n * h];
        decoder.norm.backward(isa, params, gradients, &taken, &stats, &dnormed, &mut dtaken);
        for ((row, ..), from) in chunk.iter().zip(dtaken.chunks_exact(h)) {
            dx[row * h..(row + 1) * h].copy_from_slice(from);
        }
    }
    (sum, dx)
}

/// Logits of all rows, `[n, V]`.
pub(crate) fn logits(isa: Isa, params: &Params, decoder: &Decoder, x: &[f32]) -> Vec<f32> {
    let (h, vocab) = (decoder.config.hidden_size, decoder.config.vocab_size);
    let (normed, _) = decoder.norm.forward(isa, params, x);
    let n = x.len() / h;
    let mut out = vec![0.0; n * vocab];
    let head = Matrix::new(params.get(decoder.lm_head), vocab, h);
    par_matmul(isa, Matrix::new(&normed, n, h), head.t(), &mut out, Old::Replace);
    out
}

/// Means of the rows of every segment, `[segments, d]`.
pub(crate) fn segment_means(isa: Isa, x: &[f32], d: usize, cu_seqlens: &[u32]) -> Vec<f32> {
    let mut out = vec![0.0; (cu_seqlens.len() - 1) * d];
    rows::each_row(&mut out, d, |i, out| {
        let (start, end) = (cu_seqlens[i] as usize, cu_seqlens[i + 1] as usize);
        for row in start..end {
            kernels::add_scaled(isa, out, &x[row * d..(row + 1) * d], 1.0 / (end - start) as f32);
        }
    });
    out
}
