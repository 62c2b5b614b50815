//! generation_config.json: the checkpoint's sampling defaults.

use std::path::Path;

use serde_json::Value;

use crate::files::{CONFIG_BYTES, Fields};
use crate::{CheckpointFiles, ProcessorError};

/// Defaults of a checkpoint; `None` where the file says nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// False means greedy.
    pub do_sample: bool,
    /// Temperature.
    pub temperature: Option<f32>,
    /// Top-k; 0 is off.
    pub top_k: Option<u32>,
    /// Top-p; 1 is off.
    pub top_p: Option<f32>,
    /// Min-p.
    pub min_p: Option<f32>,
    /// Repetition penalty; 1 is off.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end an answer, any of them.
    pub eos_token_id: Vec<u32>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` of a checkpoint directory; without the file, greedy with no end tokens of its own.
    /// `vocab` bounds the token ids.
    pub fn load(from: impl Into<CheckpointFiles>, vocab: usize) -> Result<Self, ProcessorError> {
        let (files, name) = (from.into(), "generation_config.json");
        let path = files.path(name);
        match files.read_json_if_present(name, CONFIG_BYTES)? {
            Some(value) => Self::from_value(&path, &value, vocab),
            None => Ok(Self::default()),
        }
    }

    fn from_value(path: &Path, value: &Value, vocab: usize) -> Result<Self, ProcessorError> {
        let file = Fields::of(path, value)?;
        let number = |name, range| Ok::<_, ProcessorError>(file.number(name, range)?.map(|n| n as f32));
        Ok(Self {
            do_sample: file.bool("do_sample")?.unwrap_or(false),
            temperature: number("temperature", 0.0..=100.0)?,
            top_k: file.uint("top_k", 0..=u64::from(u32::MAX))?.map(|n| n as u32),
            top_p: number("top_p", 0.0..=1.0)?,
            min_p: number("min_p", 0.0..=1.0)?,
            repetition_penalty: number("repetition_penalty", 1e-3..=100.0)?,
            eos_token_id: file.tokens("eos_token_id", vocab as u64)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_the_published_file() {
        let value = json!({"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [7, 5]});
        let config = GenerationConfig::from_value(Path::new("g.json"), &value, 10).unwrap();
        let expected = GenerationConfig {
            do_sample: true,
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.95),
            eos_token_id: vec![7, 5],
            ..GenerationConfig::default()
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn errors_name_the_field() {
        for (value, named) in [
            (json!({"temperature": -1}), "temperature"),
            (json!({"top_p": 1.5}), "top_p"),
            (json!({"top_k": "20"}), "top_k"),
            (json!({"eos_token_id": 10}), "eos_token_id"),
        ] {
            let error = GenerationConfig::from_value(Path::new("g.json"), &value, 10).expect_err(named).to_string();
            assert!(error.contains(&format!("g.json: {named}: expected")), "{error}");
        }
    }
}
