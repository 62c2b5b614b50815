//! tokenizer.json: text to ids and back.

use std::collections::HashSet;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use tokenizers::{DecoderWrapper, ModelWrapper, PostProcessorWrapper};

use crate::files::{CONFIG_BYTES, Fields, VOCABULARY_BYTES, describe, file_error};
use crate::{CheckpointFiles, ProcessorError, tokenizer_file};

/// Byte-level BPE with the checkpoint's special tokens. Cheap to clone.
///
/// As in transformers, strings like `<|im_start|>` become their special tokens wherever they stand, also inside text that a
/// user wrote. Whoever forwards text of strangers and minds must take such strings out first.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
    /// Ids below it decode; those without a string, to nothing.
    id_limit: u32,
}

struct Shared {
    inner: tokenizers::Tokenizer,
    special: HashSet<u32>,
}

/// Split regex of Qwen2 (spec §7), for checkpoints without a tokenizer.json.
const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Longest run of white space. The regex engine stops after a million backtracking steps, one for each such character,
/// and what follows would silently get other ids than the reference gives.
const MAX_WHITESPACE: usize = 500_000;

/// Most bytes of one text: the tokenizer takes some twenty times as much memory.
const MOST_BYTES: usize = 32 << 20;
/// Most tokens of one text, more than any model's context; the tokenizer takes some 200 bytes for each.
const MOST_TOKENS: usize = 1 << 20;
/// A longer text is counted in parts before it is tokenised as a whole.
const PART: usize = 1 << 20;

/// Parts of at most [`PART`] bytes, cut between characters.
fn parts(mut text: &str) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let end = (0..=text.len().min(PART)).rev().find(|at| text.is_char_boundary(*at))?;
        let (part, rest) = text.split_at(end);
        text = rest;
        (!part.is_empty()).then_some(part)
    })
}

/// Nothing when the library panics: its files come from anywhere.
fn caught<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}

fn longest_whitespace(text: &str) -> usize {
    let (mut run, mut longest) = (0, 0);
    for c in text.chars() {
        run = if c.is_whitespace() { run + 1 } else { 0 };
        longest = longest.max(run);
    }
    longest
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a checkpoint, or else builds the same from `vocab.json`, `merges.txt` and
    /// `tokenizer_config.json`.
    pub fn load(from: impl Into<CheckpointFiles>) -> Result<Self, ProcessorError> {
        let (files, name) = (from.into(), "tokenizer.json");
        let path = files.path(name);
        match files.read(name, VOCABULARY_BYTES) {
            Ok(bytes) => Self::from_bytes(&path, &bytes),
            Err(ProcessorError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                if !files.exists("vocab.json") {
                    let reason = "missing, and there is no vocab.json with merges.txt and tokenizer_config.json to make \
                                  it from; download the checkpoint's tokenizer files";
                    return Err(file_error(&path, reason));
                }
                Self::from_vocab_and_merges(files)
            }
            Err(other) => Err(other),
        }
    }

    /// Builds the tokenizer from `vocab.json`, `merges.txt` and the `added_tokens_decoder` of `tokenizer_config.json`.
    pub fn from_vocab_and_merges(from: impl Into<CheckpointFiles>) -> Result<Self, ProcessorError> {
        let files = from.into();
        let vocab = files.read_json("vocab.json", VOCABULARY_BYTES)?;
        let merges_path = files.path("merges.txt");
        let merges = files
            .read_text("merges.txt", VOCABULARY_BYTES)?
            .lines()
            .enumerate()
            .filter(|(i, line)| !(line.is_empty() || *i == 0 && line.starts_with("#version")))
            .map(|(i, line)| match line.split_once(' ') {
                Some((left, right)) => Ok(json!([left, right])),
                None => Err(file_error(&merges_path, format!("line {}: expected two pieces, found {line:?}", i + 1))),
            })
            .collect::<Result<Vec<Value>, _>>()?;
        let config_path = files.path("tokenizer_config.json");
        let added = added_tokens(&config_path, &files.read_json("tokenizer_config.json", CONFIG_BYTES)?)?;
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let split =
            json!({"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": false});
        let whole = json!({
            "version": "1.0", "truncation": null, "padding": null, "post_processor": null,
            "added_tokens": added, "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}, "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": merges,
            },
        });
        let built = Self::from_bytes(&files.path("vocab.json"), whole.to_string().as_bytes())?;
        for token in &added {
            let (content, id) = (token["content"].as_str().unwrap_or_default(), token["id"].as_u64());
            let found = built.token_to_id(content);
            if found.map(u64::from) != id {
                let reason =
                    format!("added_tokens_decoder: {content:?}: expected id {id:?}, the vocabulary gives {found:?}");
                return Err(file_error(&config_path, reason));
            }
        }
        Ok(built)
    }

    pub(crate) fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self, ProcessorError> {
        tokenizer_file::check(path, bytes)?;
        let expected = |e: &dyn Display| {
            file_error(path, format!("expected a tokenizer that Hugging Face tokenizers can read: {e}"))
        };
        let mut inner = caught(|| tokenizers::Tokenizer::from_bytes(bytes))
            .ok_or_else(|| expected(&"it fails on the file"))?
            .map_err(|e| expected(&e))?;
        inner.with_truncation(None).map_err(|e| file_error(path, format!("truncation: {e}")))?;
        inner.with_padding(None);
        // It could only put something in front or behind.
        inner.with_post_processor(None::<PostProcessorWrapper>);
        let (model, decoder) = (inner.get_model(), inner.get_decoder());
        if !matches!((model, decoder), (ModelWrapper::BPE(_), Some(DecoderWrapper::ByteLevel(_)))) {
            return Err(file_error(path, "model and decoder: expected BPE and ByteLevel, found others"));
        }
        let special = inner.get_added_tokens_decoder().iter().filter(|(_, t)| t.special).map(|(id, _)| *id).collect();
        let highest = inner.get_vocab(true).into_values().max();
        let highest = highest.ok_or_else(|| file_error(path, "model.vocab: expected tokens, found none"))?;
        if highest >= tokenizer_file::IDS {
            let reason = format!("model.vocab: expected ids below {}, found {highest}", tokenizer_file::IDS);
            return Err(file_error(path, reason));
        }
        let id_limit = highest + 1;
        Ok(Self { shared: Arc::new(Shared { inner, special }), id_limit })
    }

    /// The same tokenizer for a model whose vocabulary was padded to `vocab_size`: the ids between decode to nothing.
    pub fn padded_to(self, vocab_size: u32) -> Self {
        Self { id_limit: self.id_limit.max(vocab_size), ..self }
    }

    /// Ids are below it.
    pub fn vocab_size(&self) -> usize {
        self.id_limit as usize
    }

    /// The id of a token, as written in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.shared.inner.token_to_id(token)
    }

    /// The token of an id, as written in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.shared.inner.id_to_token(id)
    }

    /// True for tokens that `skip_special` leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.shared.special.contains(&id)
    }

    /// Ids of `text`; nothing is put in front or behind.
    ///
    /// # Errors
    /// [`ProcessorError::Prompt`] for a run of white space so long that the split regex would give up on it, and for a text of
    /// more tokens than any model takes, before they are made.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ProcessorError> {
        if text.len() > PART {
            self.check_length(text)?;
        }
        self.encode_whole(text)
    }

    fn check_length(&self, text: &str) -> Result<(), ProcessorError> {
        let too_long = |found: &str, most: usize| {
            let reason = format!("the text has {found}, at most {most} are tokenised; shorten it");
            Err(ProcessorError::Prompt(reason))
        };
        if text.len() > MOST_BYTES {
            return too_long(&format!("{} bytes", text.len()), MOST_BYTES);
        }
        let mut tokens = 0usize;
        for part in parts(text) {
            // A cut may add a few tokens.
            tokens += self.encode_whole(part)?.len().saturating_sub(16);
            if tokens > MOST_TOKENS {
                return too_long(&format!("more than {MOST_TOKENS} tokens"), MOST_TOKENS);
            }
        }
        Ok(())
    }

    fn encode_whole(&self, text: &str) -> Result<Vec<u32>, ProcessorError> {
        if text.len() > MAX_WHITESPACE && longest_whitespace(text) > MAX_WHITESPACE {
            let reason = format!("cannot tokenise more than {MAX_WHITESPACE} white-space characters in a row");
            return Err(ProcessorError::Prompt(reason));
        }
        let failed = |e: &dyn Display| ProcessorError::Prompt(format!("cannot tokenise the text: {e}"));
        let encoding = caught(|| self.shared.inner.encode_fast(text, false))
            .ok_or_else(|| failed(&"the tokenizer's file leads the library into an error of its own"))?
            .map_err(|e| failed(&e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, ProcessorError> {
        let mut decoder = self.stream(skip_special);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&decoder.push(id)?);
        }
        text.push_str(&decoder.finish());
        Ok(text)
    }

    /// A decoder for ids that come one by one.
    pub fn stream(&self, skip_special: bool) -> StreamDecoder {
        StreamDecoder { tokenizer: self.clone(), skip_special, pending: Vec::new() }
    }

    /// The bytes that a token adds to the text, special tokens spelled; nothing for an id without a string.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        // Only ids outside the vocabulary are refused.
        let _ = self.push_bytes(id, false, &mut bytes);
        bytes
    }

    /// The bytes that a token stands for: its characters through the byte-level alphabet, or as they are when one of them
    /// is not in it.
    fn push_bytes(&self, id: u32, skip_special: bool, out: &mut Vec<u8>) -> Result<(), ProcessorError> {
        if id >= self.id_limit {
            let reason = format!("cannot decode token id {id}: the vocabulary has ids below {}", self.id_limit);
            return Err(ProcessorError::Prompt(reason));
        }
        if skip_special && self.is_special(id) {
            return Ok(());
        }
        let Some(token) = self.id_to_token(id) else { return Ok(()) };
        let start = out.len();
        for c in token.chars() {
            match byte_of(c) {
                Some(byte) => out.push(byte),
                None => {
                    out.truncate(start);
                    out.extend_from_slice(token.as_bytes());
                    break;
                }
            }
        }
        Ok(())
    }
}

/// `added_tokens_decoder` of tokenizer_config.json as `added_tokens` of tokenizer.json, by rising id.
fn added_tokens(path: &Path, config: &Value) -> Result<Vec<Value>, ProcessorError> {
    let file = Fields::of(path, config)?;
    let missing = || file.error("added_tokens_decoder", "missing, and there is no tokenizer.json");
    let decoder = file.object("added_tokens_decoder")?.ok_or_else(missing)?;
    let map = file.get("added_tokens_decoder").and_then(Value::as_object).ok_or_else(missing)?;
    let mut tokens = Vec::with_capacity(map.len());
    for (key, value) in map {
        let wrong = || decoder.error(key, format_args!("expected a token under its id, found {}", describe(value)));
        let id: u32 = key.parse().map_err(|_| wrong())?;
        let mut token =
            value.as_object().filter(|t| t.get("content").is_some_and(Value::is_string)).ok_or_else(wrong)?.clone();
        for flag in ["single_word", "lstrip", "rstrip", "normalized", "special"] {
            token.entry(flag).or_insert(Value::Bool(false));
        }
        token.insert("id".into(), id.into());
        tokens.push((id, Value::Object(token)));
    }
    tokens.sort_by_key(|(id, _)| *id);
    Ok(tokens.into_iter().map(|(_, token)| token).collect())
}

/// The byte that a character of the byte-level alphabet stands for: printable Latin-1 characters stand for themselves,
/// the other bytes in rising order for U+0100 and on.
fn byte_of(c: char) -> Option<u8> {
    const TABLE: [Option<u8>; 324] = {
        let mut table = [None; 324];
        let (mut byte, mut next) = (0usize, 256);
        while byte < 256 {
            if matches!(byte as u8, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
                table[byte] = Some(byte as u8);
            } else {
                table[next] = Some(byte as u8);
                next += 1;
            }
            byte += 1;
        }
        table
    };
    TABLE.get(c as usize).copied().flatten()
}

/// Ids to text, as they come, never splitting a character.
///
/// What [`push`](Self::push) and [`finish`](Self::finish) return, joined, equals [`Tokenizer::decode`] of all ids. A push
/// costs as much as its token is long; at most three bytes wait for the rest of their character.
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    pending: Vec<u8>,
}

impl StreamDecoder {
    /// The text that is settled now that `id` has come; often a word, sometimes nothing.
    pub fn push(&mut self, id: u32) -> Result<String, ProcessorError> {
        self.tokenizer.push_bytes(id, self.skip_special, &mut self.pending)?;
        let mut text = String::new();
        let mut rest = &self.pending[..];
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(invalid) = error.error_len() else {
                        rest = after;
                        break;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[invalid..];
                }
            }
        }
        let settled = self.pending.len() - rest.len();
        self.pending.drain(..settled);
        Ok(text)
    }

    /// What is left when no more ids come: a character that was cut short becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/keye-1_5-tiny/model")
    }

    #[test]
    fn vocab_and_merges_give_the_same_tokenizer() {
        let (file, built) =
            (Tokenizer::load(&fixture()).unwrap(), Tokenizer::from_vocab_and_merges(&fixture()).unwrap());
        assert_eq!(file.vocab_size(), built.vocab_size());
        for text in [
            "",
            "Hello world",
            "  a\r\n\r\nb \t c",
            "e\u{301}té 123.4",
            "你好😀<|frame|>0.5<think>x</think><|im_end|>\n",
        ] {
            let ids = file.encode(text).unwrap();
            assert_eq!(ids, built.encode(text).unwrap(), "{text:?}");
            for skip in [false, true] {
                assert_eq!(file.decode(&ids, skip).unwrap(), built.decode(&ids, skip).unwrap());
            }
        }
        for id in 0..file.vocab_size() as u32 {
            assert_eq!(file.id_to_token(id), built.id_to_token(id));
            assert_eq!(file.is_special(id), built.is_special(id));
        }
    }

    #[test]
    fn a_missing_tokenizer_says_what_to_do() {
        let error = Tokenizer::load(Path::new("/nonexistent")).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json") && error.contains("merges.txt"), "{error}");
    }

    #[test]
    fn streamed_text_equals_decoded_text_for_any_ids() {
        let tokenizer = Tokenizer::load(&fixture()).unwrap().padded_to(960);
        let mut state = 1u64;
        for _ in 0..500 {
            let ids: Vec<u32> = (0..24)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (state >> 33) as u32 % 960
                })
                .collect();
            for skip in [false, true] {
                let known: Vec<u32> = ids.iter().copied().filter(|id| tokenizer.id_to_token(*id).is_some()).collect();
                let expected = tokenizer.shared.inner.decode(&known, skip).unwrap();
                let mut stream = tokenizer.stream(skip);
                let mut text = String::new();
                for id in &ids {
                    text.push_str(&stream.push(*id).unwrap());
                    assert!(stream.pending.len() < 4);
                }
                text.push_str(&stream.finish());
                assert_eq!(text, expected);
            }
        }
    }

    #[test]
    fn deserts_of_white_space_are_errors() {
        let tokenizer = Tokenizer::load(&fixture()).unwrap();
        let spaces = |n: usize| format!("a{}x{}", " ".repeat(n), " ".repeat(600_000 - n));
        assert!(tokenizer.encode(&spaces(300_000)).is_ok());
        assert!(tokenizer.encode(&spaces(500_001)).is_err());
    }

    #[test]
    fn texts_of_more_tokens_than_any_context_are_refused_in_parts() {
        let tokenizer = Tokenizer::load(&fixture()).unwrap();
        let long = "a\u{e4} ".repeat(700_000);
        assert!(parts(&long).all(|part| part.len() <= PART) && parts(&long).collect::<String>() == long);
        let error = tokenizer.encode(&long).unwrap_err().to_string();
        assert!(error.contains("more than 1048576 tokens"), "{error}");
        let error = tokenizer.encode(&"x".repeat(MOST_BYTES + 1)).unwrap_err().to_string();
        assert!(error.contains("33554433 bytes"), "{error}");
        let fits = "word ".repeat(250_000);
        assert_eq!(tokenizer.encode(&fits).unwrap(), tokenizer.encode_whole(&fits).unwrap());
    }

    #[test]
    fn ids_beyond_the_vocabulary_are_errors() {
        let tokenizer = Tokenizer::load(&fixture()).unwrap();
        assert_eq!(tokenizer.vocab_size(), 708);
        assert!(tokenizer.decode(&[708], false).unwrap_err().to_string().contains("708"));
        assert!(tokenizer.decode(&[u32::MAX], true).is_err());
        assert_eq!(tokenizer.clone().padded_to(960).decode(&[708, 39, 959], false).unwrap(), "H");
    }
}
