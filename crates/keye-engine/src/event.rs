//! What a request streams back.

use std::sync::mpsc::Receiver;
use std::time::Duration;

use keye_processor::Answer;

use crate::EngineError;

/// Work that is going on before tokens come.
#[derive(Debug, Clone, PartialEq)]
pub enum Stage {
    /// Waiting for its turn.
    Queued,
    /// Fetching or decoding media number `index` (0-based).
    Media {
        /// Which.
        index: usize,
        /// How far.
        progress: keye_media::Progress,
    },
    /// Media `index` is decoded.
    MediaReady {
        /// Which.
        index: usize,
        /// Frames shown to the model.
        frames: usize,
        /// Of them slow.
        slow_frames: usize,
        /// Patches.
        patches: usize,
        /// Tokens in the prompt.
        tokens: usize,
        /// Seconds of vision work expected, when known; 0 when its features are cached.
        estimate: Option<f64>,
    },
    /// Vision tower at work on media `index`.
    Vision {
        /// Which.
        index: usize,
        /// 0..=1.
        fraction: f32,
    },
    /// Prompt tokens processed.
    Prefill {
        /// So far, cached ones included.
        done: usize,
        /// In all.
        total: usize,
    },
}

/// Token counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Usage {
    /// Prompt tokens, media included.
    pub prompt_tokens: usize,
    /// Of them taken from the cache.
    pub cached_tokens: usize,
    /// Of them media tokens.
    pub media_tokens: usize,
    /// Generated tokens, the end token included.
    pub completion_tokens: usize,
}

/// Wall-clock times of a request's stages.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Timings {
    /// Waiting in queues.
    pub queued: Duration,
    /// Fetching, decoding, resizing.
    pub media: Duration,
    /// Vision tower and projector.
    pub vision: Duration,
    /// Prompt.
    pub prefill: Duration,
    /// Generation, first token excluded.
    pub decode: Duration,
    /// From submission to the first token.
    pub first_token: Duration,
    /// Submission to end.
    pub total: Duration,
}

/// Why generation ended.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_tokens`, or the model's longest sequence.
    Length,
}

/// One thing that happened to a request.
#[derive(Debug)]
pub enum Event {
    /// Work before the first token.
    Stage(Stage),
    /// A generated token. `text` is what it adds to the answer; it may be empty while a character is incomplete or while a
    /// stop string may be forming.
    Token {
        /// Token id.
        id: u32,
        /// New text.
        text: String,
    },
    /// The end. `text` is the whole answer.
    Finished {
        /// Why.
        reason: FinishReason,
        /// All of the text.
        text: String,
        /// Its parts.
        answer: Answer,
        /// Counts.
        usage: Usage,
        /// Times.
        timings: Timings,
    },
    /// The request failed; nothing follows.
    Failed(EngineError),
}

/// The events of one request, in order. Dropping it cancels the request.
pub struct EventStream {
    pub(crate) receiver: Receiver<Event>,
}

impl Iterator for EventStream {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.receiver.recv().ok()
    }
}
