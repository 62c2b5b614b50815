//! The decoder's fields of Keye-VL-671B's config.json: latent attention, grouped experts, YaRN
//! (`docs/spec/keye-vl-671b.md` §2).

use crate::config::{
    MAX_EXPERTS, MAX_FEED_FORWARD, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH, epsilon,
    only,
};
use crate::files::Fields;
use crate::{ExpertsConfig, ProcessorError, TextConfig};

/// Multi-head latent attention: keys and values of all heads come from one narrow row a token, which is what is cached.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentConfig {
    /// Width of the row that queries come from.
    pub q_lora_rank: usize,
    /// Width of the row that keys and values come from.
    pub kv_lora_rank: usize,
    /// Columns of a query head that are not rotated.
    pub qk_nope_head_dim: usize,
    /// Columns of a query head that are rotated, in neighbouring pairs; all heads share their key.
    pub qk_rope_head_dim: usize,
    /// Width of a value head.
    pub v_head_dim: usize,
    /// Rotation beyond the length of training.
    pub yarn: YarnConfig,
}

impl LatentConfig {
    /// Cached values of a token and layer.
    pub fn latent_dim(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }
}

/// YaRN: frequencies that turn slowly over the original length are slowed down.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct YarnConfig {
    /// By which the original length is multiplied.
    pub factor: f64,
    /// The original length.
    pub original_max_position_embeddings: usize,
    /// Turns over the original length above which a frequency stays.
    pub beta_fast: f64,
    /// Turns over the original length below which a frequency is divided by the factor.
    pub beta_slow: f64,
    /// Weight of the factor's logarithm in the length of rotated vectors.
    pub mscale: f64,
    /// Weight of the factor's logarithm in the scores.
    pub mscale_all_dim: f64,
}

/// How experts are chosen by groups.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupConfig {
    /// Groups of equally many experts.
    pub n_group: usize,
    /// Groups that a token may choose from.
    pub topk_group: usize,
    /// Factor of the chosen experts' weights.
    pub routed_scaling_factor: f32,
}

/// Defaults of absent fields: spec §2. Dimensions that any decoder has are not guessed.
pub(crate) fn text_config(top: &Fields, text: &Fields) -> Result<TextConfig, ProcessorError> {
    let num_attention_heads = text.size("num_attention_heads", MAX_HEADS, None)?;
    if let Some(found) = text.uint("num_key_value_heads", 0..=MAX_HEADS as u64)?
        && found != num_attention_heads as u64
    {
        let reason = format!("expected num_attention_heads ({num_attention_heads}): the latent is shared by all heads");
        return Err(text.error("num_key_value_heads", format_args!("{reason}, found {found}")));
    }
    only(text, "hidden_act", "silu")?;
    if text.bool("attention_bias")? == Some(true) {
        return Err(text.error("attention_bias", "expected false: latent attention has no biases"));
    }
    if text.bool("rope_interleave")? == Some(false) {
        return Err(text.error("rope_interleave", "expected true: columns turn in neighbouring pairs, found false"));
    }
    let num_hidden_layers = text.size("num_hidden_layers", MAX_LAYERS, None)?;
    let (yarn, rope_theta) = rope(text)?;
    let latent = latent(text, yarn)?;
    Ok(TextConfig {
        hidden_size: text.size("hidden_size", MAX_WIDTH, None)?,
        intermediate_size: text.size("intermediate_size", MAX_FEED_FORWARD, None)?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: num_attention_heads,
        head_dim: latent.qk_nope_head_dim + latent.qk_rope_head_dim,
        rms_norm_eps: epsilon(text, "rms_norm_eps", 1e-6)?,
        rope_theta,
        // Positions have one axis.
        mrope_section: [latent.qk_rope_head_dim / 2, 0, 0],
        max_position_embeddings: text.size("max_position_embeddings", MAX_POSITIONS, Some(163_840))?,
        vocab_size: text.size("vocab_size", MAX_VOCAB, None)?,
        attention_bias: false,
        tie_word_embeddings: text_or_top(top, text, "tie_word_embeddings")?.unwrap_or(false),
        experts: Some(experts(text, num_hidden_layers)?),
        indexer: None,
        latent: Some(latent),
    })
}

fn text_or_top(top: &Fields, text: &Fields, name: &str) -> Result<Option<bool>, ProcessorError> {
    match top.bool(name)? {
        Some(value) => Ok(Some(value)),
        None => text.bool(name),
    }
}

fn latent(text: &Fields, yarn: YarnConfig) -> Result<LatentConfig, ProcessorError> {
    let rank = |name: &str, default: usize| text.size(name, MAX_WIDTH, Some(default));
    let width = |name: &str, default: usize| text.size(name, MAX_HEAD_DIM, Some(default));
    let qk_rope_head_dim = width("qk_rope_head_dim", 64)?;
    if !qk_rope_head_dim.is_multiple_of(2) {
        let reason = format!("expected an even number: columns turn in pairs, found {qk_rope_head_dim}");
        return Err(text.error("qk_rope_head_dim", reason));
    }
    Ok(LatentConfig {
        q_lora_rank: rank("q_lora_rank", 1536)?,
        kv_lora_rank: rank("kv_lora_rank", 512)?,
        qk_nope_head_dim: width("qk_nope_head_dim", 128)?,
        qk_rope_head_dim,
        v_head_dim: width("v_head_dim", 128)?,
        yarn,
    })
}

/// The rotation and its base, from `rope_scaling` and `rope_theta` or from the newer `rope_parameters`, which has both.
fn rope(text: &Fields) -> Result<(YarnConfig, f64), ProcessorError> {
    let fields = match text.object("rope_parameters")? {
        Some(fields) => Some(fields),
        None => text.object("rope_scaling")?,
    };
    let theta = |fields: &Fields| fields.number("rope_theta", 1.0..=1e12);
    let outer = theta(text)?;
    match fields {
        Some(fields) => Ok((yarn(&fields)?, theta(&fields)?.or(outer).unwrap_or(1e4))),
        None => Ok((DEEPSEEK, outer.unwrap_or(1e4))),
    }
}

/// What is meant where nothing is said.
const DEEPSEEK: YarnConfig = YarnConfig {
    factor: 40.0,
    original_max_position_embeddings: 4096,
    beta_fast: 32.0,
    beta_slow: 1.0,
    mscale: 1.0,
    mscale_all_dim: 1.0,
};

fn yarn(fields: &Fields) -> Result<YarnConfig, ProcessorError> {
    for key in ["rope_type", "type"] {
        if let Some(kind) = fields.str(key)?.filter(|kind| !["yarn", "deepseek_yarn"].contains(kind)) {
            return Err(fields.error(key, format_args!("expected \"yarn\", found {kind:?}")));
        }
    }
    if fields.get("mrope_section").is_some() {
        let reason = "expected none: this decoder's rotation has one axis (positions 0, 1, 2, ...), so that it cannot take \
                      three; remove the field if the model was trained so";
        return Err(fields.error("mrope_section", reason));
    }
    // What would change the rotation in ways that this decoder does not know.
    if fields.get("attention_factor").is_some() {
        let reason =
            "expected none: the length of rotated vectors comes from mscale and mscale_all_dim; say it with these";
        return Err(fields.error("attention_factor", reason));
    }
    if fields.bool("truncate")? == Some(false) {
        return Err(fields.error("truncate", "expected true: the range between beta_fast and beta_slow has whole ends"));
    }
    if fields.bool("mrope_interleaved")? == Some(true) {
        return Err(fields.error("mrope_interleaved", "expected false: this decoder's rotation has one axis"));
    }
    if let Some(part) = fields.number("partial_rotary_factor", 0.0..=1.0)?
        && part != 1.0
    {
        let reason = format!("expected 1: all columns of qk_rope_head_dim turn, found {part}");
        return Err(fields.error("partial_rotary_factor", reason));
    }
    let number = |name: &str, range: std::ops::RangeInclusive<f64>, default: f64| {
        Ok::<_, ProcessorError>(fields.number(name, range)?.unwrap_or(default))
    };
    let factor = fields.number("factor", 1.0..=1e6)?.ok_or_else(|| fields.error("factor", "missing"))?;
    Ok(YarnConfig {
        factor,
        original_max_position_embeddings: fields.size("original_max_position_embeddings", MAX_POSITIONS, None)?,
        beta_fast: number("beta_fast", 1e-3..=1e6, 32.0)?,
        beta_slow: number("beta_slow", 1e-3..=1e6, 1.0)?,
        mscale: number("mscale", 0.0..=100.0, 1.0)?,
        mscale_all_dim: number("mscale_all_dim", 0.0..=100.0, 1.0)?,
    })
}

fn experts(text: &Fields, layers: usize) -> Result<ExpertsConfig, ProcessorError> {
    only(text, "scoring_func", "sigmoid")?;
    only(text, "topk_method", "noaux_tc")?;
    let num_experts = text.size("n_routed_experts", MAX_EXPERTS, Some(256))?;
    let n_group = text.size("n_group", num_experts, Some(8))?;
    if !num_experts.is_multiple_of(n_group) {
        let reason = format!("expected a divisor of n_routed_experts ({num_experts}), found {n_group}");
        return Err(text.error("n_group", reason));
    }
    let topk_group = text.size("topk_group", n_group, Some(4.min(n_group)))?;
    let most = topk_group * (num_experts / n_group);
    let count = |name: &str, most: usize, default: u64| {
        Ok::<_, ProcessorError>(text.uint(name, 0..=most as u64)?.unwrap_or(default) as usize)
    };
    Ok(ExpertsConfig {
        num_experts,
        num_experts_per_tok: text.size("num_experts_per_tok", most, Some(8))?,
        moe_intermediate_size: text.size("moe_intermediate_size", MAX_FEED_FORWARD, Some(2048))?,
        norm_topk_prob: text.bool("norm_topk_prob")?.unwrap_or(true),
        n_shared_experts: count("n_shared_experts", 64, 1)?,
        first_k_dense_replace: count("first_k_dense_replace", layers, 3.min(layers as u64))?,
        moe_layer_freq: text.size("moe_layer_freq", MAX_LAYERS, Some(1))?,
        groups: Some(GroupConfig {
            n_group,
            topk_group,
            routed_scaling_factor: text.number("routed_scaling_factor", 1e-6..=1e6)?.unwrap_or(2.5) as f32,
        }),
    })
}

/// Rows and columns of a block of 8-bit weights, of `quantization_config` (spec §6).
pub(crate) fn fp8_block(top: &Fields) -> Result<[usize; 2], ProcessorError> {
    const DEFAULT: [usize; 2] = [128, 128];
    let Some(fields) = top.object("quantization_config")? else { return Ok(DEFAULT) };
    match fields.str("quant_method")? {
        Some("fp8") => {
            only(&fields, "fmt", "e4m3")?;
            only(&fields, "activation_scheme", "dynamic")?;
        }
        // Quantised from 8-bit floats, of which some are left.
        Some("keye") => {}
        _ => return Ok(DEFAULT),
    }
    let Some(list) = fields.list("weight_block_size")? else { return Ok(DEFAULT) };
    let side = |value: &serde_json::Value| crate::files::whole(value).filter(|n| (1..=1 << 16).contains(n));
    match list.iter().map(side).collect::<Option<Vec<u64>>>().as_deref() {
        Some(&[down, across]) => Ok([down as usize, across as usize]),
        _ => Err(fields.error("weight_block_size", "expected [rows, columns], two whole numbers from 1 to 65536")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::Variant;
    use crate::config::tests::{edited, load};

    /// All fields of the spec, as a published file would have them.
    fn published() -> Value {
        let text = r#"{
            "architectures": ["KeyeVLMoeForConditionalGeneration"], "hidden_size": 7168, "num_hidden_layers": 61,
            "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 18432,
            "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_routed_experts": 256,
            "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid",
            "topk_method": "noaux_tc", "norm_topk_prob": true, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6,
            "hidden_act": "silu", "vocab_size": 129280, "rope_theta": 10000,
            "rope_scaling": {
                "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
                "mscale": 1.0, "mscale_all_dim": 1.0
            },
            "max_position_embeddings": 163840, "tie_word_embeddings": false, "eos_token_id": 1,
            "image_token_id": 128815, "video_token_id": 128816, "fast_video_token_id": 128817,
            "vision_start_token_id": 128818, "vision_end_token_id": 128819,
            "vision_config": {
                "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304,
                "patch_size": 14, "image_size": 384, "spatial_merge_size": 2
            },
            "quantization_config": {
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
            }
        }"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn reads_every_field() {
        let config = load(&published()).unwrap();
        assert_eq!(config.variant, Variant::V671b);
        let text = &config.text;
        assert_eq!((text.head_dim, text.mrope_section, text.indexer), (192, [32, 0, 0], None));
        let latent = text.latent.unwrap();
        assert_eq!((latent.q_lora_rank, latent.latent_dim(), latent.v_head_dim), (1536, 576, 128));
        assert_eq!((latent.yarn.factor, latent.yarn.mscale_all_dim), (40.0, 1.0));
        let experts = text.experts.unwrap();
        assert_eq!((experts.num_experts, experts.num_experts_per_tok, experts.n_shared_experts), (256, 8, 1));
        assert!(!experts.is_in_layer(2) && experts.is_in_layer(3));
        assert_eq!(experts.groups.unwrap().routed_scaling_factor, 2.5);
        assert_eq!(config.fp8_block, [128, 128]);
    }

    #[test]
    fn absent_fields_are_deepseeks() {
        let mut value = published();
        for pointer in [
            "num_key_value_heads",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "moe_intermediate_size",
            "first_k_dense_replace",
            "moe_layer_freq",
            "n_routed_experts",
            "n_shared_experts",
            "num_experts_per_tok",
            "n_group",
            "topk_group",
            "scoring_func",
            "topk_method",
            "norm_topk_prob",
            "routed_scaling_factor",
            "rms_norm_eps",
            "hidden_act",
            "rope_theta",
            "rope_scaling",
            "max_position_embeddings",
            "tie_word_embeddings",
            "quantization_config",
        ] {
            value = edited(value, &format!("/{pointer}"), Value::Null);
        }
        assert_eq!(load(&value).unwrap(), load(&published()).unwrap());
        for field in ["type", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"] {
            value = edited(published(), &format!("/rope_scaling/{field}"), Value::Null);
            assert_eq!(load(&value).unwrap(), load(&published()).unwrap(), "{field}");
        }
    }

    /// Newer versions of transformers save one object with all that concerns the rotation.
    #[test]
    fn the_rotation_stands_in_either_object() {
        let mut old = published();
        old["rope_scaling"]["factor"] = json!(20);
        old["rope_theta"] = json!(50_000);
        let mut parameters = old["rope_scaling"].clone();
        parameters["rope_theta"] = json!(50_000);
        parameters["rope_type"] = parameters["type"].take();
        let mut new = edited(edited(old.clone(), "/rope_scaling", Value::Null), "/rope_theta", Value::Null);
        new["rope_parameters"] = parameters.clone();
        new["rope_interleave"] = json!(true);
        assert_eq!(load(&new).unwrap(), load(&old).unwrap());
        let both = edited(published(), "/rope_parameters", parameters);
        assert_eq!(load(&both).unwrap(), load(&old).unwrap(), "the newer one counts");
        let inside = edited(new.clone(), "/rope_parameters/rope_theta", Value::Null);
        assert_eq!(load(&inside).unwrap().text.rope_theta, 1e4);
        for (pointer, field, named) in [
            ("/rope_interleave", json!(false), "rope_interleave: expected true"),
            ("/rope_parameters/rope_type", json!("default"), "rope_parameters.rope_type: expected \"yarn\""),
            ("/rope_parameters/factor", Value::Null, "rope_parameters.factor: missing"),
            ("/rope_parameters/rope_theta", json!(0), "rope_parameters.rope_theta"),
            ("/rope_parameters/attention_factor", json!(1.2), "rope_parameters.attention_factor: expected none"),
            ("/rope_parameters/truncate", json!(false), "rope_parameters.truncate: expected true"),
            ("/rope_parameters/mrope_section", json!([8, 12, 12]), "rope_parameters.mrope_section: expected none"),
            ("/rope_parameters/mrope_interleaved", json!(true), "rope_parameters.mrope_interleaved"),
            ("/rope_parameters/partial_rotary_factor", json!(0.5), "rope_parameters.partial_rotary_factor: expected 1"),
        ] {
            let error = load(&edited(new.clone(), pointer, field)).expect_err(pointer).to_string();
            assert!(error.contains(named), "{pointer}: {error}");
        }
    }

    #[test]
    fn errors_name_the_field() {
        let cases = [
            ("/hidden_size", Value::Null, "hidden_size: missing"),
            ("/num_key_value_heads", json!(8), "num_key_value_heads: expected num_attention_heads (128)"),
            ("/q_lora_rank", json!(0), "q_lora_rank"),
            ("/kv_lora_rank", json!("512"), "kv_lora_rank"),
            ("/qk_rope_head_dim", json!(63), "qk_rope_head_dim: expected an even number"),
            ("/qk_nope_head_dim", json!(1 << 20), "qk_nope_head_dim"),
            ("/v_head_dim", json!(-1), "v_head_dim"),
            ("/n_group", json!(7), "n_group: expected a divisor of n_routed_experts (256)"),
            ("/topk_group", json!(9), "topk_group"),
            ("/num_experts_per_tok", json!(129), "num_experts_per_tok: expected a whole number from 1 to 128"),
            ("/scoring_func", json!("softmax"), "scoring_func: expected \"sigmoid\""),
            ("/topk_method", json!("greedy"), "topk_method: expected \"noaux_tc\""),
            ("/routed_scaling_factor", json!(0), "routed_scaling_factor"),
            ("/first_k_dense_replace", json!(62), "first_k_dense_replace"),
            ("/moe_layer_freq", json!(0), "moe_layer_freq"),
            ("/attention_bias", json!(true), "attention_bias: expected false"),
            ("/hidden_act", json!("gelu"), "hidden_act"),
            ("/rope_scaling/type", json!("linear"), "rope_scaling.type: expected \"yarn\""),
            ("/rope_scaling/factor", Value::Null, "rope_scaling.factor: missing"),
            ("/rope_scaling/factor", json!(0.5), "rope_scaling.factor"),
            (
                "/rope_scaling/original_max_position_embeddings",
                Value::Null,
                "rope_scaling.original_max_position_embeddings: missing",
            ),
            ("/rope_scaling/mrope_section", json!([16, 24, 24]), "rope_scaling.mrope_section: expected none"),
            ("/image_token_id", Value::Null, "image_token_id: missing"),
            ("/video_token_id", Value::Null, "video_token_id: missing"),
            ("/fast_video_token_id", Value::Null, "fast_video_token_id: missing"),
            ("/vision_start_token_id", Value::Null, "vision_start_token_id: missing"),
            ("/vision_end_token_id", json!(129_280), "vision_end_token_id: expected a token id below 129280"),
            ("/quantization_config/fmt", json!("e5m2"), "quantization_config.fmt: expected \"e4m3\""),
            ("/quantization_config/activation_scheme", json!("static"), "quantization_config.activation_scheme"),
            ("/quantization_config/weight_block_size", json!([128]), "quantization_config.weight_block_size"),
            ("/quantization_config/weight_block_size", json!([0, 128]), "quantization_config.weight_block_size"),
        ];
        for (pointer, field, named) in cases {
            let error = load(&edited(published(), pointer, field.clone())).expect_err(pointer).to_string();
            assert!(error.contains("config.json: ") && error.contains(named), "{pointer} = {field}: {error}");
        }
    }
}
