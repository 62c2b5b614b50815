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
//! A [`Request`] says more: the form of the answer, pictures and frames that are in memory, when to stop.
//!
//! ```
//! use keye::{Conversation, Event, FrameItem, Grammar, Keye, MediaItem, MediaKind, Request, Source};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let model = "../../fixtures/keye-1_5-tiny/model";
//! # let options = keye::LoadOptions { max_model_len: Some(2048), ..keye::LoadOptions::default() };
//! let keye = Keye::load(model, options)?;
//! let frame = |shade: u8| keye::rgb_source(64, 48, &[shade; 64 * 48 * 3]);
//! let frames = [0, 90, 180, 255].map(|shade| Ok(FrameItem { source: frame(shade)?, options: None }));
//! let frames = frames.into_iter().collect::<Result<_, keye::MediaError>>()?;
//! let clip = MediaItem { kind: MediaKind::Video, source: Source::Frames(frames), options: Default::default() };
//! let mut conversation = Conversation::new();
//! conversation.push_user(vec![clip], "Does it get brighter?");
//! let schema = serde_json::json!({
//!     "type": "object", "properties": {"brighter": {"type": "boolean"}}, "required": ["brighter"],
//!     "additionalProperties": false,
//! });
//! let request = Request {
//!     conversation,
//!     grammar: Some(Grammar::JsonSchema(schema)),
//!     max_reasoning_tokens: Some(64),
//!     sampling: keye.default_sampling(),
//!     ..Request::default()
//! };
//! let mut found = String::new();
//! for event in keye.submit(request)? {
//!     match event {
//!         // What was thought is apart, and free of the schema.
//!         Event::Finished { answer, .. } => found = answer.answer,
//!         Event::Failed(error) => return Err(error.into()),
//!         _ => {}
//!     }
//! }
//! let found: serde_json::Value = serde_json::from_str(&found)?;
//! assert!(found["brighter"].is_boolean());
//!
//! let events = keye.ask::<&str>(&[], "Tell a long story.")?;
//! // For whoever is to stop it: a signal's thread, a button.
//! let canceller = events.canceller();
//! canceller.cancel();
//! // An answer that was there already stays one.
//! assert!(matches!(events.last(), Some(Err(keye::EngineError::Cancelled) | Ok(Event::Finished { .. }))));
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
mod rgb;
mod units;

pub use api::{AskError, Events, Keye, LoadError, LoadOptions, LoadProgress, default_sampling, resolve_model};
pub use device::{CacheSize, Device, DeviceOptions, Loaded};
pub use device_plan::{DevicePlan, WeightBytes, device_plans};
pub use disk::free_bytes;
pub use media_argument::{ArgumentError, kind_of_bytes, media_file, media_item};
pub use memory::{CacheFit, MemoryPlan, cache_spec, cache_spec_of_ranks, fit_cache};
pub use new_dir::check_new_dir;
pub use ranks::{ModelFiles, load_cpu, load_ranks};
pub use rgb::rgb_source;
pub use units::bytes_text;

/// The name of the model inside this library, where there is one (feature `nano`): see `Keye::embedded`.
pub const NANO: &str = "keye-nano";

pub use keye_backend::KvDtype;
pub use keye_engine::{
    Canceller, Engine, EngineError, EngineOptions, Event, EventStream, FinishReason, Grammar, NothingYet, Request,
    SamplingParams, Stage, Timings, TokenLogprob, Usage,
};
pub use keye_media::{
    Access, Frame, FrameItem, FrameKind, ItemOptions, Limits, Loader, MediaConfig, MediaError, MediaItem, MediaKind,
    Progress, RemotePolicy, Source, TimestampRule,
};
pub use keye_processor::{
    Answer, AttentionKind, CheckpointFiles, Claim, Conversation, IndexScorer, Overrides, PackedFormat, Processor,
    TemplateOptions, ThinkMode, ThinkTag, claim_dir,
};
