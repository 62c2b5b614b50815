//! A step as the layers of a decoder see it.

use keye_backend::{Backend, SequenceRows};

/// The rows of a step: what all ranks know of it.
pub(crate) struct Rows {
    /// Rotary positions of each.
    pub(crate) positions: Vec<[u32; 3]>,
    pub(crate) sequences: Vec<SequenceRows>,
    /// Those whose logits are wanted.
    pub(crate) wanted: Vec<u32>,
}

/// A step's place in the cache.
pub(crate) struct Place<'a, B: Backend> {
    pub(crate) cache: &'a mut B::Cache,
    pub(crate) layer: usize,
    pub(crate) plan: &'a B::Plan,
}
