//! What a tokenizer.json may say.
//!
//! The library that reads it knows many kinds of everything, some of which take gigabytes or panic on what a file says. The
//! family's tokenizers are of one kind, and others are refused by name before the library sees them.

use std::path::Path;

use crate::ProcessorError;
use crate::few::Few;
use crate::files::file_error;

/// Most steps of a sequence; DeepSeek's has four.
const STEPS: usize = 16;
/// Longest expression that splits; DeepSeek's has 300 bytes.
const PATTERN_BYTES: usize = 2048;
/// Ids are below it; the largest vocabularies have 300 000.
pub(crate) const IDS: u32 = 1 << 24;

#[derive(serde::Deserialize)]
struct File {
    normalizer: Option<Step>,
    pre_tokenizer: Option<Step>,
    decoder: Option<Step>,
    model: Model,
}

/// The type, and what the types that are read have.
#[derive(serde::Deserialize)]
struct Step {
    #[serde(rename = "type")]
    kind: String,
    normalizers: Option<Few<Step, STEPS>>,
    pretokenizers: Option<Few<Step, STEPS>>,
    pattern: Option<Pattern>,
}

#[derive(serde::Deserialize)]
enum Pattern {
    String(String),
    Regex(String),
}

#[derive(serde::Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

/// Refuses a file that is not a byte-level BPE like the family's.
pub(crate) fn check(path: &Path, bytes: &[u8]) -> Result<(), ProcessorError> {
    let wrong = |field: &str, expected: &str, found: &str| {
        Err(file_error(
            path,
            format!("{field}: expected {expected}, found {}", found.chars().take(60).collect::<String>()),
        ))
    };
    let file: File = serde_json::from_slice(bytes)
        .map_err(|e| file_error(path, format!("expected a tokenizer that Hugging Face tokenizers can read: {e}")))?;
    if let Some(step) = &file.normalizer {
        for step in flat(step, |step| step.normalizers.as_ref()) {
            if step.kind != "NFC" {
                return wrong("normalizer", "NFC or none", &step.kind);
            }
        }
    }
    if let Some(step) = &file.pre_tokenizer {
        for step in flat(step, |step| step.pretokenizers.as_ref()) {
            match (step.kind.as_str(), &step.pattern) {
                ("ByteLevel", _) => {}
                ("Split", Some(Pattern::String(text) | Pattern::Regex(text))) => {
                    if text.is_empty() || text.len() > PATTERN_BYTES {
                        let (expected, found) =
                            (format!("1 to {PATTERN_BYTES} bytes"), format!("{} bytes", text.len()));
                        return wrong("pre_tokenizer.pattern", &expected, &found);
                    }
                }
                ("Split", None) => return wrong("pre_tokenizer.pattern", "a text or an expression", "none"),
                (other, _) => return wrong("pre_tokenizer", "Split and ByteLevel", other),
            }
        }
    }
    match &file.decoder {
        Some(decoder) if decoder.kind == "ByteLevel" => {}
        found => return wrong("decoder", "ByteLevel", found.as_ref().map_or("none", |decoder| &decoder.kind)),
    }
    match &file.model {
        Model { kind: Some(kind), .. } if kind != "BPE" => wrong("model.type", "BPE", kind),
        Model { dropout: Some(rate), .. } if *rate != 0.0 => wrong("model.dropout", "none", &rate.to_string()),
        Model { continuing_subword_prefix: Some(text), .. } if !text.is_empty() => {
            wrong("model.continuing_subword_prefix", "none", text)
        }
        Model { end_of_word_suffix: Some(text), .. } if !text.is_empty() => {
            wrong("model.end_of_word_suffix", "none", text)
        }
        _ => Ok(()),
    }
}

/// The step, or those of a sequence and of sequences in it.
fn flat<'a>(step: &'a Step, inside: fn(&'a Step) -> Option<&'a Few<Step, STEPS>>) -> Vec<&'a Step> {
    match inside(step).filter(|_| step.kind == "Sequence") {
        Some(Few(steps)) => steps.iter().flat_map(|step| flat(step, inside)).collect(),
        None => vec![step],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::Tokenizer;

    /// Each panicked, or took gigabytes.
    #[test]
    fn tokenizers_of_other_kinds_are_refused_by_name() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/keye-1_5-tiny/model/tokenizer.json");
        let whole: Value = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
        let replace = json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"});
        let precompiled = json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="});
        let sequence = |kind: &str, steps: Vec<Value>| json!({"type": "Sequence", kind: steps});
        let split =
            |text: &str| json!({"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": false});
        let nfc = json!({"type": "NFC"});
        let cases = [
            ("/normalizer", replace.clone(), "normalizer: expected NFC or none, found Replace"),
            ("/normalizer", precompiled, "normalizer: expected NFC or none, found Precompiled"),
            ("/normalizer", sequence("normalizers", vec![nfc.clone(), replace.clone()]), "found Replace"),
            ("/normalizer", sequence("normalizers", vec![replace; 36]), "expected a list of at most 16"),
            (
                "/pre_tokenizer",
                json!({"type": "FixedLength", "length": 0}),
                "expected Split and ByteLevel, found FixedLength",
            ),
            ("/pre_tokenizer", split(""), "pre_tokenizer.pattern: expected 1 to 2048 bytes, found 0 bytes"),
            ("/pre_tokenizer", split(&"(".repeat(9999)), "found 9999 bytes"),
            ("/pre_tokenizer", split(&"(".repeat(2000)), "tokenizer"),
            ("/pre_tokenizer", split(&"((a{99}){99}){99}".repeat(9)), "tokenizer"),
            ("/decoder", json!({"type": "Fuse"}), "decoder: expected ByteLevel, found Fuse"),
            ("/decoder", Value::Null, "decoder: expected ByteLevel, found none"),
            ("/model/type", json!("Unigram"), "model.type: expected BPE, found Unigram"),
            ("/model/dropout", json!(0.5), "model.dropout: expected none, found 0.5"),
            (
                "/model/continuing_subword_prefix",
                json!("########"),
                "continuing_subword_prefix: expected none, found ####",
            ),
            ("/model/end_of_word_suffix", json!("</w>"), "end_of_word_suffix: expected none, found </w>"),
            ("/model/vocab/a", json!(u32::MAX), "expected ids below 16777216, found 4294967295"),
        ];
        let load = |whole: &Value| Tokenizer::from_bytes(Path::new("tokenizer.json"), whole.to_string().as_bytes());
        for (at, value, expected) in cases {
            let mut whole = whole.clone();
            match whole.pointer_mut(at) {
                Some(field) => *field = value.clone(),
                None => panic!("{at}"),
            }
            let error = load(&whole).err().unwrap_or_else(|| panic!("{at} {value}")).to_string();
            assert!(error.contains(expected), "{error}");
        }
        // What DeepSeek's and Qwen's files say.
        let mut other = whole.clone();
        other["normalizer"] = sequence("normalizers", vec![]);
        other["pre_tokenizer"]["pretokenizers"].as_array_mut().unwrap().insert(0, split("[0-9]{1,3}"));
        (other["model"]["continuing_subword_prefix"], other["model"]["end_of_word_suffix"]) = (json!(""), json!(""));
        assert!(load(&other).unwrap().encode("12345 x").is_ok());
    }
}
