//! `keye bench`: measuring without a download.

use std::path::PathBuf;

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use keye::presets::Preset;
use keye::random_checkpoint;
use keye_processor::Dtype;

use super::failure::{Interrupted, Usage};
use super::signals;
use super::ui::{self, Status};

const AFTER_HELP: &str = "\
Examples:
  keye bench --write-checkpoint /tmp/keye-8b --preset keye-vl-1.5-8b
  keye bench --write-checkpoint /tmp/tiny --preset keye-tiny --dtype f32
  keye ask -m /tmp/tiny photo.jpg \"What is this?\" --max-tokens 32
  keye inspect /tmp/keye-8b";

/// Write checkpoints with random weights, of the size and speed of the real ones
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The new directory
    #[arg(long, value_name = "DIR", required = true)]
    write_checkpoint: PathBuf,
    /// Which model
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(Preset::ALL.map(Preset::name)))]
    preset: String,
    /// Type of the weights
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = ["bf16", "f16", "f32"])]
    dtype: String,
    /// Same seed, same weights
    #[arg(long, default_value = "0")]
    seed: u64,
}

pub fn run(args: Args) -> Result<()> {
    let preset = Preset::from_name(&args.preset).ok_or_else(|| Usage(format!("{} is no preset", args.preset)))?;
    let dtype = match args.dtype.as_str() {
        "f32" => Dtype::F32,
        "f16" => Dtype::F16,
        _ => Dtype::Bf16,
    };
    let mut status = Status::new(false);
    let dir = &args.write_checkpoint;
    let guard = signals::guard();
    let written = random_checkpoint::write(dir, preset, dtype, args.seed, &mut |done, total| {
        let percent = 100.0 * done as f64 / total.max(1) as f64;
        let (done, total) = (ui::bytes(done), ui::bytes(total));
        status.progress(&format!("writing {}: {done} of {total} ({percent:.0}%)", dir.display()));
        !guard.interrupted()
    });
    if guard.interrupted() && written.is_err() {
        return Err(Interrupted.into());
    }
    written?;
    status.line(&format!("{} with random {} weights (seed {}): {}", args.preset, args.dtype, args.seed, dir.display()));
    Ok(())
}
