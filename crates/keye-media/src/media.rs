//! What the crate hands on.

use crate::MediaKind;

/// Slow frames keep their detail, fast frames are small (1.5). Still pictures and Preview's frames are slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// Full detail (`frame_types` 0).
    Slow,
    /// About a third of the tokens (`frame_types` 1).
    Fast,
}

/// One frame of a [`Media`], in time order.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    /// Index in the source clip (or in the frame list); 0 for a still picture.
    pub index: usize,
    /// Seconds, as the model is told; `None` when the source has no times.
    pub timestamp: Option<f32>,
    /// Slow or fast.
    pub kind: FrameKind,
    /// Height in pixels after resizing.
    pub height: u32,
    /// Width in pixels after resizing.
    pub width: u32,
}

/// Pixel values of patches, `[N, 3, 14, 14]`: channel, row, column inside a patch, channels RGB.
#[derive(Debug, Clone, PartialEq)]
pub enum Pixels {
    /// Bytes; rescaling, mean and standard deviation are left to the patch embedding.
    U8(Vec<u8>),
    /// Normalised values, for recorded inputs.
    F32(Vec<f32>),
}

/// The patches of one image or one clip. Inside a grid the order is frame, row, column.
#[derive(Debug, Clone, PartialEq)]
pub struct Patches {
    /// The values.
    pub pixels: Pixels,
    /// Rows `(t, h, w)` in patches; a 1.5 clip has one row per run of frames of equal size, everything else has one row.
    pub grid_thw: Vec<[u32; 3]>,
    /// SHA-256 over pixels, grid, time stamps and kinds: equal hashes mean equal input to the model.
    pub hash: [u8; 32],
}

impl Patches {
    /// Number of patches, the sum of `t*h*w`.
    pub fn len(&self) -> usize {
        self.grid_thw.iter().map(|[t, h, w]| *t as usize * *h as usize * *w as usize).sum()
    }

    /// True when there is no patch.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A processed image or clip.
#[derive(Debug, Clone, PartialEq)]
pub struct Media {
    /// Image or video.
    pub kind: MediaKind,
    /// The patches.
    pub patches: Patches,
    /// The frames in time order; one for a still picture.
    pub frames: Vec<Frame>,
    /// Real sampling rate in frames per second: Preview's `second_per_grid_t` is its reciprocal. `None` for pictures.
    pub sample_fps: Option<f64>,
}

/// A processed item, and what whoever asked for it should hear.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The item.
    pub media: Media,
    /// Of a source that is not whole, what is missing: a sentence each, without the source's name.
    pub warnings: Vec<String>,
}

impl From<Media> for Loaded {
    /// With nothing to be said.
    fn from(media: Media) -> Self {
        Self { media, warnings: Vec::new() }
    }
}

impl Media {
    /// The grid with every frame on its own, `(1, h, w)` each: what 1.5 attends and counts positions by.
    pub fn frame_grids(&self) -> impl Iterator<Item = [u32; 3]> + '_ {
        self.patches.grid_thw.iter().flat_map(|[t, h, w]| std::iter::repeat_n([1, *h, *w], *t as usize))
    }
}
