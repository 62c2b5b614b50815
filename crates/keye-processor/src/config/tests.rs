use serde_json::json;

use super::*;

/// The published config.json of Preview, cut down to what is read.
fn published() -> Value {
    json!({
        "architectures": ["KeyeForConditionalGeneration"], "model_type": "Keye", "attention_bias": false,
        "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "image_token_id": 151655, "video_token_id": 151656, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "max_position_embeddings": 40960,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "sliding_window": null,
        "use_sliding_window": false, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 151936,
        "vision_config": {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
            "image_size": 384, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "tokens_per_second": 2
        }
    })
}

pub(crate) fn load(value: &Value) -> Result<ModelConfig, ProcessorError> {
    ModelConfig::from_value(Path::new("config.json"), value)
}

/// Sets, or with null removes, the field at a json pointer.
pub(crate) fn edited(mut value: Value, pointer: &str, field: Value) -> Value {
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    let parent = value.pointer_mut(parent).unwrap().as_object_mut().unwrap();
    match field {
        Value::Null => parent.remove(name),
        field => parent.insert(name.into(), field),
    };
    value
}

#[test]
fn reads_the_published_file() {
    let config = load(&published()).unwrap();
    assert_eq!(config.variant, Variant::Preview);
    assert_eq!((config.text.head_dim, config.text.mrope_section), (128, [16, 24, 24]));
    assert_eq!((config.vision.layer_norm_eps, config.vision.num_channels), (1e-6, 3));
    assert_eq!(config.eos_token_id, [151_645]);
}

#[test]
fn nested_text_config_and_rope_parameters_mean_the_same() {
    let flat = published();
    let mut nested = flat.clone();
    let map = nested.as_object_mut().unwrap();
    let mut text = serde_json::Map::new();
    for name in [
        "attention_bias",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "vocab_size",
        "eos_token_id",
        "tie_word_embeddings",
        "torch_dtype",
    ] {
        text.insert(name.into(), map.remove(name).unwrap());
    }
    map.remove("rope_theta");
    map.remove("rope_scaling");
    let rope = json!({"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]});
    text.insert("rope_parameters".into(), rope);
    map.insert("text_config".into(), text.into());
    assert_eq!(load(&nested).unwrap(), load(&flat).unwrap());
}

#[test]
fn defaults_of_absent_fields() {
    let mut value = published();
    for pointer in
        ["/head_dim", "/rope_theta", "/rope_scaling", "/image_token_id", "/vision_config/patch_size", "/torch_dtype"]
    {
        value = edited(value, pointer, Value::Null);
    }
    assert_eq!(load(&value).unwrap(), load(&published()).unwrap());
    let config = load(&edited(published(), "/rms_norm_eps", Value::Null)).unwrap();
    assert_eq!(config.text.rms_norm_eps, 1e-5);
    let config = load(&edited(published(), "/eos_token_id", json!([1, 2]))).unwrap();
    assert_eq!(config.eos_token_id, [1, 2]);
}

#[test]
fn variants() {
    let name = |architecture: Value, model_type: &str| {
        load(&edited(edited(published(), "/architectures", architecture), "/model_type", json!(model_type)))
    };
    assert_eq!(name(json!(["KeyeVL1_5ForConditionalGeneration"]), "x").unwrap().variant, Variant::V1_5);
    assert_eq!(name(Value::Null, "my-KeyeVL1_5").unwrap().variant, Variant::V1_5);
    assert_eq!(name(Value::Null, "Keye").unwrap().variant, Variant::Preview);
    assert_eq!(name(json!(["KeyeVL2ForConditionalGeneration"]), "KeyeVL2").unwrap().variant, Variant::V2);
    let error = name(json!(["KeyeVL671BForConditionalGeneration"]), "x").unwrap_err().to_string();
    assert!(error.contains("unknown") && error.contains("KeyeVLMoeForConditionalGeneration"), "{error}");
    let error = name(json!(["LlamaForCausalLM"]), "llama").unwrap_err().to_string();
    assert!(error.contains("LlamaForCausalLM") && error.contains("unknown"), "{error}");
}

#[test]
fn errors_name_the_field() {
    let cases = [
        ("/hidden_size", json!(0), "hidden_size"),
        ("/hidden_size", json!("4096"), "hidden_size: expected a whole number from 1 to 131072, found \"4096\""),
        ("/hidden_size", Value::Null, "hidden_size: missing"),
        ("/intermediate_size", json!(1u64 << 40), "intermediate_size"),
        ("/num_hidden_layers", json!(1_000_000), "num_hidden_layers"),
        ("/num_hidden_layers", json!(-1), "num_hidden_layers"),
        ("/num_hidden_layers", json!(36.5), "num_hidden_layers"),
        ("/num_attention_heads", json!([32]), "num_attention_heads"),
        ("/num_key_value_heads", json!(7), "num_key_value_heads: expected a divisor"),
        ("/head_dim", json!(127), "head_dim"),
        ("/vocab_size", json!(u64::MAX), "vocab_size"),
        ("/vocab_size", json!(1000), "eos_token_id"),
        ("/rms_norm_eps", json!(-1.0), "rms_norm_eps"),
        ("/rope_theta", json!(0), "rope_theta"),
        ("/rope_scaling", json!("mrope"), "rope_scaling: expected an object"),
        ("/rope_scaling/type", json!("yarn"), "rope_scaling.type"),
        ("/rope_scaling/mrope_section", json!([16, 24, 25]), "rope_scaling.mrope_section"),
        ("/rope_scaling/mrope_section", json!([16, 48]), "rope_scaling.mrope_section"),
        ("/rope_scaling/mrope_section", json!([1u64 << 63, 1u64 << 63, 64]), "rope_scaling.mrope_section"),
        ("/max_position_embeddings", json!(0), "max_position_embeddings"),
        ("/hidden_act", json!("gelu"), "hidden_act"),
        ("/attention_bias", json!("no"), "attention_bias: expected true or false"),
        ("/eos_token_id", json!([151_645, 151_936]), "eos_token_id"),
        ("/image_token_id", json!(-5), "image_token_id"),
        ("/video_token_id", json!([1, 2]), "video_token_id"),
        ("/vision_config", Value::Null, "vision_config: missing"),
        ("/vision_config", json!([]), "vision_config: expected an object"),
        ("/vision_config/hidden_size", json!(1150), "vision_config.num_attention_heads"),
        ("/vision_config/patch_size", json!(0), "vision_config.patch_size"),
        ("/vision_config/image_size", json!(13), "vision_config.image_size"),
        ("/vision_config/num_hidden_layers", json!(true), "vision_config.num_hidden_layers"),
        ("/vision_config/tokens_per_second", json!("two"), "vision_config.tokens_per_second"),
        ("/vision_config/num_channels", json!(1), "vision_config.num_channels"),
        ("/architectures", json!("Keye"), "architectures: expected a list"),
        ("/architectures", json!([3]), "architectures"),
        ("/torch_dtype", json!(16), "torch_dtype"),
    ];
    for (pointer, field, named) in cases {
        let error = load(&edited(published(), pointer, field.clone())).expect_err(pointer).to_string();
        assert!(error.contains("config.json: ") && error.contains(named), "{pointer} = {field}: {error}");
    }
    assert!(load(&json!([])).unwrap_err().to_string().contains("expected an object"));
}
