//! An OpenAI-compatible HTTP server over the engine.
//!
//! **In**: requests of OpenAI's chat, completions, responses and embeddings APIs with the fields that clients of vLLM and
//! SGLang add, media as URLs, data URLs or files. **Out**: answers, whole or streamed as server-sent events, thinking apart
//! from the answer; vectors.
//!
//! How a request goes:
//!
//! 1. `guard` gives it an id, checks origin and key, catches panics, and logs and counts how it ended.
//! 2. `admission` takes a place for it among the open streams and for its body among the bytes in memory, or answers 429.
//! 3. `chat`, `completions`, `responses` or `embeddings` reads the fields into [`keye_engine::Request`]s, one for each
//!    prompt. What would change the meaning of the answer and is not supported is refused by name, other unknown fields are
//!    ignored.
//! 4. `generation` submits them, each for `n` choices (embeddings go to the engine directly). One thread per choice carries events from the engine's blocking stream into a bounded
//!    channel; the response reads it. When the response is dropped, because the client went away, the requests are cancelled.
//!
//! What it promises:
//!
//! * Everything is bounded: connections, headers, bodies and the sum of bodies, json values, open streams, the queue, media by
//!   the loader's limits and by [`Ceilings`], readers that do not read, the time that shutting down takes.
//! * Streamed and whole answers are made by the same code from the same events.
//! * Nothing is opened that [`MediaAccess`] does not allow; remote media are off by default, and with them only public
//!   addresses ([`keye_media::RemotePolicy`]).
//! * A request fails alone. Errors have OpenAI's shape; `error` is the one place that gives them their status.
//! * Logs have ids, routes, statuses, counts and times, never prompts, media or answers.

mod admission;
mod answer;
mod app;
mod chat;
mod completions;
mod config;
mod embeddings;
mod error;
mod fields;
mod gbnf;
mod generation;
mod guard;
mod logprobs;
mod metrics;
mod openapi;
mod openapi_schemas;
#[cfg(feature = "otel")]
mod otel;
mod page;
mod parts;
mod progress;
mod response_items;
mod responses;
mod routes;
mod sampling_fields;
mod server;
mod sse;
mod stall;
mod structured;
mod tls;
mod tokens;
mod tools;

pub use config::{Ceilings, MediaAccess, ServerConfig};
pub use server::{ServeError, Server, Shutdown};
pub use tls::TlsFiles;
