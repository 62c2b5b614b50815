//! `keye quantize`: a model in int8 or int4.

use std::path::PathBuf;

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use keye::quantize::{Report, quantize};
use keye_processor::PackedFormat;
use serde_json::json;

use super::args::check_new_dir;
use super::failure::{Interrupted, Usage};
use super::signals;
use super::ui::{self, Status};

const AFTER_HELP: &str = "\
Examples:
  keye quantize Kwai-Keye/Keye-VL-1_5-8B --to int4 -o ./keye-int4
  keye quantize ./model --to int8 -o ./model-int8 --json
  keye ask -m ./keye-int4 clip.mp4 \"What happens in this clip?\"";

/// Write a model in int8 (half the size) or int4 (about a third), ready to be mapped
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Checkpoint directory, hub id, or keye-nano
    #[arg(value_name = "DIR|HUB_ID")]
    model: String,
    /// Format of the language model's matrices; vision tower and projector are int10 or int12
    #[arg(long, value_name = "FORMAT", value_parser = PossibleValuesParser::new(["int4", "int8"]))]
    to: String,
    /// The new directory
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Use downloaded models only, never the network
    #[arg(long)]
    offline: bool,
    /// Print the report as json
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let to = PackedFormat::from_name(&args.to).ok_or_else(|| Usage(format!("{} is no format", args.to)))?;
    // A model may have to be downloaded first.
    check_new_dir("--output", &args.output)?;
    let mut status = Status::new(false);
    let from = keye::resolve_model(&args.model, args.offline, &mut |progress| status.loading(progress))?;
    let guard = signals::guard();
    let result = quantize(from, to, &args.output, &mut |done, total| {
        let percent = 100.0 * done as f64 / total.max(1) as f64;
        status.progress(&format!("quantising to {to}: {percent:.0}% of {} weights", ui::grouped(total)));
        !guard.interrupted()
    });
    if guard.interrupted() && result.is_err() {
        return Err(Interrupted.into());
    }
    let report = result?;
    status.clear();
    match args.json {
        true => ui::out(&format!("{:#}\n", json!({"directory": args.output, "format": to.name(), "report": report}))),
        false => ui::out(&table(&args, &report)),
    }
}

fn table(args: &Args, report: &Report) -> String {
    let mut text = format!("{:<10} {:>8} {:>16} {:>10} {:>7} {:>10}\n", "", "", "weights", "", "bits", "error");
    for role in &report.roles {
        let name = json!(role.role).as_str().unwrap_or_default().replace('_', " ");
        let bits = 8.0 * role.bytes as f64 / role.weights.max(1) as f64;
        let error = match role.relative_rms_error {
            0.0 => "-".to_owned(),
            error => format!("{:.2} %", 100.0 * error),
        };
        let (weights, bytes) = (ui::grouped(role.weights), ui::bytes(role.bytes));
        text += &format!("{name:<10} {:>8} {weights:>16} {bytes:>10} {bits:>7.2} {error:>10}\n", role.format);
    }
    let (weights, bytes) = (ui::grouped(report.weights), ui::bytes(report.bytes));
    text += &format!("{:<10} {:>8} {weights:>16} {bytes:>10} {:>7.2}\n", "all", "", report.bits_per_weight);
    if report.left_out > 0 {
        text += &format!("{} tensors that inference does not use are left out\n", report.left_out);
    }
    text + &format!("{}\n", args.output.display())
}
