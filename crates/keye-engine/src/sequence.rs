//! A request on its way through the engine: its tokens become text until something ends it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use keye_media::Media;
use keye_model::{FeatureId, FeatureRows, LogitRows};
use keye_processor::{
    FeatureSpan, ProcessorError, Prompt, Thinking, parse_answer, parse_formed_answer, parse_opened_answer,
};

use crate::block_manager::ContentSpan;
use crate::constraint::{Constraint, forbid};
use crate::embedding::Pool;
use crate::event::EventSender;
use crate::feature_cache::{FeatureKey, feature_key};
use crate::guesser::Guesser;
use crate::sampling::logprobs;
use crate::stop::StopMatcher;
use crate::{EngineError, Event, FinishReason, Pooling, SamplingParams, Timings, TokenLogprob, Usage};

/// Ids to text as they come; `None` is the end and gives what was kept for an incomplete character.
pub(crate) type Detokenizer = Box<dyn FnMut(Option<u32>) -> Result<String, ProcessorError> + Send>;

/// Media decoded, prompt written: all that generation needs.
pub(crate) struct PreparedRequest {
    /// Number of its arrival.
    pub order: u64,
    pub prompt: Arc<Prompt>,
    /// What [`Prompt::features`] counts.
    pub media: Vec<Arc<Media>>,
    /// What is to be said of each of them.
    pub warnings: Vec<Arc<[String]>>,
    pub sampling: SamplingParams,
    /// The checkpoint's end tokens.
    pub end_tokens: Arc<[u32]>,
    pub detokenize: Detokenizer,
    pub events: EventSender,
    pub clock: Clock,
    pub place: Option<Place>,
    /// Most likely tokens to tell of with each token.
    pub logprobs: Option<usize>,
    /// What may be said.
    pub constraint: Option<Constraint>,
    /// The prompt is to become a vector; nothing is generated.
    pub pool: Option<Pool>,
    /// The same prompt with other seeds.
    pub siblings: Vec<PreparedRequest>,
}

/// A place in the engine's queue, given up when dropped.
pub(crate) struct Place(Arc<AtomicUsize>);

impl Place {
    /// `n` places, unless fewer than that are left of `max`.
    pub fn take_many(taken: &Arc<AtomicUsize>, n: usize, max: usize) -> Option<Vec<Self>> {
        let more = |taken: usize| taken.checked_add(n).filter(|taken| *taken <= max);
        taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok()?;
        Some((0..n).map(|_| Self(Arc::clone(taken))).collect())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Splits a request's time into its stages.
#[derive(Clone)]
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

/// Features in use: those of which media of the prompt, and where they are.
pub(crate) type Pin = (usize, FeatureKey, FeatureId);

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
    guesser: Guesser,
    /// Features in use.
    pub pinned: Vec<Pin>,
}

impl Sequence {
    /// `None` when the request cannot be run within `max_model_len` tokens; its stream has been told.
    pub fn new(mut request: PreparedRequest, max_model_len: usize) -> Option<Self> {
        if let Err(error) = check(&request, max_model_len) {
            let siblings = std::mem::take(&mut request.siblings);
            siblings.into_iter().for_each(|sibling| drop(Self::new(sibling, max_model_len)));
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
            guesser: Guesser::default(),
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

    /// What is to be said of one of the media.
    pub fn warnings(&self, index: usize) -> Arc<[String]> {
        self.request.warnings.get(index).cloned().unwrap_or_default()
    }

    pub fn events(&self) -> &EventSender {
        &self.request.events
    }

    /// The requests with the same prompt, once.
    pub fn take_siblings(&mut self) -> Vec<PreparedRequest> {
        std::mem::take(&mut self.request.siblings)
    }

    pub fn clock(&mut self) -> &mut Clock {
        &mut self.request.clock
    }

    /// It leaves the queue; `cached` prompt tokens need not be computed. True the first time.
    pub fn admitted(&mut self, cached: usize) -> bool {
        if std::mem::replace(&mut self.started, true) {
            return false;
        }
        self.request.place = None;
        self.usage.cached_tokens = cached;
        self.request.clock.lap(|timings| &mut timings.queued);
        true
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

    /// Which rows of a step over tokens `start..end` it needs, `guessed` tokens after them included.
    pub fn rows(&self, start: usize, end: usize, total: usize, guessed: usize) -> LogitRows {
        let n = end - start;
        match &self.request.pool {
            Some(pool) if pool.pooling == Pooling::Mean => LogitRows::Hidden(0..n),
            Some(_) if end == total => LogitRows::Hidden(n - 1..n),
            None if guessed > 0 => LogitRows::Range(n - 1..n + guessed),
            None if end == total => self.deciding().map_or(LogitRows::Last, LogitRows::Highest),
            _ => LogitRows::None,
        }
    }

    /// How many of the highest logits the next token is chosen from; `None`: all of them matter.
    fn deciding(&self) -> Option<usize> {
        let whole = self.request.constraint.is_some() || self.request.logprobs.is_some();
        if whole { None } else { self.request.sampling.deciding() }
    }

    /// For a prompt that becomes a vector.
    pub fn pool(&mut self) -> Option<&mut Pool> {
        self.request.pool.as_mut()
    }

    /// Its prompt may not be taken from the cache: every token's hidden state is needed.
    pub fn needs_all_rows(&self) -> bool {
        self.request.pool.as_ref().is_some_and(|pool| pool.pooling == Pooling::Mean)
    }

    /// Tokens that may come next, at most `max`.
    pub fn guess(&mut self, max: usize) -> Vec<u32> {
        let max = max.min(self.limit.saturating_sub(self.generated.len() + 1));
        self.guesser.guess(&self.request.prompt.input_ids, &self.generated, max)
    }

    /// How many of `proposed` guesses were right.
    pub fn guessed(&mut self, proposed: usize, accepted: usize) {
        self.guesser.learn(proposed, accepted);
    }

    /// The next token, and how likely it was if that is asked for. The logits are overwritten.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<(u32, Option<TokenLogprob>), EngineError> {
        let raw = self.request.logprobs.map(|_| logits.to_vec());
        let token = match &mut self.request.constraint {
            None => choose(logits, &self.request.sampling, &self.request.prompt, &self.generated),
            Some(constraint) => {
                constraint.restrict(logits)?;
                loop {
                    // Penalties overwrite the logits.
                    let mut draft = logits.to_vec();
                    let token = choose(&mut draft, &self.request.sampling, &self.request.prompt, &self.generated);
                    if constraint.accepts(token) || logits[token as usize] == f32::NEG_INFINITY {
                        break token;
                    }
                    forbid(logits, token);
                }
            }
        };
        let logprob = self.request.logprobs.zip(raw).map(|(k, raw)| logprobs(&raw, token, k));
        Ok((token, logprob))
    }

    /// Takes a token; streams its text. Says why the answer ends with it, if it does.
    pub fn push(&mut self, token: u32, logprob: Option<TokenLogprob>) -> Result<Option<FinishReason>, EngineError> {
        let clock = &mut self.request.clock;
        if self.generated.is_empty() {
            clock.lap(|timings| &mut timings.prefill);
            clock.timings.first_token = clock.submitted.elapsed();
        } else {
            clock.lap(|timings| &mut timings.decode);
        }
        self.generated.push(token);
        let sampling = &self.request.sampling;
        let over = self.request.constraint.as_mut().map_or(Ok(false), |constraint| constraint.push(token))?;
        let end_token = self.request.end_tokens.contains(&token);
        // With a grammar an end token comes where the grammar ends.
        let end = sampling.stop_token_ids.contains(&token) || (end_token && (over || !sampling.ignore_eos));
        let over = over && !end;
        let full = self.generated.len() >= self.limit;
        let mut text = if end { String::new() } else { (self.request.detokenize)(Some(token))? };
        if end || over || full {
            text += &(self.request.detokenize)(None)?;
        }
        let (mut shown, stopped) = self.stop.push(&text);
        if (end || over || full) && !stopped {
            shown += &self.stop.finish();
        }
        self.text += &shown;
        self.request.events.token(token, shown, logprob);
        Ok(if end || over || stopped { Some(FinishReason::Stop) } else { full.then_some(FinishReason::Length) })
    }

    /// Sends the last event.
    pub fn finish(mut self, reason: FinishReason) {
        self.usage.completion_tokens = self.generated.len();
        let mut timings = self.request.clock.timings;
        timings.total = self.request.clock.submitted.elapsed();
        let has_form = self.request.constraint.as_ref().is_some_and(Constraint::has_form);
        let answer = match Thinking::of(&self.request.prompt.text).tag() {
            opened if has_form => parse_formed_answer(opened, &self.text),
            Some(tag) => parse_opened_answer(tag, &self.text),
            None => parse_answer(&self.text),
        };
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

    /// Nobody waits for it, nor for its siblings.
    pub fn cancelled(&self) -> bool {
        self.events.cancelled() && self.siblings.iter().all(Self::cancelled)
    }
}

/// One draw, by the rule of [`crate::sample`].
fn choose(logits: &mut [f32], params: &SamplingParams, prompt: &Prompt, generated: &[u32]) -> u32 {
    crate::sample(logits, params, &prompt.input_ids, generated, generated.len() as u64)
}

/// A prompt has to be whole and to leave room for an answer, if there is to be one.
fn check(request: &PreparedRequest, max_model_len: usize) -> Result<(), EngineError> {
    let (prompt, media) = (&request.prompt, request.media.len());
    let tokens = prompt.input_ids.len();
    let answer = usize::from(request.pool.is_none());
    if tokens + answer > max_model_len {
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
