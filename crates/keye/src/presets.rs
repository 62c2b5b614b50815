//! Checkpoint layouts without their weights: the files and tensors of the published models, and of tiny ones.

mod dims;
mod keye_671b;
mod text;

use std::path::Path;

use keye_model::TensorShape;
use keye_processor::{ChatTemplate, Dtype, ModelConfig, NewTensor, ProcessorError, Variant};
use serde_json::{Value, json};

use self::dims::{Dims, REAL, REAL_2, REAL_671B, TINY, TINY_2, TINY_671B};
use self::text::tokenizer_config;

/// A checkpoint that can be written with random weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// Keye-VL-8B-Preview in its real size.
    KeyeVl8b,
    /// Keye-VL-1.5-8B in its real size.
    KeyeVl1_5_8b,
    /// Preview with the dimensions of the golden data.
    KeyeTiny,
    /// 1.5 with the dimensions of the golden data.
    Keye1_5Tiny,
    /// Keye-VL-2.0-30B-A3B in its real size.
    KeyeVl2,
    /// 2.0 with dimensions like those of the golden data.
    Keye2Tiny,
    /// Keye-VL-671B-A37B in its real size; its vocabulary's special tokens are guessed.
    KeyeVl671b,
    /// Keye-VL-671B-A37B with 1.5's tiny tower and a decoder as tiny.
    Keye671bTiny,
}

const PATCH: usize = 14;
const MERGE: usize = 2;

impl Preset {
    /// Every preset.
    pub const ALL: [Self; 8] = [
        Self::KeyeVl8b,
        Self::KeyeVl1_5_8b,
        Self::KeyeTiny,
        Self::Keye1_5Tiny,
        Self::KeyeVl2,
        Self::Keye2Tiny,
        Self::KeyeVl671b,
        Self::Keye671bTiny,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::KeyeVl8b => "keye-vl-8b",
            Self::KeyeVl1_5_8b => "keye-vl-1.5-8b",
            Self::KeyeTiny => "keye-tiny",
            Self::Keye1_5Tiny => "keye-1.5-tiny",
            Self::KeyeVl2 => "keye-vl-2",
            Self::Keye2Tiny => "keye-2-tiny",
            Self::KeyeVl671b => "keye-vl-671b",
            Self::Keye671bTiny => "keye-671b-tiny",
        }
    }

    /// The preset called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|preset| preset.name() == name)
    }

    fn variant(self) -> Variant {
        match self {
            Self::KeyeVl8b | Self::KeyeTiny => Variant::Preview,
            Self::KeyeVl1_5_8b | Self::Keye1_5Tiny => Variant::V1_5,
            Self::KeyeVl2 | Self::Keye2Tiny => Variant::V2,
            Self::KeyeVl671b | Self::Keye671bTiny => Variant::V671b,
        }
    }

    /// Whether the vocabulary is that of the golden data.
    fn is_tiny(self) -> bool {
        self.dims().first_added == TINY.first_added
    }

    /// Whether the published model has weights of this type, or could be saved so.
    pub fn is_stored_as(self, dtype: Dtype) -> bool {
        match dtype {
            Dtype::F8E4M3 => self.variant() == Variant::V671b,
            _ => matches!(dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32),
        }
    }

    /// The type of the published model's weights.
    pub fn published_dtype(self) -> Dtype {
        if self.variant() == Variant::V671b { Dtype::F8E4M3 } else { Dtype::Bf16 }
    }

    fn dims(self) -> &'static Dims {
        match self {
            Self::KeyeVl8b | Self::KeyeVl1_5_8b => &REAL,
            Self::KeyeTiny | Self::Keye1_5Tiny => &TINY,
            Self::KeyeVl2 => &REAL_2,
            Self::Keye2Tiny => &TINY_2,
            Self::KeyeVl671b => &REAL_671B,
            Self::Keye671bTiny => &TINY_671B,
        }
    }

    /// Names and contents of the checkpoint's json files, for weights of type `dtype`.
    pub fn files(self, dtype: Dtype) -> [(&'static str, Value); 6] {
        [
            ("config.json", self.config(dtype)),
            ("generation_config.json", self.generation_config()),
            ("preprocessor_config.json", self.preprocessor_config()),
            ("chat_template.json", json!({"chat_template": ChatTemplate::published(self.variant())})),
            ("tokenizer.json", self.tokenizer()),
            ("tokenizer_config.json", tokenizer_config()),
        ]
    }

    fn config(self, dtype: Dtype) -> Value {
        let (dims, id) = (self.dims(), |token: &str| self.id(token));
        let (architecture, model_type, positions, theta) = match self.variant() {
            // 671B's is completed below.
            Variant::V1_5 | Variant::V671b => ("KeyeVL1_5ForConditionalGeneration", "KeyeVL1_5", 131_072, 8_000_000),
            Variant::V2 => ("KeyeVL2MoeForConditionalGeneration", "KeyeVL2", 262_144, 10_000_000),
            _ => ("KeyeForConditionalGeneration", "Keye", 40_960, 1_000_000),
        };
        let torch_dtype = match dtype {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            _ => "bfloat16",
        };
        let vision = json!({
            "architectures": ["SiglipVisionModel"],
            "attention_dropout": 0.0,
            "hidden_size": dims.vision_hidden,
            "image_size": 384,
            "intermediate_size": dims.vision_intermediate,
            "model_type": "siglip_vision_model",
            "num_attention_heads": dims.vision_heads,
            "num_hidden_layers": dims.vision_layers,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
        });
        let mut config = json!({
            "architectures": [architecture],
            "model_type": model_type,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": id("<|endoftext|>"),
            "eos_token_id": id("<|im_end|>"),
            "vision_start_token_id": id("<|vision_start|>"),
            "vision_end_token_id": id("<|vision_end|>"),
            "vision_token_id": id("<|vision_pad|>"),
            "image_token_id": id("<|image_pad|>"),
            "video_token_id": id("<|video_pad|>"),
            "head_dim": dims.head_dim,
            "hidden_act": "silu",
            "hidden_size": dims.hidden,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": dims.intermediate,
            "max_position_embeddings": positions,
            "max_window_layers": dims.layers,
            "num_attention_heads": dims.heads,
            "num_hidden_layers": dims.layers,
            "num_key_value_heads": dims.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"type": "mrope", "mrope_section": dims.mrope_section},
            "rope_theta": theta,
            "sliding_window": null,
            "tie_word_embeddings": false,
            "torch_dtype": torch_dtype,
            "transformers_version": "4.41.2",
            "use_cache": true,
            "use_sliding_window": false,
            "vision_config": vision,
            "vocab_size": dims.vocab,
        });
        if self.variant() != Variant::Preview {
            config["fast_video_token_id"] = json!(id("<|fast_video_pad|>"));
        }
        if let Some([count, chosen, width]) = dims.experts {
            config["num_experts"] = json!(count);
            config["num_experts_per_tok"] = json!(chosen);
            config["moe_intermediate_size"] = json!(width);
            config["norm_topk_prob"] = json!(true);
        }
        if let Some([heads, width, topk]) = dims.indexer {
            config["rope_scaling"] = json!({"rope_type": "default", "mrope_section": dims.mrope_section});
            config["sa_config"] = json!({
                "indexer_head_dim": width, "indexer_num_heads": heads, "indexer_num_kv_heads": 1,
                "kv_chunk_size": 512, "q_chunk_size": 512, "topk": topk,
            });
        }
        if self.variant() == Variant::V671b {
            keye_671b::complete(&mut config, self.is_tiny(), dtype);
        }
        config
    }

    fn generation_config(self) -> Value {
        let (end, turn_end) = (self.id("<|endoftext|>"), self.id("<|im_end|>"));
        json!({
            "bos_token_id": end,
            "do_sample": true,
            "eos_token_id": [turn_end, end],
            "pad_token_id": end,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "transformers_version": "4.41.2",
        })
    }

    fn preprocessor_config(self) -> Value {
        json!({
            "do_convert_rgb": true,
            "do_normalize": true,
            "do_rescale": true,
            "do_resize": true,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "max_pixels": self.dims().image_max_pixels,
            "merge_size": MERGE,
            "min_pixels": 3136,
            "patch_size": PATCH,
            "processor_class": if self.variant() == Variant::Preview { "KeyeProcessor" } else { "KeyeVL1_5Processor" },
            "resample": 3,
            "rescale_factor": 1.0 / 255.0,
            "temporal_patch_size": 1,
        })
    }

    /// The tensors that inference uses, in the order of a forward pass.
    pub fn used_tensors(self, dtype: Dtype) -> Result<Vec<NewTensor>, ProcessorError> {
        Sizes::from(self).used_tensors(dtype)
    }

    /// Every tensor of the checkpoint, those that inference does not use included (spec §3).
    pub fn tensors(self, dtype: Dtype) -> Result<Vec<NewTensor>, ProcessorError> {
        Sizes::from(self).tensors(dtype)
    }
}

/// A preset, or the first layers of its decoder only: what a layer costs is the same, and a part of it fits in memory that
/// has no room for the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Which.
    pub preset: Preset,
    /// Layers of the decoder; `None`: all.
    pub layers: Option<usize>,
}

impl From<Preset> for Sizes {
    fn from(preset: Preset) -> Self {
        Self { preset, layers: None }
    }
}

impl Sizes {
    /// Layers of the whole preset's decoder.
    pub fn all_layers(self) -> usize {
        self.preset.dims().layers
    }

    /// Names and contents of the checkpoint's json files, for weights of type `dtype`.
    pub fn files(self, dtype: Dtype) -> [(&'static str, Value); 6] {
        let mut files = self.preset.files(dtype);
        files[0].1 = self.config(dtype);
        files
    }

    fn config(self, dtype: Dtype) -> Value {
        let mut config = self.preset.config(dtype);
        if let Some(layers) = self.layers {
            config["num_hidden_layers"] = layers.into();
        }
        config
    }

    /// The tensors that inference uses, in the order of a forward pass.
    pub fn used_tensors(self, dtype: Dtype) -> Result<Vec<NewTensor>, ProcessorError> {
        let tensors = new_tensors(keye_model::weight_layout(&self.model_config(dtype)?), dtype);
        Ok(if dtype == Dtype::F8E4M3 { keye_671b::stored(tensors) } else { tensors })
    }

    /// The same with every expert apart, as they are packed.
    pub fn split_tensors(self, dtype: Dtype) -> Result<Vec<NewTensor>, ProcessorError> {
        let layout = keye_model::weight_layout(&self.model_config(dtype)?);
        let tensors = new_tensors(keye_model::split_experts(layout), dtype);
        Ok(if dtype == Dtype::F8E4M3 { keye_671b::stored(tensors) } else { tensors })
    }

    /// What config.json says.
    pub fn model_config(self, dtype: Dtype) -> Result<ModelConfig, ProcessorError> {
        ModelConfig::from_value(Path::new("config.json"), &self.config(dtype))
    }

    /// Every tensor of the checkpoint, those that inference does not use included (spec §3).
    pub fn tensors(self, dtype: Dtype) -> Result<Vec<NewTensor>, ProcessorError> {
        let config = self.model_config(dtype)?;
        let (d, i) = (config.vision.hidden_size, config.vision.intermediate_size);
        let packing = ("embeddings.packing_position_embedding.weight", vec![self.preset.dims().packing_positions, d]);
        let mut unused = vec![packing];
        if self.preset.variant() != Variant::V2 {
            unused.extend([
                ("head.probe", vec![1, 1, d]),
                ("head.attention.in_proj_weight", vec![3 * d, d]),
                ("head.attention.in_proj_bias", vec![3 * d]),
                ("head.attention.out_proj.weight", vec![d, d]),
                ("head.attention.out_proj.bias", vec![d]),
                ("head.layernorm.weight", vec![d]),
                ("head.layernorm.bias", vec![d]),
                ("head.mlp.fc1.weight", vec![i, d]),
                ("head.mlp.fc1.bias", vec![i]),
                ("head.mlp.fc2.weight", vec![d, i]),
                ("head.mlp.fc2.bias", vec![d]),
            ]);
        }
        let mut tensors = self.used_tensors(dtype)?;
        let dtype = if dtype == Dtype::F8E4M3 { Dtype::Bf16 } else { dtype };
        tensors.extend(unused.into_iter().map(|(name, shape)| NewTensor {
            name: format!("visual.vision_model.{name}"),
            dtype,
            shape,
        }));
        Ok(tensors)
    }
}

fn new_tensors(layout: Vec<TensorShape>, dtype: Dtype) -> Vec<NewTensor> {
    layout.into_iter().map(|tensor| NewTensor { name: tensor.name, dtype, shape: tensor.shape }).collect()
}
