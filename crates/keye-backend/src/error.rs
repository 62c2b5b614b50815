//! What can go wrong on a device.

/// Names the tensor or setting, what was expected and what was found.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// A weight whose size, type or shape cannot be used.
    #[error("tensor {name}: {reason}")]
    Weight {
        /// Its name.
        name: String,
        /// Expected and found.
        reason: String,
    },
    /// Not enough memory.
    #[error("{what} needs {bytes} bytes, which could not be had; {remedy}")]
    Memory {
        /// For what.
        what: String,
        /// How much.
        bytes: u64,
        /// What helps.
        remedy: &'static str,
    },
    /// A device that is not there, or a call to it that failed.
    #[error("{what}: {reason}")]
    Device {
        /// What was to be done.
        what: String,
        /// What the device, its driver or its library said.
        reason: String,
    },
    /// One of the devices that share a model has failed, and so all have.
    #[error("rank {rank} of {ranks}: {reason}")]
    Rank {
        /// Its number.
        rank: usize,
        /// How many there are.
        ranks: usize,
        /// What it said.
        reason: String,
    },
    /// A setting that is not one.
    #[error("{0}")]
    Setting(String),
}
