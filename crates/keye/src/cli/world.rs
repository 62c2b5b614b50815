//! `keye world`: clips with exact truth, as files.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::ValueEnum;
use keye_world::{Record, Row, RowWriter, Sample, Split, World};

use super::failure::Interrupted;
use super::signals;
use super::ui::{self, Status};

const AFTER_HELP: &str = "\
Examples:
  keye world ./clips --count 100
  keye world ./held-out --split test --kind still --count 1000

OUT/records.parquet has a row for each sample: uuid, source, messages, images, videos; the clips are in OUT/media.
A file of records that is there already is left alone.";

/// Write samples of the synthetic world: clips, and what can be asked about them
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The directory to write
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// Part of the world: train, validation or test
    #[arg(long, value_name = "SPLIT", default_value = "train")]
    split: Split,
    /// What is written
    #[arg(long, value_name = "KIND", default_value = "clip")]
    kind: Kind,
    /// Number of the first sample
    #[arg(long, value_name = "N", default_value = "0")]
    first: u64,
    /// How many
    #[arg(long, value_name = "N", default_value = "10", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    count: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// Clips with questions.
    Clip,
    /// Stills with questions.
    Still,
    /// The world in words.
    Text,
    /// Stills in words.
    Note,
    /// Stills with captions.
    Pair,
}

pub fn run(args: Args) -> Result<()> {
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let path = args.out.join("records.parquet");
    let mut rows = RowWriter::create(&path)?;
    let world = World::new(args.split);
    let sample = |index: u64| -> Sample {
        match args.kind {
            Kind::Clip => world.clip(index),
            Kind::Still => world.still(index),
            Kind::Text => world.text(index),
            Kind::Note => world.note(index),
            Kind::Pair => world.pair(index),
        }
    };
    let (mut status, guard) = (Status::new(false), signals::guard());
    for number in 0..args.count {
        if guard.interrupted() {
            return Err(Interrupted.into());
        }
        rows.push(Row::from(&Record::write(&sample(args.first.saturating_add(number)), &args.out)?))?;
        status.progress(&format!("{} of {} samples", number + 1, args.count));
    }
    status.clear();
    rows.finish()?;
    ui::out(&format!("{}\n", path.display()))
}
