//! The binary as its users meet it, and the library's whole path, on the golden models.

#[path = "cli/ask.rs"]
mod ask;
#[path = "cli/chat.rs"]
mod chat;
#[path = "cli/engine.rs"]
mod engine;
#[path = "cli/eval.rs"]
mod eval;
#[path = "cli/failures.rs"]
mod failures;
#[path = "cli/inspect.rs"]
mod inspect;
#[path = "cli/keye_671b.rs"]
mod keye_671b;
#[cfg(feature = "nano")]
#[path = "cli/nano.rs"]
mod nano;
#[path = "cli/quantize.rs"]
mod quantize;
#[path = "cli/readme.rs"]
mod readme;
#[cfg(feature = "serve")]
#[path = "cli/serve.rs"]
mod serve;
#[path = "cli/support.rs"]
mod support;
#[path = "cli/trace.rs"]
mod trace;
#[cfg(feature = "train")]
#[path = "cli/train.rs"]
mod train;
