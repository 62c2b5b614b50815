//! Behaviour of the crate, one binary.

#[path = "golden/experts.rs"]
mod experts;
#[path = "golden/fp8.rs"]
mod fp8;
#[cfg(feature = "hub")]
#[path = "golden/hub.rs"]
mod hub;
#[path = "golden/quantize.rs"]
mod quantize;
#[path = "golden/random_checkpoint.rs"]
mod random_checkpoint;
