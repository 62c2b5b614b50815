//! The threads that turn requests into prompts: media are fetched and decoded here, so that generation never waits for
//! them. Requests without media have threads of their own and never wait behind others' media, nor plain text behind
//! others' grammars.

use std::collections::VecDeque;
use std::sync::Arc;

use keye_media::{Loader, Media};
use keye_processor::{Processor, Prompt, Thinking};

use crate::constraint::Constraint;
use crate::engine::{Branch, Shared, Submission};
use crate::event::EventSender;
use crate::grammar::GrammarCompiler;
use crate::media_cache::MediaCache;
use crate::queue::Queue;
use crate::sequence::{Clock, Detokenizer, PreparedRequest};
use crate::worker::guarded;
use crate::{EngineError, MediumError, Request, Stage};

/// Requests with media prepared ahead of the model, beside one in each thread's hands; more would only hold decoded media
/// in memory.
const AHEAD: usize = 1;

pub(crate) struct Preparer {
    processor: Arc<Processor>,
    loader: Loader,
    shared: Arc<Shared>,
    media: MediaCache,
    grammars: GrammarCompiler,
    end_tokens: Arc<[u32]>,
}

/// What the branches of a request share.
struct Prepared {
    prompt: Arc<Prompt>,
    media: Vec<Arc<Media>>,
    warnings: Vec<Arc<[String]>>,
    constraint: Option<Constraint>,
}

impl Preparer {
    pub fn new(processor: Arc<Processor>, loader: Loader, shared: Arc<Shared>, media_cache_bytes: usize) -> Self {
        // generation_config.json has the tokens to stop at and config.json the one of the model; each knows some.
        let end_tokens: Arc<[u32]> =
            processor.generation.eos_token_id.iter().chain(&processor.config.eos_token_id).copied().collect();
        let grammars = GrammarCompiler::new(processor.tokenizer.clone(), Arc::clone(&end_tokens));
        Self { processor, loader, shared, media: MediaCache::new(media_cache_bytes), grammars, end_tokens }
    }

    /// Works on one of the queues until the engine stops.
    pub fn run(&self, submissions: &Queue<Submission>) {
        while let Some(Submission { order, request, branches, mut clock, pool }) = submissions.pop() {
            clock.lap(|timings| &mut timings.queued);
            let prepared = guarded(|| self.prepare(&request, &branches, &mut clock));
            let prepared = match prepared {
                Ok(prepared) => prepared,
                Err(error) => {
                    self.fail(branches, &error);
                    continue;
                }
            };
            let mut requests = branches.into_iter().map(|Branch { seed, events, place }| PreparedRequest {
                order,
                prompt: Arc::clone(&prepared.prompt),
                media: prepared.media.clone(),
                warnings: prepared.warnings.clone(),
                sampling: crate::SamplingParams { seed, ..request.sampling.clone() },
                end_tokens: Arc::clone(&self.end_tokens),
                detokenize: self.detokenizer(&request),
                events,
                clock: clock.clone(),
                place: Some(place),
                logprobs: request.logprobs,
                constraint: prepared.constraint.clone(),
                pool: None,
                siblings: Vec::new(),
            });
            let Some(mut first) = requests.next() else { continue };
            first.siblings = requests.collect();
            first.pool = pool;
            self.hand_on(first);
        }
    }

    /// Puts a request into the model's queue, in order of arrival.
    fn hand_on(&self, request: PreparedRequest) {
        let has_media = !request.media.is_empty();
        let with_media = |items: &VecDeque<PreparedRequest>| items.iter().filter(|r| !r.media.is_empty()).count();
        let room = |items: &VecDeque<PreparedRequest>| !has_media || with_media(items) < AHEAD;
        let after = |other: &PreparedRequest, this: &PreparedRequest| other.order > this.order;
        if let Err(mut request) = self.shared.prepared.insert_when(request, room, after, PreparedRequest::cancelled) {
            for request in std::mem::take(&mut request.siblings).into_iter().chain([request]) {
                let error = self.shared.why(&request.events, EngineError::Stopped);
                request.fail(error);
            }
        }
    }

    /// Tells all branches.
    fn fail(&self, branches: Vec<Branch>, error: &EngineError) {
        for Branch { events, place, .. } in branches {
            drop(place);
            let error = self.shared.why(&events, error.clone());
            events.end(crate::Event::Failed(error));
        }
    }

    fn prepare(&self, request: &Request, branches: &[Branch], clock: &mut Clock) -> Result<Prepared, EngineError> {
        let shared = &self.shared;
        let give_up = || shared.stopping() || branches.iter().all(|branch| branch.events.cancelled());
        let matcher = request.grammar.as_ref().map(|grammar| self.grammars.compile(grammar, &give_up));
        let matcher = matcher.transpose()?;
        let (mut media, mut warnings, mut tokens) = (Vec::new(), Vec::new(), 0);
        let of = request.conversation.media().len();
        for (index, item) in request.conversation.media().iter().enumerate() {
            let mut progress = |progress: keye_media::Progress| {
                let tell = |events: &EventSender| events.stage(Stage::Media { index, progress: progress.clone() });
                branches.iter().for_each(|branch| tell(&branch.events));
                !give_up()
            };
            let loaded = self.media.load(&self.loader, item, &mut progress, &give_up);
            let (loaded, hit) = loaded.map_err(|error| MediumError { index, of, error: Arc::new(error) })?;
            let mut stats = shared.stats();
            *(if hit { &mut stats.media_hits } else { &mut stats.media_misses }) += 1;
            // Many media that could never be answered about are not held until the prompt is made.
            tokens += loaded.media.patches.len() / self.processor.config.vision.spatial_merge_size.pow(2).max(1);
            if tokens >= shared.max_model_len {
                return Err(EngineError::ContextLength { tokens, max: shared.max_model_len });
            }
            media.push(loaded.media);
            warnings.push(loaded.warnings);
        }
        if give_up() {
            return Err(EngineError::Cancelled);
        }
        let borrowed: Vec<&Media> = media.iter().map(Arc::as_ref).collect();
        let prompt = match &request.raw_prompt {
            Some(text) => self.processor.raw_prompt(text.clone(), &borrowed)?,
            None => {
                let conversation = request.conversation.with_think(request.think);
                self.processor.prompt(&conversation, &borrowed, &request.template)?
            }
        };
        clock.lap(|timings| &mut timings.media);
        if let Some(tag) = Thinking::of(&prompt.text).tag() {
            branches.iter().for_each(|branch| branch.events.thinking(tag));
        }
        let constraint = (matcher.is_some() || request.max_reasoning_tokens.is_some()).then(|| {
            let (tokenizer, end_tokens) = (self.processor.tokenizer.clone(), Arc::clone(&self.end_tokens));
            let (think, budget) = (request.think, request.max_reasoning_tokens);
            Constraint::new(tokenizer, matcher, end_tokens, think, &prompt.text, budget)
        });
        Ok(Prepared { prompt: Arc::new(prompt), media, warnings, constraint })
    }

    fn detokenizer(&self, request: &Request) -> Detokenizer {
        let mut decoder = self.processor.tokenizer.stream(request.sampling.skip_special_tokens);
        Box::new(move |token| match token {
            Some(id) => decoder.push(id),
            None => Ok(decoder.finish()),
        })
    }
}
