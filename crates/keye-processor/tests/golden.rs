//! Golden data and behaviour of the crate, one binary.

#[path = "golden/checkpoint.rs"]
mod checkpoint;
#[path = "golden/qwen3.rs"]
mod qwen3;
#[path = "golden/text.rs"]
mod text;
