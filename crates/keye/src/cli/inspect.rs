//! `keye inspect`: what a checkpoint is, from its files' headers.

mod text;

use std::path::Path;

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use keye::presets::{Preset, Sizes};
use keye::quantize::quantized_bytes;
use keye::{
    KvDtype, LoadError, MemoryPlan, NANO, WeightBytes, cache_spec, device_plans, random_checkpoint, resolve_model,
};
use keye_backend::BLOCK_TOKENS;
use keye_media::VideoRule;
use keye_model::{TensorShape, stored_layout, weight_layout};
use keye_processor::{Checkpoint, ModelConfig, Overrides, PackedFormat, Processor, ProcessorError, Variant};
use serde_json::{Map, Value, json};

use self::text::{model_lines, plan_lines, text};
use super::args::UNNAMED;
use super::failure::Usage;
use super::ui::{self, Status};

const AFTER_HELP: &str = "\
Examples:
  keye inspect
  keye inspect ./Keye-VL-1_5-8B
  keye inspect Kwai-Keye/Keye-VL-8B-Preview
  keye inspect ./model --json | jq .parameters
  keye inspect ./model --json | jq -e .weights.complete
  keye inspect --preset keye-vl-671b

The plan for devices divides the decoder's matrices among them, leaves a fifth of their memory to activations and holds the \
cache in bf16. --preset plans a published model from its sizes alone. Weights are not read, only the headers of their files. Exit code 3 when \
tensors are missing or have wrong shapes, or a file that answering needs, like the tokenizer's, cannot be read; what the others say \
is told.";

/// Say what a checkpoint is, how large, and whether it is whole
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Checkpoint directory, or hub id
    #[cfg_attr(feature = "nano", doc = "[default: keye-nano, inside this program]")]
    #[arg(env = MODEL)]
    #[cfg_attr(not(feature = "nano"), arg(required_unless_present = "preset"))]
    model: Option<String>,
    /// Plan the memory of this model from its sizes, without a checkpoint
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(Preset::ALL.map(Preset::name)))]
    preset: Option<String>,
    /// One JSON object
    #[arg(long)]
    json: bool,
    /// Use downloaded models only, never the network
    #[arg(long)]
    offline: bool,
}

/// Names the model when the command line does not.
const MODEL: &str = "KEYE_MODEL";

pub fn run(args: Args) -> Result<()> {
    // An empty variable, as build and container files leave it, names nothing.
    let named = args.model.as_deref().filter(|name| !name.is_empty());
    if args.preset.is_some() {
        // The variable steps back behind a preset.
        if named.is_some_and(|name| std::env::var_os(MODEL).is_none_or(|default| default != name)) {
            return Err(Usage("--preset plans without a checkpoint: leave the model out".into()).into());
        }
        return preset(&args);
    }
    let mut status = Status::new(args.json);
    if named.is_none() {
        status.line(UNNAMED);
    }
    let files = resolve_model(named.unwrap_or(NANO), args.offline, &mut |progress| status.loading(progress))?;
    status.clear();
    let config = ModelConfig::load(&files).map_err(LoadError::from)?;
    let checkpoint = Checkpoint::open(&files).map_err(LoadError::from)?;
    let processor = Processor::load(&files, &Overrides::default());
    let facts = facts(files.root(), &config, &checkpoint, &processor);
    if args.json {
        ui::out(&format!("{facts:#}\n"))?;
    } else {
        ui::out(&text(&facts))?;
    }
    processor.map_err(LoadError::from)?;
    match facts["weights"]["problems"].as_array().and_then(|problems| problems.first()) {
        Some(first) => Err(LoadError::Resolve(format!(
            "{} tensors are missing or wrong, the first: {}",
            facts["weights"]["problems"].as_array().map_or(0, Vec::len),
            first.as_str().unwrap_or_default()
        ))
        .into()),
        None => Ok(()),
    }
}

/// What can be told of a model's sizes.
fn preset(args: &Args) -> Result<()> {
    let name = args.preset.as_deref().unwrap_or_default();
    let preset = Preset::from_name(name).ok_or_else(|| Usage(format!("{name} is no preset")))?;
    let dtype = preset.published_dtype();
    let config = Sizes::from(preset).model_config(dtype)?;
    let tensors = preset.used_tensors(dtype)?.into_iter().map(|tensor| {
        let bytes = tensor.bytes().unwrap_or(u64::MAX);
        (tensor.name, tensor.dtype, bytes)
    });
    let mut plan = plan(&config, &WeightBytes::of(tensors));
    plan["quantized_bytes"] = quantized(|to| random_checkpoint::quantized_bytes(preset.into(), dtype, to));
    if args.json {
        let mut facts = model_facts(&config);
        facts["plan"] = plan;
        return ui::out(&format!("{facts:#}\n"));
    }
    let mut out = String::new();
    let facts = model_facts(&config);
    model_lines(&facts, &mut out);
    plan_lines(&plan, &mut out);
    ui::out(&out)
}

/// Weights by type, cache, and what each of several devices would hold.
fn plan(config: &ModelConfig, weights: &WeightBytes) -> Value {
    let types: Map<String, Value> =
        weights.by_type.iter().map(|(dtype, bytes)| (dtype.name().to_owned(), json!(bytes))).collect();
    json!({
        "weight_bytes": weights.total(),
        "expert_bytes": weights.experts,
        "types": types,
        "cache_bytes_per_token": cache_spec(config, KvDtype::Bf16).block_bytes() / BLOCK_TOKENS,
        "latent": config.text.latent.is_some(),
        "devices": device_plans(config, weights),
    })
}

/// Bytes of the model quantised to each format; null when it cannot be.
fn quantized(bytes: impl Fn(PackedFormat) -> Result<u64>) -> Value {
    let formats = [PackedFormat::Int4, PackedFormat::Int8];
    let sizes = formats.into_iter().map(|to| Ok((to.name().to_owned(), json!(bytes(to)?))));
    sizes.collect::<Result<Map<_, _>>>().map_or(Value::Null, Value::Object)
}

fn facts(
    dir: &Path,
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    processor: &Result<Processor, ProcessorError>,
) -> Value {
    let layout = stored_layout(config, checkpoint);
    let wrong = |tensor: &TensorShape| checkpoint.tensor(&tensor.name, &tensor.shape).err().map(|e| e.to_string());
    let problems: Vec<String> = layout.iter().filter_map(wrong).collect();
    let stored = WeightBytes::stored(config, checkpoint);
    let used = stored.total();
    let by_type = checkpoint.totals().into_iter().map(|(dtype, total)| {
        let counts = json!({"tensors": total.tensors, "parameters": total.elements, "bytes": total.bytes});
        (dtype.name().to_owned(), counts)
    });
    let mut plan = plan(config, &stored);
    if !checkpoint.is_packed() && problems.is_empty() {
        plan["quantized_bytes"] = quantized(|to| quantized_bytes(config, checkpoint, to));
    }
    let mut facts = model_facts(config);
    let more = json!({
        "directory": dir,
        "weights": {
            "files": checkpoint.files().count(),
            "tensors": checkpoint.names().count(),
            "bytes": checkpoint.total_bytes(),
            "used_bytes": used,
            "types": by_type.collect::<Map<_, _>>(),
            "complete": problems.is_empty(),
            "problems": problems,
        },
        "kv_cache": {
            "f32": kv_cache(config, KvDtype::F32),
            "bf16": kv_cache(config, KvDtype::Bf16),
            "int8": kv_cache(config, KvDtype::Int8),
        },
        "memory": {
            "f32": memory(config, checkpoint, KvDtype::F32),
            "bf16": memory(config, checkpoint, KvDtype::Bf16),
            "int8": memory(config, checkpoint, KvDtype::Int8),
        },
        "processor": {
            "complete": processor.is_ok(),
            "problem": processor.as_ref().err().map(ToString::to_string),
        },
        "plan": plan,
    });
    let of_processor = processor.as_ref().map(processor_facts).unwrap_or_default();
    for more in [more, of_processor] {
        if let (Some(facts), Value::Object(more)) = (facts.as_object_mut(), more) {
            facts.extend(more);
        }
    }
    facts
}

/// What the files beside weights and config.json say.
fn processor_facts(processor: &Processor) -> Value {
    json!({
        "media": media(processor),
        "generation": {
            "do_sample": processor.generation.do_sample,
            "temperature": processor.generation.temperature,
            "top_k": processor.generation.top_k,
            "top_p": processor.generation.top_p,
            "min_p": processor.generation.min_p,
            "repetition_penalty": processor.generation.repetition_penalty,
        },
        "special_tokens": special_tokens(processor),
    })
}

/// What config.json says.
fn model_facts(config: &ModelConfig) -> Value {
    let (text, vision) = (&config.text, &config.vision);
    json!({
        "architecture": config.architecture,
        "variant": match config.variant {
            Variant::Preview => "Keye-VL-8B-Preview",
            Variant::V1_5 => "Keye-VL-1.5",
            Variant::V2 => "Keye-VL-2.0",
            Variant::V671b => "Keye-VL-671B-A37B",
        },
        "text": {
            "layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "heads": text.num_attention_heads,
            "kv_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_position_embeddings,
            "rope_theta": text.rope_theta,
            "mrope_section": text.mrope_section,
            "latent_dim": text.latent.map(|latent| latent.latent_dim()),
        },
        "vision": {
            "layers": vision.num_hidden_layers,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "heads": vision.num_attention_heads,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
        },
        "parameters": parameters(&weight_layout(config)),
    })
}

fn parameters(layout: &[TensorShape]) -> Value {
    let count = |prefixes: &[&str]| -> u64 {
        let ours = layout.iter().filter(|tensor| prefixes.iter().any(|prefix| tensor.name.starts_with(prefix)));
        ours.map(|tensor| tensor.shape.iter().map(|n| *n as u64).product::<u64>()).sum()
    };
    let (vision, projector, text) = (count(&["visual."]), count(&["mlp_AR."]), count(&["model.", "lm_head."]));
    json!({"vision": vision, "projector": projector, "text": text, "total": vision + projector + text})
}

fn kv_cache(config: &ModelConfig, dtype: KvDtype) -> Value {
    let token = cache_spec(config, dtype).block_bytes() / BLOCK_TOKENS;
    json!({
        "bytes_per_token": token,
        "bytes_at_8k": token * 8192,
        "bytes_at_32k": token * 32_768,
        "bytes_at_128k": token * 131_072,
    })
}

/// What the longest sequence takes, and what fits.
fn memory(config: &ModelConfig, checkpoint: &Checkpoint, dtype: KvDtype) -> Value {
    let tokens = config.text.max_position_embeddings;
    let plan = MemoryPlan::new(config, checkpoint, dtype, tokens, 1);
    let token = cache_spec(config, dtype).block_bytes() / BLOCK_TOKENS;
    json!({
        "tokens": tokens,
        "weights": plan.weights + plan.experts,
        "experts": plan.experts,
        "kv": plan.kv,
        "index_keys": plan.index_keys,
        "activations": plan.activations,
        "total": plan.total(),
        "machine": plan.machine,
        "tokens_that_fit": plan.tokens_that_fit(token),
        "text": plan.to_string(),
    })
}

fn media(processor: &Processor) -> Value {
    let (image, video, pixels) = (&processor.media.image, &processor.media.video, &processor.media.processor);
    json!({
        "image": {
            "min_pixels": image.min_pixels.max(pixels.min_pixels),
            "max_pixels": image.max_pixels.min(pixels.max_pixels),
        },
        "video": {
            "rule": match video.rule {
                VideoRule::WholeClip => "whole clip",
                VideoRule::SlowFast => "slow and fast frames",
                VideoRule::Adaptive => "frames of one size",
            },
            "fps": video.fps,
            "min_frames": video.min_frames,
            "max_frames": (video.max_frames < u32::MAX).then_some(video.max_frames),
            "min_pixels": video.min_pixels,
            "max_pixels": video.max_pixels,
            "total_pixels": video.total_pixels,
        },
    })
}

fn special_tokens(processor: &Processor) -> Value {
    let (config, tokenizer) = (&processor.config, &processor.tokenizer);
    let named = |id: u32| json!({"id": id, "text": tokenizer.id_to_token(id)});
    let mut tokens = json!({
        "image": named(config.image_token_id),
        "video": named(config.video_token_id),
        "vision_start": named(config.vision_start_token_id),
        "vision_end": named(config.vision_end_token_id),
    });
    for (field, text) in [("frame", "<|frame|>"), ("fast_start", "<|fast_start|>"), ("fast_end", "<|fast_end|>")] {
        if let Some(id) = tokenizer.token_to_id(text) {
            tokens[field] = named(id);
        }
    }
    tokens["end"] = processor.generation.eos_token_id.iter().map(|id| named(*id)).collect();
    tokens
}
