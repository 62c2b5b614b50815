//! The thread that owns the model: takes prepared requests, runs steps, hands out tokens.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use keye_media::{FrameKind, Media};
use keye_model::{Batch, Chunk, LogitRows, ModelError, NoTap, Runner, panic_text};
use keye_processor::FeatureSpan;

use crate::block_manager::BlockManager;
use crate::encoder::Encoder;
use crate::engine::Shared;
use crate::feature_cache::{FeatureCache, FeatureKey, feature_key};
use crate::pace::Pace;
use crate::scheduler::{Planned, Scheduled, Scheduler};
use crate::sequence::{Pin, PreparedRequest, Sequence};
use crate::{EngineError, EngineOptions, FinishReason, Stage};

pub(crate) struct Worker {
    runner: Box<dyn Runner>,
    shared: Arc<Shared>,
    scheduler: Scheduler,
    features: FeatureCache,
    encoder: Encoder,
    pace: Pace,
    /// Most tokens guessed ahead.
    speculation: usize,
    /// Those that the scheduler knows.
    sequences: BTreeMap<u64, Sequence>,
    /// Requests with the prompt of a sequence that is still computing it.
    followers: BTreeMap<u64, Vec<PreparedRequest>>,
    next_id: u64,
}

/// What a step gave for one chunk: rows of logits or of hidden states.
#[derive(Default)]
struct Rows {
    logits: Vec<f32>,
    hidden: Vec<f32>,
}

impl Worker {
    pub fn new(runner: Box<dyn Runner>, shared: Arc<Shared>, options: &EngineOptions) -> Self {
        let info = runner.info();
        let blocks = BlockManager::new(info.num_blocks, info.block_tokens);
        let mut worker = Self {
            runner,
            shared,
            scheduler: Scheduler::new(blocks, options.max_batch_tokens, options.max_running),
            features: FeatureCache::new(options.feature_cache_bytes),
            encoder: Encoder::default(),
            pace: Pace::new(options.prefill_share),
            speculation: options.speculation,
            sequences: BTreeMap::new(),
            followers: BTreeMap::new(),
            next_id: 0,
        };
        worker.publish();
        worker
    }

    /// Works until the engine stops. Requests that are not finished then end with [`EngineError::Stopped`].
    pub fn run(mut self) {
        while !self.shared.stopping() && self.receive() {
            self.drop_cancelled();
            self.step();
            self.encode();
            self.publish();
        }
    }

    /// Takes prepared requests; waits for one when there is nothing else to do. False when there will be none. What is
    /// prepared ahead stays in the bounded queue, since decoded media are large.
    fn receive(&mut self) -> bool {
        while self.scheduler.num_waiting() == 0 {
            let prepared =
                if self.scheduler.is_empty() { self.shared.prepared.pop() } else { self.shared.prepared.try_pop() };
            match prepared {
                Some(request) => self.accept(request),
                None => return !self.scheduler.is_empty(),
            }
        }
        // Text passes media in line, which may have to wait until others are encoded.
        while !self.scheduler.text_waits()
            && let Some(text) = self.shared.prepared.try_pop_where(|request| request.media.is_empty())
        {
            self.accept(text);
        }
        true
    }

    fn accept(&mut self, request: PreparedRequest) {
        self.accept_with(request, &[]);
    }

    /// The features with these keys are in use, and stay so until the request's prompt is computed.
    fn accept_with(&mut self, request: PreparedRequest, pins: &[Pin]) {
        let Some(mut sequence) = Sequence::new(request, self.shared.max_model_len) else { return };
        for (index, key, _) in pins {
            sequence.pinned.extend(self.features.acquire(key).map(|feature| (*index, *key, feature)));
        }
        self.announce_media(&sequence);
        let id = self.next_id;
        self.next_id += 1;
        let mut scheduled = Scheduled::new(id, sequence.prompt().input_ids.clone(), sequence.content());
        scheduled.private = sequence.needs_all_rows();
        self.scheduler.add(scheduled);
        let siblings = sequence.take_siblings();
        if !siblings.is_empty() {
            self.followers.insert(id, siblings);
        }
        self.sequences.insert(id, sequence);
    }

    /// The prompt of the sequence is computed, or the sequence is gone: those with the same prompt begin. They find it in
    /// the cache; when it is not there, the first of them computes it for the others. They take over the features in use
    /// before these can be evicted: some have to compute the prompt's end again.
    fn release_followers(&mut self, id: u64, computed: bool, pins: &[Pin]) {
        let mut followers = self.followers.remove(&id).unwrap_or_default();
        if computed || followers.is_empty() {
            followers.into_iter().for_each(|request| self.accept_with(request, pins));
        } else {
            let mut first = followers.remove(0);
            first.siblings = followers;
            self.accept_with(first, pins);
        }
    }

    fn announce_media(&mut self, sequence: &Sequence) {
        for (index, media) in sequence.media().iter().enumerate() {
            let spans = sequence.prompt().features.iter().filter(|span| span.media == index);
            let tokens = spans.map(|span| span.len).sum();
            sequence.events().stage(Stage::MediaReady {
                index,
                frames: media.frames.len(),
                slow_frames: media.frames.iter().filter(|frame| frame.kind == FrameKind::Slow).count(),
                patches: media.patches.len(),
                tokens,
                shown: media.frames.as_slice().into(),
                estimate: self.estimate(media, tokens),
                warnings: sequence.warnings(index),
            });
        }
    }

    /// Seconds that the vision tower and these tokens of the prompt will take.
    fn estimate(&mut self, media: &Media, tokens: usize) -> Option<f64> {
        if self.features.contains(&feature_key(media)) {
            return Some(0.0);
        }
        let seconds = guarded(|| {
            let cost = self.runner.cost(media.kind, &media.patches.grid_thw, tokens);
            Ok((cost.vision + cost.prefill) / self.runner.flops_per_second())
        });
        seconds.ok().filter(|seconds| seconds.is_finite() && *seconds > 0.0)
    }

    fn drop_cancelled(&mut self) {
        for followers in self.followers.values_mut() {
            for request in followers.extract_if(.., |request| request.cancelled()) {
                request.fail(EngineError::Cancelled);
            }
        }
        let cancelled: Vec<u64> =
            self.sequences.iter().filter(|(_, sequence)| sequence.events().cancelled()).map(|(id, _)| *id).collect();
        cancelled.into_iter().for_each(|id| self.fail(id, EngineError::Cancelled));
    }

    fn step(&mut self) {
        let generating = self.generating();
        let max_prefill = if generating { self.pace.prefill_tokens(self.encoder.busy()) } else { usize::MAX };
        let (mut planned, mut chunks, mut prompt_tokens) = (Vec::new(), Vec::new(), 0);
        for plan in self.scheduler.schedule(max_prefill) {
            match self.chunk(&plan) {
                Ok((chunk, guesses)) => {
                    if plan.range.len() > 1 {
                        prompt_tokens += plan.range.len();
                    }
                    planned.push((plan, guesses));
                    chunks.push(chunk);
                }
                Err(error) => self.fail(plan.id, error),
            }
        }
        let start = Instant::now();
        let results = self.forward(chunks);
        if !planned.is_empty() {
            self.pace.stepped(start.elapsed(), generating, prompt_tokens);
        }
        for ((Planned { id, range }, guesses), rows) in planned.into_iter().zip(results) {
            match rows {
                Ok(rows) => {
                    self.scheduler.commit(id, range.len());
                    self.advance(id, range.end, &guesses, rows);
                }
                Err(error) => self.fail(id, error),
            }
        }
    }

    /// True when a running sequence has its prompt behind it.
    fn generating(&self) -> bool {
        let generates = |s: &Scheduled| {
            s.placed
                && self.sequences.get(&s.id).is_some_and(|sequence| s.computed >= sequence.prompt().input_ids.len())
        };
        self.scheduler.running().any(generates)
    }

    /// A sequence that runs has left the queue.
    fn admitted(&mut self, id: u64) {
        let (Some(scheduled), Some(sequence)) = (self.scheduler.get(id), self.sequences.get_mut(&id)) else { return };
        let cached = scheduled.cached.unwrap_or(0);
        if sequence.admitted(cached) {
            let mut stats = self.shared.stats();
            stats.prefix_hits += cached as u64;
            stats.prefix_misses += (scheduled.tokens.len() - cached) as u64;
        }
    }

    /// Builds a part of a step, and the tokens guessed in it.
    fn chunk(&mut self, Planned { id, range }: &Planned) -> Result<(Chunk, Vec<u32>), EngineError> {
        let lost = || EngineError::Internal(format!("sequence {id} is planned but unknown"));
        let room = self.scheduler.room(*id);
        self.admitted(*id);
        let scheduled = self.scheduler.get(*id).ok_or_else(lost)?;
        let sequence = self.sequences.get_mut(id).ok_or_else(lost)?;
        if range.start == 0
            && let Some(pool) = sequence.pool()
        {
            pool.clear();
        }
        let total = scheduled.tokens.len();
        let generates = range.len() == 1 && range.end == total && total > sequence.prompt().input_ids.len();
        let guesses = if generates { sequence.guess(self.speculation.min(room)) } else { Vec::new() };
        let mut tokens = scheduled.tokens[range.clone()].to_vec();
        tokens.extend_from_slice(&guesses);
        let chunk = Chunk {
            start: range.start,
            positions: (range.start..range.end + guesses.len()).map(|index| sequence.position(index)).collect(),
            features: sequence.feature_rows(range.start, range.end),
            block_table: scheduled.block_table.clone(),
            logits: sequence.rows(range.start, range.end, total, guesses.len()),
            tokens,
        };
        Ok((chunk, guesses))
    }

    /// Runs chunks in one step. When it fails they run one by one, so that only those at fault fail: rows do not depend on
    /// what else is in a batch, and writing the same keys and values again changes nothing.
    fn forward(&mut self, chunks: Vec<Chunk>) -> Vec<Result<Rows, EngineError>> {
        if chunks.is_empty() {
            return Vec::new();
        }
        let batch = Batch { chunks };
        let vocab_size = self.runner.info().vocab_size;
        let result = guarded(|| {
            let outputs = self.runner.step(&batch, &mut NoTap)?;
            let mut hidden = outputs.hidden.into_iter();
            let rows: Vec<Rows> = (outputs.logits.into_iter())
                .map(|logits| Rows { logits, hidden: hidden.next().unwrap_or_default() })
                .collect();
            let fits = |(rows, chunk): (&Rows, &Chunk)| match &chunk.logits {
                LogitRows::None => rows.logits.is_empty(),
                LogitRows::Last | LogitRows::Highest(_) => rows.logits.len() == vocab_size,
                LogitRows::Range(range) => rows.logits.len() == range.len() * vocab_size,
                LogitRows::Hidden(range) => !rows.hidden.is_empty() && rows.hidden.len() % range.len() == 0,
            };
            if rows.len() == batch.chunks.len() && rows.iter().zip(&batch.chunks).all(fits) {
                Ok(rows)
            } else {
                Err(EngineError::Internal("the model returned other rows than were asked for".into()))
            }
        });
        match result {
            Ok(rows) => rows.into_iter().map(Ok).collect(),
            Err(error) if batch.chunks.len() == 1 => vec![Err(error)],
            Err(_) => batch.chunks.into_iter().flat_map(|chunk| self.forward(vec![chunk])).collect(),
        }
    }

    /// `computed` tokens of the sequence are in the cache, and `guesses` after them; the rows that it asked for are here.
    fn advance(&mut self, id: u64, computed: usize, guesses: &[u32], mut rows: Rows) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let total = sequence.prompt().input_ids.len();
        if computed <= total {
            sequence.events().stage(Stage::Prefill { done: computed, total });
        }
        if let Some(pool) = sequence.pool() {
            pool.add(&rows.hidden, computed, total);
            if computed == total {
                pool.finish();
                self.finish(id, FinishReason::Stop);
            }
            return;
        }
        let vocab_size = self.runner.info().vocab_size;
        let mut accepted = 0;
        for (index, logits) in rows.logits.chunks_exact_mut(vocab_size.max(1)).enumerate() {
            let Some(sequence) = self.sequences.get_mut(&id) else { return };
            let pushed = guarded(|| {
                let (token, logprob) = sequence.sample(logits)?;
                Ok((token, sequence.push(token, logprob)?))
            });
            self.shared.count_token();
            match pushed {
                Err(error) => return self.fail(id, error),
                Ok((_, Some(reason))) => {
                    self.learn(id, guesses.len(), accepted);
                    return self.finish(id, reason);
                }
                Ok((token, None)) => {
                    self.scheduler.append(id, token);
                    // A wrong guess's keys and values are overwritten by the token in its place.
                    if guesses.get(index) != Some(&token) {
                        break;
                    }
                    accepted += 1;
                    self.scheduler.commit(id, 1);
                }
            }
        }
        self.learn(id, guesses.len(), accepted);
        if computed >= total
            && let Some(sequence) = self.sequences.get_mut(&id)
        {
            let pins = std::mem::take(&mut sequence.pinned);
            self.release_followers(id, true, &pins);
            self.unpin(pins);
        }
    }

    fn learn(&mut self, id: u64, proposed: usize, accepted: usize) {
        if proposed > 0
            && let Some(sequence) = self.sequences.get_mut(&id)
        {
            sequence.guessed(proposed, accepted);
            let mut stats = self.shared.stats();
            stats.speculation_proposed += proposed as u64;
            stats.speculation_accepted += accepted as u64;
        }
    }

    /// Brings media features to the sequences that run and need them, encoding for a bounded time what is not there.
    fn encode(&mut self) {
        let flops = if self.generating() { self.pace.encode_flops() } else { 0.0 };
        let blocked: Vec<u64> = self.scheduler.running().filter(|s| !s.ready).map(|s| s.id).collect();
        let mut wanted = Vec::new();
        for id in blocked {
            self.admitted(id);
            wanted.extend(self.pin(id).into_iter().map(|(index, key)| (key, id, index)));
        }
        let media = |id: u64, index: usize| self.sequences.get(&id).map(|s| Arc::clone(&s.media()[index]));
        self.encoder.update(&wanted, media, &mut *self.runner);
        let start = Instant::now();
        let Some((key, worked)) = self.encoder.work(flops, &mut *self.runner) else { return };
        let users: Vec<(u64, usize)> =
            wanted.iter().filter(|(wanted, ..)| *wanted == key).map(|(_, id, index)| (*id, *index)).collect();
        match worked {
            Ok((progress, done)) => {
                self.pace.encoded(start.elapsed(), progress.flops);
                let fraction = (progress.done as f64 / progress.total.max(1) as f64).min(1.0) as f32;
                for (id, index) in &users {
                    if let Some(sequence) = self.sequences.get(id) {
                        sequence.events().stage(Stage::Vision { index: *index, fraction });
                    }
                }
                if let Some(feature) = done {
                    self.shared.stats().feature_misses += 1;
                    self.features.insert(key, feature, &*self.runner);
                    // Unused, they could be evicted before the next step is over.
                    users.into_iter().for_each(|(id, _)| drop(self.pin(id)));
                }
            }
            Err(error) => {
                // Others that want the same media find the same error themselves.
                if let Some((id, _)) = users.first() {
                    self.fail(*id, error);
                }
            }
        }
    }

    /// Takes what is there of the features that a running sequence needs; returns what is missing. With all of them it is
    /// ready.
    fn pin(&mut self, id: u64) -> Vec<(usize, FeatureKey)> {
        let Some(computed) = self.scheduler.get(id).map(|s| s.computed) else { return Vec::new() };
        let Some(sequence) = self.sequences.get_mut(&id) else { return Vec::new() };
        match pin(sequence, computed, &mut self.features, &self.encoder, &*self.runner, &self.shared) {
            Ok(missing) => {
                if missing.is_empty() {
                    sequence.clock().lap(|timings| &mut timings.vision);
                    self.scheduler.set_ready(id);
                }
                missing
            }
            Err(error) => {
                self.fail(id, error);
                Vec::new()
            }
        }
    }

    fn unpin(&mut self, pins: Vec<Pin>) {
        for (_, key, _) in pins {
            self.features.release(&key, &mut *self.runner);
        }
    }

    fn finish(&mut self, id: u64, reason: FinishReason) {
        if let Some(sequence) = self.forget(id, true) {
            sequence.finish(reason);
        }
    }

    fn fail(&mut self, id: u64, error: EngineError) {
        if let Some(sequence) = self.forget(id, false) {
            let error = self.shared.why(sequence.events(), error);
            sequence.fail(error);
        }
    }

    /// Frees all that a sequence holds; the numbers tell so before its reader hears of the end.
    fn forget(&mut self, id: u64, computed: bool) -> Option<Sequence> {
        self.scheduler.remove(id);
        let mut sequence = self.sequences.remove(&id)?;
        let pins = std::mem::take(&mut sequence.pinned);
        self.release_followers(id, computed, &pins);
        self.unpin(pins);
        self.publish();
        Some(sequence)
    }

    fn publish(&mut self) {
        let mut stats = self.shared.stats();
        stats.running = self.scheduler.num_running();
        stats.free_blocks = self.scheduler.blocks.num_free();
        stats.num_blocks = self.scheduler.blocks.num_blocks();
        stats.feature_bytes = self.features.bytes();
        stats.preemptions = self.scheduler.preemptions;
    }
}

/// Takes what is there of the features that tokens from `start` on need; returns what is missing.
fn pin(
    sequence: &mut Sequence,
    start: usize,
    features: &mut FeatureCache,
    encoder: &Encoder,
    runner: &dyn Runner,
    shared: &Shared,
) -> Result<Vec<(usize, FeatureKey)>, EngineError> {
    let mut missing = Vec::new();
    for (index, key) in sequence.media_from(start) {
        if sequence.pinned.iter().any(|(pinned, ..)| *pinned == index) {
            continue;
        }
        let Some(feature) = features.acquire(&key) else {
            missing.push((index, key));
            continue;
        };
        if !encoder.just_done(&key) {
            shared.stats().feature_hits += 1;
        }
        sequence.pinned.push((index, key, feature));
        let rows = runner.feature_rows(feature);
        let fits = |span: &FeatureSpan| span.media != index || span.row + span.len <= rows;
        if !sequence.prompt().features.iter().all(fits) {
            return Err(
                ModelError::Media(format!("media {index} gave {rows} rows of features, its prompt has more")).into()
            );
        }
    }
    Ok(missing)
}

/// Runs code that is not ours to trust with the thread: a panic is this request's error. Blocks and features are only
/// shared after what filled them has returned, so what a panic leaves half done is never read.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(EngineError::Internal(format!("panicked: {}", panic_text(&*panic)))))
}

impl Drop for Worker {
    /// However the thread ends, nobody waits for it.
    fn drop(&mut self) {
        self.shared.stop();
    }
}
