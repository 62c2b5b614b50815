//! A conversation with media in it.

use keye_media::{MediaItem, MediaKind, Source};
use serde_json::{Map, Value, json};

use crate::ThinkMode;
use crate::tool_prompt::is_tool_results;

/// Chat messages as the template sees them, and the media they mention, in order.
///
/// Message content is a string or a list of parts. Media parts are accepted in all forms that keye-vl-utils, the
/// transformers examples and OpenAI clients use: `{"type": "image", "image": X}`, `{"type": "video", "video": X}` with X a
/// string or, for videos, a list of frames; `{"type": "image_url", "image_url": X}`, `{"type": "video_url", ...}` with X a
/// string or `{"url": ...}`. Options stand beside X or in its object. Inside, parts are normalised to `image` and `video`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    pub(crate) messages: Vec<Value>,
    pub(crate) media: Vec<MediaItem>,
}

impl Conversation {
    /// An empty conversation.
    pub fn new() -> Self {
        Self::default()
    }

    /// The media, in the order in which the template mentions them.
    pub fn media(&self) -> &[MediaItem] {
        &self.media
    }

    /// The normalised messages, for display and for the template.
    pub fn messages(&self) -> &[Value] {
        &self.messages
    }

    /// Puts a system message in front.
    pub fn with_system(mut self, text: &str) -> Self {
        self.messages.insert(0, json!({"role": "system", "content": text}));
        self
    }

    /// Adds a user's turn: the media, in order, then the text.
    pub fn push_user(&mut self, media: Vec<MediaItem>, text: &str) {
        let content = if media.is_empty() {
            Value::from(text)
        } else {
            let parts = media.iter().map(shown_part).chain([text_part(text)]);
            Value::Array(parts.collect())
        };
        self.messages.push(json!({"role": "user", "content": content}));
        self.media.extend(media);
    }

    /// Adds an answer.
    pub fn push_assistant(&mut self, text: &str) {
        self.messages.push(json!({"role": "assistant", "content": text}));
    }

    /// A copy whose last user text ends with the suffix of `mode`, without a space (spec §9). A suffix that is already
    /// there stays as it was written. Results of tools that are told in the user's role are not the user's text.
    pub fn with_think(&self, mode: ThinkMode) -> Self {
        let mut copy = self.clone();
        let last_user = copy.messages.iter_mut().rfind(|m| m["role"] == "user" && !is_tool_results(&m["content"]));
        if let (Some(message), false) = (last_user, mode == ThinkMode::Auto) {
            append(&mut message["content"], mode.suffix());
        }
        copy
    }
}

/// Appends to a content's last text, unless it ends with a think suffix.
fn append(content: &mut Value, suffix: &str) {
    let add = |text: &str| {
        let chosen = [ThinkMode::Think, ThinkMode::NoThink].iter().any(|mode| text.trim_end().ends_with(mode.suffix()));
        Value::from(if chosen { text.to_owned() } else { format!("{text}{suffix}") })
    };
    match content {
        Value::String(text) => *content = add(text),
        Value::Array(parts) => match parts.iter_mut().rfind(|part| part["text"].is_string()) {
            Some(part) => part["text"] = add(part["text"].as_str().unwrap_or_default()),
            None => parts.push(text_part(suffix)),
        },
        _ => {}
    }
}

/// A text part as the template sees it.
pub(crate) fn text_part(text: &str) -> Value {
    json!({"type": "text", "text": text})
}

/// A media part as the template sees it: what it is and, shortened, where it comes from.
pub(crate) fn shown_part(item: &MediaItem) -> Value {
    let name = match item.kind {
        MediaKind::Image => "image",
        MediaKind::Video => "video",
    };
    let mut part = Map::new();
    part.insert("type".into(), name.into());
    part.insert(name.into(), shown_source(&item.source));
    Value::Object(part)
}

fn shown_source(source: &Source) -> Value {
    match source {
        Source::Path(path) => path.to_string_lossy().into_owned().into(),
        Source::Url(url) => url.as_str().into(),
        Source::Bytes(bytes) => format!("<{} bytes>", bytes.len()).into(),
        Source::Frames(frames) => frames.iter().map(|frame| shown_source(&frame.source)).collect(),
    }
}
