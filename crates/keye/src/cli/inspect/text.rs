//! The facts of `keye inspect` for the eye.

use serde_json::Value;

use super::super::ui::{bytes, grouped};

/// What config.json says, for the eye.
pub fn model_lines(facts: &Value, out: &mut String) {
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

/// All facts of a checkpoint, a line each.
pub fn text(facts: &Value) -> String {
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
    if facts["processor"]["complete"] == true {
        processor_lines(facts, &mut line);
    }
    for problem in weights["problems"].as_array().into_iter().flatten().chain(facts["processor"].get("problem")) {
        if problem.is_string() {
            line("problem", plain(problem));
        }
    }
    if large {
        plan_lines(&facts["plan"], &mut out);
    }
    out
}

/// Media rules, sampling and tokens, for the eye.
fn processor_lines(facts: &Value, line: &mut dyn FnMut(&str, String)) {
    let number = |value: &Value| grouped(value.as_u64().unwrap_or(0));
    let plain = |value: &Value| value.as_str().unwrap_or_default().to_owned();
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
}

/// What each of several devices would hold.
pub fn plan_lines(plan: &Value, out: &mut String) {
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

fn quantized_line(sizes: &Value) -> Option<String> {
    let sizes = sizes.as_object()?.iter();
    let sizes: Vec<String> = sizes.map(|(to, size)| format!("{to} {}", bytes(size.as_u64().unwrap_or(0)))).collect();
    Some(format!("{} (keye quantize)", sizes.join(", ")))
}
