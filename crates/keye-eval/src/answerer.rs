//! Who answers.

use keye_engine::{Engine, Event, FinishReason, Request, SamplingParams};
use keye_media::{ItemOptions, Loader, MediaItem};
use keye_processor::{Answer, Conversation, ThinkMode};

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

/// What was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The answer proper: what a model thinks before it is no part of it.
    pub text: String,
    /// Whether it was ended by a limit before the model ended it.
    pub cut: bool,
}

impl Reply {
    /// Of an answer in its parts: what it puts into a box, else all that is not thought.
    fn new(answer: Answer, reason: &FinishReason) -> Self {
        Self { text: answer.boxed.unwrap_or(answer.answer), cut: *reason == FinishReason::Length }
    }
}

/// Something that answers questions; asked from several threads at once.
pub trait Answerer: Sync {
    /// The answer to a question about a clip, or about nothing.
    ///
    /// # Errors
    /// When there is none.
    fn answer(&self, media: Option<MediaItem>, question: &str) -> Result<Reply, AnswerError>;
}

/// An engine that answers greedily.
pub struct EngineAnswerer<'a> {
    engine: &'a Engine,
    /// Counts the tokens that a clip has with slow and fast frames.
    budget: Option<Loader>,
    think: ThinkMode,
    max_tokens: usize,
}

/// Longest answer in tokens, unless another is asked for: dense captions of the longest clips.
pub const MAX_TOKENS: usize = 512;
/// Pixels of a token.
const TOKEN_PIXELS: u64 = 28 * 28;

impl<'a> EngineAnswerer<'a> {
    /// Asks `engine`. Whether to think is left to the model: `/no_think` behind a question is noise to models that were not
    /// trained with it, keye-nano among them.
    pub fn new(engine: &'a Engine) -> Self {
        Self { engine, budget: None, think: ThinkMode::Auto, max_tokens: MAX_TOKENS }
    }

    /// Asks for thinking or none, and ends answers after `max_tokens`, thinking included.
    pub fn with_thinking(self, think: ThinkMode, max_tokens: usize) -> Self {
        Self { think, max_tokens, ..self }
    }

    /// Gives every clip as many tokens as `loader` gives it with slow and fast frames. For comparison: the engine's own
    /// loader is then to be one that makes all frames slow.
    pub fn with_budget_of(self, loader: Loader) -> Self {
        Self { budget: Some(loader), ..self }
    }
}

impl Answerer for EngineAnswerer<'_> {
    fn answer(&self, media: Option<MediaItem>, question: &str) -> Result<Reply, AnswerError> {
        let mut media = media;
        if let (Some(loader), Some(item)) = (&self.budget, &mut media) {
            let tokens = loader.load(item, &mut |_| true)?.patches.len() as u64 / 4;
            item.options = ItemOptions { video_total_pixels: Some(tokens * TOKEN_PIXELS), ..item.options.clone() };
        }
        let mut conversation = Conversation::new();
        conversation.push_user(media.into_iter().collect(), question);
        let sampling = SamplingParams { max_tokens: self.max_tokens, ..SamplingParams::default() };
        let request = Request { conversation, sampling, think: self.think, ..Request::default() };
        for event in self.engine.submit(request)? {
            match event {
                Event::Finished { answer, reason, .. } => return Ok(Reply::new(answer, &reason)),
                Event::Failed(error) => return Err(error.into()),
                Event::Stage(_) | Event::Thinking(_) | Event::Token { .. } => {}
            }
        }
        Err(AnswerError::Stopped)
    }
}

#[cfg(test)]
mod tests {
    use keye_processor::parse_answer;

    use super::*;

    #[test]
    fn thoughts_are_no_part_of_the_answer() {
        let plain = "<|clip_time_start|>[0.5, 2.0]<|clip_time_end|>";
        for (text, answer) in [
            (plain, plain),
            (
                "<analysis>Times 1 and 2. Therefore, /no_think mode is more appropriate.</analysis>[0.5, 2.0]",
                "[0.5, 2.0]",
            ),
            ("<think>At 1.0 it is red,\nat 3.0 blue.</think>\n<answer>blue</answer>", "blue"),
            ("<think>A or B?</think><answer>It is \\boxed{B}.</answer>", "B"),
            ("<think>Red, or is it", ""),
        ] {
            let reply = Reply::new(parse_answer(text), &FinishReason::Stop);
            assert_eq!(reply, Reply { text: answer.into(), cut: false });
        }
        assert!(Reply::new(parse_answer("red ring"), &FinishReason::Length).cut);
    }
}
