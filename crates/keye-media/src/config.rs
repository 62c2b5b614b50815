//! The rules of a variant, as data.

/// What happens to transparency in still pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alpha {
    /// RGBA pictures are composited on white, every other mode loses its alpha (keye-vl-utils 1.0.0).
    CompositeRgbaOnWhite,
    /// Alpha is dropped and the colour under it shows (keye-vl-utils 1.5.2).
    Drop,
}

/// Resampling of the image processor, as `resample` in preprocessor_config.json counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resample {
    /// PIL 2.
    Bilinear,
    /// PIL 3.
    Bicubic,
}

/// How a clip becomes patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VideoRule {
    /// Keye-VL-8B-Preview: frames of one size, one grid row for the whole clip (spec §10.2).
    WholeClip,
    /// Keye-VL-1.5: slow and fast frames of two sizes with time stamps (spec §10.3).
    SlowFast,
    /// Keye-VL-2.0: frames of one size with time stamps, within a budget (`docs/spec/keye-vl-2.md` §5.4 and §5.5).
    Adaptive,
}

/// First resizing stage of still pictures (spec §10.1).
#[derive(Debug, Clone, PartialEq)]
pub struct ImageConfig {
    /// Smallest number of pixels.
    pub min_pixels: u64,
    /// Largest number of pixels.
    pub max_pixels: u64,
    /// Transparency rule.
    pub alpha: Alpha,
}

/// Sampling and sizes of clips (spec §10.2, §10.3). Pixels count one frame unless the name says otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct VideoConfig {
    /// The variant's rule.
    pub rule: VideoRule,
    /// Frames per second when the item names none.
    pub fps: f64,
    /// Fewest frames (`WholeClip`, `Adaptive`).
    pub min_frames: u32,
    /// Most frames (`WholeClip`; the others derive their own from the budget).
    pub max_frames: u32,
    /// Smallest number of pixels of a frame.
    pub min_pixels: u64,
    /// Largest number of pixels of a frame.
    pub max_pixels: u64,
    /// Budget of pixels over the whole clip.
    pub total_pixels: u64,
    /// A fast frame has this part of a slow frame's tokens (`SlowFast`).
    pub fast_token_ratio: f64,
    /// Below this similarity a frame is slow (`SlowFast`).
    pub min_frame_similarity: f64,
    /// `(seconds, share)`, ascending: a clip of at most so many seconds gets this share of the budget, a longer one all
    /// of it (`Adaptive`). Empty: every clip gets all of it.
    pub budget_shares: &'static [(f64, f64)],
}

/// The image processor: preprocessor_config.json. Its limits cap every still picture, whatever the item says.
#[derive(Debug, Clone, PartialEq)]
pub struct ProcessorConfig {
    /// Smallest number of pixels of a picture.
    pub min_pixels: u64,
    /// Largest number of pixels of a picture.
    pub max_pixels: u64,
    /// Side of a patch in pixels, 14.
    pub patch_size: u32,
    /// Patches per side that the projector merges into one token, 2.
    pub merge_size: u32,
    /// Resampling of the second stage.
    pub resample: Resample,
    /// Mean per channel, on values in 0..1.
    pub image_mean: [f32; 3],
    /// Standard deviation per channel, on values in 0..1.
    pub image_std: [f32; 3],
    /// Factor from bytes to 0..1.
    pub rescale_factor: f64,
    /// False: the processor leaves sizes alone.
    pub do_resize: bool,
    /// False: bytes are not scaled to 0..1.
    pub do_rescale: bool,
    /// False: mean and standard deviation are not applied.
    pub do_normalize: bool,
}

/// 2.0's shares of the budget as its server has them behind a switch, for [`VideoConfig::budget_shares`].
pub const BUDGET_SHARES: &[(f64, f64)] = &[(259.0, 0.09), (518.0, 0.18), (1036.0, 0.36), (2016.0, 0.7)];

/// 2.0's shares of the budget as its report has them.
pub const REPORTED_BUDGET_SHARES: &[(f64, f64)] = &[(256.0, 0.125), (512.0, 0.25), (1024.0, 0.5)];

/// Everything that shapes patches.
#[derive(Debug, Clone, PartialEq)]
pub struct MediaConfig {
    /// Still pictures, first stage.
    pub image: ImageConfig,
    /// Clips.
    pub video: VideoConfig,
    /// The image processor, second stage.
    pub processor: ProcessorConfig,
}

impl ProcessorConfig {
    /// Side of a token in pixels: sizes are multiples of it (28).
    pub fn factor(&self) -> u32 {
        self.patch_size * self.merge_size
    }
}

impl Default for ProcessorConfig {
    /// The published preprocessor_config.json (spec §10.1).
    fn default() -> Self {
        Self {
            min_pixels: 3136,
            max_pixels: 1_003_520,
            patch_size: 14,
            merge_size: 2,
            resample: Resample::Bicubic,
            image_mean: [0.5; 3],
            image_std: [0.5; 3],
            rescale_factor: 1.0 / 255.0,
            do_resize: true,
            do_rescale: true,
            do_normalize: true,
        }
    }
}

impl MediaConfig {
    /// Keye-VL-8B-Preview with keye-vl-utils 1.0.0 (spec §10.1, §10.2).
    pub fn preview() -> Self {
        Self {
            image: ImageConfig { min_pixels: 4 * 784, max_pixels: 16_384 * 784, alpha: Alpha::CompositeRgbaOnWhite },
            video: VideoConfig {
                rule: VideoRule::WholeClip,
                fps: 2.0,
                min_frames: 4,
                max_frames: 768,
                min_pixels: 128 * 784,
                max_pixels: 768 * 784,
                total_pixels: 90_316_800,
                fast_token_ratio: 1.0,
                min_frame_similarity: 0.0,
                budget_shares: &[],
            },
            processor: ProcessorConfig::default(),
        }
    }

    /// Keye-VL-1.5 with keye-vl-utils 1.5.2 (spec §10.1, §10.3).
    pub fn slow_fast() -> Self {
        Self {
            image: ImageConfig { min_pixels: 4 * 784, max_pixels: 20_480 * 784, alpha: Alpha::Drop },
            video: VideoConfig {
                rule: VideoRule::SlowFast,
                fps: 2.0,
                min_frames: 1,
                max_frames: u32::MAX,
                min_pixels: 48 * 784,
                max_pixels: 768 * 784,
                total_pixels: 65_536 * 784,
                fast_token_ratio: 0.3,
                min_frame_similarity: 0.9,
                budget_shares: &[],
            },
            processor: ProcessorConfig::default(),
        }
    }

    /// Keye-VL-2.0 (`docs/spec/keye-vl-2.md` §5.1), with the same budget for clips of any length, as served by default.
    pub fn adaptive() -> Self {
        Self {
            image: ImageConfig { min_pixels: 4 * 784, max_pixels: 20_480 * 784, alpha: Alpha::Drop },
            video: VideoConfig {
                rule: VideoRule::Adaptive,
                fps: 2.0,
                min_frames: 2,
                max_frames: u32::MAX,
                min_pixels: 64 * 784,
                max_pixels: 256 * 784,
                total_pixels: 184_320 * 784,
                fast_token_ratio: 1.0,
                min_frame_similarity: 0.0,
                budget_shares: &[],
            },
            processor: ProcessorConfig::default(),
        }
    }
}
