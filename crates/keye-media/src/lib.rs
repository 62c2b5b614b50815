//! Bytes to frames to patches.
//!
//! **In**: a [`MediaItem`]: an image or a video named by path, URL, data URL, raw bytes or a list of frames, with the
//! per-item options of `keye-vl-utils` ([`ItemOptions`]). **Out**: [`Media`]: 14x14 RGB patches as bytes
//! ([`Patches`]), their grid, time stamps, slow/fast kinds and a content hash that covers the pixels and everything that
//! shaped them.
//!
//! What it promises:
//!
//! * The arithmetic of the reference, bit for bit where the reference is integer (`docs/spec/keye-vl-8b.md` §10):
//!   sizes, sampled frames, time stamps, the slow/fast split, Pillow's and torch's resampling.
//! * All variants share one code path; they differ by the data in [`MediaConfig`].
//! * Media are hostile: sizes are checked before allocation, decoding has limits of time, bytes, pixels and frames
//!   ([`Limits`]), and only what [`Access`] allows is opened. Videos are decoded by an `ffmpeg` child process that can
//!   open nothing but the one file handed to it.
//! * Frames stream: a clip is never held in memory as full-size frames.
//! * Of a clip that is cut short or damaged, what can be decoded is used, and [`Loaded::warnings`] says what is missing.
//!
//! No tensor, tokenizer or checkpoint types: those live further up.

mod adaptive_sampling;
mod config;
mod damage;
mod decode;
mod error;
mod ffmpeg;
mod frames;
mod hsv;
mod huge_pages;
mod item;
mod loader;
mod measure;
mod media;
mod memory;
mod options;
mod patches;
mod probe;
#[cfg(feature = "remote")]
mod remote;
mod remote_policy;
mod resample;
#[cfg(target_arch = "x86_64")]
mod resample_avx2;
mod sampling;
mod similarity;
mod sizes;
mod slow_fast;
mod smart_resize;
mod sniff;
mod source;
mod spill;
mod still;
mod video;

pub use config::{
    Alpha, BUDGET_SHARES, ImageConfig, MediaConfig, ProcessorConfig, REPORTED_BUDGET_SHARES, Resample, VideoConfig,
    VideoRule,
};
pub use error::MediaError;
pub use item::{FrameItem, ItemOptions, MediaItem, MediaKind, Source};
pub use loader::{Access, Limits, Loader, Progress, TimestampRule};
pub use measure::{MediaCost, media_cost, write_sample_clip, write_sample_photo};
pub use media::{Frame, FrameKind, Loaded, Media, Patches, Pixels};
pub use memory::RgbClip;
pub use remote_policy::{RemotePolicy, is_global};

#[cfg(test)]
#[path = "../tests/golden/arith.rs"]
mod golden_arith;

#[cfg(test)]
#[path = "../tests/golden/decoding.rs"]
mod golden_decoding;

#[cfg(test)]
#[path = "../tests/golden/modes.rs"]
mod golden_modes;
