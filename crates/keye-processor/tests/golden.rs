//! Golden data and behaviour of the crate, one binary.

#[path = "golden/checkpoint.rs"]
mod checkpoint;
