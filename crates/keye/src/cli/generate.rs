//! A request from submission to its last token, watched.

use std::time::Duration;

use anyhow::Result;
use keye::{Answer, EngineError, Event, FinishReason, Keye, Request, Stage, Timings, Usage};
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
    let mut stream = keye.submit(request).map_err(|error| match error {
        EngineError::Refused(reason) => UsageError(reason).into(),
        error => anyhow::Error::from(error),
    })?;
    let mut media = Vec::new();
    // The tag that the prompt ended with belongs to the answer, for whoever reads it.
    let mut tag = None;
    loop {
        if guard.interrupted() {
            status.clear();
            return Err(Interrupted.into());
        }
        let Ok(event) = stream.next_timeout(LOOK) else { continue };
        match event {
            Some(Event::Stage(stage)) => {
                if let Stage::MediaReady { frames, slow_frames, patches, tokens, .. } = stage {
                    media.push(json!({
                        "frames": frames, "slow_frames": slow_frames, "patches": patches, "tokens": tokens
                    }));
                }
                status.stage(&stage);
            }
            Some(Event::Thinking(opened)) => tag = Some(opened),
            Some(Event::Token { text, .. }) => {
                status.clear();
                if let Some(tag) = tag.take() {
                    on_text(&format!("{}\n", tag.open()))?;
                }
                if !text.is_empty() {
                    on_text(&text)?;
                }
            }
            Some(Event::Finished { reason, text, answer, usage, timings }) => {
                status.clear();
                return Ok(Finished { reason, text, answer, usage, timings, media });
            }
            Some(Event::Failed(error)) => {
                status.clear();
                return Err(error.into());
            }
            None => return Err(EngineError::Stopped.into()),
        }
    }
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
