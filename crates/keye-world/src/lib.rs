//! The synthetic world: short clips, stills and texts with exact truth, drawn from a seed.
//!
//! **In**: a [`Split`] and an index. **Out**: a [`Sample`]: messages in the record format of `docs/spec/training.md` §3.4,
//! the [`Clip`] they ask about, rendered frame by frame when wanted, and the [`Story`] behind it, which is the truth.
//!
//! What it promises:
//!
//! * The same split and index give the same sample on every machine: integers only, and a generator of our own.
//! * Test clips show a combination of colour, shape and motion that no clip of the other splits ever shows
//!   ([`is_held_out`]), while each colour, shape and motion, and each pair of them, is seen in training.
//! * An answer follows from the clip: what is asked about is named unambiguously and is not covered by anything.
//! * Answers are short, times are seconds on a grid of half a second.

mod captions;
mod clip;
mod compose;
mod export;
mod font;
mod names;
mod questions;
mod raster;
mod record;
mod rng;
#[cfg(feature = "parquet")]
mod rows;
mod sample;
mod split;
mod story;
mod text;
mod wording;
mod world;

pub use captions::{caption, dense_caption};
pub use clip::Clip;
pub use export::{Encoder, WriteError, write_mp4, write_mp4_at, write_png};
pub use names::{Background, Colour, Motion, Place, Shape, Size};
pub use record::Record;
pub use rng::Rng;
#[cfg(feature = "parquet")]
pub use rows::{Row, RowFile, RowWriter, RowsError, write_rows};
pub use sample::{Media, Message, Part, Role, Sample, Task, Turn};
pub use split::{Split, is_held_out};
pub use story::{Change, Contact, FPS, Label, Look, Property, Scene, Story, Thing};
pub use world::World;
