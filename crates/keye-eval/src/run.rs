//! Asks the questions of a plan.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use keye_media::{ItemOptions, MediaItem, MediaKind, Source};
use keye_world::{Sample, Split, Task, World, WriteError};

use crate::answerer::{AnswerError, Answerer, Reply};
use crate::clips::Clips;
use crate::report::{Report, Row};
use crate::score::{SCORING, exact, score};

/// What is asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Part of the world; [`Split::Test`] for figures that are reported.
    pub split: Split,
    /// Kinds of questions, each once.
    pub tasks: Vec<Task>,
    /// Questions of each kind.
    pub count: u64,
    /// Ask without showing the clip.
    pub text_only: bool,
    /// Squeeze every frame to a square of so many pixels a side, as a tower of one fixed resolution would have it.
    pub square: Option<u32>,
    /// Where the clips are written and found again by the next run; without, they go in the end.
    pub clips: Option<PathBuf>,
    /// Questions that are asked at the same time.
    pub at_once: usize,
}

/// A question that was answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The question, its truth and clip.
    pub sample: Sample,
    /// What was answered.
    pub answer: Reply,
    /// 0 to 1.
    pub score: f64,
    /// Wholly right.
    pub exact: bool,
}

/// How far it is.
#[derive(Debug)]
pub struct Step<'a> {
    /// The question that was just answered.
    pub outcome: &'a Outcome,
    /// Answered so far.
    pub done: usize,
    /// In all.
    pub total: usize,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// A clip could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// There is no folder for clips.
    #[error("no folder for clips: {0}; let --clips or TMPDIR name one that can be written")]
    Folder(std::io::Error),
    /// A question was not answered.
    #[error("{question}: {source}")]
    Answer {
        /// Its name.
        question: String,
        /// Why.
        source: AnswerError,
    },
    /// The caller wanted no more.
    #[error("stopped")]
    Stopped,
}

/// What is kept of an outcome.
struct Scored {
    task: Task,
    index: u64,
    score: f64,
    exact: f64,
    chance: f64,
    cut: bool,
    question: u64,
}

/// FNV-1a: the same on every machine and for every compiler.
fn fingerprint(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Asks all questions and scores the answers. `step` is called after each, in any order; when it returns false, the rest is
/// left unasked.
///
/// # Errors
/// The first failure ends it.
pub fn run(
    answerer: &dyn Answerer,
    plan: &Plan,
    step: &mut (dyn FnMut(Step) -> bool + Send),
) -> Result<Report, EvalError> {
    let clips = Clips::new(plan.clips.as_deref(), plan.square).map_err(EvalError::Folder)?;
    let questions: Vec<(Task, u64)> =
        (0..plan.count).flat_map(|index| plan.tasks.iter().map(move |task| (*task, index))).collect();
    let total = questions.len();
    let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
    let shared = Mutex::new((Vec::<Scored>::with_capacity(total), step));
    let worker = || -> Result<(), EvalError> {
        while !stopped.load(Ordering::Relaxed) {
            let Some(&(task, index)) = questions.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            let outcome =
                ask(answerer, plan, &clips, task, index).inspect_err(|_| stopped.store(true, Ordering::Relaxed))?;
            let mut shared = shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let (outcomes, step) = &mut *shared;
            let go_on = step(Step { outcome: &outcome, done: outcomes.len() + 1, total });
            let turn = &outcome.sample.turns[0];
            let texts = [&outcome.sample.uuid, &turn.question, &turn.answer];
            outcomes.push(Scored {
                task,
                index,
                score: outcome.score,
                exact: f64::from(outcome.exact),
                chance: f64::from(turn.chance),
                cut: outcome.answer.cut,
                question: fingerprint(texts.into_iter().flat_map(|text| text.bytes().chain([0xff]))),
            });
            if !go_on {
                stopped.store(true, Ordering::Relaxed);
                return Err(EvalError::Stopped);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..plan.at_once.max(1)).map(|_| scope.spawn(worker)).collect();
        let ended = |worker: std::thread::ScopedJoinHandle<Result<(), EvalError>>| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        // All are waited for before the first failure is told.
        workers.into_iter().map(ended).collect::<Vec<_>>().into_iter().collect::<Result<(), EvalError>>()
    })?;
    let (mut outcomes, _) = shared.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    outcomes.sort_by_key(|outcome| outcome.index);
    let rows = Task::every().filter_map(|task| {
        let of: Vec<&Scored> = outcomes.iter().filter(|outcome| outcome.task == task).collect();
        let mean = |value: fn(&Scored) -> f64| of.iter().map(|outcome| value(outcome)).sum::<f64>() / of.len() as f64;
        (!of.is_empty()).then(|| Row {
            task,
            count: of.len(),
            questions: format!("{:016x}", fingerprint(of.iter().flat_map(|outcome| outcome.question.to_le_bytes()))),
            cut: of.iter().filter(|outcome| outcome.cut).count(),
            exact: mean(|outcome| outcome.exact),
            chance: mean(|outcome| outcome.chance),
            scores: of.iter().map(|outcome| outcome.score).collect(),
        })
    });
    Ok(Report { split: plan.split, scoring: SCORING, rows: rows.collect() })
}

fn ask(answerer: &dyn Answerer, plan: &Plan, clips: &Clips, task: Task, index: u64) -> Result<Outcome, EvalError> {
    let sample = World::new(plan.split).question(task, index);
    let path = match &sample.media[..] {
        [(_, media), ..] if !plan.text_only => Some(clips.write(&sample.uuid, media.clip())?),
        _ => None,
    };
    let media = path.clone().map(|path| {
        let (source, options) = (Source::Path(path), ItemOptions::default());
        MediaItem { kind: MediaKind::Video, source, options }
    });
    let turn = &sample.turns[0];
    let answer = answerer.answer(media, &turn.question);
    let answer = answer.map_err(|source| EvalError::Answer { question: sample.uuid.clone(), source })?;
    if let Some(path) = path {
        clips.done(&path);
    }
    let said = &answer.text;
    let (score, exact) = (score(turn, &sample.story, said), exact(turn, &sample.story, said));
    Ok(Outcome { answer, score, exact, sample })
}
