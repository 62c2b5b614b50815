//! What a caller asks for: a source and its options.

use std::path::PathBuf;
use std::sync::Arc;

/// An image or a video. The two are processed by different rules even when the bytes are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MediaKind {
    /// One picture.
    Image,
    /// A clip, or a list of frames that is to be understood as a clip.
    Video,
}

/// Where the bytes come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// A file. Relative paths are resolved against [`crate::Access::root`] when it is set.
    Path(PathBuf),
    /// `http://` or `https://`.
    Url(String),
    /// The bytes themselves: standard input, an upload, a decoded data URL.
    Bytes(Arc<[u8]>),
    /// A clip given as pictures, in time order (videos only).
    Frames(Vec<FrameItem>),
}

/// One picture of a frame list, with options of its own where the reference accepts them.
#[derive(Debug, Clone, PartialEq)]
pub struct FrameItem {
    /// Where the picture is; never [`Source::Frames`].
    pub source: Source,
    /// Options of this frame alone; `None` means those of the list.
    pub options: Option<ItemOptions>,
}

/// One media part of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct MediaItem {
    /// Image or video.
    pub kind: MediaKind,
    /// Where it is.
    pub source: Source,
    /// How it is to be read.
    pub options: ItemOptions,
}

/// The per-item options of `keye-vl-utils` 1.0.0 and 1.5.2, under their names. Which variant takes which option is
/// decided by the loader, by [`crate::MediaConfig`]; an option that a variant does not take is an error there.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ItemOptions {
    /// Smallest number of pixels after resizing (of the picture, or of each frame).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_pixels: Option<u64>,
    /// Largest number of pixels after resizing (of the picture, or of each frame).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_pixels: Option<u64>,
    /// Wanted height in pixels, together with `resized_width`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resized_height: Option<u32>,
    /// Wanted width in pixels, together with `resized_height`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resized_width: Option<u32>,
    /// Frames per second to sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fps: Option<f64>,
    /// Exact number of frames to sample; excludes `fps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nframes: Option<f64>,
    /// Fewest frames to sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_frames: Option<u32>,
    /// Most frames to sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_frames: Option<u32>,
    /// Start of the part to look at, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub video_start: Option<f64>,
    /// End of the part to look at, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub video_end: Option<f64>,
    /// Budget of pixels over the whole clip, Preview's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_pixels: Option<u64>,
    /// Budget of pixels over the whole clip, 1.5's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub video_total_pixels: Option<u64>,
    /// Below this similarity to the last slow frame a frame becomes slow itself (1.5).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_frame_similarity: Option<f64>,
    /// Turn the picture upright as its EXIF tag says. The reference ignores the tag, so this is off by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exif: Option<bool>,
}
