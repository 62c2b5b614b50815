//! What a request streams back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use keye_processor::{Answer, ThinkTag};

use crate::EngineError;
use crate::queue::{Queue, Timeout};

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
        /// The frames as the model sees them, in time order; one for a picture.
        shown: Arc<[keye_media::Frame]>,
        /// Seconds of vision tower and prompt expected, when known; 0 when its features are cached.
        estimate: Option<f64>,
        /// What whoever asked should hear: that a clip is cut short or damaged. Sentences without the medium's name.
        warnings: Arc<[String]>,
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

/// How likely a token was: natural logarithms of the model's own probabilities, before penalties, temperature and grammar.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The token's.
    pub logprob: f32,
    /// The most likely tokens and theirs, most likely first, of equal ones the lowest id first.
    pub top: Vec<(u32, f32)>,
}

/// One thing that happened to a request.
#[derive(Debug)]
pub enum Event {
    /// Work before the first token.
    Stage(Stage),
    /// The prompt has opened this tag: the text of the tokens begins inside thinking. At most once, before the first token.
    Thinking(ThinkTag),
    /// A generated token. `text` is what it adds to the answer; it may be empty while a character is incomplete or while a
    /// stop string may be forming.
    Token {
        /// Token id.
        id: u32,
        /// New text.
        text: String,
        /// How likely it was, when the request asked.
        logprob: Option<TokenLogprob>,
    },
    /// The end. `text` is the whole answer.
    Finished {
        /// Why.
        reason: FinishReason,
        /// All of the text.
        text: String,
        /// Its parts. Text of a [`Grammar`](crate::Grammar) is in `answer` as it is.
        answer: Answer,
        /// Counts.
        usage: Usage,
        /// Times.
        timings: Timings,
    },
    /// The request failed; nothing follows.
    Failed(EngineError),
}

/// The events of one request, in order; the last is [`Event::Finished`] or [`Event::Failed`]. Dropping it cancels the
/// request.
///
/// A slow reader stalls nobody, and what waits for it is bounded by its own request: a [`Stage`] takes the place of an
/// unread one of the same kind, and there are at most `max_tokens` tokens.
pub struct EventStream {
    channel: Arc<Channel>,
}

/// Cancels a request from elsewhere, such as a signal handler's thread. The stream then ends with
/// [`EngineError::Cancelled`].
#[derive(Clone)]
pub struct Canceller {
    channel: Arc<Channel>,
}

/// The engine's end.
pub(crate) struct EventSender {
    channel: Arc<Channel>,
    ended: bool,
}

struct Channel {
    events: Queue<Event>,
    cancelled: AtomicBool,
}

pub(crate) fn event_channel() -> (EventSender, EventStream) {
    let channel = Arc::new(Channel { events: Queue::new(), cancelled: AtomicBool::new(false) });
    (EventSender { channel: Arc::clone(&channel), ended: false }, EventStream { channel })
}

impl EventStream {
    /// Waits for the next event for at most `timeout`: `Ok(None)` is the end of the stream, `Err` that nothing came.
    pub fn next_timeout(&mut self, timeout: Duration) -> Result<Option<Event>, NothingYet> {
        self.channel.events.pop_timeout(timeout).map_err(|Timeout| NothingYet)
    }

    /// A handle that cancels this request.
    pub fn canceller(&self) -> Canceller {
        Canceller { channel: Arc::clone(&self.channel) }
    }
}

/// No event came in the time given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no event yet")]
pub struct NothingYet;

impl Iterator for EventStream {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.channel.events.pop()
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.channel.cancelled.store(true, Ordering::Release);
        self.channel.events.close();
        self.channel.events.retain(|_| false);
    }
}

impl Canceller {
    /// Ends the request as soon as the engine looks: between steps, and within media decoding and the vision tower.
    pub fn cancel(&self) {
        self.channel.cancelled.store(true, Ordering::Release);
    }
}

impl EventSender {
    pub fn cancelled(&self) -> bool {
        self.channel.cancelled.load(Ordering::Acquire)
    }

    pub fn stage(&self, stage: Stage) {
        let same = |last: &Event| matches!(last, Event::Stage(last) if last.updates() == stage.updates());
        let event = Event::Stage(stage.clone());
        self.channel.events.push_or_replace(event, same);
    }

    pub fn thinking(&self, tag: ThinkTag) {
        let _ = self.channel.events.push(Event::Thinking(tag));
    }

    pub fn token(&self, id: u32, text: String, logprob: Option<TokenLogprob>) {
        // A closed channel is a cancelled request, which is noticed elsewhere.
        let _ = self.channel.events.push(Event::Token { id, text, logprob });
    }

    /// The last event.
    pub fn end(mut self, event: Event) {
        self.ended = true;
        let _ = self.channel.events.push(event);
    }
}

impl Drop for EventSender {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.channel.events.push(Event::Failed(EngineError::Stopped));
        }
        self.channel.events.close();
    }
}

impl Stage {
    /// Stages with equal values tell of the same work at different times.
    fn updates(&self) -> (std::mem::Discriminant<Self>, usize) {
        let index = match self {
            Self::Queued | Self::Prefill { .. } => 0,
            Self::Media { index, .. } | Self::MediaReady { index, .. } | Self::Vision { index, .. } => *index,
        };
        (std::mem::discriminant(self), index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unread_progress_is_replaced_by_newer_of_its_kind_only() {
        let (sender, mut stream) = event_channel();
        for index in [0, 1] {
            for part in 0..1000 {
                sender.stage(Stage::Vision { index, fraction: part as f32 });
            }
        }
        sender.token(7, "x".into(), None);
        sender.stage(Stage::Vision { index: 1, fraction: 1.0 });
        drop(sender);
        let seen: Vec<Event> = stream.by_ref().collect();
        assert!(matches!(seen[0], Event::Stage(Stage::Vision { index: 0, fraction: 999.0 })));
        assert!(matches!(seen[1], Event::Stage(Stage::Vision { index: 1, fraction: 999.0 })));
        assert!(matches!(seen[2], Event::Token { id: 7, .. }));
        assert!(matches!(seen[3], Event::Stage(Stage::Vision { index: 1, fraction: 1.0 })));
        assert!(matches!(seen[4], Event::Failed(EngineError::Stopped)), "a lost request does not hang its reader");
        assert_eq!(seen.len(), 5);
        assert!(matches!(stream.next_timeout(Duration::from_secs(9)), Ok(None)));
    }

    #[test]
    fn dropping_the_stream_is_seen_at_once() {
        let (sender, stream) = event_channel();
        assert!(!sender.cancelled());
        drop(stream);
        assert!(sender.cancelled());
        sender.token(1, String::new(), None);
        sender.end(Event::Failed(EngineError::Cancelled));
    }
}
