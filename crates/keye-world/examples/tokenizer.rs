//! Writes keye-nano's tokenizer, trained on the world's texts: `tokenizer OUT_DIR`.
//!
//! Qwen's layout: the byte-level alphabet, then merges by frequency, then the special tokens of Keye-VL-1.5 in the order of
//! the published checkpoints; digits stand alone. What is to be read in pictures is left out of the training text, so that
//! its letters stay tokens of their own.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::path::Path;

use keye_world::{Sample, Split, Task, World};
use serde_json::{Map, Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// Samples of each kind that are read.
const SAMPLES: u64 = 20_000;
/// Alphabet and merges; training stops earlier when all words are whole.
const VOCABULARY: usize = 2048;

/// Name, and whether it is left out of answers.
const ADDED: [(&str, bool); 36] = [
    ("<|endoftext|>", true),
    ("<|im_start|>", true),
    ("<|im_end|>", true),
    ("<|object_ref_start|>", false),
    ("<|object_ref_end|>", false),
    ("<|box_start|>", false),
    ("<|box_end|>", false),
    ("<|quad_start|>", false),
    ("<|quad_end|>", false),
    ("<|vision_start|>", true),
    ("<|vision_end|>", true),
    ("<|vision_pad|>", true),
    ("<|image_pad|>", true),
    ("<|video_pad|>", true),
    ("<tool_call>", false),
    ("</tool_call>", false),
    ("<|fim_prefix|>", false),
    ("<|fim_middle|>", false),
    ("<|fim_suffix|>", false),
    ("<|fim_pad|>", false),
    ("<|repo_name|>", false),
    ("<|file_sep|>", false),
    ("<tool_response>", false),
    ("</tool_response>", false),
    ("<think>", false),
    ("</think>", false),
    ("<|point_start|>", false),
    ("<|point_end|>", false),
    ("<|ocr_text_start|>", false),
    ("<|ocr_text_end|>", false),
    ("<|clip_time_start|>", false),
    ("<|clip_time_end|>", false),
    ("<|frame|>", true),
    ("<|fast_video_pad|>", true),
    ("<|fast_start|>", true),
    ("<|fast_end|>", true),
];

/// What the template writes around messages.
const FRAME: [&str; 4] = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "The text reads text"];

fn main() -> Result<(), Box<dyn Error>> {
    let out = std::env::args().nth(1).ok_or("usage: tokenizer OUT_DIR")?;
    let out = Path::new(&out);
    fs::create_dir_all(out)?;

    let world = World::new(Split::Train);
    let mut corpus: Vec<String> = Vec::new();
    let kinds: [fn(&World, u64) -> Sample; 3] = [World::clip, World::still, World::text];
    for sample in (0..SAMPLES).flat_map(|index| kinds.map(|kind| kind(&world, index))) {
        let has_label = sample.story.label.is_some();
        for turn in sample.turns {
            match has_label {
                false => corpus.extend([turn.question, turn.answer]),
                true if turn.task == Task::Reading => corpus.push(turn.question),
                true => {}
            }
        }
    }
    corpus.extend((0..SAMPLES).flat_map(|_| FRAME.map(str::to_owned)));
    for (name, _) in ADDED {
        corpus.iter_mut().for_each(|text| *text = text.replace(name, "\n"));
    }

    let mut tokenizer =
        tokenizers::Tokenizer::from_bytes(layout(&json!({}), &json!([]), &[]).to_string()).map_err(text)?;
    let trainer = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .min_frequency(20)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), corpus.iter()).map_err(text)?;

    let trained: Value = serde_json::from_str(&tokenizer.to_string(false).map_err(text)?)?;
    let (vocabulary, merges) = (&trained["model"]["vocab"], &trained["model"]["merges"]);
    let mut words: Vec<(&String, u64)> = vocabulary
        .as_object()
        .ok_or("no vocabulary")?
        .iter()
        .filter_map(|(word, id)| Some((word, id.as_u64()?)))
        .collect();
    words.sort_by_key(|(_, id)| *id);
    let sorted: Map<String, Value> = words.iter().map(|(word, id)| ((*word).clone(), Value::from(*id))).collect();
    let added: Vec<Value> = ADDED
        .iter()
        .enumerate()
        .map(|(i, (content, special))| {
            json!({
                "id": words.len() + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            })
        })
        .collect();
    fs::write(out.join("tokenizer.json"), layout(&Value::Object(sorted), merges, &added).to_string() + "\n")?;

    let decoder: Map<String, Value> = added
        .iter()
        .map(|token| {
            let mut fields = token.as_object().cloned().unwrap_or_default();
            let id = fields.remove("id").map(|id| id.to_string()).unwrap_or_default();
            (id, Value::Object(fields))
        })
        .collect();
    let special: Vec<&str> =
        ADDED.iter().filter(|(name, special)| *special && *name != "<|endoftext|>").map(|(name, _)| *name).collect();
    let config = json!({
        "add_bos_token": false, "add_prefix_space": false, "added_tokens_decoder": decoder,
        "additional_special_tokens": special, "bos_token": null, "clean_up_tokenization_spaces": false,
        "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 4096, "pad_token": "<|endoftext|>",
        "split_special_tokens": false, "tokenizer_class": "Qwen2Tokenizer", "unk_token": null,
    });
    fs::write(out.join("tokenizer_config.json"), serde_json::to_string_pretty(&config)? + "\n")?;

    let tokenizer = tokenizers::Tokenizer::from_file(out.join("tokenizer.json")).map_err(text)?;
    let tokens = corpus
        .iter()
        .map(|line| tokenizer.encode_fast(line.as_str(), false).map(|e| e.len()))
        .sum::<Result<usize, _>>();
    let (tokens, bytes) = (tokens.map_err(text)?, corpus.iter().map(String::len).sum::<usize>());
    let distinct: BTreeSet<&str> = corpus.iter().flat_map(|line| line.split_whitespace()).collect();
    println!("{} tokens and {} special ones", words.len(), ADDED.len());
    println!(
        "{bytes} bytes of text, {} distinct words: {:.2} bytes per token",
        distinct.len(),
        bytes as f64 / tokens as f64
    );
    Ok(())
}

fn text(error: tokenizers::Error) -> String {
    error.to_string()
}

/// tokenizer.json with Qwen2's splitting.
fn layout(vocabulary: &Value, merges: &Value, added: &[Value]) -> Value {
    let split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let bytes = |add_prefix_space: bool, trim_offsets: bool, use_regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets, "use_regex": use_regex,
        })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": false},
                bytes(false, true, false),
            ],
        },
        "post_processor": bytes(false, false, false),
        "decoder": bytes(true, true, true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges,
        },
    })
}
