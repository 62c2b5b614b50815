//! A request on its way through the engine: its tokens become text until something ends it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use keye_media::Media;
use keye_model::{FeatureId, FeatureRows};
use keye_processor::{FeatureSpan, ProcessorError, Prompt, parse_answer};

use crate::block_manager::ContentSpan;
use crate::event::EventSender;
use crate::feature_cache::{FeatureKey, feature_key};
use crate::stop::StopMatcher;
use crate::{EngineError, Event, FinishReason, SamplingParams, Timings, Usage};

/// Ids to text as they come; `None` is the end and gives what was kept for an incomplete character.
pub(crate) type Detokenizer = Box<dyn FnMut(Option<u32>) -> Result<String, ProcessorError> + Send>;

/// Media decoded, prompt written: all that generation needs.
pub(crate) struct PreparedRequest {
    pub prompt: Prompt,
    /// What [`Prompt::features`] counts.
    pub media: Vec<Arc<Media>>,
    pub sampling: SamplingParams,
    /// The checkpoint's end tokens.
    pub end_tokens: Arc<[u32]>,
    pub detokenize: Detokenizer,
    pub events: EventSender,
    pub clock: Clock,
    pub place: Option<Place>,
}

/// A place in the engine's queue, given up when dropped.
pub(crate) struct Place(Arc<AtomicUsize>);

impl Place {
    /// A place, unless `max` are taken.
    pub fn take(taken: &Arc<AtomicUsize>, max: usize) -> Option<Self> {
        let more = |taken: usize| (taken < max).then_some(taken + 1);
        taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok()?;
        Some(Self(Arc::clone(taken)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Splits a request's time into its stages.
pub(crate) struct Clock {
    submitted: Instant,
    lap: Instant,
    pub timings: Timings,
}

impl Clock {
    pub fn start() -> Self {
        let now = Instant::now();
        Self { submitted: now, lap: now, timings: Timings::default() }
    }

    /// The time since the last lap was spent on `stage`.
    pub fn lap(&mut self, stage: impl FnOnce(&mut Timings) -> &mut Duration) {
        let now = Instant::now();
        *stage(&mut self.timings) += now.duration_since(std::mem::replace(&mut self.lap, now));
    }
}

/// A request that generates or is about to.
pub(crate) struct Sequence {
    request: PreparedRequest,
    /// Most tokens to generate.
    limit: usize,
    generated: Vec<u32>,
    stop: StopMatcher,
    text: String,
    usage: Usage,
    started: bool,
    /// Features in use.
    pub pinned: Vec<(usize, FeatureKey, FeatureId)>,
}

impl Sequence {
    /// `None` when the request cannot be run within `max_model_len` tokens; its stream has been told.
    pub fn new(request: PreparedRequest, max_model_len: usize) -> Option<Self> {
        if let Err(error) = check(&request.prompt, request.media.len(), max_model_len) {
            request.fail(error);
            return None;
        }
        let prompt_tokens = request.prompt.input_ids.len();
        let usage = Usage {
            prompt_tokens,
            media_tokens: request.prompt.features.iter().map(|span| span.len).sum(),
            ..Usage::default()
        };
        Some(Self {
            limit: request.sampling.max_tokens.min(max_model_len - prompt_tokens),
            generated: Vec::new(),
            stop: StopMatcher::new(&request.sampling.stop),
            text: String::new(),
            usage,
            started: false,
            pinned: Vec::new(),
            request,
        })
    }

    pub fn prompt(&self) -> &Prompt {
        &self.request.prompt
    }

    pub fn media(&self) -> &[Arc<Media>] {
        &self.request.media
    }

    pub fn events(&self) -> &EventSender {
        &self.request.events
    }

    pub fn clock(&mut self) -> &mut Clock {
        &mut self.request.clock
    }

    /// It leaves the queue; `cached` prompt tokens need not be computed.
    pub fn admitted(&mut self, cached: usize) {
        if !std::mem::replace(&mut self.started, true) {
            self.request.place = None;
            self.usage.cached_tokens = cached;
            self.request.clock.lap(|timings| &mut timings.queued);
        }
    }

    /// What stands behind the media tokens.
    pub fn content(&self) -> Vec<ContentSpan> {
        let media = &self.request.media;
        let span = |span: &FeatureSpan| ContentSpan {
            start: span.start,
            len: span.len,
            hash: media[span.media].patches.hash,
            row: span.row,
        };
        self.request.prompt.features.iter().map(span).collect()
    }

    /// Position of token `index`: the prompt's, then (spec §6.2) `index + rope_delta` on all axes.
    pub fn position(&self, index: usize) -> [u32; 3] {
        let prompt = &self.request.prompt;
        match prompt.positions.get(index) {
            Some(position) => *position,
            None => [(index as i64 + prompt.rope_delta) as u32; 3],
        }
    }

    /// The media that tokens from `start` on take features of.
    pub fn media_from(&self, start: usize) -> Vec<(usize, FeatureKey)> {
        let mut needed: Vec<usize> =
            self.prompt().features.iter().filter(|span| span.start + span.len > start).map(|span| span.media).collect();
        needed.sort_unstable();
        needed.dedup();
        needed.into_iter().map(|media| (media, feature_key(&self.request.media[media]))).collect()
    }

    /// The feature rows that tokens `start..end` take, counted from `start`.
    pub fn feature_rows(&self, start: usize, end: usize) -> Vec<FeatureRows> {
        let rows = |span: &FeatureSpan| {
            let (from, to) = (span.start.max(start), (span.start + span.len).min(end));
            let (.., feature) = *self.pinned.iter().find(|(media, ..)| *media == span.media)?;
            (from < to).then(|| FeatureRows {
                at: from - start,
                feature,
                row: span.row + (from - span.start),
                len: to - from,
            })
        };
        self.prompt().features.iter().filter_map(rows).collect()
    }

    /// The next token.
    pub fn sample(&self, logits: &mut [f32]) -> u32 {
        let step = self.generated.len() as u64;
        crate::sample(logits, &self.request.sampling, &self.request.prompt.input_ids, &self.generated, step)
    }

    /// Takes a token; streams its text. Says why the answer ends with it, if it does.
    pub fn push(&mut self, token: u32) -> Result<Option<FinishReason>, EngineError> {
        let clock = &mut self.request.clock;
        if self.generated.is_empty() {
            clock.lap(|timings| &mut timings.prefill);
            clock.timings.first_token = clock.submitted.elapsed();
        } else {
            clock.lap(|timings| &mut timings.decode);
        }
        self.generated.push(token);
        let sampling = &self.request.sampling;
        let end = sampling.stop_token_ids.contains(&token)
            || (!sampling.ignore_eos && self.request.end_tokens.contains(&token));
        let full = self.generated.len() >= self.limit;
        let mut text = if end { String::new() } else { (self.request.detokenize)(Some(token))? };
        if end || full {
            text += &(self.request.detokenize)(None)?;
        }
        let (mut shown, stopped) = self.stop.push(&text);
        if (end || full) && !stopped {
            shown += &self.stop.finish();
        }
        self.text += &shown;
        self.request.events.token(token, shown, None);
        Ok(if end || stopped { Some(FinishReason::Stop) } else { full.then_some(FinishReason::Length) })
    }

    /// Sends the last event.
    pub fn finish(mut self, reason: FinishReason) {
        self.usage.completion_tokens = self.generated.len();
        let mut timings = self.request.clock.timings;
        timings.total = self.request.clock.submitted.elapsed();
        let answer = parse_answer(&self.text);
        let event = Event::Finished { reason, text: self.text, answer, usage: self.usage, timings };
        self.request.events.end(event);
    }

    /// Sends the last event of a request that failed.
    pub fn fail(self, error: EngineError) {
        self.request.fail(error);
    }
}

impl PreparedRequest {
    pub fn fail(self, error: EngineError) {
        self.events.end(Event::Failed(error));
    }
}

/// A prompt has to be whole and to leave room for an answer.
fn check(prompt: &Prompt, media: usize, max_model_len: usize) -> Result<(), EngineError> {
    let tokens = prompt.input_ids.len();
    if tokens >= max_model_len {
        return Err(EngineError::ContextLength { tokens, max: max_model_len });
    }
    let last_position = tokens as i64 + prompt.rope_delta;
    let spans_fit = prompt.features.iter().all(|span| {
        span.media < media
            && span.start.checked_add(span.len).is_some_and(|end| end <= tokens)
            && span.row <= usize::MAX / 2
    });
    let ordered = prompt.features.windows(2).all(|pair| pair[0].start + pair[0].len <= pair[1].start);
    if tokens == 0 || prompt.positions.len() != tokens || last_position < 0 || !spans_fit || !ordered {
        return Err(EngineError::Internal("the prompt's tokens, positions and media do not fit each other".into()));
    }
    Ok(())
}
