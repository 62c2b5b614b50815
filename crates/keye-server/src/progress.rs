//! Work before the first token, for clients that ask with `stream_options.include_progress`: each [`Stage`] as the `keye`
//! field of a chunk without choices.
//!
//! | `stage` | besides |
//! |---|---|
//! | `queued` | |
//! | `fetching` | `media`, `done` and `total` bytes; `total` is null when nobody said |
//! | `decoding` | `media`, `done` and `total` frames; `total` is 0 while unknown |
//! | `ready` | `media`, `tokens`, `estimate` seconds until the first token or null, `frames`: what the model sees, and `warnings` |
//! | `vision` | `media`, `done` of 1 |
//! | `prefill` | `done` and `total` tokens |
//!
//! `media` counts the images and videos of the request from 0. A frame has its `index` in the source, its `time` in seconds
//! or null, `kind` (`slow` or `fast`), `width` and `height`.

use keye_engine::Stage;
use keye_media::{Frame, FrameKind, Progress};
use serde_json::{Value, json};

/// The `keye` field.
pub(crate) fn report(stage: &Stage) -> Value {
    match stage {
        Stage::Queued => json!({"stage": "queued"}),
        Stage::Media { index, progress: Progress::Fetching { done, total } } => {
            json!({"stage": "fetching", "media": index, "done": done, "total": total})
        }
        Stage::Media { index, progress: Progress::Decoding { done, total } } => {
            json!({"stage": "decoding", "media": index, "done": done, "total": total})
        }
        Stage::MediaReady { index, tokens, shown, estimate, warnings, .. } => {
            let frames: Vec<Value> = shown.iter().map(frame).collect();
            let warnings: &[String] = warnings;
            json!({
                "stage": "ready", "media": index, "tokens": tokens, "estimate": estimate, "frames": frames,
                "warnings": warnings,
            })
        }
        Stage::Vision { index, fraction } => json!({"stage": "vision", "media": index, "done": fraction}),
        Stage::Prefill { done, total } => json!({"stage": "prefill", "done": done, "total": total}),
    }
}

fn frame(frame: &Frame) -> Value {
    let kind = match frame.kind {
        FrameKind::Slow => "slow",
        FrameKind::Fast => "fast",
    };
    json!({
        "index": frame.index, "time": frame.timestamp, "kind": kind, "width": frame.width, "height": frame.height,
    })
}
