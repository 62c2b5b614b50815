//! A request from submission to its last token, watched.

use std::time::Duration;

use anyhow::Result;
use keye::{
    Answer, EngineError, Event, EventStream, FinishReason, Frame, FrameKind, Keye, Request, Stage, ThinkTag, Timings,
    Usage,
};
use serde_json::{Value, json};

use super::failure::{Interrupted, Usage as UsageError};
use super::signals::Guard;
use super::ui::Status;

/// How long an interruption may go unseen.
const LOOK: Duration = Duration::from_millis(50);

/// A finished answer.
pub struct Finished {
    pub reason: FinishReason,
    pub text: String,
    pub answer: Answer,
    pub usage: Usage,
    pub timings: Timings,
    /// What [`Stage::MediaReady`] told, in order.
    pub media: Vec<Value>,
}

/// Runs `request`; `on_text` gets the answer piece by piece. An interruption cancels the request.
pub fn generate(
    keye: &Keye,
    request: Request,
    status: &mut Status,
    guard: &Guard,
    on_text: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Finished> {
    let mut stream = submit(keye, request)?;
    let mut collector = Collector::default();
    loop {
        if guard.interrupted() {
            status.clear();
            return Err(Interrupted.into());
        }
        let Ok(event) = stream.next_timeout(LOOK) else { continue };
        if let Some(finished) = collector.take(event, status, on_text)? {
            return Ok(finished);
        }
    }
}

/// Queues a request.
pub fn submit(keye: &Keye, request: Request) -> Result<EventStream> {
    keye.submit(request).map_err(|error| match error {
        EngineError::Refused(reason) => UsageError(reason).into(),
        error => anyhow::Error::from(error),
    })
}

/// What the events of a request have told so far.
#[derive(Default)]
pub struct Collector {
    media: Vec<Value>,
    /// The tag that the prompt ended with, which belongs to the answer for whoever reads it.
    tag: Option<ThinkTag>,
}

impl Collector {
    /// Takes an event; the last one gives the answer, or the error that it failed with.
    pub fn take(
        &mut self,
        event: Option<Event>,
        status: &mut Status,
        on_text: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Option<Finished>> {
        match event {
            Some(Event::Stage(stage)) => {
                if let Stage::MediaReady { frames, slow_frames, patches, tokens, shown, warnings, .. } = &stage {
                    self.media.push(json!({
                        "frames": frames, "slow_frames": slow_frames, "patches": patches, "tokens": tokens,
                        "shown": shown.iter().map(frame).collect::<Vec<_>>(), "warnings": &warnings[..],
                    }));
                }
                status.stage(&stage);
            }
            Some(Event::Thinking(opened)) => self.tag = Some(opened),
            Some(Event::Token { text, .. }) => {
                status.clear();
                if let Some(tag) = self.tag.take() {
                    on_text(&format!("{}\n", tag.open()))?;
                }
                if !text.is_empty() {
                    on_text(&text)?;
                }
            }
            Some(Event::Finished { reason, text, answer, usage, timings }) => {
                status.clear();
                let media = std::mem::take(&mut self.media);
                return Ok(Some(Finished { reason, text, answer, usage, timings, media }));
            }
            Some(Event::Failed(error)) => {
                status.clear();
                return Err(error.into());
            }
            None => return Err(EngineError::Stopped.into()),
        }
        Ok(None)
    }
}

/// A frame as the model saw it.
fn frame(frame: &Frame) -> Value {
    // By way of its shortest decimals: 0.1 as a double would be 0.10000000149011612.
    let time = frame.timestamp.and_then(|time| time.to_string().parse::<f64>().ok());
    let kind = match frame.kind {
        FrameKind::Slow => "slow",
        FrameKind::Fast => "fast",
    };
    json!({"index": frame.index, "time": time, "kind": kind, "width": frame.width, "height": frame.height})
}

/// Timings in seconds.
pub fn seconds(timings: &Timings) -> Value {
    json!({
        "queued": timings.queued.as_secs_f64(),
        "media": timings.media.as_secs_f64(),
        "vision": timings.vision.as_secs_f64(),
        "prefill": timings.prefill.as_secs_f64(),
        "decode": timings.decode.as_secs_f64(),
        "first_token": timings.first_token.as_secs_f64(),
        "total": timings.total.as_secs_f64(),
    })
}
