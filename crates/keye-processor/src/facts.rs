//! The table of facts by which variants differ.

use keye_media::MediaConfig;

/// The models of the family that this build knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Keye-VL-8B-Preview.
    Preview,
    /// Keye-VL-1.5-8B.
    V1_5,
    /// Keye-VL-2.0, with experts (30B-A3B) or dense.
    V2,
    /// Keye-VL-671B-A37B.
    V671b,
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

/// How a clip is written in the prompt, and with it how its positions are counted (spec §6.2): what stands between two
/// markers is a block of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameMarkers {
    /// One run of video pads, one block: frame i stands at `trunc(i * second_per_grid_t * tokens_per_second)`.
    None,
    /// `<|frame|>`, the time stamp, and `<|fast_start|>`..`<|fast_end|>` around fast frames (spec §8.3): every frame is a
    /// block.
    SlowFast,
    /// A [`FramePrefix`](crate::FramePrefix) before each frame (spec of 2.0, §4.3): every frame is a block.
    Timestamps,
}

/// How tokens are counted for the decoder's rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PositionRule {
    /// By time, row and column (spec §6.2).
    ThreeAxis,
    /// 0, 1, 2, ... over all tokens, those of media included.
    Sequential,
}

/// How a variant differs from the others (spec §1).
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// Projector norm.
    pub projector_norm: ProjectorNorm,
    /// Attention span of clips in the vision tower.
    pub vision_span: VisionSpan,
    /// Prompt form of clips.
    pub markers: FrameMarkers,
    /// Counting of positions.
    pub positions: PositionRule,
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
                markers: FrameMarkers::None,
                positions: PositionRule::ThreeAxis,
                media: MediaConfig::preview(),
            },
            Self::V1_5 => Facts {
                projector_norm: ProjectorNorm::AfterMerge,
                vision_span: VisionSpan::Frame,
                markers: FrameMarkers::SlowFast,
                positions: PositionRule::ThreeAxis,
                media: MediaConfig::slow_fast(),
            },
            Self::V2 => {
                Facts { markers: FrameMarkers::Timestamps, media: MediaConfig::adaptive(), ..Self::V1_5.facts() }
            }
            // 1.5's tower and clips before a decoder that counts tokens (spec of 671B, §4 and §5).
            Self::V671b => Facts { positions: PositionRule::Sequential, ..Self::V1_5.facts() },
        }
    }
}
