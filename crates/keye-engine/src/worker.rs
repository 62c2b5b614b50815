//! The thread that owns the model: takes prepared requests, runs steps, hands out tokens.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use keye_media::{FrameKind, Media};
use keye_model::{Batch, Chunk, FeatureId, LogitRows, ModelError, NoTap, Runner};
use keye_processor::FeatureSpan;

use crate::block_manager::BlockManager;
use crate::engine::Shared;
use crate::event::EventSender;
use crate::feature_cache::{FeatureCache, feature_key};
use crate::scheduler::{Planned, Scheduled, Scheduler};
use crate::sequence::{PreparedRequest, Sequence};
use crate::{EngineError, EngineOptions, Stage};

pub(crate) struct Worker {
    runner: Box<dyn Runner>,
    shared: Arc<Shared>,
    scheduler: Scheduler,
    features: FeatureCache,
    /// Those that the scheduler knows.
    sequences: BTreeMap<u64, Sequence>,
    next_id: u64,
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
            sequences: BTreeMap::new(),
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
        true
    }

    fn accept(&mut self, request: PreparedRequest) {
        let Some(sequence) = Sequence::new(request, self.shared.max_model_len) else { return };
        self.announce_media(&sequence);
        let id = self.next_id;
        self.next_id += 1;
        self.scheduler.add(Scheduled::new(id, sequence.prompt().input_ids.clone(), sequence.content()));
        self.sequences.insert(id, sequence);
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
        let cancelled: Vec<u64> =
            self.sequences.iter().filter(|(_, sequence)| sequence.events().cancelled()).map(|(id, _)| *id).collect();
        cancelled.into_iter().for_each(|id| self.fail(id, EngineError::Cancelled));
    }

    fn step(&mut self) {
        let (mut planned, mut chunks) = (Vec::new(), Vec::new());
        for plan in self.scheduler.schedule() {
            match self.chunk(&plan) {
                Ok(chunk) => {
                    planned.push(plan);
                    chunks.push(chunk);
                }
                Err(error) => self.fail(plan.id, error),
            }
        }
        for (Planned { id, range }, logits) in planned.into_iter().zip(self.forward(chunks)) {
            match logits {
                Ok(logits) => {
                    self.scheduler.commit(id, range.len());
                    self.advance(id, range.end, logits);
                }
                Err(error) => self.fail(id, error),
            }
        }
    }

    /// Builds a part of a step; the features it needs are there afterwards.
    fn chunk(&mut self, Planned { id, range }: &Planned) -> Result<Chunk, EngineError> {
        let lost = || EngineError::Internal(format!("sequence {id} is planned but unknown"));
        let scheduled = self.scheduler.get(*id).ok_or_else(lost)?;
        let sequence = self.sequences.get_mut(id).ok_or_else(lost)?;
        sequence.admitted(scheduled.cached.unwrap_or(0));
        encode_media(sequence, range.start, &mut self.features, &mut *self.runner, &self.shared)?;
        Ok(Chunk {
            tokens: scheduled.tokens[range.clone()].to_vec(),
            start: range.start,
            positions: range.clone().map(|index| sequence.position(index)).collect(),
            features: sequence.feature_rows(range.start, range.end),
            block_table: scheduled.block_table.clone(),
            logits: if range.end == scheduled.tokens.len() { LogitRows::Last } else { LogitRows::None },
        })
    }

    /// Runs chunks in one step. When it fails they run one by one, so that only those at fault fail: rows do not depend on
    /// what else is in a batch, and writing the same keys and values again changes nothing.
    fn forward(&mut self, chunks: Vec<Chunk>) -> Vec<Result<Vec<f32>, EngineError>> {
        if chunks.is_empty() {
            return Vec::new();
        }
        let batch = Batch { chunks };
        let vocab_size = self.runner.info().vocab_size;
        let result = guarded(|| {
            let logits = self.runner.step(&batch, &mut NoTap)?.logits;
            let wanted = batch.chunks.iter().map(|c| if c.logits == LogitRows::None { 0 } else { vocab_size });
            if logits.iter().map(Vec::len).eq(wanted) {
                Ok(logits)
            } else {
                Err(EngineError::Internal("the model returned other rows of logits than were asked for".into()))
            }
        });
        match result {
            Ok(logits) => logits.into_iter().map(Ok).collect(),
            Err(error) if batch.chunks.len() == 1 => vec![Err(error)],
            Err(_) => batch.chunks.into_iter().flat_map(|chunk| self.forward(vec![chunk])).collect(),
        }
    }

    /// `computed` tokens of the sequence are in the cache; the logits of the last one are there if it was the last.
    fn advance(&mut self, id: u64, computed: usize, mut logits: Vec<f32>) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let total = sequence.prompt().input_ids.len();
        if computed <= total {
            sequence.events().stage(Stage::Prefill { done: computed, total });
        }
        if computed >= total {
            unpin(sequence, &mut self.features, &mut *self.runner);
        }
        if logits.is_empty() {
            return;
        }
        let token = sequence.sample(&mut logits);
        let finished = sequence.push(token);
        self.shared.count_token();
        match finished {
            Err(error) => self.fail(id, error),
            Ok(None) => self.scheduler.append(id, token),
            Ok(Some(reason)) => {
                if let Some(sequence) = self.forget(id) {
                    sequence.finish(reason);
                }
            }
        }
    }

    fn fail(&mut self, id: u64, error: EngineError) {
        if let Some(sequence) = self.forget(id) {
            let error = self.shared.why(sequence.events(), error);
            sequence.fail(error);
        }
    }

    /// Frees all that a sequence holds; the numbers tell so before its reader hears of the end.
    fn forget(&mut self, id: u64) -> Option<Sequence> {
        self.scheduler.remove(id);
        let mut sequence = self.sequences.remove(&id)?;
        unpin(&mut sequence, &mut self.features, &mut *self.runner);
        self.publish();
        Some(sequence)
    }

    fn publish(&mut self) {
        let mut stats = self.shared.stats();
        stats.running = self.scheduler.num_running();
        stats.free_blocks = self.scheduler.blocks.num_free();
        stats.num_blocks = self.scheduler.blocks.num_blocks();
        stats.feature_bytes = self.features.bytes();
    }
}

/// Encodes the media that tokens from `start` on need and that are not in the cache.
fn encode_media(
    sequence: &mut Sequence,
    start: usize,
    features: &mut FeatureCache,
    runner: &mut dyn Runner,
    shared: &Shared,
) -> Result<(), EngineError> {
    for (index, key) in sequence.media_from(start) {
        if sequence.pinned.iter().any(|(pinned, ..)| *pinned == index) {
            continue;
        }
        sequence.clock().lap(|timings| &mut timings.prefill);
        let media = Arc::clone(&sequence.media()[index]);
        let events = sequence.events();
        let feature = features.acquire(key, runner, |runner| encode(runner, &media, index, events, shared))?;
        sequence.pinned.push((index, key, feature));
        let rows = runner.feature_rows(feature);
        let fits = |span: &FeatureSpan| span.media != index || span.row + span.len <= rows;
        if !sequence.prompt().features.iter().all(fits) {
            return Err(
                ModelError::Media(format!("media {index} gave {rows} rows of features, its prompt has more")).into()
            );
        }
        sequence.clock().lap(|timings| &mut timings.vision);
    }
    Ok(())
}

fn encode(
    runner: &mut dyn Runner,
    media: &Media,
    index: usize,
    events: &EventSender,
    shared: &Shared,
) -> Result<FeatureId, EngineError> {
    let mut progress = |done: u64, total: u64| {
        let fraction = (done as f64 / total.max(1) as f64).min(1.0) as f32;
        events.stage(Stage::Vision { index, fraction });
        !events.cancelled() && !shared.stopping()
    };
    guarded(|| Ok(runner.encode(media.kind, &media.patches, &mut NoTap, &mut progress)?))
}

fn unpin(sequence: &mut Sequence, features: &mut FeatureCache, runner: &mut dyn Runner) {
    for (_, key, _) in sequence.pinned.drain(..) {
        features.release(&key, runner);
    }
}

/// Runs code that is not ours to trust with the thread: a panic is this request's error. Blocks and features are only
/// shared after what filled them has returned, so what a panic leaves half done is never read.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        Err(EngineError::Internal(format!("panicked: {}", said.unwrap_or("(no message)"))))
    })
}

impl Drop for Worker {
    /// However the thread ends, nobody waits for it.
    fn drop(&mut self) {
        self.shared.stop();
    }
}
