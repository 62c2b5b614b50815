//! A runner without a model, for tests: its logits are a hash of everything that a model's logits depend on, read through
//! its own block-addressed cache, so that a wrong token, position, feature row, block or cut changes the answer.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use keye_media::{Frame, FrameKind, Media, MediaKind, Patches, Pixels};
use keye_model::{Batch, Cost, EncodeProgress, FeatureId, LogitRows, ModelError, Outputs, Runner, RunnerInfo, Tap};
use keye_processor::{FeatureSpan, Prompt};

use crate::random::philox;

/// Stands for every media token.
pub(crate) const PAD: u32 = 50;
/// A prompt with this token makes a step fail.
pub(crate) const BAD_TOKEN: u32 = 61;
/// A prompt with this token makes a step panic.
pub(crate) const PANIC_TOKEN: u32 = 62;
/// Media with this hash cannot be encoded.
pub(crate) const BAD_MEDIA: u8 = 0xEE;
/// Media with this hash make the encoder panic.
pub(crate) const PANIC_MEDIA: u8 = 0xEF;
/// Media with this hash take very long to encode.
pub(crate) const SLOW_MEDIA: u8 = 0xF0;

/// What a fake did.
#[derive(Default)]
pub(crate) struct Log {
    pub encodes: AtomicUsize,
    /// Features that are held, those in the making included.
    pub features: AtomicUsize,
    /// Bytes of those that are made.
    pub feature_bytes: AtomicUsize,
    /// Tokens of every chunk of every step.
    pub steps: Mutex<Vec<Vec<usize>>>,
}

impl Log {
    pub fn steps(&self) -> Vec<Vec<usize>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

pub(crate) struct FakeRunner {
    info: RunnerInfo,
    cache: HashMap<(u32, usize), u64>,
    features: HashMap<FeatureId, Vec<u64>>,
    /// What the features will be made of, and parts done.
    encodings: HashMap<FeatureId, (u64, u64)>,
    next_feature: u64,
    pub step_time: Duration,
    pub log: Arc<Log>,
}

impl FakeRunner {
    pub fn new(num_blocks: usize, block_tokens: usize) -> Self {
        Self {
            info: RunnerInfo {
                vocab_size: 64,
                max_positions: 100_000,
                block_tokens,
                num_blocks,
                block_bytes: 1,
                feature_row_bytes: 10,
            },
            cache: HashMap::new(),
            features: HashMap::new(),
            encodings: HashMap::new(),
            next_feature: 0,
            step_time: Duration::ZERO,
            log: Arc::default(),
        }
    }
}

impl FakeRunner {
    fn note_features(&self) {
        let rows: usize = self.features.values().map(Vec::len).sum();
        self.log.features.store(self.features.len() + self.encodings.len(), Ordering::SeqCst);
        self.log.feature_bytes.store(rows * self.info.feature_row_bytes, Ordering::SeqCst);
    }

    /// With a real vocabulary all of which may be generated.
    pub fn with_vocabulary(mut self, vocab_size: usize) -> Self {
        self.info.vocab_size = vocab_size;
        self
    }
}

fn mix(a: u64, b: u64) -> u64 {
    let [x, y, ..] = philox([a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32], [1, 2]);
    u64::from(x) << 32 | u64::from(y)
}

impl Runner for FakeRunner {
    fn info(&self) -> &RunnerInfo {
        &self.info
    }

    fn begin_encode(&mut self, kind: MediaKind, patches: &Patches) -> Result<FeatureId, ModelError> {
        self.log.encodes.fetch_add(1, Ordering::SeqCst);
        let id = FeatureId(self.next_feature);
        self.next_feature += 1;
        let kind = (kind == MediaKind::Video) as u64;
        self.encodings.insert(id, (mix(u64::from(patches.hash[0]), kind), 0));
        self.note_features();
        Ok(id)
    }

    fn encode_step(
        &mut self,
        feature: FeatureId,
        patches: &Patches,
        flops: f64,
        _tap: &mut dyn Tap,
    ) -> Result<EncodeProgress, ModelError> {
        // Taken out, so that it is gone after an error.
        let (state, mut done) = self.encodings.remove(&feature).ok_or(ModelError::Media("not begun".into()))?;
        self.note_features();
        // Real media have hashes of unequal bytes and are never special.
        let seed = patches.hash[0];
        let special = patches.hash == [seed; 32];
        let slow = special && seed == SLOW_MEDIA;
        let total = if slow { 100_000 } else { 4 };
        if slow {
            std::thread::sleep(Duration::from_millis(1));
        }
        match seed {
            BAD_MEDIA if special => return Err(ModelError::Media("bad".into())),
            PANIC_MEDIA if special => panic!("the encoder panicked on purpose"),
            _ => {}
        }
        done += 1 + (flops as u64).min(total - done - 1);
        if done == total {
            let rows = patches.len() as u64 / 4;
            self.features.insert(feature, (0..rows).map(|row| mix(state, row)).collect());
        } else {
            self.encodings.insert(feature, (state, done));
        }
        self.note_features();
        Ok(EncodeProgress { done, total, flops: 1.0 })
    }

    fn feature_rows(&self, feature: FeatureId) -> usize {
        self.features.get(&feature).map_or(0, Vec::len)
    }

    fn release(&mut self, feature: FeatureId) {
        let held = self.features.remove(&feature).is_some() | self.encodings.remove(&feature).is_some();
        assert!(held, "released twice");
        self.note_features();
    }

    fn step(&mut self, batch: &Batch, _tap: &mut dyn Tap) -> Result<Outputs, ModelError> {
        std::thread::sleep(self.step_time);
        let sizes = batch.chunks.iter().map(|chunk| chunk.tokens.len()).collect();
        self.log.steps.lock().unwrap_or_else(PoisonError::into_inner).push(sizes);
        let size = self.info.block_tokens;
        let mut outputs = Outputs::default();
        for chunk in &batch.chunks {
            assert!(self.info.vocab_size > 64 || !chunk.tokens.contains(&PANIC_TOKEN), "a step panicked on purpose");
            if self.info.vocab_size == 64 && chunk.tokens.contains(&BAD_TOKEN) {
                return Err(ModelError::Batch("bad".into()));
            }
            let mut inputs: Vec<u64> = chunk.tokens.iter().map(|token| u64::from(*token)).collect();
            for rows in &chunk.features {
                let feature = self.features.get(&rows.feature).ok_or(ModelError::Batch("unknown feature".into()))?;
                inputs[rows.at..rows.at + rows.len].copy_from_slice(&feature[rows.row..rows.row + rows.len]);
            }
            let at = |index: usize| (chunk.block_table[index / size], index % size);
            let (mut logits, mut hidden) = (Vec::new(), Vec::new());
            for (offset, input) in inputs.iter().enumerate() {
                let index = chunk.start + offset;
                let [t, h, w] = chunk.positions[offset].map(u64::from);
                let mut seen = mix(mix(*input, t), mix(h, w));
                for earlier in 0..index {
                    seen = mix(seen, *self.cache.get(&at(earlier)).ok_or(ModelError::Batch("never written".into()))?);
                }
                self.cache.insert(at(index), seen);
                if let LogitRows::Hidden(range) = &chunk.logits
                    && range.contains(&offset)
                {
                    hidden.extend((0..4).map(|at| (mix(seen, at) % 1000) as f32 - 500.0));
                }
                let wanted = match &chunk.logits {
                    LogitRows::None | LogitRows::Hidden(_) => false,
                    LogitRows::Last | LogitRows::Highest(_) => offset + 1 == inputs.len(),
                    LogitRows::Range(range) => range.contains(&offset),
                };
                if wanted {
                    // Tokens from PAD on are never generated.
                    let small = self.info.vocab_size == 64;
                    // After tokens below 10 the next number is likely, so that answers repeat themselves.
                    let habit = (small && *input < 10 && !seen.is_multiple_of(4)).then(|| (input + 1) % 10);
                    logits.extend((0..self.info.vocab_size as u64).map(|id| match !small || id < u64::from(PAD) {
                        true if habit == Some(id) => 15.0,
                        true => (mix(seen, id) % 1000) as f32 / 100.0,
                        false => f32::NEG_INFINITY,
                    }));
                    if let LogitRows::Highest(count) = chunk.logits {
                        let mut sorted = logits.clone();
                        sorted.sort_unstable_by(|a, b| b.total_cmp(a));
                        let least = sorted[count.min(sorted.len()) - 1];
                        logits.iter_mut().filter(|logit| **logit < least).for_each(|logit| *logit = f32::NEG_INFINITY);
                    }
                }
            }
            outputs.logits.push(logits);
            outputs.hidden.push(hidden);
        }
        Ok(outputs)
    }

    fn cost(&self, _kind: MediaKind, grid_thw: &[[u32; 3]], _tokens: usize) -> Cost {
        Cost { vision: f64::from(grid_thw.iter().map(|[t, h, w]| t * h * w).sum::<u32>()), prefill: 0.0 }
    }

    fn flops_per_second(&mut self) -> f64 {
        10.0
    }
}

/// A clip whose features depend on `seed`, with `tokens` tokens.
pub(crate) fn clip(seed: u8, tokens: usize) -> Arc<Media> {
    let grid = [1, 2, tokens as u32 * 2];
    let patches = Patches { pixels: Pixels::U8(Vec::new()), grid_thw: vec![grid], hash: [seed; 32] };
    let frame = Frame { index: 0, timestamp: None, kind: FrameKind::Slow, height: 28, width: 28 * tokens as u32 };
    Arc::new(Media { kind: MediaKind::Video, patches, frames: vec![frame], sample_fps: None })
}

/// A prompt: two tokens, every clip with a token after it, then `text`.
pub(crate) fn prompt(text: &[u32], media: &[Arc<Media>]) -> Prompt {
    let mut prompt = Prompt {
        text: String::new(),
        input_ids: vec![3, 4],
        positions: vec![[0; 3], [1; 3]],
        rope_delta: 0,
        features: Vec::new(),
    };
    let mut next = 2;
    for (index, media) in media.iter().enumerate() {
        let len = media.patches.len() / 4;
        prompt.features.push(FeatureSpan { media: index, start: prompt.input_ids.len(), len, row: 0 });
        prompt.input_ids.extend(std::iter::repeat_n(PAD, len));
        prompt.positions.extend((0..len as u32).map(|row| [next, next + row / 3, next + row % 3]));
        next += 3;
        prompt.input_ids.push(5);
        prompt.positions.push([next; 3]);
        next += 1;
    }
    for token in text {
        prompt.input_ids.push(*token);
        prompt.positions.push([next; 3]);
        next += 1;
    }
    prompt.rope_delta = i64::from(next) - prompt.input_ids.len() as i64;
    prompt
}
