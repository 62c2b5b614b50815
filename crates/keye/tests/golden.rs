//! Behaviour of the crate, one binary.

#[path = "golden/random_checkpoint.rs"]
mod random_checkpoint;
