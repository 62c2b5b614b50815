//! Keye-VL: questions about images and short videos, answered by one Rust library.
//!
//! **In**: a checkpoint (a directory in Hugging Face layout, a hub id, or the small one inside), pictures and clips, a question. **Out**: a stream
//! of [`Event`]s: what is being done, then text as it is generated, then counts and timings.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let (model, clip) = ("../../fixtures/keye-1_5-tiny/model", "../../fixtures/keye-1_5-tiny/inputs/clip.mp4#fps=1");
//! # let options = keye::LoadOptions { max_model_len: Some(1024), ..keye::LoadOptions::default() };
//! let keye = keye::Keye::load(model, options)?;
//! for event in keye.ask(&[clip], "What happens in this clip?")? {
//!     if let keye::Event::Token { text, .. } = event? {
//!         print!("{text}");
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! What it promises:
//!
//! * Media named by the caller are opened, nothing else: what a file of messages names is the caller's to allow
//!   ([`LoadOptions::access`]).
//! * [`Keye`] is a cheap handle to one engine: requests of many threads share the weights, and the caches of prompts and media.
//! * Dropping a stream cancels its request.

mod api;
mod device;
mod device_plan;
mod disk;
#[cfg(any(test, feature = "cuda"))]
mod gpu_memory;
#[cfg(feature = "hub")]
pub mod hub;
mod machine_memory;
mod media_argument;
mod memory;
#[cfg(feature = "nano")]
mod nano;
mod new_dir;
pub mod presets;
pub mod quantize;
pub mod random_checkpoint;
mod ranks;

pub use api::{AskError, Events, Keye, LoadError, LoadOptions, LoadProgress, default_sampling, resolve_model};
pub use device::{CacheSize, Device, DeviceOptions, Loaded};
pub use device_plan::{DevicePlan, WeightBytes, device_plans};
pub use disk::free_bytes;
pub use media_argument::{ArgumentError, kind_of_bytes, media_item};
pub use memory::{CacheFit, MemoryPlan, cache_spec, cache_spec_of_ranks, fit_cache};
pub use ranks::{ModelFiles, load_cpu, load_ranks};

/// The name of the model inside this library, where there is one (feature `nano`): see `Keye::embedded`.
pub const NANO: &str = "keye-nano";

pub use keye_backend::KvDtype;
pub use keye_engine::{EngineError, Event, EventStream, FinishReason, Request, SamplingParams, Stage, Timings, Usage};
pub use keye_media::{Access, ItemOptions, MediaError, MediaItem, MediaKind, Source, TimestampRule};
pub use keye_processor::{Answer, AttentionKind, CheckpointFiles, Conversation, IndexScorer, Overrides, ThinkMode};
