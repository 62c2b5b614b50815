//! The Keye-VL models, written once over [`keye_backend::Backend`].
//!
//! **In**: a checkpoint's weights and config, then patches and [`Batch`]es of tokens. **Out**: a [`Runner`]: media features
//! that stay with the model under a [`FeatureId`], and logits for the rows that a batch asks for.
//!
//! What it promises:
//!
//! * The papers' order and the checkpoint's names, so that the files here can be read beside the reference.
//! * One code path for all variants; they differ by config and by [`keye_processor::Facts`].
//! * The generics over the backend end at [`Runner`], which is object-safe: what is above compiles without tensors.
//! * Row invariance: what a row yields depends only on its own input and history, not on what else is in the batch
//!   nor on how a prompt was cut into chunks.
//! * Every tensor of interest can be watched through a [`Tap`]; without one nothing is copied.
//!
//! From patches to logits: [`vision`](self) tower, projector, decoder, held together by [`KeyeModel`], which has one device;
//! [`ParallelModel`] divides a decoder among several.

mod cost;
mod decoder;
mod encode;
mod feed_forward;
mod indexer;
mod latent_attention;
mod layout;
mod model;
mod panic;
mod parallel;
mod projector;
mod ranks;
mod rope;
mod runner;
mod step;
mod tap;
mod vision;
mod weights;

pub use cost::{Cost, vision_flops};
pub use layout::{TensorShape, split_experts, stored_layout, weight_layout};
pub use model::{KeyeModel, LoadOptions};
pub use panic::panic_text;
pub use parallel::{ParallelModel, RankDevice};
pub use ranks::cache_spec;
pub use runner::{
    Batch, Chunk, EncodeProgress, FeatureId, FeatureRows, LogitRows, ModelError, Outputs, Runner, RunnerInfo,
};
pub use tap::{NoTap, Tap};
