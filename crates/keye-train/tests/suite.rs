//! The crate's behaviour through its public interface.

#[cfg(feature = "cuda-tests")]
#[path = "suite/cuda.rs"]
mod cuda;
#[path = "suite/data.rs"]
mod data;
#[path = "suite/engine.rs"]
mod engine;
#[path = "suite/gradients.rs"]
mod gradients;
#[path = "suite/resume.rs"]
mod resume;
#[path = "suite/support.rs"]
mod support;
#[path = "suite/training.rs"]
mod training;
