//! Keye-VL.

mod disk;
#[cfg(feature = "hub")]
pub mod hub;
pub mod presets;
pub mod random_checkpoint;
