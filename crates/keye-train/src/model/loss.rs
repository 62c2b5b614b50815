//! Next-token cross entropy, some rows of logits at a time, forward and reverse in one go.

use keye_backend::matmul::Old;
use keye_backend::training::{Device, Precision, Taps, View, ViewMut};

use super::decoder::Decoder;
use crate::layers::Result;
use crate::params::{Gradients, Params};

/// Rows whose logits exist at a time.
const ROWS: usize = 512;

/// A row of the hidden state that predicts a token, and how much that counts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    row: u32,
    token: u32,
    weight: f32,
}

/// The rows that predict a target.
pub(crate) fn targets(ids: &[u32], weights: &[f32]) -> Vec<Target> {
    let weighted = (1..ids.len()).filter(|i| weights[*i] != 0.0);
    weighted.map(|i| Target { row: i as u32 - 1, token: ids[i], weight: weights[i] }).collect()
}

/// `sum w_i (-log softmax(lm_head(norm(x_i)))[token_i])` over targets; with gradients also that of x `[n, H]` (zero where a
/// row predicts nothing), all gradients times `scale`.
pub(crate) fn cross_entropy<D: Device>(
    device: &D,
    params: &Params<D::Array>,
    mut gradients: Option<&mut Gradients<D::Array>>,
    decoder: &Decoder,
    x: &D::Array,
    targets: &[Target],
    scale: f32,
) -> Result<(f64, Option<D::Array>)> {
    let (h, vocab) = (decoder.config.hidden_size, decoder.config.vocab_size);
    let rows = device.len(x) / h;
    let head = params.get(decoder.lm_head);
    let mut dx = match gradients {
        Some(_) => Some(device.zeros(device.len(x))?),
        None => None,
    };
    let mut losses = Vec::new();
    for chunk in targets.chunks(ROWS) {
        let n = chunk.len();
        let taken_rows: Vec<u32> = chunk.iter().map(|target| target.row).collect();
        let taken = device.gather(View::of(x, rows, h), &taken_rows)?;
        let (normed, stats) = decoder.norm.forward(device, params, &taken)?;
        let mut logits = device.zeros(n * vocab)?;
        let normed_rows = View::of(&normed, n, h);
        let to = ViewMut::of(&mut logits, n, vocab);
        device.product(Precision::F32, normed_rows.plain(), head.t(), to, Old::Replace)?;
        let tokens: Vec<(u32, f32)> = chunk.iter().map(|target| (target.token, target.weight * scale)).collect();
        // Logits become the gradient of the logits.
        losses.push(device.softmax_loss(&mut logits, &tokens)?);
        let (Some(gradients), Some(dx)) = (gradients.as_deref_mut(), &mut dx) else { continue };
        let dlogits = View::of(&logits, n, vocab);
        if let Some(dw) = gradients.get_mut(decoder.lm_head) {
            device.product(Precision::F32, dlogits.t(), normed_rows.plain(), dw, Old::Keep)?;
        }
        let mut dnormed = device.zeros(n * h)?;
        let to = ViewMut::of(&mut dnormed, n, h);
        device.product(Precision::F32, dlogits.plain(), head.plain(), to, Old::Replace)?;
        let mut dtaken = device.zeros(n * h)?;
        decoder.norm.backward(device, params, gradients, &taken, &stats, &dnormed, &mut dtaken)?;
        device.scatter(ViewMut::of(dx, rows, h), &taken_rows, &dtaken)?;
    }
    // Only now: reading a value waits for the device.
    let mut sum = 0.0;
    for (chunk, losses) in targets.chunks(ROWS).zip(losses) {
        let losses = device.values(View::of(&losses, 1, chunk.len()))?;
        sum += chunk.iter().zip(&*losses).map(|(t, loss)| f64::from(t.weight) * f64::from(*loss)).sum::<f64>();
    }
    Ok((sum, dx))
}

/// Logits of all rows, `[n, V]`.
pub(crate) fn logits<D: Device>(
    device: &D,
    params: &Params<D::Array>,
    decoder: &Decoder,
    x: &D::Array,
) -> Result<Vec<f32>> {
    let (h, vocab) = (decoder.config.hidden_size, decoder.config.vocab_size);
    let (normed, _) = decoder.norm.forward(device, params, x)?;
    let n = device.len(x) / h;
    let mut out = device.zeros(n * vocab)?;
    let (rows, head) = (View::of(&normed, n, h), params.get(decoder.lm_head));
    device.product(Precision::F32, rows.plain(), head.t(), ViewMut::of(&mut out, n, vocab), Old::Replace)?;
    Ok(device.values(View::of(&out, n, vocab))?.into_owned())
}

/// Of every segment the mean of its rows: `(segment, row, weight)`.
pub(crate) fn segment_means(cu_seqlens: &[u32]) -> Vec<(u32, u32, f32)> {
    let segments = cu_seqlens.windows(2).enumerate();
    segments
        .flat_map(|(i, rows)| {
            let weight = 1.0 / (rows[1] - rows[0]) as f32;
            (rows[0]..rows[1]).map(move |row| (i as u32, row, weight))
        })
        .collect()
}

/// Rows of `x [rows, d]` added up as `(row of the sum, row of x, weight)` say: `[sums, d]`.
pub(crate) fn weighted_sums<D: Device>(
    device: &D,
    x: &D::Array,
    d: usize,
    sums: usize,
    taps: impl Iterator<Item = (u32, u32, f32)> + Clone,
) -> Result<D::Array> {
    let mut out = device.zeros(sums * d)?;
    let from = View::of(x, device.len(x) / d, d);
    device.add_taps(ViewMut::of(&mut out, sums, d), from, &Taps::new(sums, taps))?;
    Ok(out)
}
