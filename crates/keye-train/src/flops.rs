//! What a pack costs.

use keye_processor::ModelConfig;

use crate::Pack;

/// Floating-point operations of a training step over a pack: three times the forward pass of all that is not frozen, two a
/// multiply-add, projections, attention inside samples and frames, logits of targets.
pub fn training_flops(config: &ModelConfig, pack: &Pack) -> f64 {
    let text = &config.text;
    let (h, q) = (text.hidden_size as f64, (text.num_attention_heads * text.head_dim) as f64);
    let kv = (text.num_key_value_heads * text.head_dim) as f64;
    let squares = |cu: &[u32]| cu.windows(2).map(|w| f64::from(w[1] - w[0]).powi(2)).sum::<f64>();
    let tokens = pack.len() as f64;
    let layer = 2.0 * tokens * h * (2.0 * q + 2.0 * kv + 3.0 * text.intermediate_size as f64);
    // Half of the pairs are seen.
    let decoder = text.num_hidden_layers as f64 * (layer + 2.0 * q * squares(&pack.cu_seqlens));
    let head = 2.0 * pack.targets() as f64 * h * text.vocab_size as f64;

    let vision = &config.vision;
    let (d, i) = (vision.hidden_size as f64, vision.intermediate_size as f64);
    let patches: f64 = pack.grids.iter().map(|[h, w]| f64::from(*h) * f64::from(*w)).sum();
    let layer = 2.0 * patches * d * (4.0 * d + 2.0 * i);
    let tower = vision.num_hidden_layers as f64 * (layer + 4.0 * d * squares(&pack.vit_cu_seqlens()));
    let embedding = 2.0 * patches * d * crate::PATCH_VALUES as f64;
    let projector = 2.0 * patches / 4.0 * 4.0 * d * (4.0 * d + h);
    3.0 * (decoder + head + tower + embedding + projector)
}
