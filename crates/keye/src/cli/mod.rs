//! The command line: one file per command.

#[cfg(not(all(feature = "cuda", feature = "parquet")))]
mod absent;
mod args;
mod ask;
mod bench;
mod bench_context;
mod bench_context_svg;
mod bench_model;
mod bench_report;
mod chat;
mod completions;
mod each;
mod eval;
mod failure;
mod generate;
mod golden;
#[cfg(feature = "cuda")]
mod gpu_check;
mod inspect;
mod quantize;
#[cfg(feature = "serve")]
mod serve;
mod signals;
mod trace;
#[cfg(feature = "train")]
mod train;
mod ui;
#[cfg(feature = "parquet")]
mod world;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

#[cfg(not(feature = "cuda"))]
use self::absent::gpu_check;
#[cfg(not(feature = "parquet"))]
use self::absent::world;

const AFTER_HELP: &str = "\
Examples:
  keye ask --model Kwai-Keye/Keye-VL-1_5-8B clip.mp4 \"What happens in this clip?\"
  keye ask -m ./model photo.jpg chart.png \"Does the chart fit the photo?\"
  keye chat -m ./model clip.mp4
  keye serve -m ./model
  keye inspect ./model

KEYE_MODEL names the model when --model does not; bench takes --model or --preset alone. KEYE_FFMPEG and KEYE_FFPROBE name other \
programs to decode with, HF_HOME the place of downloaded models; README.md has a table of all variables.

Exit codes:
  0    done
  1    failed
  2    wrong usage
  3    the model cannot be loaded
  4    media cannot be read
  130  interrupted";

/// Understands images and short videos with the Keye-VL models, on this machine.
#[derive(Parser)]
#[command(name = "keye", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Ask(ask::Args),
    Chat(chat::Args),
    #[cfg(feature = "serve")]
    Serve(Box<serve::Args>),
    Trace(trace::Args),
    Inspect(inspect::Args),
    Quantize(quantize::Args),
    Bench(bench::Args),
    #[cfg(feature = "train")]
    Train(train::Args),
    Eval(eval::Args),
    #[cfg_attr(
        not(feature = "parquet"),
        command(hide = true, about = "Write synthetic clips and their records: for builds with Parquet")
    )]
    World(world::Args),
    #[cfg_attr(not(feature = "cuda"), command(hide = true, about = "Check an NVIDIA GPU: for builds with CUDA"))]
    GpuCheck(gpu_check::Args),
    Completions(completions::Args),
}

/// Reads the command line, does what it says, and turns errors into messages and exit codes.
pub fn main() -> ExitCode {
    signals::install();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.kind() == ErrorKind::InvalidUtf8 => return failure::report(&not_utf8().into()),
        Err(error) => error.exit(),
    };
    let result = match cli.command {
        Command::Ask(args) => ask::run(args),
        Command::Chat(args) => chat::run(args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(*args),
        Command::Trace(args) => trace::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Bench(args) => bench::run(args),
        #[cfg(feature = "train")]
        Command::Train(args) => train::run_command(args),
        Command::Eval(args) => eval::run(args),
        Command::World(args) => world::run(args),
        Command::GpuCheck(args) => gpu_check::run(&args),
        Command::Completions(args) => completions::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}

/// The parser does not say which argument it means.
fn not_utf8() -> failure::Usage {
    let arguments = std::env::args_os().enumerate().filter(|(_, argument)| argument.to_str().is_none());
    let found: Vec<String> = arguments.map(|(place, argument)| format!("{argument:?} (number {place})")).collect();
    let found = found.join(", ");
    failure::Usage(format!("expected arguments in UTF-8, found {found}; only names of files may be other bytes"))
}
