//! Names and shapes of the tensors that a config asks for (spec §3): for writing checkpoints and for inspecting them.

use keye_processor::{Checkpoint, LatentConfig, ModelConfig, ProjectorNorm, TextConfig};

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
    add("model.embed_tokens.weight".into(), &[text.vocab_size, h]);
    for number in 0..text.num_hidden_layers {
        let layer = format!("model.layers.{number}");
        add(format!("{layer}.input_layernorm.weight"), &[h]);
        match &text.latent {
            Some(latent) => latent_attention(&mut add, &format!("{layer}.self_attn"), text, latent),
            None => heads_attention(&mut add, &format!("{layer}.self_attn"), text),
        }
        add(format!("{layer}.post_attention_layernorm.weight"), &[h]);
        feed_forward(&mut add, &format!("{layer}.mlp"), text, number);
    }
    add("model.norm.weight".into(), &[h]);
    if !text.tie_word_embeddings {
        add("lm_head.weight".into(), &[text.vocab_size, h]);
    }
    out
}

/// Takes a tensor's name and shape.
type Add<'a> = dyn FnMut(String, &[usize]) + 'a;

fn heads_attention(add: &mut Add<'_>, at: &str, text: &TextConfig) {
    let h = text.hidden_size;
    let (q, kv) = (text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim);
    for (name, rows, cols) in [("q_proj", q, h), ("k_proj", kv, h), ("v_proj", kv, h), ("o_proj", h, q)] {
        add(format!("{at}.{name}.weight"), &[rows, cols]);
        if text.attention_bias {
            add(format!("{at}.{name}.bias"), &[rows]);
        }
    }
    add(format!("{at}.q_norm.weight"), &[text.head_dim]);
    add(format!("{at}.k_norm.weight"), &[text.head_dim]);
    if let Some(indexer) = &text.indexer {
        let (at, width) = (format!("{at}.sa_indexer"), indexer.head_dim);
        add(format!("{at}.q_proj.weight"), &[indexer.num_heads * (width + 1), h]);
        add(format!("{at}.k_proj.weight"), &[width, h]);
        for name in ["q_norm.weight", "k_norm.weight", "k_norm.bias"] {
            add(format!("{at}.{name}"), &[width]);
        }
    }
}

fn latent_attention(add: &mut Add<'_>, at: &str, text: &TextConfig, latent: &LatentConfig) {
    let (h, heads, q_rank, rank) =
        (text.hidden_size, text.num_attention_heads, latent.q_lora_rank, latent.kv_lora_rank);
    add(format!("{at}.q_a_proj.weight"), &[q_rank, h]);
    add(format!("{at}.q_a_layernorm.weight"), &[q_rank]);
    add(format!("{at}.q_b_proj.weight"), &[heads * text.head_dim, q_rank]);
    add(format!("{at}.kv_a_proj_with_mqa.weight"), &[latent.latent_dim(), h]);
    add(format!("{at}.kv_a_layernorm.weight"), &[rank]);
    add(format!("{at}.kv_b_proj.weight"), &[heads * (latent.qk_nope_head_dim + latent.v_head_dim), rank]);
    add(format!("{at}.o_proj.weight"), &[h, heads * latent.v_head_dim]);
}

fn feed_forward(add: &mut Add<'_>, at: &str, text: &TextConfig, layer: usize) {
    let h = text.hidden_size;
    let dense = |add: &mut Add<'_>, at: &str, width: usize| {
        add(format!("{at}.gate_proj.weight"), &[width, h]);
        add(format!("{at}.up_proj.weight"), &[width, h]);
        add(format!("{at}.down_proj.weight"), &[h, width]);
    };
    let Some(experts) = text.experts.filter(|experts| experts.is_in_layer(layer)) else {
        return dense(add, at, text.intermediate_size);
    };
    let (count, width) = (experts.num_experts, experts.moe_intermediate_size);
    add(format!("{at}.gate.weight"), &[count, h]);
    if experts.groups.is_none() {
        add(format!("{at}.experts.gate_up_proj"), &[count, h, 2 * width]);
        add(format!("{at}.experts.down_proj"), &[count, width, h]);
        return;
    }
    add(format!("{at}.gate.e_score_correction_bias"), &[count]);
    (0..count).for_each(|e| dense(add, &format!("{at}.experts.{e}"), width));
    if experts.n_shared_experts > 0 {
        dense(add, &format!("{at}.shared_experts"), experts.n_shared_experts * width);
    }
}

/// Names of a layer's experts in two tensors.
const FUSED: [&str; 2] = ["gate_up_proj", "down_proj"];

/// As [`weight_layout`], with every expert's matrices apart: `experts.E.gate_proj.weight` and `up_proj.weight` `[F, H]`,
/// `down_proj.weight` `[H, F]`. This is how experts are packed.
pub fn split_experts(layout: Vec<TensorShape>) -> Vec<TensorShape> {
    let mut out = Vec::with_capacity(layout.len());
    let mut width = 0;
    for tensor in layout {
        match (tensor.name.rsplit_once(".experts."), tensor.shape.as_slice()) {
            // The gates come with the downs, so that an expert's matrices lie together.
            (Some((_, "gate_up_proj")), &[_, _, double]) => width = double / 2,
            (Some((mlp, "down_proj")), &[count, _, h]) => {
                for expert in 0..count {
                    for (name, shape) in [("gate", [width, h]), ("up", [width, h]), ("down", [h, width])] {
                        let name = format!("{mlp}.experts.{expert}.{name}_proj.weight");
                        out.push(TensorShape { name, shape: shape.to_vec() });
                    }
                }
            }
            _ => out.push(tensor),
        }
    }
    out
}

/// As [`weight_layout`], with the experts of each layer in the form that the checkpoint has them in: input-major or
/// output-major, fused, or one by one.
pub fn stored_layout(config: &ModelConfig, checkpoint: &Checkpoint) -> Vec<TensorShape> {
    let mut out = Vec::new();
    let fused =
        |tensor: &TensorShape| tensor.name.rsplit_once(".experts.").is_some_and(|(_, name)| FUSED.contains(&name));
    let layout = weight_layout(config);
    for pair in layout.chunk_by(|a, b| fused(a) && fused(b)) {
        let Some((at, _)) = pair[0].name.rsplit_once(".experts.").filter(|_| fused(&pair[0])) else {
            out.extend_from_slice(pair);
            continue;
        };
        let found = checkpoint.get(&pair[0].name).map(|tensor| tensor.shape);
        if found.is_none() && checkpoint.get(&format!("{at}.experts.0.gate_proj.weight")).is_some() {
            out.extend(split_experts(pair.to_vec()));
            continue;
        }
        let turned = |shape: &[usize]| vec![shape[0], shape[2], shape[1]];
        let output_major = found.is_some_and(|shape| shape != pair[0].shape && shape == turned(&pair[0].shape));
        out.extend(pair.iter().map(|tensor| TensorShape {
            name: tensor.name.clone(),
            shape: if output_major { turned(&tensor.shape) } else { tensor.shape.clone() },
        }));
    }
    out
}
