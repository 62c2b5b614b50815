//! Requests to tokens.
//!
//! **In**: a [`Request`]: a conversation, sampling parameters, limits. **Out**: a bounded stream of [`Event`]s: what is
//! being done, then text as it is generated, then counts and timings. One [`Engine`] handle serves every front end.
//!
//! What it promises:
//!
//! * The same request gives the same tokens, alone or among others, streamed or not, whether its prompt was cached or not.
//! * Dropping an [`EventStream`] cancels the request and frees its blocks, wherever it is.
//! * A request that fails fails alone.
//! * KV memory is handed out in blocks; prompts that begin like an earlier one (same tokens, same media content) reuse
//!   its blocks, and media that were encoded before are not encoded again.
//!
//! No tensor types, no HTTP, no files of requests. Scheduler and block manager know nothing of models.

mod block_manager;
mod constraint;
mod detached;
mod embedding;
mod encoder;
mod engine;
mod error;
mod event;
#[cfg(test)]
mod fake;
mod feature_cache;
mod grammar;
mod grammar_depth;
mod grammar_outline;
mod guesser;
mod media_cache;
mod pace;
mod prepare;
mod queue;
mod random;
mod request;
mod sampling;
mod scheduler;
mod sequence;
mod stop;
#[cfg(test)]
mod tests;
mod trace;
mod worker;

pub use embedding::{Embedding, EmbeddingStream};
pub use engine::{Engine, EngineOptions, EngineStats};
pub use error::{EngineError, Fault, MediumError};
pub use event::{Canceller, Event, EventStream, FinishReason, NothingYet, Stage, Timings, TokenLogprob, Usage};
pub use grammar::{MAX_GRAMMAR_BYTES, spaced};
pub use keye_model::panic_text;
pub use request::{Grammar, MAX_LOGPROBS, Pooling, Request};
pub use sampling::{
    MAX_STOP_BYTES, MAX_STOPS, MIN_P, PENALTY, REPETITION_PENALTY, SamplingParams, TEMPERATURE, distribution, sample,
};
pub use trace::{Trace, trace};
