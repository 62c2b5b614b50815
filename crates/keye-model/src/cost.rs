//! What work costs, in floating-point operations, from the config alone.

use keye_processor::{LatentConfig, TextConfig, VisionConfig};

/// Operations of one request (a multiply-add counts two).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Vision tower and projector.
    pub vision: f64,
    /// Prompt, in the decoder.
    pub prefill: f64,
}

/// Operations of vision tower and projector over patches that attend in spans of the given lengths; their tokens are
/// `hidden_size` wide.
pub fn vision_flops(config: &VisionConfig, hidden_size: usize, spans: &[usize]) -> f64 {
    let (d, i) = (config.hidden_size as f64, config.intermediate_size as f64);
    let merge = (config.spatial_merge_size * config.spatial_merge_size) as f64;
    let patch = (config.num_channels * config.patch_size * config.patch_size) as f64;
    let n = spans.iter().sum::<usize>() as f64;
    let squares: f64 = spans.iter().map(|s| (*s as f64).powi(2)).sum();
    let layers = config.num_hidden_layers as f64;
    let towers = layers * (n * 2.0 * (4.0 * d * d + 2.0 * d * i) + squares * 4.0 * d);
    let merged = merge * d;
    towers + n * 2.0 * patch * d + n / merge * 2.0 * (merged * merged + merged * hidden_size as f64)
}

/// The decoder over a prompt of `tokens` tokens, logits of one row.
pub(crate) fn prefill(config: &TextConfig, tokens: usize) -> f64 {
    let h = config.hidden_size as f64;
    // Widths of the feed-forward blocks that a token goes through, over all layers.
    let f: f64 = (0..config.num_hidden_layers)
        .map(|layer| match config.experts.filter(|experts| experts.is_in_layer(layer)) {
            Some(e) => ((e.num_experts_per_tok + e.n_shared_experts) * e.moe_intermediate_size) as f64,
            None => config.intermediate_size as f64,
        })
        .sum();
    let n = tokens as f64;
    let layer = match &config.latent {
        Some(latent) => latent_attention(config, latent, n),
        None => heads_attention(config, n),
    };
    config.num_hidden_layers as f64 * layer + n * 6.0 * h * f + 2.0 * h * config.vocab_size as f64
}

fn heads_attention(config: &TextConfig, n: f64) -> f64 {
    let h = config.hidden_size as f64;
    let (q, kv) =
        ((config.num_attention_heads * config.head_dim) as f64, (config.num_key_value_heads * config.head_dim) as f64);
    let attention = match &config.indexer {
        None => n * n * 2.0 * q,
        // Half of the square is scored by the index heads; beyond the first topk a query attends to topk keys.
        Some(indexer) => {
            let (width, topk) = ((indexer.num_heads * indexer.head_dim) as f64, n.min(indexer.topk as f64));
            let scored = if n > topk { n * n * width } else { 0.0 };
            scored + (topk * topk + 2.0 * (n - topk) * topk) * 2.0 * q
        }
    };
    n * 2.0 * (2.0 * h * q + 2.0 * h * kv) + attention
}

/// In the latent space: scores over rank and rotated key, weighted sums over the rank.
fn latent_attention(config: &TextConfig, latent: &LatentConfig, n: f64) -> f64 {
    let [h, heads] = [config.hidden_size, config.num_attention_heads].map(|n| n as f64);
    let [q_rank, rank, nope] = [latent.q_lora_rank, latent.kv_lora_rank, latent.qk_nope_head_dim].map(|n| n as f64);
    let [rope, v] = [latent.qk_rope_head_dim, latent.v_head_dim].map(|n| n as f64);
    let per_head = q_rank * (nope + rope) + nope * rank + rank * v + v * h;
    n * 2.0 * (h * q_rank + h * (rank + rope) + heads * per_head) + n * n * heads * (2.0 * rank + rope)
}
