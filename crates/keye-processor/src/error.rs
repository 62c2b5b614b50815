//! What can go wrong between a checkpoint's files and a prompt.

use std::path::PathBuf;

/// Names the file and field or tensor, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessorError {
    /// A file of the checkpoint could not be read.
    #[error("{}: cannot read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("{}: cannot write: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file of the checkpoint is damaged or says something impossible.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Field, expected, found.
        reason: String,
    },
    /// A kind of attention was asked for that the model does not have.
    #[error("{reason}")]
    Attention {
        /// What is asked for, and the remedy.
        reason: &'static str,
    },
    /// A tensor is missing or has another type or shape.
    #[error("{}: tensor {name}: {reason}", path.display())]
    Tensor {
        /// The file that holds it, or the checkpoint's directory when it is missing.
        path: PathBuf,
        /// Its name.
        name: String,
        /// Expected and found.
        reason: String,
    },
    /// A conversation that cannot be understood.
    #[error("messages{at}: {reason}")]
    Messages {
        /// Where, as a path: `[0].content[1].fps`.
        at: String,
        /// Expected and found.
        reason: String,
    },
    /// The chat template failed, or refused the conversation.
    #[error("chat template: {0}")]
    Template(String),
    /// Prompt and media do not fit each other, or the text cannot be tokenised.
    #[error("prompt: {0}")]
    Prompt(String),
}
