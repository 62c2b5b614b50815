//! Training data: samples to packs (`docs/spec/training.md` §3.4 to §3.7).
//!
//! **In**: a [`DataConfig`]: the synthetic world, drawn in this process, and files of records. **Out**: a [`Stream`] of
//! [`Pack`](crate::Pack)s, prepared ahead on a thread in bounded memory.
//!
//! What it promises:
//!
//! * Media and prompts are made by `keye-media` and `keye-processor`, as at inference: there is no second code for them.
//! * What comes next is a function of the config and a small state (samples drawn, next sample of each source, the sample
//!   that did not fit), so that a run that goes on from a state sees the very same packs.
//! * Loss is on what the assistant says, its closing `<|im_end|>\n` included; samples without loss are left out.
//!
//! Of §3.6, the tiny picture that gives every pack something to see and the padding of the tail are left out: both serve
//! collective operations between processes, and packs here are of any length up to the limit.

mod balance;
mod config;
mod encode;
mod example;
mod mask;
mod packer;
#[cfg(feature = "parquet")]
mod rows;
mod stream;
mod validation;

pub use balance::balance;
pub use config::{DataConfig, Kind, SourceConfig, Targets};
pub use encode::{Encoded, Encoder};
pub use example::{Body, Example, Visual};
pub use mask::{completion_mask, conversation_mask};
pub use packer::State;
pub use stream::Stream;
pub use validation::held_out;
