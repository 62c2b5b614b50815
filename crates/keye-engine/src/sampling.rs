//! How a token is chosen from logits: one rule, pure, seeded.
//!
//! The order is that of transformers: repetition penalty, presence and frequency penalty, temperature, top-k, top-p, min-p,
//! then a draw with a counter-based generator.

use std::ops::RangeInclusive;

use crate::TokenLogprob;
use crate::random::uniform;

/// Sampling parameters; the names are those of vLLM and transformers.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k best; 0 is off.
    pub top_k: u32,
    /// Keep the smallest set with this probability; 1 is off.
    pub top_p: f32,
    /// Drop what is less probable than this part of the best; 0 is off.
    pub min_p: f32,
    /// Divides the logits of tokens seen in prompt or answer (multiplies negative ones); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from tokens that the answer has; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted for every time that the answer has a token; 0 is off.
    pub frequency_penalty: f32,
    /// Seed of the generator; the same seed gives the same answer.
    pub seed: u64,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// The answer ends before any of these.
    pub stop: Vec<String>,
    /// Token ids that end the answer besides the checkpoint's.
    pub stop_token_ids: Vec<u32>,
    /// Keep going at the checkpoint's end tokens.
    pub ignore_eos: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            max_tokens: 1024,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            skip_special_tokens: true,
        }
    }
}

impl SamplingParams {
    /// How many of the highest logits decide, with the equals of the lowest of these: with all others at -inf [`sample`] chooses
    /// the same. `None`: all of them, or too many.
    pub(crate) fn deciding(&self) -> Option<usize> {
        let penalties = [self.repetition_penalty - 1.0, self.presence_penalty, self.frequency_penalty];
        if penalties != [0.0; 3] {
            return None;
        }
        match self.top_k {
            _ if self.temperature <= 0.0 => Some(1),
            1..=MOST_DECIDING => Some(self.top_k as usize),
            _ => None,
        }
    }

    /// Checks the ranges (those of OpenAI and vLLM); the error names the field, the range and the value.
    pub fn validate(&self) -> Result<(), String> {
        let range = |name: &str, value: f32, allowed: RangeInclusive<f64>| {
            let (low, high) = (*allowed.start() as f32, *allowed.end() as f32);
            // A NaN is in no range.
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(format!("{name} is {value}, it has to be from {low} to {high}"))
            }
        };
        range("temperature", self.temperature, TEMPERATURE)?;
        if self.top_p.is_nan() || self.top_p <= 0.0 || self.top_p > 1.0 {
            return Err(format!("top_p is {}, it has to be above 0 and at most 1", self.top_p));
        }
        range("min_p", self.min_p, MIN_P)?;
        range("repetition_penalty", self.repetition_penalty, REPETITION_PENALTY)?;
        range("presence_penalty", self.presence_penalty, PENALTY)?;
        range("frequency_penalty", self.frequency_penalty, PENALTY)?;
        if self.max_tokens == 0 {
            return Err("max_tokens is 0, it has to be at least 1".into());
        }
        if self.stop.len() > MAX_STOPS {
            return Err(format!("there are {} stop strings, at most {MAX_STOPS} are allowed", self.stop.len()));
        }
        for stop in &self.stop {
            if !(1..=MAX_STOP_BYTES).contains(&stop.len()) {
                return Err(format!("a stop string has {} bytes, allowed are 1 to {MAX_STOP_BYTES}", stop.len()));
            }
        }
        Ok(())
    }
}

/// Largest `top_k` for which a device is asked for the highest logits alone.
const MOST_DECIDING: u32 = 128;

/// Most stop strings of a request.
pub const MAX_STOPS: usize = 64;
/// Longest stop string.
pub const MAX_STOP_BYTES: usize = 1024;
/// Values that `temperature` may have.
pub const TEMPERATURE: RangeInclusive<f64> = 0.0..=100.0;
/// Values that `min_p` may have.
pub const MIN_P: RangeInclusive<f64> = 0.0..=1.0;
/// Values that `repetition_penalty` may have.
pub const REPETITION_PENALTY: RangeInclusive<f64> = 0.01..=100.0;
/// Values that `presence_penalty` and `frequency_penalty` may have.
pub const PENALTY: RangeInclusive<f64> = -2.0..=2.0;

/// Chooses a token for step `step` of a sequence from its logits; `prompt` and `generated` feed the penalties.
///
/// The choice depends on the arguments only, and its randomness on seed and step only. Temperature 0 takes the largest
/// logit, of equal ones the lowest id. A NaN is never chosen unless there is nothing else; then, as with logits that are all
/// -inf, the answer is token 0. The logits are overwritten.
pub fn sample(logits: &mut [f32], params: &SamplingParams, prompt: &[u32], generated: &[u32], step: u64) -> u32 {
    penalise(logits, params, prompt, generated);
    if params.temperature <= 0.0 {
        return argmax(logits);
    }
    draw(&distribution(logits, params), uniform(params.seed, step))
}

/// The token at `left`, from 0 to 1, of the probabilities laid end to end.
fn draw(candidates: &[(u32, f32)], mut left: f64) -> u32 {
    for (id, probability) in candidates {
        left -= f64::from(*probability);
        if left < 0.0 {
            return *id;
        }
    }
    // Rounding: the probabilities sum to a little less than 1. The last one may be next to impossible.
    let better = |best: (u32, f32), other: &(u32, f32)| if other.1 > best.1 { *other } else { best };
    candidates.iter().fold((0, 0.0), better).0
}

/// The log-softmax of logits at `token` and at the `k` most likely tokens. Give it the model's own logits, before any
/// penalty.
pub(crate) fn logprobs(logits: &[f32], token: u32, k: usize) -> TokenLogprob {
    let max = logits.iter().copied().filter(|logit| !logit.is_nan()).fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: &f32| if logit.is_nan() { 0.0 } else { (f64::from(*logit) - f64::from(max)).exp() };
    let total = f64::from(max) + logits.iter().map(weight).sum::<f64>().ln();
    let logprob = |logit: f32| (f64::from(logit) - total) as f32;
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(k + 1);
    for (id, logit) in (0..).zip(logits) {
        if top.len() < k || top.last().is_some_and(|(_, least)| logit > least) {
            let at = top.partition_point(|(_, better)| better >= logit);
            top.insert(at, (id, *logit));
            top.truncate(k);
        }
    }
    let top = top.into_iter().filter(|(_, logit)| logit.is_finite()).map(|(id, logit)| (id, logprob(logit))).collect();
    TokenLogprob { logprob: logits.get(token as usize).map_or(f32::NEG_INFINITY, |logit| logprob(*logit)), top }
}

/// Tokens and probabilities after temperature, top-k, top-p and min-p, in the order and with the ties of transformers'
/// `LogitsProcessor`s: tokens that tie with the k-th best stay, and a token stays when those better than it have less
/// than `top_p` together. The most probable comes first, of equal ones the lowest id; without top-k and top-p the order is
/// that of the ids. At temperature 0 there is one token. Penalties are not applied here.
pub fn distribution(logits: &[f32], params: &SamplingParams) -> Vec<(u32, f32)> {
    let best = argmax(logits);
    let max = logits.get(best as usize).copied().unwrap_or(f32::NEG_INFINITY);
    if params.temperature <= 0.0 || !max.is_finite() {
        return vec![(best, 1.0)];
    }
    let cut_k = params.top_k > 0 && (params.top_k as usize) < logits.len();
    let threshold = if cut_k { kth_largest(logits, params.top_k as usize) } else { f32::NEG_INFINITY };
    let temperature = f64::from(params.temperature);
    let mut kept: Vec<(u32, f64)> = (0..)
        .zip(logits)
        .filter(|(_, logit)| **logit >= threshold && **logit > f32::NEG_INFINITY)
        .map(|(id, logit)| (id, ((f64::from(*logit) - f64::from(max)) / temperature).exp()))
        .collect();
    let cut_p = params.top_p < 1.0;
    if cut_p {
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        keep_top(&mut kept, f64::from(params.top_p) * total);
    } else if cut_k {
        kept.sort_unstable_by(by_weight);
    }
    // Weights are relative to the best one's, which is 1.
    kept.retain(|(_, weight)| *weight >= f64::from(params.min_p));
    let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
    kept.into_iter().map(|(id, weight)| (id, (weight / total) as f32)).collect()
}

/// The largest logit's id, of equal ones the lowest; NaN counts as -inf.
fn argmax(logits: &[f32]) -> u32 {
    let (mut best, mut max) = (0, f32::NEG_INFINITY);
    for (id, logit) in (0..).zip(logits) {
        if *logit > max {
            (best, max) = (id, *logit);
        }
    }
    best
}

/// Repetition penalty (Keskar et al. 2019, over prompt and answer), then presence and frequency (OpenAI, over the answer).
fn penalise(logits: &mut [f32], params: &SamplingParams, prompt: &[u32], generated: &[u32]) {
    if params.repetition_penalty != 1.0 {
        let mut seen = vec![false; logits.len()];
        for id in prompt.iter().chain(generated) {
            if let Some(logit) = logits.get_mut(*id as usize)
                && !std::mem::replace(&mut seen[*id as usize], true)
            {
                let penalty = params.repetition_penalty;
                let penalised = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
                // A grammar's only way on may have the least number there is; at -inf it would be forbidden.
                *logit = if logit.is_finite() { penalised.clamp(f32::MIN, f32::MAX) } else { penalised };
            }
        }
    }
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        let mut counts = std::collections::BTreeMap::new();
        generated.iter().for_each(|id| *counts.entry(*id).or_insert(0u32) += 1);
        for (id, count) in counts {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
            }
        }
    }
}

/// The k-th largest of the logits that are numbers; -inf when there are fewer. `k` is at least 1.
fn kth_largest(logits: &[f32], k: usize) -> f32 {
    let mut numbers: Vec<f32> = logits.iter().copied().filter(|logit| !logit.is_nan()).collect();
    if numbers.len() < k {
        return f32::NEG_INFINITY;
    }
    *numbers.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

fn by_weight(a: &(u32, f64), b: &(u32, f64)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Keeps, sorted, those before which the sum of weights is below `mass`. Sorts only as many as it needs.
fn keep_top(kept: &mut Vec<(u32, f64)>, mass: f64) {
    let (mut sum, mut done, mut size) = (0.0, 0, 256);
    while done < kept.len() {
        let end = (done + size).min(kept.len());
        if end < kept.len() {
            kept[done..].select_nth_unstable_by(end - done - 1, by_weight);
        }
        kept[done..end].sort_unstable_by(by_weight);
        for index in done..end {
            if index > 0 && sum >= mass {
                kept.truncate(index);
                return;
            }
            sum += kept[index].1;
        }
        (done, size) = (end, size * 4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(temperature: f32) -> SamplingParams {
        SamplingParams { temperature, ..SamplingParams::default() }
    }

    /// `n` logits in about [-8, 8], the same every time.
    fn noise(n: u64) -> Vec<f32> {
        (0..n).map(|i| ((uniform(9, i) - 0.5) * 16.0) as f32).collect()
    }

    /// The rule written the long way: sort everything, then cut.
    fn plain(logits: &[f32], params: &SamplingParams) -> Vec<(u32, f64)> {
        let softmax = |kept: &[(u32, f64)]| -> Vec<(u32, f64)> {
            let total: f64 = kept.iter().map(|(_, logit)| logit.exp()).sum();
            kept.iter().map(|(id, logit)| (*id, logit.exp() / total)).collect()
        };
        let mut kept: Vec<(u32, f64)> =
            (0..).zip(logits).map(|(id, logit)| (id, f64::from(*logit) / f64::from(params.temperature))).collect();
        kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if params.top_k > 0 {
            kept.truncate(params.top_k as usize);
        }
        let mut before = 0.0;
        let probabilities = softmax(&kept);
        let mut index = 0;
        kept.retain(|_| {
            let keep = index == 0 || before < f64::from(params.top_p);
            before += probabilities[index].1;
            index += 1;
            keep
        });
        let probabilities = softmax(&kept);
        let best = probabilities[0].1;
        let kept: Vec<_> = kept
            .iter()
            .zip(&probabilities)
            .filter(|(_, (_, p))| *p >= f64::from(params.min_p) * best)
            .map(|(entry, _)| *entry)
            .collect();
        softmax(&kept)
    }

    #[test]
    fn agrees_with_the_rule_written_the_long_way() {
        let logits = noise(5000);
        for temperature in [0.3, 1.0, 1.7] {
            for top_k in [0, 1, 20, 700, 9999] {
                for top_p in [0.05, 0.5, 0.95, 1.0] {
                    for min_p in [0.0, 0.02, 1.0] {
                        let params = SamplingParams { top_k, top_p, min_p, ..params(temperature) };
                        let mut got = distribution(&logits, &params);
                        got.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                        let expected = plain(&logits, &params);
                        assert_eq!(got.len(), expected.len(), "{params:?}");
                        for (got, expected) in got.iter().zip(&expected) {
                            assert!((f64::from(got.1) - expected.1).abs() < 1e-6, "{params:?}");
                        }
                        let ids = |all: Vec<u32>| all.into_iter().collect::<std::collections::BTreeSet<_>>();
                        assert_eq!(
                            ids(got.iter().map(|(id, _)| *id).collect()),
                            ids(expected.iter().map(|(id, _)| *id).collect())
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn greedy_takes_the_largest_and_of_equal_ones_the_lowest_id() {
        assert_eq!(sample(&mut [1.0, 3.0, 3.0, 2.0], &params(0.0), &[], &[], 0), 1);
        assert_eq!(sample(&mut [f32::NAN, -1.0, f32::NAN], &params(0.0), &[], &[], 0), 1);
        assert_eq!(sample(&mut [-0.0, 0.0], &params(0.0), &[], &[], 0), 0);
    }

    #[test]
    fn the_deciding_logits_alone_give_the_same_choice() {
        // Rounded, so that many are equal.
        let logits: Vec<f32> = noise(3000).iter().map(|logit| (logit * 20.0).round() / 20.0).collect();
        for (temperature, top_k) in [(0.0, 0), (0.0, 5), (0.7, 1), (0.7, 20), (1.3, 128)] {
            for (top_p, min_p) in [(1.0, 0.0), (0.8, 0.0), (0.95, 0.05)] {
                let params = SamplingParams { top_k, top_p, min_p, seed: 3, ..params(temperature) };
                let least = kth_largest(&logits, params.deciding().unwrap());
                let cut = |logit: &f32| if *logit >= least { *logit } else { f32::NEG_INFINITY };
                let cut: Vec<f32> = logits.iter().map(cut).collect();
                for step in 0..50 {
                    let choices = [&logits, &cut].map(|logits| sample(&mut logits.clone(), &params, &[], &[], step));
                    assert_eq!(choices[0], choices[1], "{params:?}, step {step}");
                }
            }
        }
        let all = |params: SamplingParams| assert_eq!(params.deciding(), None, "{params:?}");
        all(params(0.7));
        all(SamplingParams { top_k: 129, ..params(0.7) });
        all(SamplingParams { repetition_penalty: 1.1, ..params(0.0) });
        all(SamplingParams { presence_penalty: 0.1, ..params(0.0) });
        all(SamplingParams { frequency_penalty: 0.1, ..params(0.0) });
    }

    #[test]
    fn hostile_logits_neither_panic_nor_win() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        for temperature in [0.0, 0.5] {
            for top_k in [0, 2] {
                let params = SamplingParams { top_k, top_p: 0.9, min_p: 0.1, ..params(temperature) };
                let pick = |mut logits: Vec<f32>, step| sample(&mut logits, &params, &[0, 9], &[1], step);
                for step in 0..20 {
                    assert_eq!(pick(vec![], step), 0);
                    assert_eq!(pick(vec![-inf, -inf], step), 0);
                    assert_eq!(pick(vec![nan, nan], step), 0);
                    assert_eq!(pick(vec![nan, -inf, 1.0, nan], step), 2);
                    assert_eq!(pick(vec![1.0, inf, nan, inf], step), 1);
                }
            }
        }
    }

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let logits = noise(5000);
        let exact: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln();
        let got = logprobs(&logits, 17, 20);
        assert!((f64::from(got.logprob) - (f64::from(logits[17]) - exact)).abs() < 1e-5);
        let mut ids: Vec<u32> = (0..5000).collect();
        ids.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
        assert_eq!(got.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ids[..20]);
        assert!(got.top.iter().all(|(id, p)| (f64::from(*p) - (f64::from(logits[*id as usize]) - exact)).abs() < 1e-5));
        let ties = logprobs(&[1.0, 2.0, 1.0, f32::NAN, 2.0], 4, 3).top;
        assert_eq!(ties.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 4, 0]);
        assert!(logprobs(&[], 0, 5).top.is_empty());
    }

    #[test]
    fn ties_with_the_kth_best_stay() {
        let params = SamplingParams { top_k: 2, ..params(1.0) };
        assert_eq!(
            distribution(&[1.0, 2.0, 1.0, 1.0, 0.0], &params).iter().map(|x| x.0).collect::<Vec<_>>(),
            [1, 0, 2, 3]
        );
    }

    #[test]
    fn penalties() {
        let penalised = |params: &SamplingParams, prompt: &[u32], generated: &[u32]| {
            let mut logits = [2.0, -2.0, 1.0, 0.5];
            penalise(&mut logits, params, prompt, generated);
            logits
        };
        let repetition = SamplingParams { repetition_penalty: 2.0, ..params(0.0) };
        assert_eq!(penalised(&repetition, &[0, 0, 77], &[1, 0]), [1.0, -4.0, 1.0, 0.5], "once each");
        let mut only = [f32::NEG_INFINITY, f32::MIN, f32::NEG_INFINITY];
        assert_eq!(sample(&mut only, &repetition, &[1], &[], 0), 1, "penalised, but allowed");
        let others = SamplingParams { presence_penalty: 0.5, frequency_penalty: 0.25, ..params(0.0) };
        assert_eq!(penalised(&others, &[2, 2], &[0, 0, 3]), [1.0, -2.0, 1.0, -0.25], "not the prompt's");
    }

    #[test]
    fn the_draw_follows_the_distribution_and_only_seed_and_step() {
        let logits = [1.0f32, 0.0, 2.0, f32::NEG_INFINITY];
        let params = SamplingParams { seed: 5, ..params(0.8) };
        let expected = distribution(&logits, &params);
        let n = 30_000u64;
        let mut counts = [0u32; 4];
        for step in 0..n {
            let token = sample(&mut logits.clone(), &params, &[], &[], step);
            assert_eq!(token, sample(&mut logits.clone(), &params, &[1, 2], &[3], step));
            counts[token as usize] += 1;
        }
        for (id, probability) in expected {
            let share = f64::from(counts[id as usize]) / n as f64;
            assert!((share - f64::from(probability)).abs() < 0.01, "{id}: {share} {probability}");
        }
        assert_eq!(counts[3], 0);
        let with_seed = |seed| -> Vec<u32> {
            (0..40)
                .map(|step| sample(&mut logits.clone(), &SamplingParams { seed, ..params.clone() }, &[], &[], step))
                .collect()
        };
        assert_ne!(with_seed(1), with_seed(2));
    }

    #[test]
    fn what_rounding_leaves_goes_to_the_most_probable() {
        let candidates = [(3, 0.2f32), (4, 0.6), (5, 0.1999), (6, 1e-9)];
        assert_eq!([0.1, 0.3, 0.9].map(|at| draw(&candidates, at)), [3, 4, 5]);
        assert_eq!(draw(&candidates, 0.99999), 4);
        assert_eq!(draw(&[], 0.5), 0);
    }

    #[test]
    fn validation_names_the_field() {
        type Change = fn(&mut SamplingParams);
        let cases: [(&str, Change); 12] = [
            ("temperature", |p| p.temperature = -0.1),
            ("temperature", |p| p.temperature = f32::NAN),
            ("temperature", |p| p.temperature = f32::INFINITY),
            ("top_p", |p| p.top_p = 0.0),
            ("top_p", |p| p.top_p = 1.1),
            ("min_p", |p| p.min_p = f32::NAN),
            ("repetition_penalty", |p| p.repetition_penalty = 0.0),
            ("presence_penalty", |p| p.presence_penalty = 2.1),
            ("frequency_penalty", |p| p.frequency_penalty = -2.1),
            ("max_tokens", |p| p.max_tokens = 0),
            ("stop string", |p| p.stop = vec![String::new()]),
            ("stop strings", |p| p.stop = vec!["a".into(); 65]),
        ];
        for (name, change) in cases {
            let mut params = SamplingParams::default();
            assert_eq!(params.validate(), Ok(()));
            change(&mut params);
            assert!(params.validate().expect_err(name).contains(name));
        }
    }
}
