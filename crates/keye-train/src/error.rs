//! What can go wrong.

use std::path::PathBuf;

/// Errors of training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A pack that contradicts itself or the model.
    #[error("pack: {0}")]
    Pack(String),
    /// Training data: records, media, the state of reading.
    #[error("data: {0}")]
    Data(String),
    /// A model that is not trained here.
    #[error("model: {0}")]
    Model(String),
    /// Checkpoints: config, tensors.
    #[error(transparent)]
    Checkpoint(#[from] keye_processor::ProcessorError),
    /// Threads or instruction set.
    #[error(transparent)]
    Backend(#[from] keye_backend::BackendError),
    /// A recipe that cannot be followed.
    #[error("{}: {reason}", path.display())]
    Recipe {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what is expected.
        reason: String,
    },
    /// Reading or writing a file of a run.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
}
