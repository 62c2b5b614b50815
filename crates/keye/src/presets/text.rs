//! The presets' text side: added tokens and tokenizer.

use keye_processor::Variant;
use serde_json::{Map, Value, json};

use super::Preset;

/// Added tokens of Preview in the order of their ids (spec §7).
const ADDED: [&str; 32] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "<|point_start|>",
    "<|point_end|>",
    "<|ocr_text_start|>",
    "<|ocr_text_end|>",
    "<|clip_time_start|>",
    "<|clip_time_end|>",
];
/// Further added tokens of 1.5.
const ADDED_1_5: [&str; 4] = ["<|frame|>", "<|fast_video_pad|>", "<|fast_start|>", "<|fast_end|>"];

/// Decoding skips the tokens of turns and of vision, counted from `<|endoftext|>`.
fn is_special(index: usize) -> bool {
    matches!(index, 0..=2 | 9..=13 | 32..)
}

/// Split regex of the family's tokenizers (spec §7).
const SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl Preset {
    /// Added tokens with their ids and whether decoding skips them.
    fn added_tokens(self) -> impl Iterator<Item = (usize, &'static str, bool)> {
        let first = self.dims().first_added;
        // 151675 and 151676 of 1.5 are unknown (spec §7).
        let gap = if self.is_tiny() { 0 } else { 2 };
        let of_1_5 = ADDED_1_5.into_iter().enumerate().filter(move |_| self.variant() != Variant::Preview);
        let of_1_5 = of_1_5.map(move |(i, token)| (ADDED.len() + gap + i, token));
        ADDED.into_iter().enumerate().chain(of_1_5).map(move |(i, token)| (first + i, token, is_special(i)))
    }

    pub(super) fn id(self, token: &str) -> Option<usize> {
        self.added_tokens().find(|(_, text, _)| *text == token).map(|(id, ..)| id)
    }

    /// A byte-level tokenizer without the published vocabulary: bytes, a few pairs for the tiny presets, the added tokens at
    /// their real ids. Added tokens are in the model's vocabulary too, since ids given beside it are not kept.
    pub(super) fn tokenizer(self) -> Value {
        let mut vocab: Map<String, Value> = byte_symbols().map(String::from).zip((0..).map(Value::from)).collect();
        let mut merges = Vec::new();
        if self.is_tiny() {
            let starts = std::iter::once('Ġ').chain("bcdfghklmnprstw".chars());
            for (start, end) in starts.flat_map(|start| ('a'..='z').map(move |end| (start, end))) {
                merges.push(json!([start, end]));
                vocab.insert(format!("{start}{end}"), vocab.len().into());
            }
        }
        let mut added = Vec::new();
        for (id, content, special) in self.added_tokens() {
            vocab.insert(content.into(), id.into());
            added.push(json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            }));
        }
        let byte_level = |trim: bool, space: bool| json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": trim, "use_regex": space});
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": false},
                byte_level(true, false),
            ]},
            "post_processor": byte_level(false, false),
            "decoder": byte_level(true, true),
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": merges,
            },
        })
    }
}

pub(super) fn tokenizer_config() -> Value {
    json!({
        "add_bos_token": false,
        "add_prefix_space": false,
        "bos_token": null,
        "clean_up_tokenization_spaces": false,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131_072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": false,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": null,
    })
}

/// The characters that stand for bytes in a byte-level vocabulary, in the order of their ids: bytes that print stand for
/// themselves and come first, the others are counted up from U+0100.
fn byte_symbols() -> impl Iterator<Item = char> {
    let prints = |byte: &u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=255u8).filter(|byte| !prints(byte)).count() as u32;
    let counted = (0x100..0x100 + others).filter_map(char::from_u32);
    (0..=255u8).filter(move |byte| prints(byte)).map(char::from).chain(counted)
}
