//! `keye inspect`: what a checkpoint is, from its files' headers.

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
use keye_processor::{Checkpoint, ModelConfig, Overrides, PackedFormat, Processor, Variant};
use serde_json::{Map, Value, json};

use super::args::UNNAMED;
use super::failure::Usage;
use super::ui::{self, Status, bytes, grouped};

const AFTER_HELP: &str = "\
Examples:
  keye inspect
  keye inspect ./Keye-VL-1_5-8B
  keye inspect Kwai-Keye/Keye-VL-8B-Preview
  keye inspect ./model --json | jq .parameters
  keye inspect ./model --json | jq -e .weights.complete
  keye inspect --preset keye-vl-671b

The plan for devices divides the decoder's matrices among them, leaves a fifth of their memory to activations and holds the \
cache in bf16. --preset plans a published model from its sizes alone. Weights are not read, only the headers of their files. Exit code 3 when tensors are missing or have wrong shapes.";

/// Say what a checkpoint is, how large, and whether it is whole
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Checkpoint directory, or hub id
    #[cfg_attr(feature = "nano", doc = "[default: keye-nano, inside this program]")]
    #[cfg_attr(not(feature = "nano"), arg(required_unless_present = "preset"))]
    model: Option<String>,
    /// Plan the memory of this model from its sizes, without a checkpoint
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(Preset::ALL.map(Preset::name)), conflicts_with = "model")]
    preset: Option<String>,
    /// One JSON object
    #[arg(long)]
    json: bool,
    /// Use downloaded models only, never the network
    #[arg(long)]
    offline: bool,
}

pub fn run(args: Args) -> Result<()> {
    if args.preset.is_some() {
        return preset(&args);
    }
    let mut status = Status::new(args.json);
    if args.model.is_none() {
        status.line(UNNAMED);
    }
    let model = args.model.as_deref().unwrap_or(NANO);
    let files = resolve_model(model, args.offline, &mut |progress| status.loading(progress))?;
    status.clear();
    let processor = Processor::load(&files, &Overrides::default()).map_err(LoadError::from)?;
    let checkpoint = Checkpoint::open(&files).map_err(LoadError::from)?;
    let facts = facts(files.root(), &processor, &checkpoint);
    if args.json {
        ui::out(&format!("{facts:#}\n"))?;
    } else {
        ui::out(&text(&facts))?;
    }
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

fn quantized_line(sizes: &Value) -> Option<String> {
    let sizes = sizes.as_object()?.iter();
    let sizes: Vec<String> = sizes.map(|(to, size)| format!("{to} {}", bytes(size.as_u64().unwrap_or(0)))).collect();
    Some(format!("{} (keye quantize)", sizes.join(", ")))
}

fn plan_lines(plan: &Value, out: &mut String) {
    let size = |value: &Value| bytes(value.as_u64().unwrap_or(0));
    let types: Vec<String> = plan["types"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, bytes)| format!("{name} {}", size(bytes)))
        .collect();
    *out += &format!("{:<14} {} = {}\n", "plan weights", size(&plan["weight_bytes"]), types.join(" + "));
    let latent = if plan["latent"] == true { ", the latents of all heads, whole on every device" } else { "" };
    *out += &format!("{:<14} {} a token in bf16{latent}\n", "plan cache", size(&plan["cache_bytes_per_token"]));
    for device in plan["devices"].as_array().into_iter().flatten() {
        let gigabytes = device["device_bytes"].as_u64().unwrap_or(0) / 1_000_000_000;
        let name = format!("{} x {gigabytes} GB", device["devices"]);
        let weights = size(&device["weight_bytes"]);
        let verdict = match device["fits"].as_bool() {
            Some(true) => format!(
                "{weights} of weights each, then {} tokens of cache",
                grouped(device["cache_tokens"].as_u64().unwrap_or(0))
            ),
            _ => format!("does not fit: {weights} of weights each, {} usable", size(&device["usable_bytes"])),
        };
        *out += &format!("{name:<14} {verdict}\n");
    }
    if let Some(sizes) = quantized_line(&plan["quantized_bytes"]) {
        *out += &format!("{:<14} {sizes}\n", "quantised");
    }
}

fn facts(dir: &Path, processor: &Processor, checkpoint: &Checkpoint) -> Value {
    let config = &processor.config;
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
        "plan": plan,
    });
    if let (Some(facts), Value::Object(more)) = (facts.as_object_mut(), more) {
        facts.extend(more);
    }
    facts
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

/// What config.json says, for the eye.
fn model_lines(facts: &Value, out: &mut String) {
    let number = |value: &Value| grouped(value.as_u64().unwrap_or(0));
    let (text, vision, parameters) = (&facts["text"], &facts["vision"], &facts["parameters"]);
    let plain = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut line = |name: &str, value: String| *out += &format!("{name:<14} {value}\n");
    line("model", format!("{} ({})", plain(&facts["variant"]), plain(&facts["architecture"])));
    if facts["directory"].is_string() {
        line("directory", plain(&facts["directory"]));
    }
    let keys = match text["latent_dim"].as_u64() {
        Some(width) => format!("latent keys and values of {width}"),
        None => format!("{} key/value heads", text["kv_heads"]),
    };
    line(
        "text",
        format!(
            "{} layers, width {}, feed-forward {}, {} heads of {}, {keys}, vocabulary {}, {} positions",
            text["layers"],
            text["hidden_size"],
            text["intermediate_size"],
            text["heads"],
            text["head_dim"],
            number(&text["vocab_size"]),
            number(&text["max_position_embeddings"])
        ),
    );
    line(
        "vision",
        format!(
            "{} layers, width {}, feed-forward {}, {} heads, patches of {} merged {} by {}",
            vision["layers"],
            vision["hidden_size"],
            vision["intermediate_size"],
            vision["heads"],
            vision["patch_size"],
            vision["spatial_merge_size"],
            vision["spatial_merge_size"]
        ),
    );
    line(
        "parameters",
        format!(
            "{} = vision {} + projector {} + text {}",
            number(&parameters["total"]),
            number(&parameters["vision"]),
            number(&parameters["projector"]),
            number(&parameters["text"])
        ),
    );
}

/// The same facts for the eye.
fn text(facts: &Value) -> String {
    let number = |value: &Value| grouped(value.as_u64().unwrap_or(0));
    let size = |value: &Value| bytes(value.as_u64().unwrap_or(0));
    let weights = &facts["weights"];
    let mut out = String::new();
    model_lines(facts, &mut out);
    // A model that one device holds needs no plan.
    let large = facts["plan"]["devices"][1]["fits"] == false;
    let mut line = |name: &str, value: String| out += &format!("{name:<14} {value}\n");
    let plain = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let types: Vec<String> = weights["types"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, total)| format!("{name} {}", size(&total["bytes"])))
        .collect();
    let problems = weights["problems"].as_array().map_or(0, Vec::len);
    let files = match weights["files"].as_u64() {
        Some(1) => "1 file".to_owned(),
        _ => format!("{} files", weights["files"]),
    };
    let whole = match problems {
        0 => "all tensors are there".to_owned(),
        n => format!("{n} tensors are missing or wrong"),
    };
    line("weights", format!("{}, {} tensors, {}; {whole}", files, weights["tensors"], types.join(", ")));
    if let Some(sizes) = quantized_line(&facts["plan"]["quantized_bytes"]).filter(|_| !large) {
        line("quantised", sizes);
    }
    for (name, cache) in facts["kv_cache"].as_object().into_iter().flatten() {
        line(
            &format!("cache {name}"),
            format!(
                "{} a token; 8K {}, 32K {}, 128K {}",
                size(&cache["bytes_per_token"]),
                size(&cache["bytes_at_8k"]),
                size(&cache["bytes_at_32k"]),
                size(&cache["bytes_at_128k"])
            ),
        );
    }
    for (name, plan) in facts["memory"].as_object().into_iter().flatten() {
        let fits = match (plan["machine"].as_u64(), plan["tokens_that_fit"].as_u64()) {
            (Some(machine), Some(tokens)) => {
                format!(
                    "; in this machine's {} fit {} tokens",
                    bytes(machine),
                    grouped(tokens.min(plan["tokens"].as_u64().unwrap_or(0)))
                )
            }
            _ => String::new(),
        };
        let (tokens, sum) = (number(&plan["tokens"]), plain(&plan["text"]));
        line(&format!("memory {name}"), format!("{tokens} tokens: {sum}{fits}"));
    }
    let (image, video) = (&facts["media"]["image"], &facts["media"]["video"]);
    line("images", format!("{} to {} pixels", number(&image["min_pixels"]), number(&image["max_pixels"])));
    line(
        "videos",
        format!(
            "{}, {} frames a second, {} to {} pixels a frame, {} in all",
            plain(&video["rule"]),
            video["fps"],
            number(&video["min_pixels"]),
            number(&video["max_pixels"]),
            number(&video["total_pixels"])
        ),
    );
    let generation = &facts["generation"];
    let set: Vec<String> = generation
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, value)| *name != "do_sample" && !value.is_null())
        .map(|(name, value)| format!("{name} {}", value.as_f64().map_or(String::new(), |v| format!("{}", v as f32))))
        .collect();
    line("sampling", if generation["do_sample"] == true { set.join(", ") } else { "greedy".into() });
    let mut tokens = Vec::new();
    for (name, token) in facts["special_tokens"].as_object().into_iter().flatten() {
        for token in token.as_array().map_or(std::slice::from_ref(token), Vec::as_slice) {
            tokens.push(format!("{name} {} {}", token["id"], plain(&token["text"])));
        }
    }
    line("tokens", tokens.join(", "));
    for problem in weights["problems"].as_array().into_iter().flatten() {
        line("problem", plain(problem));
    }
    if large {
        plan_lines(&facts["plan"], &mut out);
    }
    out
}
