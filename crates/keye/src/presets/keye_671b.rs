//! Keye-VL-671B-A37B: what its config.json adds, and which of its weights are stored in 8 bits
//! (`docs/spec/keye-vl-671b.md` §2, §3 and §6).

use keye_processor::{Dtype, NewTensor};
use serde_json::{Value, json};

/// Rows and columns of the weights that share a scale.
const BLOCK: usize = 128;

/// Dimensions of latent attention and of the experts.
struct Dims {
    q_rank: usize,
    kv_rank: usize,
    nope: usize,
    rope: usize,
    value: usize,
    expert: usize,
    experts: usize,
    chosen: usize,
    groups: usize,
    chosen_groups: usize,
    dense_layers: usize,
}

const REAL: Dims = Dims {
    q_rank: 1536,
    kv_rank: 512,
    nope: 128,
    rope: 64,
    value: 128,
    expert: 2048,
    experts: 256,
    chosen: 8,
    groups: 8,
    chosen_groups: 4,
    dense_layers: 3,
};

const TINY: Dims = Dims {
    q_rank: 24,
    kv_rank: 32,
    nope: 16,
    rope: 8,
    value: 16,
    expert: 40,
    experts: 16,
    chosen: 4,
    groups: 4,
    chosen_groups: 2,
    dense_layers: 1,
};

/// Makes this model's config.json of one of 1.5 with the common dimensions.
pub(super) fn complete(config: &mut Value, tiny: bool, dtype: Dtype) {
    let dims = if tiny { &TINY } else { &REAL };
    let attention = json!({
        "architectures": ["KeyeVLMoeForConditionalGeneration"],
        "model_type": "KeyeVLMoe",
        "q_lora_rank": dims.q_rank,
        "kv_lora_rank": dims.kv_rank,
        "qk_nope_head_dim": dims.nope,
        "qk_rope_head_dim": dims.rope,
        "v_head_dim": dims.value,
        "max_position_embeddings": 163_840,
        "rope_theta": 10_000,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        },
        "head_dim": null,
        "max_window_layers": null,
        "use_sliding_window": null,
    });
    let experts = json!({
        "moe_intermediate_size": dims.expert,
        "n_routed_experts": dims.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": dims.chosen,
        "n_group": dims.groups,
        "topk_group": dims.chosen_groups,
        "first_k_dense_replace": dims.dense_layers,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": true,
        "routed_scaling_factor": 2.5,
    });
    let Some(fields) = config.as_object_mut() else { return };
    for (name, value) in [attention, experts].iter().filter_map(Value::as_object).flatten() {
        match value {
            Value::Null => fields.remove(name),
            value => fields.insert(name.clone(), value.clone()),
        };
    }
    if dtype == Dtype::F8E4M3 {
        let how = json!({
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        });
        fields.insert("quantization_config".into(), how);
    }
}

/// Matrices of the decoder's layers are stored in 8 bits, routers and norms are not.
fn is_fp8(name: &str) -> bool {
    name.starts_with("model.layers.") && name.contains("_proj") && name.ends_with(".weight")
}

/// `tensors` as the published model stores them: matrices of the layers in 8 bits, each followed by its scales, the
/// routers' biases in f32, the rest in bf16.
pub(super) fn stored(tensors: Vec<NewTensor>) -> Vec<NewTensor> {
    let mut stored = Vec::with_capacity(2 * tensors.len());
    for tensor in tensors {
        match tensor.shape[..] {
            [rows, cols] if is_fp8(&tensor.name) => {
                let scales = vec![rows.div_ceil(BLOCK), cols.div_ceil(BLOCK)];
                let name = format!("{}_scale_inv", tensor.name);
                stored.push(NewTensor { dtype: Dtype::F8E4M3, ..tensor });
                stored.push(NewTensor { name, dtype: Dtype::F32, shape: scales });
            }
            _ if tensor.name.ends_with(".e_score_correction_bias") => {
                stored.push(NewTensor { dtype: Dtype::F32, ..tensor });
            }
            _ => stored.push(NewTensor { dtype: Dtype::Bf16, ..tensor }),
        }
    }
    stored
}
