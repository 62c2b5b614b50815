//! tokenizer.json: text to ids and back.

/// Byte-level BPE with the checkpoint's special tokens.
pub struct Tokenizer {}

/// Ids to text, as they come, never splitting a character.
pub struct StreamDecoder {}
