//! What can go wrong.

/// Errors of training.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A pack that contradicts itself or the model.
    #[error("pack: {0}")]
    Pack(String),
}
