//! config.json, and the table of facts by which variants differ.

use keye_media::MediaConfig;

/// The models of the family that this build knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Keye-VL-8B-Preview.
    Preview,
    /// Keye-VL-1.5-8B.
    V1_5,
}

/// Where the projector's LayerNorm sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProjectorNorm {
    /// Over each patch, before the 2x2 merge (width D).
    BeforeMerge,
    /// Over each merged vector (width 4D).
    AfterMerge,
}

/// Which patches of a clip attend to each other in the vision tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VisionSpan {
    /// All frames of a clip.
    Clip,
    /// Each frame alone.
    Frame,
}

/// Temporal positions of a clip in the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeRule {
    /// One block; frame i stands at `trunc(i * second_per_grid_t * tokens_per_second)` (spec §6.2, Preview).
    Absolute,
    /// Every frame is a block of its own (spec §6.2, 1.5).
    PerFrame,
}

/// How a clip is written in the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameMarkers {
    /// One run of video pads.
    None,
    /// `<|frame|>`, the time stamp, and `<|fast_start|>`..`<|fast_end|>` around fast frames (spec §8.3).
    SlowFast,
}

/// How a variant differs from the others (spec §1).
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// Projector norm.
    pub projector_norm: ProjectorNorm,
    /// Attention span of clips in the vision tower.
    pub vision_span: VisionSpan,
    /// Temporal positions.
    pub time: TimeRule,
    /// Prompt form of clips.
    pub markers: FrameMarkers,
    /// Media rules before the checkpoint's own files are applied.
    pub media: MediaConfig,
}

impl Variant {
    /// The facts of the variant.
    pub fn facts(self) -> Facts {
        match self {
            Self::Preview => Facts {
                projector_norm: ProjectorNorm::BeforeMerge,
                vision_span: VisionSpan::Clip,
                time: TimeRule::Absolute,
                markers: FrameMarkers::None,
                media: MediaConfig::preview(),
            },
            Self::V1_5 => Facts {
                projector_norm: ProjectorNorm::AfterMerge,
                vision_span: VisionSpan::Frame,
                time: TimeRule::PerFrame,
                markers: FrameMarkers::SlowFast,
                media: MediaConfig::slow_fast(),
            },
        }
    }
}

/// The decoder's dimensions.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    /// Width H.
    pub hidden_size: usize,
    /// Feed-forward width F.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f32,
    /// RoPE base.
    pub rope_theta: f64,
    /// Frequencies that turn by time, row and column; they sum to `head_dim / 2`.
    pub mrope_section: [usize; 3],
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Vocabulary V, padding included.
    pub vocab_size: usize,
    /// q, k, v and o have biases.
    pub attention_bias: bool,
    /// `lm_head` is `embed_tokens`.
    pub tie_word_embeddings: bool,
}

/// The vision tower's dimensions.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Width D.
    pub hidden_size: usize,
    /// Feed-forward width I.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Side of the pictures that the learned positions were made for; their grid has `image_size / patch_size` a side.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Patches per side that become one token.
    pub spatial_merge_size: usize,
    /// Temporal positions per second (Preview).
    pub tokens_per_second: f32,
    /// Epsilon of the tower's LayerNorms.
    pub layer_norm_eps: f32,
    /// Colour channels.
    pub num_channels: usize,
    /// Base of the tower's 2D RoPE.
    pub rope_theta: f64,
}

/// A checked config.json.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which model it is.
    pub variant: Variant,
    /// `architectures[0]`, as written.
    pub architecture: String,
    /// Decoder.
    pub text: TextConfig,
    /// Vision tower.
    pub vision: VisionConfig,
    /// `<|image_pad|>`.
    pub image_token_id: u32,
    /// `<|video_pad|>`.
    pub video_token_id: u32,
    /// `<|vision_start|>`.
    pub vision_start_token_id: u32,
    /// `<|vision_end|>`.
    pub vision_end_token_id: u32,
    /// `eos_token_id` of config.json; generation_config.json wins where it has one.
    pub eos_token_id: Vec<u32>,
    /// Type of the stored weights, as written ("bfloat16").
    pub torch_dtype: String,
}
