//! How well a model answers.
//!
//! **In**: something that answers ([`Answerer`], of which an engine is one), and which questions to ask ([`Plan`]). **Out**: a
//! [`Report`]: for every kind of question the score, how many answers were wholly right, and what guessing would score.
//!
//! What it promises:
//!
//! * Clips are written as mp4 files and read back by the answerer: nothing of the media path is left out.
//! * The same plan asks the same questions everywhere, of a part of the world that training never shows.
//! * A score says what was measured: exact answers after normalisation; intersection over union for times; edit distance for
//!   reading.

mod answerer;
mod report;
mod run;
mod score;

pub use answerer::{AnswerError, Answerer, EngineAnswerer};
pub use report::{Report, Row};
pub use run::{EvalError, Outcome, Plan, Step, run};
pub use score::{exact, normalise, score};
