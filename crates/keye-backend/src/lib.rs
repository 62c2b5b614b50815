//! placeholder
/// Error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// Memory.
    #[error("{0}")]
    Memory(String),
}
