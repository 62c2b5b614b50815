//! Names and shapes of the tensors that a config asks for (spec §3): for writing checkpoints and for inspecting them.

use keye_processor::{ModelConfig, ProjectorNorm};

/// A tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorShape {
    /// Its name.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

/// All tensors that inference uses, in the order of a forward pass.
pub fn weight_layout(config: &ModelConfig) -> Vec<TensorShape> {
    let mut out = Vec::new();
    let mut add = |name: String, shape: &[usize]| out.push(TensorShape { name, shape: shape.to_vec() });
    let vision = &config.vision;
    let (d, i, p) = (vision.hidden_size, vision.intermediate_size, vision.patch_size);
    let side = vision.image_size / p;
    let tower = "visual.vision_model";
    add(format!("{tower}.embeddings.patch_embedding.weight"), &[d, vision.num_channels, p, p]);
    add(format!("{tower}.embeddings.patch_embedding.bias"), &[d]);
    add(format!("{tower}.embeddings.position_embedding.weight"), &[side * side, d]);
    for layer in 0..vision.num_hidden_layers {
        let layer = format!("{tower}.encoder.layers.{layer}");
        for (name, rows, cols) in [
            ("layer_norm1", d, 0),
            ("self_attn.q_proj", d, d),
            ("self_attn.k_proj", d, d),
            ("self_attn.v_proj", d, d),
            ("self_attn.out_proj", d, d),
            ("layer_norm2", d, 0),
            ("mlp.fc1", i, d),
            ("mlp.fc2", d, i),
        ] {
            let weight: &[usize] = if cols == 0 { &[rows] } else { &[rows, cols] };
            add(format!("{layer}.{name}.weight"), weight);
            add(format!("{layer}.{name}.bias"), &[rows]);
        }
    }
    add(format!("{tower}.post_layernorm.weight"), &[d]);
    add(format!("{tower}.post_layernorm.bias"), &[d]);
    let merged = vision.spatial_merge_size * vision.spatial_merge_size * d;
    let h = config.text.hidden_size;
    let norm = match config.variant.facts().projector_norm {
        ProjectorNorm::BeforeMerge => d,
        ProjectorNorm::AfterMerge => merged,
    };
    add("mlp_AR.pre_norm.weight".into(), &[norm]);
    add("mlp_AR.pre_norm.bias".into(), &[norm]);
    add("mlp_AR.linear_1.weight".into(), &[merged, merged]);
    add("mlp_AR.linear_1.bias".into(), &[merged]);
    add("mlp_AR.linear_2.weight".into(), &[h, merged]);
    add("mlp_AR.linear_2.bias".into(), &[h]);
    let text = &config.text;
    let (q, kv) = (text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim);
    add("model.embed_tokens.weight".into(), &[text.vocab_size, h]);
    for layer in 0..text.num_hidden_layers {
        let layer = format!("model.layers.{layer}");
        add(format!("{layer}.input_layernorm.weight"), &[h]);
        for (name, rows, cols) in [("q_proj", q, h), ("k_proj", kv, h), ("v_proj", kv, h), ("o_proj", h, q)] {
            add(format!("{layer}.self_attn.{name}.weight"), &[rows, cols]);
            if text.attention_bias {
                add(format!("{layer}.self_attn.{name}.bias"), &[rows]);
            }
        }
        add(format!("{layer}.self_attn.q_norm.weight"), &[text.head_dim]);
        add(format!("{layer}.self_attn.k_norm.weight"), &[text.head_dim]);
        add(format!("{layer}.post_attention_layernorm.weight"), &[h]);
        if let Some(indexer) = &text.indexer {
            let (at, width) = (format!("{layer}.self_attn.sa_indexer"), indexer.head_dim);
            add(format!("{at}.q_proj.weight"), &[indexer.num_heads * (width + 1), h]);
            add(format!("{at}.k_proj.weight"), &[width, h]);
            for name in ["q_norm.weight", "k_norm.weight", "k_norm.bias"] {
                add(format!("{at}.{name}"), &[width]);
            }
        }
        match &text.experts {
            Some(experts) => {
                let (count, width) = (experts.num_experts, experts.moe_intermediate_size);
                add(format!("{layer}.mlp.gate.weight"), &[count, h]);
                add(format!("{layer}.mlp.experts.gate_up_proj"), &[count, h, 2 * width]);
                add(format!("{layer}.mlp.experts.down_proj"), &[count, width, h]);
            }
            None => {
                add(format!("{layer}.mlp.gate_proj.weight"), &[text.intermediate_size, h]);
                add(format!("{layer}.mlp.up_proj.weight"), &[text.intermediate_size, h]);
                add(format!("{layer}.mlp.down_proj.weight"), &[h, text.intermediate_size]);
            }
        }
    }
    add("model.norm.weight".into(), &[h]);
    if !text.tie_word_embeddings {
        add("lm_head.weight".into(), &[text.vocab_size, h]);
    }
    out
}
