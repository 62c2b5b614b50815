//! config.json, checked.

use std::path::Path;

use serde_json::Value;

use crate::files::{CONFIG_BYTES, Fields, whole};
use crate::indexer_config::{IndexerConfig, indexer};
use crate::latent_config::{self, GroupConfig, LatentConfig};
use crate::{CheckpointFiles, Facts, ProcessorError, Variant};

/// A feed-forward block of experts (2.0, 671B).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertsConfig {
    /// Experts E of a layer.
    pub num_experts: usize,
    /// Experts of a token.
    pub num_experts_per_tok: usize,
    /// Width of an expert.
    pub moe_intermediate_size: usize,
    /// The chosen experts' weights are scaled to sum to one.
    pub norm_topk_prob: bool,
    /// Experts that every token goes through, as one of their common width.
    pub n_shared_experts: usize,
    /// First layer that may have experts; those before are dense.
    pub first_k_dense_replace: usize,
    /// From there on every how manieth layer has experts.
    pub moe_layer_freq: usize,
    /// Scores by sigmoid, chosen by groups with a bias; `None` is softmax over all experts.
    pub groups: Option<GroupConfig>,
}

impl ExpertsConfig {
    /// Whether this layer has experts; others are dense.
    pub fn is_in_layer(&self, layer: usize) -> bool {
        layer >= self.first_k_dense_replace && layer.is_multiple_of(self.moe_layer_freq)
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
    /// Experts in place of the dense feed-forward block.
    pub experts: Option<ExpertsConfig>,
    /// Sparse attention; `None` is dense. Clearing it runs the same weights densely.
    pub indexer: Option<IndexerConfig>,
    /// Latent attention (671B); `None` is attention with keys and values per head.
    pub latent: Option<LatentConfig>,
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
    /// Rows and columns of the blocks in which 8-bit weights share a scale.
    pub fp8_block: [usize; 2],
}

/// Ceilings: several times above every published model, low enough that products of a few of them fit 64 bits.
pub(crate) const MAX_WIDTH: usize = 1 << 17;
pub(crate) const MAX_FEED_FORWARD: usize = 1 << 19;
pub(crate) const MAX_LAYERS: usize = 1024;
pub(crate) const MAX_HEADS: usize = 1024;
pub(crate) const MAX_HEAD_DIM: usize = 1024;
pub(crate) const MAX_EXPERTS: usize = 4096;
pub(crate) const MAX_VOCAB: usize = 1 << 22;
pub(crate) const MAX_POSITIONS: usize = 1 << 24;
const MAX_IMAGE_SIDE: usize = 1 << 14;
const MAX_PATCH_SIDE: usize = 64;

/// Its file.
const CONFIG: &str = "config.json";

impl ModelConfig {
    /// Reads and checks `config.json` of a checkpoint.
    pub fn load(from: impl Into<CheckpointFiles>) -> Result<Self, ProcessorError> {
        let files = from.into();
        Self::from_value(&files.path(CONFIG), &files.read_json(CONFIG, CONFIG_BYTES)?)
    }

    /// Checks the contents of a config.json; `path` is for messages. Text fields stand at the top or in `text_config`.
    /// Defaults: spec §2.1.
    pub fn from_value(path: &Path, value: &Value) -> Result<Self, ProcessorError> {
        let top = Fields::of(path, value)?;
        let (variant, architecture) = variant(&top)?;
        let text_fields = top.object("text_config")?.unwrap_or_else(|| top.clone());
        let text = match variant {
            Variant::V671b => latent_config::text_config(&top, &text_fields)?,
            _ => text_config(&top, &text_fields, variant, &architecture)?,
        };
        let vision_fields = top.object("vision_config")?.ok_or_else(|| top.error("vision_config", "missing"))?;
        let vision = vision_config(&vision_fields)?;

        let token = |name: &str, default: u32| match top.tokens(name, text.vocab_size as u64)?[..] {
            [id] => Ok(id),
            // 671B has a vocabulary of its own.
            [] if variant != Variant::V671b && (default as usize) < text.vocab_size => Ok(default),
            [] => Err(top.error(name, "missing")),
            _ => Err(top.error(name, "expected one token id, found a list")),
        };
        if variant == Variant::V671b {
            token("fast_video_token_id", 0)?;
        }
        let mut eos_token_id = top.tokens("eos_token_id", text.vocab_size as u64)?;
        if eos_token_id.is_empty() {
            eos_token_id = text_fields.tokens("eos_token_id", text.vocab_size as u64)?;
        }
        let torch_dtype = match (top.str("torch_dtype")?, top.str("dtype")?, text_fields.str("torch_dtype")?) {
            (Some(name), _, _) | (_, Some(name), _) | (_, _, Some(name)) => name,
            _ => "bfloat16",
        };
        Ok(Self {
            variant,
            architecture,
            vision,
            image_token_id: token("image_token_id", 151_655)?,
            video_token_id: token("video_token_id", 151_656)?,
            vision_start_token_id: token("vision_start_token_id", 151_652)?,
            vision_end_token_id: token("vision_end_token_id", 151_653)?,
            eos_token_id,
            torch_dtype: torch_dtype.to_owned(),
            fp8_block: latent_config::fp8_block(&top)?,
            text,
        })
    }

    /// The facts of the variant.
    pub fn facts(&self) -> Facts {
        self.variant.facts()
    }
}

const SUPPORTED: &str = "KeyeForConditionalGeneration (Keye-VL-8B-Preview), KeyeVL1_5ForConditionalGeneration (Keye-VL-1.5-8B), \
     KeyeVL2MoeForConditionalGeneration and KeyeVL2ForConditionalGeneration (Keye-VL-2.0), \
     KeyeVLMoeForConditionalGeneration (Keye-VL-671B-A37B)";

fn variant(top: &Fields) -> Result<(Variant, String), ProcessorError> {
    let architecture = match top.list("architectures")?.and_then(|list| list.first()) {
        None => None,
        Some(Value::String(name)) => Some(name.as_str()),
        Some(_) => return Err(top.error("architectures", "expected a list of strings")),
    };
    let model_type = top.str("model_type")?;
    let variant = match (architecture, model_type) {
        (Some("KeyeForConditionalGeneration"), _) => Variant::Preview,
        (Some(name), _) if name.starts_with("KeyeVL1_5") => Variant::V1_5,
        (None, Some(name)) if name.contains("KeyeVL1_5") => Variant::V1_5,
        (Some("KeyeVL2MoeForConditionalGeneration" | "KeyeVL2ForConditionalGeneration"), _) => Variant::V2,
        (None, Some("KeyeVL2")) => Variant::V2,
        (Some("KeyeVLMoeForConditionalGeneration"), _) => Variant::V671b,
        (None, Some("Keye")) => Variant::Preview,
        (None, None) => return Err(top.error("architectures", format_args!("missing; supported are {SUPPORTED}"))),
        (architecture, model_type) => {
            let (field, name) = match architecture {
                Some(name) => ("architectures[0]", name),
                None => ("model_type", model_type.unwrap_or_default()),
            };
            return Err(top.error(field, format_args!("found {name:?}, which is unknown; supported are {SUPPORTED}")));
        }
    };
    Ok((variant, architecture.or(model_type).unwrap_or_default().to_owned()))
}

fn text_config(
    top: &Fields,
    text: &Fields,
    variant: Variant,
    architecture: &str,
) -> Result<TextConfig, ProcessorError> {
    let hidden_size = text.size("hidden_size", MAX_WIDTH, None)?;
    let num_attention_heads = text.size("num_attention_heads", MAX_HEADS, None)?;
    let num_key_value_heads = text.size("num_key_value_heads", MAX_HEADS, Some(num_attention_heads))?;
    if !num_attention_heads.is_multiple_of(num_key_value_heads) {
        let reason =
            format!("expected a divisor of num_attention_heads ({num_attention_heads}), found {num_key_value_heads}");
        return Err(text.error("num_key_value_heads", reason));
    }
    let head_dim = text.size("head_dim", MAX_HEAD_DIM, Some(hidden_size / num_attention_heads))?;
    if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
        return Err(
            text.error("head_dim", format_args!("expected an even number up to {MAX_HEAD_DIM}, found {head_dim}"))
        );
    }
    only(text, "hidden_act", "silu")?;
    if text.bool("use_sliding_window")? == Some(true) && text.get("sliding_window").is_some() {
        return Err(text.error("use_sliding_window", "expected false: sliding windows are not supported"));
    }
    let second = variant == Variant::V2;
    let (rope_theta, mrope_section) = rope(text, head_dim, if second { 1e7 } else { 1e6 })?;
    // The dense class may have the other's fields.
    let dense = architecture == "KeyeVL2ForConditionalGeneration";
    let moe = second && !dense && (architecture.contains("Moe") || text.get("num_experts").is_some());
    Ok(TextConfig {
        hidden_size,
        intermediate_size: text.size("intermediate_size", MAX_FEED_FORWARD, None)?,
        num_hidden_layers: text.size("num_hidden_layers", MAX_LAYERS, None)?,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        rms_norm_eps: epsilon(text, "rms_norm_eps", if second { 1e-6 } else { 1e-5 })?,
        rope_theta,
        mrope_section,
        max_position_embeddings: text.size(
            "max_position_embeddings",
            MAX_POSITIONS,
            Some(if second { 262_144 } else { 32_768 }),
        )?,
        vocab_size: text.size("vocab_size", MAX_VOCAB, None)?,
        attention_bias: text.bool("attention_bias")?.unwrap_or(false),
        tie_word_embeddings: match top.bool("tie_word_embeddings")? {
            Some(tied) => tied,
            None => text.bool("tie_word_embeddings")?.unwrap_or(false),
        },
        experts: if moe { Some(experts(text)?) } else { None },
        indexer: if second { indexer(top, text, head_dim, mrope_section)? } else { None },
        latent: None,
    })
}

fn experts(text: &Fields) -> Result<ExpertsConfig, ProcessorError> {
    let num_experts = text.size("num_experts", MAX_EXPERTS, None)?;
    Ok(ExpertsConfig {
        num_experts,
        num_experts_per_tok: text.size("num_experts_per_tok", num_experts, None)?,
        moe_intermediate_size: text.size("moe_intermediate_size", MAX_FEED_FORWARD, None)?,
        norm_topk_prob: text.bool("norm_topk_prob")?.unwrap_or(true),
        n_shared_experts: 0,
        first_k_dense_replace: 0,
        moe_layer_freq: 1,
        groups: None,
    })
}

/// `rope_theta` and `mrope_section`, from `rope_scaling` + `rope_theta` or from the newer `rope_parameters`.
fn rope(text: &Fields, head_dim: usize, default_theta: f64) -> Result<(f64, [usize; 3]), ProcessorError> {
    let (name, fields) = match text.object("rope_parameters")? {
        Some(fields) => ("rope_parameters", Some(fields)),
        None => ("rope_scaling", text.object("rope_scaling")?),
    };
    let mut theta = text.number("rope_theta", 1.0..=1e12)?;
    let mut section = None;
    if let Some(fields) = &fields {
        for key in ["rope_type", "type"] {
            if let Some(kind) = fields.str(key)?.filter(|kind| !["mrope", "default"].contains(kind)) {
                return Err(fields.error(key, format_args!("expected \"mrope\" or \"default\", found {kind:?}")));
            }
        }
        if fields.bool("mrope_interleaved")? == Some(true) {
            return Err(fields.error("mrope_interleaved", "expected false: sections are contiguous"));
        }
        theta = fields.number("rope_theta", 1.0..=1e12)?.or(theta);
        section = fields.list("mrope_section")?;
    }
    let wrong = |found: String| {
        let expected = format!("expected three whole numbers that sum to head_dim / 2 = {}", head_dim / 2);
        text.error(&format!("{name}.mrope_section"), format_args!("{expected}, found {found}"))
    };
    let section = match section {
        None if head_dim == 128 => [16, 24, 24],
        None => return Err(wrong("nothing".into())),
        Some(list) => {
            let shown = || wrong(Value::from(list.clone()).to_string().chars().take(80).collect());
            let parts: Option<Vec<usize>> =
                list.iter().map(|v| whole(v).filter(|n| *n <= MAX_HEAD_DIM as u64).map(|n| n as usize)).collect();
            match parts.as_deref() {
                Some(&[t, h, w]) if t + h + w == head_dim / 2 => [t, h, w],
                _ => return Err(shown()),
            }
        }
    };
    Ok((theta.unwrap_or(default_theta), section))
}

fn vision_config(vision: &Fields) -> Result<VisionConfig, ProcessorError> {
    let hidden_size = vision.size("hidden_size", MAX_WIDTH, None)?;
    let num_attention_heads = vision.size("num_attention_heads", MAX_HEADS, None)?;
    // The 2D RoPE gives half of a head to rows and half to columns, in pairs.
    if !hidden_size.is_multiple_of(num_attention_heads) || !(hidden_size / num_attention_heads).is_multiple_of(4) {
        let reason =
            format!("expected heads of a multiple of 4 wide, found {num_attention_heads} heads for {hidden_size}");
        return Err(vision.error("num_attention_heads", reason));
    }
    only(vision, "hidden_act", "gelu_pytorch_tanh")?;
    let patch_size = vision.size("patch_size", MAX_PATCH_SIDE, Some(14))?;
    let image_size = vision.size("image_size", MAX_IMAGE_SIDE, Some(224))?;
    if image_size < patch_size {
        return Err(
            vision.error("image_size", format_args!("expected at least patch_size ({patch_size}), found {image_size}"))
        );
    }
    Ok(VisionConfig {
        hidden_size,
        intermediate_size: vision.size("intermediate_size", MAX_FEED_FORWARD, None)?,
        num_hidden_layers: vision.size("num_hidden_layers", MAX_LAYERS, None)?,
        num_attention_heads,
        image_size,
        patch_size,
        spatial_merge_size: vision.size("spatial_merge_size", 8, Some(2))?,
        tokens_per_second: vision.number("tokens_per_second", 0.0..=1e4)?.unwrap_or(2.0) as f32,
        layer_norm_eps: epsilon(vision, "layer_norm_eps", 1e-6)?,
        num_channels: match vision.size("num_channels", 3, Some(3))? {
            3 => 3,
            other => return Err(vision.error("num_channels", format_args!("expected 3, found {other}"))),
        },
        rope_theta: vision.number("rope_theta", 1.0..=1e12)?.unwrap_or(1e4),
    })
}

pub(crate) fn epsilon(fields: &Fields, name: &str, default: f64) -> Result<f32, ProcessorError> {
    Ok(fields.number(name, 1e-30..=1.0)?.unwrap_or(default) as f32)
}

pub(crate) fn only(fields: &Fields, name: &str, supported: &str) -> Result<(), ProcessorError> {
    match fields.str(name)? {
        Some(found) if found != supported => {
            Err(fields.error(name, format_args!("expected {supported:?}, found {found:?}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod tests;
