//! The models against the golden data, patches fed from the files: `fixtures/README.md`; Keye-VL-671B's decoder, for which
//! there are none, against its formulas.

#[path = "golden/cases.rs"]
mod cases;
#[path = "golden/cost.rs"]
mod cost;
#[cfg(feature = "cuda-tests")]
#[path = "golden/cuda.rs"]
mod cuda;
#[path = "golden/invariance.rs"]
mod invariance;
#[path = "golden/keye_2.rs"]
mod keye_2;
#[path = "golden/latent.rs"]
mod latent;
#[path = "golden/latent_reference.rs"]
mod latent_reference;
#[path = "golden/mixed_formats.rs"]
mod mixed_formats;
#[path = "golden/parallel.rs"]
mod parallel;
#[path = "golden/support.rs"]
mod support;
