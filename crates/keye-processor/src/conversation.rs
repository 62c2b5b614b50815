//! A conversation with media in it.

use keye_media::MediaItem;
use serde_json::Value;

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
}
