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
    /// A sample whose picture has sides for which the limits leave no size; it is left out of packs.
    #[error("data: {0}")]
    NoSize(String),
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
    /// A run that ended with an error, and could not save its last steps either.
    #[error("{}", lost_steps(error, *step, reason))]
    Unsaved {
        /// What ended it.
        error: Box<TrainError>,
        /// The step of its newest checkpoint.
        step: u64,
        /// Why there is no newer one.
        reason: Box<TrainError>,
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

/// Where saving is what ended the run, the second try most often fails alike: told once.
fn lost_steps(error: &TrainError, step: u64, reason: &TrainError) -> String {
    let (error, reason) = (error.to_string(), reason.to_string());
    match error == reason {
        true => format!("{error}; the steps after {step} are lost"),
        false => format!("{error}; the steps after {step} are lost: {reason}"),
    }
}
