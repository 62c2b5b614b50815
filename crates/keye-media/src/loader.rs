//! From an item to its patches.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::ffmpeg::Watch;
use crate::options::Target;
use crate::smart_resize::IMAGE_FACTOR;
use crate::source::Opener;
use crate::still::{self, PixelRange};
use crate::{
    Frame, FrameItem, FrameKind, Loaded, Media, MediaConfig, MediaError, MediaItem, MediaKind, RemotePolicy, Source,
    frames, options, patches,
};

/// What may be opened.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Fetch `http(s)://` sources.
    pub remote: bool,
    /// With `remote`: from where; `None` is from anywhere, for callers who name the URLs themselves.
    pub remote_policy: Option<RemotePolicy>,
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
    /// Pixels of a picture or frame before resizing, as its header has them. Each takes up to 16 bytes of memory while
    /// it is decoded.
    pub source_pixels: u64,
    /// Frames of a source clip that may be decoded.
    pub source_frames: u64,
    /// Frames after sampling.
    pub frames: u32,
    /// Patches of one item.
    pub patches: u64,
    /// Bytes of a clip's frames that wait on disk for their size; a clip with more is decoded twice.
    pub spilled_bytes: u64,
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
            spilled_bytes: 4 << 30,
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
        self.load_with_warnings(item, progress).map(|loaded| loaded.media)
    }

    /// As [`Loader::load`], and tells of a clip that is cut short or damaged. What can be decoded of it is used, so nobody
    /// would notice otherwise.
    pub fn load_with_warnings(
        &self,
        item: &MediaItem,
        progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<Loaded, MediaError> {
        let name = item.source.name();
        let frame_list = matches!(item.source, Source::Frames(_));
        let target = match (item.kind, frame_list) {
            (MediaKind::Image, _) => Target::Picture,
            (MediaKind::Video, false) => Target::ClipFile,
            (MediaKind::Video, true) => Target::FrameList,
        };
        options::check(&item.options, target, self.config.video.rule).map_err(|refusal| refusal.of(&name))?;
        self.check_patch_size(&name)?;

        let deadline = Instant::now() + self.limits.time;
        let opener = Opener { access: &self.access, limits: &self.limits, deadline };
        let mut watch = Watch { input: &name, deadline, time: self.limits.time, progress, done: 0, total: 0 };
        match (item.kind, &item.source) {
            (MediaKind::Image, source) => {
                let opened = opener.open(source, watch.progress)?;
                let upright = item.options.exif == Some(true);
                let picture = still::decode(opened, &mut watch, self.config.image.alpha, upright, &self.limits)?;
                let range = PixelRange::of_pictures(&self.config.image);
                let picture = still::first_stage(picture, &name, &item.options, range, &self.limits)?;
                let picture = still::processor_stage(picture, &name, &self.config.processor, &self.limits)?;
                let (height, width, patch) = (picture.height, picture.width, self.config.processor.patch_size);
                let mut pixels = Vec::new();
                patches::cut(&picture.rgb, height, width, patch, &mut pixels);
                let frame = Frame { index: 0, timestamp: None, kind: FrameKind::Slow, height, width };
                Ok(patches::assemble(MediaKind::Image, vec![frame], pixels, patch, None).into())
            }
            (MediaKind::Video, Source::Frames(list)) => {
                let fetch = |frame: &FrameItem, upright: bool, watch: &mut Watch| {
                    let (name, done, total) = (frame.source.name(), watch.done, watch.total);
                    // What is told of a list is how many of its frames are done.
                    let mut progress = |_: Progress| (watch.progress)(Progress::Decoding { done, total });
                    let opened = opener.open(&frame.source, &mut progress)?;
                    let time = self.limits.time;
                    let mut watch = Watch { input: &name, deadline, time, progress: &mut progress, done, total };
                    still::decode(opened, &mut watch, self.config.image.alpha, upright, &self.limits)
                };
                frames::load(self, list, &item.options, &fetch, &mut watch).map(Loaded::from)
            }
            (MediaKind::Video, source) => {
                let opened = opener.open(source, watch.progress)?;
                let file = opened.into_file().map_err(crate::spill::temporary)?;
                crate::video::load_clip(self, &item.options, &name, &file, deadline, watch.progress)
            }
        }
    }

    /// The sizes of `keye-vl-utils` are multiples of 28; patches have to divide them.
    fn check_patch_size(&self, name: &str) -> Result<(), MediaError> {
        let (patch, merge) = (self.config.processor.patch_size, self.config.processor.merge_size);
        match patch.checked_mul(merge).is_some_and(|side| side > 0 && IMAGE_FACTOR.is_multiple_of(side)) {
            true => Ok(()),
            false => Err(MediaError::Option {
                input: name.to_owned(),
                option: "patch_size",
                reason: format!(
                    "patches of {patch} merged {merge} by {merge} (preprocessor_config.json) do not divide \
                     {IMAGE_FACTOR}, the step of all sizes"
                ),
            }),
        }
    }
}
