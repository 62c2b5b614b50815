//! The engine's thread and its handle.

use std::sync::Arc;

use keye_media::Loader;
use keye_model::Runner;
use keye_processor::Processor;

use crate::{EngineError, EventStream, Request};

/// Limits of an engine.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineOptions {
    /// Longest sequence, prompt and answer together; at most the model's.
    pub max_model_len: Option<usize>,
    /// Most tokens in one step: prompts longer than this are cut into chunks.
    pub max_batch_tokens: usize,
    /// Requests that may wait.
    pub max_queue: usize,
    /// Bytes of media features kept for later requests.
    pub feature_cache_bytes: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { max_model_len: None, max_batch_tokens: 512, max_queue: 64, feature_cache_bytes: 512 << 20 }
    }
}

/// A handle to the engine; clones are the same engine.
#[derive(Clone)]
pub struct Engine {}

impl Engine {
    /// Starts the engine's threads.
    pub fn new(runner: Box<dyn Runner>, processor: Arc<Processor>, loader: Loader, options: EngineOptions) -> Self {
        let _ = (runner, processor, loader, options);
        Self {}
    }

    /// Queues a request. Errors that need no work (no room in the queue) are returned, all others are streamed.
    pub fn submit(&self, request: Request) -> Result<EventStream, EngineError> {
        let _ = request;
        Err(EngineError::Stopped)
    }
}
