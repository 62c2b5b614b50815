//! `keye eval`: how well a model answers.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Subcommand, ValueEnum};
use keye::{Keye, ThinkMode};
use keye_eval::{Column, EngineAnswerer, EvalError, MAX_TOKENS, Plan, Report, Row, accuracy_svg, difference, markdown};
use keye_media::{Loader, VideoRule};
use keye_world::{Split, Task};
use serde_json::json;

use super::args::ModelArgs;
use super::failure::{Interrupted, Usage};
use super::signals;
use super::ui::{self, Status};

const AFTER_HELP: &str = "\
Examples:
  keye eval world
  keye eval world -m ./model --tasks when,count --count 200 --json
  keye eval world -m ./model --text-only
  keye eval world -m ./model --frames uniform
  keye eval world -m ./model --think --max-tokens 8192
  keye eval world -m ./model --clips ./clips --json > f32.json
  keye eval world -m ./model-int8 --clips ./clips --json > int8.json
  keye eval compare f32.json int8.json --svg accuracy.svg

Scores are in percent: right answers; for `when` the overlap of the two times, for `reading` the letters that are right, for \
captions the things named; +- is the standard error. `chance` is what guessing would score; `--text-only` is what the questions alone give away.";

/// Measure how well a model answers
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    World(Box<WorldArgs>),
    Compare(CompareArgs),
}

/// Put reports of `keye eval world --json` beside one another, as Markdown
#[derive(clap::Args)]
struct CompareArgs {
    /// Reports of the same questions; the files' names stand above the columns
    #[arg(value_name = "REPORT.json", required = true)]
    reports: Vec<PathBuf>,
    /// Draw the scores as a picture as well
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print the comparison as json in place of the table
    #[arg(long)]
    json: bool,
}

/// Ask about short synthetic clips with exact truth, which training never shows
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
struct WorldArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[arg(long, value_name = "TASKS", value_delimiter = ',', help = tasks_help())]
    tasks: Vec<Task>,
    /// Questions of each kind
    #[arg(long, value_name = "N", default_value = "50", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    count: u64,
    /// Part of the world; figures to report are of test
    #[arg(long, value_name = "SPLIT", default_value = "test")]
    split: Split,
    /// Do not show the clips: the score of guessing from the question
    #[arg(long, conflicts_with = "frames")]
    text_only: bool,
    /// How the frames of clips share their tokens
    #[arg(long, value_name = "HOW", default_value = "slow-fast")]
    frames: Frames,
    /// Squeeze every frame to a square of so many pixels a side before the model sees it: no native resolution
    #[arg(long, value_name = "PIXELS", conflicts_with = "text_only", value_parser = clap::value_parser!(u32).range(28..=4096))]
    square: Option<u32>,
    /// Keep the clips in this folder, and take those that are there: saves half the time when several models are measured
    #[arg(long, value_name = "DIR")]
    clips: Option<PathBuf>,
    /// Questions that are asked at the same time
    #[arg(long, value_name = "N", default_value = "8", value_parser = clap::value_parser!(u16).range(1..=256))]
    at_once: u16,
    /// Ask for thinking (puts /think behind the question); what is thought is not scored
    #[arg(long, conflicts_with = "no_think")]
    think: bool,
    /// Ask for no thinking (puts /no_think behind the question) [default: it is left to the model]
    #[arg(long)]
    no_think: bool,
    /// Most tokens of an answer with its thinking; answers that are cut are counted
    #[arg(long, value_name = "N", default_value_t = MAX_TOKENS)]
    max_tokens: usize,
    /// Show every question with its answer
    #[arg(long)]
    show: bool,
    /// Print the report as json
    #[arg(long)]
    json: bool,
}

/// How the frames of clips share their tokens.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Frames {
    /// As the model does it.
    SlowFast,
    /// The same number of tokens for all frames, as many in all as with slow and fast frames.
    Uniform,
}

impl WorldArgs {
    fn think_mode(&self) -> ThinkMode {
        match (self.think, self.no_think) {
            (true, _) => ThinkMode::Think,
            (_, true) => ThinkMode::NoThink,
            _ => ThinkMode::Auto,
        }
    }
}

/// Some kinds are asked only where they are named.
fn tasks_help() -> String {
    let names = |tasks: &[Task], between: &str| tasks.iter().map(|task| task.name()).collect::<Vec<_>>().join(between);
    let all: Vec<Task> = Task::every().collect();
    format!("Kinds of questions: {} [default: all but {}]", names(&all, ", "), names(&Task::BY_NAME, " and "))
}

/// Above every similarity: all frames are slow.
const ALL_SLOW: f64 = 2.0;

pub fn run(args: Args) -> Result<()> {
    match args.what {
        What::World(args) => world(&args),
        What::Compare(args) => compare(&args),
    }
}

fn world(args: &WorldArgs) -> Result<()> {
    if args.square.is_some_and(|side| side % 2 == 1) {
        return Err(Usage("--square takes an even number of pixels".into()).into());
    }
    let begin = Instant::now();
    let mut status = Status::new(false);
    let uniform = args.frames == Frames::Uniform;
    super::args::warn_of_device(args.model.device, &mut status);
    let mut options = args.model.options(keye::Access::default());
    options.engine.max_queue = usize::from(args.at_once);
    let keye = Keye::load_adjusted(
        args.model.chosen(&mut status),
        options,
        &mut |progress| status.loading(progress),
        |loader| {
            if uniform {
                loader.config.video.min_frame_similarity = ALL_SLOW;
            }
        },
    )?;
    super::args::warn_of_disk(&keye, &mut status);
    status.clear();
    let media = &keye.processor().media;
    if uniform && media.video.rule != VideoRule::SlowFast {
        return Err(Usage("--frames uniform is for models with slow and fast frames".into()).into());
    }
    let answerer = EngineAnswerer::new(keye.engine()).with_thinking(args.think_mode(), args.max_tokens);
    let answerer = if uniform { answerer.with_budget_of(Loader::new(media.clone())) } else { answerer };
    let asked: &[Task] = if args.tasks.is_empty() { &Task::ALL } else { &args.tasks };
    let tasks = Task::every().filter(|task| asked.contains(task)).collect();
    let (count, split, at_once) = (args.count, args.split, usize::from(args.at_once));
    let (text_only, square, clips) = (args.text_only, args.square, args.clips.clone());
    let plan = Plan { split, tasks, count, text_only, square, clips, at_once };

    let guard = signals::guard();
    let report = keye_eval::run(&answerer, &plan, &mut |step| {
        let outcome = step.outcome;
        if args.show {
            let turn = &outcome.sample.turns[0];
            let mark = if outcome.exact { "right" } else { "wrong" };
            let cut = if outcome.answer.cut { " (cut)" } else { "" };
            status.line(&format!(
                "{} [{}] {:?} -> {:?}{cut}, {mark}: {:?}",
                outcome.sample.uuid, turn.task, turn.question, outcome.answer.text, turn.answer
            ));
        }
        status.progress(&format!("{} of {} questions", step.done, step.total));
        !guard.interrupted()
    });
    status.clear();
    match report {
        Ok(report) => print(args, &report, begin.elapsed().as_secs_f64()),
        Err(EvalError::Stopped) => Err(Interrupted.into()),
        Err(error) => Err(error.into()),
    }
}

fn print(args: &WorldArgs, report: &Report, seconds: f64) -> Result<()> {
    if !args.json {
        return ui::out(&report.table());
    }
    let frames = if args.frames == Frames::Uniform { "uniform" } else { "slow-fast" };
    let row = |row: &Row| {
        let (score, error, scores) = (row.score(), row.error(), row.scores.iter().map(|score| rounded(*score)));
        json!({
            "task": row.task, "count": row.count, "questions": row.questions, "cut": row.cut, "score": rounded(score), "error": rounded(error),
            "exact": row.exact, "chance": row.chance, "scores": scores.collect::<Vec<_>>(),
        })
    };
    let think = match args.think_mode() {
        ThinkMode::Auto => "auto",
        ThinkMode::Think => "think",
        ThinkMode::NoThink => "no_think",
    };
    let report = json!({
        "model": args.model.name(), "split": report.split, "scoring": report.scoring, "text_only": args.text_only,
        "frames": frames, "square": args.square, "think": think, "max_tokens": args.max_tokens, "cut": report.cut(),
        "seconds": rounded(seconds), "mean": rounded(report.mean()), "error": rounded(report.error()),
        "tasks": report.rows.iter().map(row).collect::<Vec<_>>(),
    });
    ui::out(&format!("{report}\n"))
}

/// To a ten-thousandth: more is noise.
fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// Of a file to be compared. Reports of older versions do not tell what was asked.
const EXPECTED: &str = "expected a report of `keye eval world --json` of this version; measure an older one again";

fn compare(args: &CompareArgs) -> Result<()> {
    let column = |path: &PathBuf| -> Result<Column> {
        let text = std::fs::read(path).with_context(|| path.display().to_string())?;
        let report: Report =
            serde_json::from_slice(&text).with_context(|| format!("{}: {EXPECTED}", path.display()))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Column { name, report })
    };
    let columns = args.reports.iter().map(column).collect::<Result<Vec<_>>>()?;
    let table = markdown(&columns)?;
    if let Some(path) = &args.svg {
        std::fs::write(path, accuracy_svg(&columns)).with_context(|| path.display().to_string())?;
    }
    match args.json {
        true => ui::out(&format!("{}\n", compared(&columns))),
        false => ui::out(&table),
    }
}

/// Every report's scores, and how much more they are than the first one's.
fn compared(columns: &[Column]) -> serde_json::Value {
    let reports = columns.iter().map(|Column { name, report }| {
        let (more, error) = columns.first().map_or((0.0, 0.0), |first| difference(&first.report, report));
        let row = |row: &Row| json!({"task": row.task, "score": rounded(row.score()), "error": rounded(row.error())});
        json!({
            "name": name, "mean": rounded(report.mean()), "error": rounded(report.error()),
            "difference": {"mean": rounded(more), "error": rounded(error)}, "cut": report.cut(),
            "tasks": report.rows.iter().map(row).collect::<Vec<_>>(),
        })
    });
    json!({"reports": reports.collect::<Vec<_>>()})
}
