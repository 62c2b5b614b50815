//! What work costs, in floating-point operations, from the config alone.

use keye_processor::{TextConfig, VisionConfig};

/// Operations of one request (a multiply-add counts two).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Vision tower and projector.
    pub vision: f64,
    /// Prompt, in the decoder.
    pub prefill: f64,
}

/// Vision tower and projector over `patches` patches that attend in spans of the given lengths.
pub(crate) fn vision(config: &VisionConfig, hidden_size: usize, patches: usize, spans: &[usize]) -> f64 {
    let (d, i) = (config.hidden_size as f64, config.intermediate_size as f64);
    let merge = (config.spatial_merge_size * config.spatial_merge_size) as f64;
    let patch = (config.num_channels * config.patch_size * config.patch_size) as f64;
    let n = patches as f64;
    let squares: f64 = spans.iter().map(|s| (*s as f64).powi(2)).sum();
    let layers = config.num_hidden_layers as f64;
    let towers = layers * (n * 2.0 * (4.0 * d * d + 2.0 * d * i) + squares * 4.0 * d);
    let merged = merge * d;
    towers + n * 2.0 * patch * d + n / merge * 2.0 * (merged * merged + merged * hidden_size as f64)
}

/// The decoder over a prompt of `tokens` tokens, logits of one row.
pub(crate) fn prefill(config: &TextConfig, tokens: usize) -> f64 {
    let (h, f) = (config.hidden_size as f64, config.intermediate_size as f64);
    let (q, kv) =
        ((config.num_attention_heads * config.head_dim) as f64, (config.num_key_value_heads * config.head_dim) as f64);
    let n = tokens as f64;
    let layer = n * 2.0 * (2.0 * h * q + 2.0 * h * kv + 3.0 * h * f) + n * n * 2.0 * q;
    config.num_hidden_layers as f64 * layer + 2.0 * h * config.vocab_size as f64
}
