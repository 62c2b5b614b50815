//! Keye-VL.

mod disk;
pub mod presets;
pub mod random_checkpoint;
