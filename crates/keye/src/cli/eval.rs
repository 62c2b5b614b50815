//! `keye eval`: how well a model answers.

use anyhow::Result;
use clap::{Subcommand, ValueEnum};
use keye::Keye;
use keye_eval::{EngineAnswerer, EvalError, Plan, Report};
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

Scores are in percent: right answers; for `when` the overlap of the two times, for `reading` the letters that are right, for
captions the things named. `chance` is what guessing would score; `--text-only` is what the questions alone give away.";

/// Measure how well a model answers
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    World(Box<WorldArgs>),
}

/// Ask about short synthetic clips with exact truth, which training never shows
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
struct WorldArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Kinds of questions [default: all]
    #[arg(long, value_name = "TASKS", value_delimiter = ',')]
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
    /// Questions that are asked at the same time
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u16).range(1..=256))]
    at_once: u16,
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

/// Above every similarity: all frames are slow.
const ALL_SLOW: f64 = 2.0;

pub fn run(args: Args) -> Result<()> {
    let What::World(args) = args.what;
    let mut status = Status::new(false);
    let uniform = args.frames == Frames::Uniform;
    super::args::warn_of_device(args.model.device, &mut status);
    let keye = Keye::load_adjusted(
        args.model.chosen(&mut status),
        args.model.options(keye::Access::default()),
        &mut |progress| status.loading(progress),
        |loader| {
            if uniform {
                loader.config.video.min_frame_similarity = ALL_SLOW;
            }
        },
    )?;
    status.clear();
    let media = &keye.processor().media;
    if uniform && media.video.rule != VideoRule::SlowFast {
        return Err(Usage("--frames uniform is for models with slow and fast frames".into()).into());
    }
    let answerer = EngineAnswerer::new(keye.engine());
    let answerer = if uniform { answerer.with_budget_of(Loader::new(media.clone())) } else { answerer };
    let tasks = Task::ALL.into_iter().filter(|task| args.tasks.is_empty() || args.tasks.contains(task)).collect();
    let (count, split, at_once) = (args.count, args.split, usize::from(args.at_once));
    let plan = Plan { split, tasks, count, text_only: args.text_only, at_once };

    let guard = signals::guard();
    let report = keye_eval::run(&answerer, &plan, &mut |step| {
        let outcome = step.outcome;
        if args.show {
            let turn = &outcome.sample.turns[0];
            let mark = if outcome.exact { "right" } else { "wrong" };
            status.line(&format!(
                "{} [{}] {:?} -> {:?}, {mark}: {:?}",
                outcome.sample.uuid, turn.task, turn.question, outcome.answer, turn.answer
            ));
        }
        status.progress(&format!("{} of {} questions", step.done, step.total));
        !guard.interrupted()
    });
    status.clear();
    match report {
        Ok(report) => print(&args, &report),
        Err(EvalError::Stopped) => Err(Interrupted.into()),
        Err(error) => Err(error.into()),
    }
}

fn print(args: &WorldArgs, report: &Report) -> Result<()> {
    if !args.json {
        return ui::out(&report.table());
    }
    let frames = if args.frames == Frames::Uniform { "uniform" } else { "slow-fast" };
    let report = json!({
        "model": args.model.name(), "split": args.split.name(), "text_only": args.text_only, "frames": frames,
        "tasks": report.rows, "mean": report.mean(),
    });
    ui::out(&format!("{report:#}\n"))
}
