//! Choosing the largest: experts of a token, keys of a query. Shared by all host backends, so that they choose alike.

use std::cmp::Ordering;

use crate::host::HostTensor;

/// In a list of chosen positions: none.
pub const UNSELECTED: u32 = u32::MAX;

/// The `count` most probable experts of a row of router logits, the most probable first (the lower number among equals), and
/// their weights: the softmax over all logits, scaled to sum to one over the chosen when `normalise` is set.
fn route(logits: &[f32], count: usize, normalise: bool) -> (Vec<u32>, Vec<f32>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f32> = logits.iter().map(|z| (z - max).exp()).collect();
    let total: f32 = exponentials.iter().sum();
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let probability = |expert: u32| exponentials[expert as usize] / total;
    order.sort_by(|a, b| probability(*b).partial_cmp(&probability(*a)).unwrap_or(Ordering::Equal));
    order.truncate(count);
    let sum: f32 = if normalise { order.iter().map(|expert| probability(*expert)).sum() } else { 1.0 };
    let weights = order.iter().map(|expert| probability(*expert) / sum).collect();
    (order, weights)
}

/// [`route`] for each row: the experts, `count` a row, and their weights `[rows, count]`.
pub(crate) fn route_rows(logits: &HostTensor, count: usize, normalise: bool) -> (Vec<u32>, HostTensor) {
    let (mut chosen, mut weights) = (Vec::new(), Vec::new());
    for row in 0..logits.rows {
        let (experts, probabilities) = route(logits.row(row), count, normalise);
        chosen.extend(experts);
        weights.extend(probabilities);
    }
    (chosen, HostTensor { rows: logits.rows, cols: count, data: weights })
}

/// Writes the positions of the `out.len()` highest scores in ascending order; among equal scores (-0 equals 0) the lower
/// position wins. With fewer scores than places all are chosen and the rest is [`UNSELECTED`].
pub(crate) fn highest(scores: &[f32], out: &mut [u32]) {
    let n = scores.len();
    if n <= out.len() || out.is_empty() {
        for (position, out) in out.iter_mut().enumerate() {
            *out = if position < n { position as u32 } else { UNSELECTED };
        }
        return;
    }
    // Larger key: higher score, then lower position. The last key that is chosen is looked for among the scores that share
    // its leading bits only.
    let key = |position: usize| u64::from(ordered(scores[position])) << 32 | u64::from(!(position as u32));
    let bucket = |score: f32| (ordered(score) >> (32 - BUCKET_BITS)) as usize;
    let mut counts = vec![0usize; 1 << BUCKET_BITS];
    for score in scores {
        counts[bucket(*score)] += 1;
    }
    let (mut last, mut above) = (counts.len() - 1, 0);
    while above + counts[last] < out.len() {
        above += counts[last];
        last -= 1;
    }
    let mut keys: Vec<u64> = Vec::with_capacity(counts[last]);
    keys.extend((0..n).filter(|position| bucket(scores[*position]) == last).map(key));
    let (_, lowest, _) = keys.select_nth_unstable(counts[last] - (out.len() - above));
    let chosen = (0..n).filter(|position| key(*position) >= *lowest);
    for (out, position) in out.iter_mut().zip(chosen) {
        *out = position as u32;
    }
}

/// Leading bits by which scores are counted: sign, exponent and three bits more.
const BUCKET_BITS: u32 = 12;

/// An integer that orders like the float; both zeros are the same.
fn ordered(value: f32) -> u32 {
    let bits = (value + 0.0).to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scores_go_to_the_lower_position() {
        let mut out = [0; 4];
        highest(&[0.0, -1.0, -0.0, 2.0, 0.0, -0.0, 3.0], &mut out);
        assert_eq!(out, [0, 2, 3, 6]);
        highest(&[-0.0, 0.0, -0.0, 0.0, 0.0], &mut out);
        assert_eq!(out, [0, 1, 2, 3]);
        highest(&[-3.0, -1.0, -2.0, -5.0, -0.5], &mut out);
        assert_eq!(out, [0, 1, 2, 4]);
        highest(&[1.0, 2.0], &mut out);
        assert_eq!(out, [0, 1, UNSELECTED, UNSELECTED]);
    }

    #[test]
    fn selection_is_that_of_a_stable_sort() {
        for seed in 1u32..60 {
            let n = 1 + seed as usize * 3;
            let scores: Vec<f32> =
                (0..n as u32).map(|i| (i.wrapping_mul(seed * 2_654_435_761) >> 29) as f32 - 3.0).collect();
            let mut order: Vec<u32> = (0..n as u32).collect();
            order.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
            order.truncate(16.min(n));
            order.sort_unstable();
            order.resize(16, UNSELECTED);
            let mut out = [0; 16];
            highest(&scores, &mut out);
            assert_eq!(out[..], order[..], "{seed}");
        }
    }

    #[test]
    fn experts_come_by_probability_then_number() {
        let (chosen, weights) = route(&[1.0, 3.0, 1.0, 2.0], 3, true);
        assert_eq!(chosen, [1, 3, 0]);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6 && weights[0] > weights[1]);
        let (_, raw) = route(&[0.0; 4], 2, false);
        assert_eq!(raw, [0.25, 0.25]);
    }
}
