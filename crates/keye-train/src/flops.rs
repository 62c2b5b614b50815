//! What a pack costs.

use keye_model::vision_flops;
use keye_processor::ModelConfig;

use crate::Pack;

/// Floating-point operations of a training step over a pack: three times the forward pass of all that is not frozen, two a
/// multiply-add, projections, attention inside samples and frames, logits of targets.
pub fn training_flops(config: &ModelConfig, pack: &Pack) -> f64 {
    let text = &config.text;
    let (h, q) = (text.hidden_size as f64, (text.num_attention_heads * text.head_dim) as f64);
    let kv = (text.num_key_value_heads * text.head_dim) as f64;
    let squares: f64 = pack.cu_seqlens.windows(2).map(|w| f64::from(w[1] - w[0]).powi(2)).sum();
    let tokens = pack.len() as f64;
    let layer = 2.0 * tokens * h * (2.0 * q + 2.0 * kv + 3.0 * text.intermediate_size as f64);
    // Half of the pairs are seen.
    let decoder = text.num_hidden_layers as f64 * (layer + 2.0 * q * squares);
    let head = 2.0 * pack.targets() as f64 * h * text.vocab_size as f64;
    let spans: Vec<usize> = pack.grids.iter().map(|[h, w]| *h as usize * *w as usize).collect();
    3.0 * (decoder + head + vision_flops(&config.vision, text.hidden_size, &spans))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_patchs_values_and_the_merge_are_the_configs() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/keye-1_5-tiny/model");
        let mut config = ModelConfig::load(&dir).unwrap();
        let pack = Pack { grids: vec![[4, 8]], ..Pack::default() };
        let (d, h) = (config.vision.hidden_size as f64, config.text.hidden_size as f64);
        let before = training_flops(&config, &pack);
        config.vision.num_channels += 1;
        let wider = training_flops(&config, &pack);
        assert_eq!(wider - before, 3.0 * 2.0 * 32.0 * 14.0 * 14.0 * d);
        config.vision.spatial_merge_size = 4;
        let projector = |merge: f64| 3.0 * 2.0 * 32.0 / merge * merge * d * (merge * d + h);
        assert_eq!(training_flops(&config, &pack) - wider, projector(16.0) - projector(4.0));
    }
}
