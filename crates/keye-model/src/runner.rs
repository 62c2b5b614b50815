//! The seam between the engine and the model.

use std::ops::Range;

use keye_media::{MediaKind, Patches};

use crate::{Cost, Tap};

/// Media features held by a runner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FeatureId(pub u64);

/// What the engine has to know of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RunnerInfo {
    /// Length of a row of logits.
    pub vocab_size: usize,
    /// Longest sequence the model was made for.
    pub max_positions: usize,
    /// Tokens in a block of the KV cache.
    pub block_tokens: usize,
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Bytes of one block over all layers.
    pub block_bytes: usize,
    /// Bytes of one row of media features.
    pub feature_row_bytes: usize,
}

/// Rows of media features that replace token embeddings inside a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeatureRows {
    /// First replaced token, counted from the chunk's start.
    pub at: usize,
    /// Whose features.
    pub feature: FeatureId,
    /// First feature row.
    pub row: usize,
    /// How many.
    pub len: usize,
}

/// For which tokens of a chunk logits are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a part of a prompt.
    None,
    /// The last token's.
    Last,
    /// The last token's, of which only so many of the highest (1 to 128) decide, and their equals: what is lower may be -inf
    /// instead.
    Highest(usize),
    /// Those of a range of the chunk's tokens.
    Range(Range<usize>),
    /// No logits, but the hidden states after the last norm of a range of the chunk's tokens.
    Hidden(Range<usize>),
}

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Index in the sequence of the first one = number of tokens already in the cache.
    pub start: usize,
    /// Rotary positions (time, row, column) of each token.
    pub positions: Vec<[u32; 3]>,
    /// Media features that take the place of embeddings.
    pub features: Vec<FeatureRows>,
    /// Blocks of the sequence, in order, enough for `start + tokens.len()` tokens.
    pub block_table: Vec<u32>,
    /// Logits wanted.
    pub logits: LogitRows,
}

/// One step: chunks of different sequences, prefill and decode mixed. A sequence appears at most once.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// The chunks.
    pub chunks: Vec<Chunk>,
}

/// What a step yields.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outputs {
    /// Per chunk the wanted rows of logits, one after the other: `rows * vocab_size` values.
    pub logits: Vec<Vec<f32>>,
    /// Per chunk the wanted rows of hidden states, one after the other: `rows * hidden_size` values.
    pub hidden: Vec<Vec<f32>>,
}

/// How far an encoding is, in patches times layers. It may have some work left when all layers are done.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EncodeProgress {
    /// So far.
    pub done: u64,
    /// In all.
    pub total: u64,
    /// Floating-point operations of the last call.
    pub flops: f64,
}

/// A model that is loaded and ready.
pub trait Runner: Send {
    /// Sizes.
    fn info(&self) -> &RunnerInfo;

    /// Begins to run the vision tower and projector over one item. The features have a name from here on and no rows
    /// until [`Runner::encode_step`] has finished them; [`Runner::release`] gives them up at any time.
    fn begin_encode(&mut self, kind: MediaKind, patches: &Patches) -> Result<FeatureId, ModelError>;

    /// Works on features that were begun over the same patches: about `flops` floating-point operations, at least one
    /// piece of some tens of billions. Where the work is cut changes no value. When it is done the runner keeps the
    /// features, one row per media token, in the order of the prompt's pads. After an error they are gone.
    fn encode_step(
        &mut self,
        feature: FeatureId,
        patches: &Patches,
        flops: f64,
        tap: &mut dyn Tap,
    ) -> Result<EncodeProgress, ModelError>;

    /// Encodes one item at once. `progress(done, total)` is told how far it is; when it returns false the item is given up
    /// with [`ModelError::Cancelled`].
    fn encode(
        &mut self,
        kind: MediaKind,
        patches: &Patches,
        tap: &mut dyn Tap,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<FeatureId, ModelError> {
        let feature = self.begin_encode(kind, patches)?;
        loop {
            let EncodeProgress { done, total, .. } = self.encode_step(feature, patches, 0.0, tap)?;
            if !progress(done, total) {
                self.release(feature);
                return Err(ModelError::Cancelled);
            }
            if self.feature_rows(feature) > 0 {
                return Ok(feature);
            }
        }
    }

    /// Rows that `feature` holds; 0 when it is unknown or not finished.
    fn feature_rows(&self, feature: FeatureId) -> usize;

    /// Forgets features.
    fn release(&mut self, feature: FeatureId);

    /// Runs a step: writes the chunks' keys and values into their blocks and returns the wanted logits.
    fn step(&mut self, batch: &Batch, tap: &mut dyn Tap) -> Result<Outputs, ModelError>;

    /// Waits until the device has done all that was asked of it: for who measures time. Nothing on a device that has done it
    /// when a call returns.
    fn synchronize(&mut self) -> Result<(), ModelError> {
        Ok(())
    }

    /// Floating-point operations of [`Runner::encode`] for this grid, and of a prefill of `tokens` tokens.
    fn cost(&self, kind: MediaKind, grid_thw: &[[u32; 3]], tokens: usize) -> Cost;

    /// Floating-point operations per second that this machine reaches on a product of the model's shapes; measured on
    /// the first call (some tens of milliseconds).
    fn flops_per_second(&mut self) -> f64;
}

/// What can go wrong in a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Loading: config, tensors.
    #[error(transparent)]
    Checkpoint(#[from] keye_processor::ProcessorError),
    /// The device.
    #[error(transparent)]
    Backend(#[from] keye_backend::BackendError),
    /// Ranks that a model does not divide among, or that have ended.
    #[error("{0}")]
    Ranks(String),
    /// A batch that breaks the contract of [`Batch`].
    #[error("batch: {0}")]
    Batch(String),
    /// Patches that do not fit the model.
    #[error("media: {0}")]
    Media(String),
    /// The caller gave up.
    #[error("cancelled")]
    Cancelled,
}
