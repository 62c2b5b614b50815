//! The training recipe of Keye-VL 1.5 at a small scale.
//!
//! **In**: packed samples ([`Pack`]). **Out**: a checkpoint directory in Hugging Face layout that the engine loads.
//!
//! The models are written once over [`Device`]; the [`Cpu`] is here, CUDA is `keye-backend`'s. On one device the same run gives the
//! same bits, stopped and gone on with or not, on any number of threads.

mod average;
mod checkpoint_dir;
mod cpu;
pub mod data;
mod error;
mod flops;
mod layers;
mod metrics;
mod model;
mod muon;
mod optimizer;
mod pack;
mod params;
mod recipe;
mod run;
mod small_files;
mod state;

pub use average::{Mean, average};
pub use checkpoint_dir::{ExportDtype, export, load_params};
pub use cpu::Cpu;
pub use error::TrainError;
pub use flops::training_flops;
pub use keye_backend::training::{Device, Precision};
pub use metrics::{StepMetrics, loss_svg};
pub use model::Model;
pub use model::contrast::{SigmoidLoss, sigmoid_loss};
pub use optimizer::{Group, Means, Optimizer, Schedule, groups};
pub use pack::{PATCH_VALUES, Pack, PackSource};
pub use params::{Gradients, Layout, Params};
pub use recipe::{Objective, Recipe, Validation, Weighting};
pub use run::{Outcome, load_model, loss_of, model_of, run, weights};
