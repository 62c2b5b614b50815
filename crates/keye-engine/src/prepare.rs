//! The thread that turns requests into prompts: media are fetched and decoded here, so that generation never waits for
//! them.

use std::sync::Arc;

use keye_media::{Loader, Media};
use keye_processor::{Processor, Prompt};

use crate::engine::{Shared, Submission};
use crate::event::EventSender;
use crate::media_cache::MediaCache;
use crate::sequence::{Clock, Detokenizer, PreparedRequest};
use crate::worker::guarded;
use crate::{EngineError, Event, Request, Stage};

/// Requests prepared ahead of the model; more would only hold decoded media in memory.
const AHEAD: usize = 1;

pub(crate) struct Preparer {
    processor: Arc<Processor>,
    loader: Loader,
    shared: Arc<Shared>,
    media: MediaCache,
    end_tokens: Arc<[u32]>,
}

impl Preparer {
    pub fn new(processor: Arc<Processor>, loader: Loader, shared: Arc<Shared>, media_cache_bytes: usize) -> Self {
        // generation_config.json has the tokens to stop at and config.json the one of the model; each knows some.
        let end_tokens =
            processor.generation.eos_token_id.iter().chain(&processor.config.eos_token_id).copied().collect();
        Self { processor, loader, shared, media: MediaCache::new(media_cache_bytes), end_tokens }
    }

    /// Works until the engine stops.
    pub fn run(mut self) {
        while let Some(Submission { request, events, mut clock, place }) = self.shared.submissions.pop() {
            clock.lap(|timings| &mut timings.queued);
            match guarded(|| self.prepare(&request, &events, &mut clock)) {
                Ok((prompt, media, detokenize)) => {
                    let sampling = request.sampling;
                    let end_tokens = Arc::clone(&self.end_tokens);
                    let place = Some(place);
                    let prepared =
                        PreparedRequest { prompt, media, sampling, end_tokens, detokenize, events, clock, place };
                    let given_up = |prepared: &PreparedRequest| prepared.events.cancelled();
                    if let Err(prepared) = self.shared.prepared.push_when(AHEAD, prepared, given_up) {
                        let error = self.shared.why(&prepared.events, EngineError::Stopped);
                        prepared.fail(error);
                    }
                }
                Err(error) => {
                    drop(place);
                    let error = self.shared.why(&events, error);
                    events.end(Event::Failed(error));
                }
            }
        }
    }

    fn prepare(
        &mut self,
        request: &Request,
        events: &EventSender,
        clock: &mut Clock,
    ) -> Result<(Prompt, Vec<Arc<Media>>, Detokenizer), EngineError> {
        let mut media = Vec::new();
        for (index, item) in request.conversation.media().iter().enumerate() {
            let shared = &self.shared;
            let mut progress = |progress| {
                events.stage(Stage::Media { index, progress });
                !events.cancelled() && !shared.stopping()
            };
            media.push(self.media.load(&self.loader, item, &mut progress)?);
        }
        if events.cancelled() {
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
        let mut decoder = self.processor.tokenizer.stream(request.sampling.skip_special_tokens);
        let detokenize: Detokenizer = Box::new(move |token| match token {
            Some(id) => decoder.push(id),
            None => Ok(decoder.finish()),
        });
        Ok((prompt, media, detokenize))
    }
}
