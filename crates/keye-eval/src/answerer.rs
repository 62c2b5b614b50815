//! Who answers.

use keye_engine::{Engine, Event, Request, SamplingParams};
use keye_media::{ItemOptions, Loader, MediaItem};
use keye_processor::Conversation;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The engine.
    #[error(transparent)]
    Engine(#[from] keye_engine::EngineError),
    /// The clip.
    #[error(transparent)]
    Media(#[from] keye_media::MediaError),
    /// The stream of events ended before the answer did.
    #[error("the engine stopped")]
    Stopped,
}

/// Something that answers questions; asked from several threads at once.
pub trait Answerer: Sync {
    /// The answer to a question about a clip, or about nothing.
    ///
    /// # Errors
    /// When there is none.
    fn answer(&self, media: Option<MediaItem>, question: &str) -> Result<String, AnswerError>;
}

/// An engine that answers greedily.
pub struct EngineAnswerer<'a> {
    engine: &'a Engine,
    /// Counts the tokens that a clip has with slow and fast frames.
    budget: Option<Loader>,
}

/// Longest answer in tokens: dense captions of the longest clips.
const MAX_TOKENS: usize = 512;
/// Pixels of a token.
const TOKEN_PIXELS: u64 = 28 * 28;

impl<'a> EngineAnswerer<'a> {
    /// Asks `engine`.
    pub fn new(engine: &'a Engine) -> Self {
        Self { engine, budget: None }
    }

    /// Gives every clip as many tokens as `loader` gives it with slow and fast frames. For comparison: the engine's own
    /// loader is then to be one that makes all frames slow.
    pub fn with_budget_of(self, loader: Loader) -> Self {
        Self { budget: Some(loader), ..self }
    }
}

impl Answerer for EngineAnswerer<'_> {
    fn answer(&self, media: Option<MediaItem>, question: &str) -> Result<String, AnswerError> {
        let mut media = media;
        if let (Some(loader), Some(item)) = (&self.budget, &mut media) {
            let tokens = loader.load(item, &mut |_| true)?.patches.len() as u64 / 4;
            item.options = ItemOptions { video_total_pixels: Some(tokens * TOKEN_PIXELS), ..item.options.clone() };
        }
        let mut conversation = Conversation::new();
        conversation.push_user(media.into_iter().collect(), question);
        let sampling = SamplingParams { max_tokens: MAX_TOKENS, ..SamplingParams::default() };
        for event in self.engine.submit(Request { conversation, sampling, ..Request::default() })? {
            match event {
                Event::Finished { text, .. } => return Ok(text),
                Event::Failed(error) => return Err(error.into()),
                Event::Stage(_) | Event::Thinking | Event::Token { .. } => {}
            }
        }
        Err(AnswerError::Stopped)
    }
}
