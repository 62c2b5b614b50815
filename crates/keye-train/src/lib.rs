//! The training recipe of Keye-VL 1.5 at a small scale, on the CPU.
//!
//! **In**: packed samples ([`Pack`]). **Out**: a checkpoint directory in Hugging Face layout that the engine loads.

mod error;
mod pack;

pub use error::TrainError;
pub use pack::{PATCH_VALUES, Pack, PackSource};
