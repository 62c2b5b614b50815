//! How well a model answers.
//!
//! **In**: something that answers ([`Answerer`], of which an engine is one), and which questions to ask ([`Plan`]). **Out**: a
//! [`Report`]: for every kind of question the score, how many answers were wholly right, and what guessing would score. Reports
//! of several models or ways of asking become one table ([`markdown`]) or picture ([`accuracy_svg`]).
//!
//! What it promises:
//!
//! * Clips are written as mp4 files and read back by the answerer: nothing of the media path is left out.
//! * The same plan asks the same questions everywhere, of a part of the world that training never shows.
//! * What is scored is the answer, not what a model thinks before it; answers that a limit of tokens cut are counted.
//! * A score says what was measured: exact answers after normalisation; intersection over union for times; edit distance for
//!   reading. With every score goes its standard error; two reports are compared question by question,
//!   and only if questions, truths and rules of scoring are the same.

mod answerer;
mod clips;
mod compare;
mod picture;
mod report;
mod run;
mod score;

pub use answerer::{AnswerError, Answerer, EngineAnswerer, MAX_TOKENS, Reply};
pub use compare::{Column, CompareError, difference, markdown};
pub use picture::accuracy_svg;
pub use report::{Report, Row};
pub use run::{EvalError, Outcome, Plan, Step, run};
pub use score::{SCORING, exact, normalise, score};
