//! `keye bench`: how fast this machine runs a model, without a download.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::ValueEnum;
use clap::builder::PossibleValuesParser;
use keye::presets::{Preset, Sizes};
use keye::random_checkpoint;
use keye::{Device, DeviceOptions, KvDtype};
use keye_processor::{Dtype, PackedFormat};

use super::args::{KvCache, check_new_dir, check_output};
use super::bench_model::{Model, measure};
use super::failure::{Interrupted, Usage};
use super::signals;
use super::ui::{self, Status};

const AFTER_HELP: &str = "\
Examples:
  keye bench --preset keye-vl-1.5-8b --quant int4
  keye bench --preset keye-vl-8b --quant int8 --only prefill,decode --json
  keye bench --model ./model --only start,decode --contexts 128,32768
  keye bench --preset keye-vl-2 --layers 12 --only decode
  keye bench --preset keye-vl-2 --context-curve --kv-cache bf16 --svg curve.svg
  keye bench --write-checkpoint /tmp/keye-8b --preset keye-vl-1.5-8b --quant int4
  keye bench --write-checkpoint /tmp/tiny --preset keye-tiny --dtype f32

Fractions: decode's is of the memory reads measured in the same run (weights and cache that a token reads), the others' \
of the int8 multiply-adds (f32 on a machine without).";

/// Measure speed beside the machine's limits, on random weights of the real sizes; or write such weights
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP, group = clap::ArgGroup::new("measured").args(["preset", "model"]).required(true))]
pub struct Args {
    /// Which model's sizes
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(Preset::ALL.map(Preset::name)))]
    preset: Option<String>,
    /// Measure this checkpoint instead of random weights: a directory, a hub id, or keye-nano
    #[arg(short, long, value_name = "DIR|HUB_ID", conflicts_with_all = ["quant", "dtype", "write_checkpoint"])]
    model: Option<String>,
    /// Format of the weights, as `keye quantize` writes them [default: int4 to measure]
    #[arg(long, value_name = "FORMAT", value_parser = ["int4", "int8", "bf16"])]
    quant: Option<String>,
    /// Only the first N layers of the preset's decoder, for machines that have no room for all
    #[arg(long, value_name = "N", requires = "preset", value_parser = clap::value_parser!(u16).range(1..))]
    layers: Option<u16>,
    /// Only what attention costs a token behind 1K to 256K others, sparse and dense
    #[arg(long, requires = "preset", conflicts_with_all = ["only", "quant", "write_checkpoint", "layers", "dir", "tp"])]
    context_curve: bool,
    /// The context curve as a picture too
    #[arg(long, value_name = "FILE.svg", requires = "context_curve")]
    svg: Option<PathBuf>,
    /// What to measure [default: everything]
    #[arg(long, value_name = "PARTS", value_delimiter = ',', conflicts_with = "write_checkpoint")]
    only: Vec<Part>,
    /// Tokens of the prompts to prefill
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "512,2048", value_parser = clap::value_parser!(u32).range(1..=131_072))]
    prompts: Vec<u32>,
    /// Tokens behind which to decode
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "128,4096", value_parser = clap::value_parser!(u32).range(1..=131_072))]
    contexts: Vec<u32>,
    /// What computes: cpu, cuda (the first GPU) or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Device,
    /// Threads of the CPU [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Divide the decoder among N ranks (tensor parallelism, docs/parallel.md), each with its part of the threads
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=16))]
    tp: u16,
    /// The best of this many runs counts
    #[arg(long, value_name = "N", default_value = "2", value_parser = clap::value_parser!(u16).range(1..))]
    repeat: u16,
    /// Element type of the KV cache
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    kv_cache: KvCache,
    /// Where the random weights are for as long as they are loaded [default: memory (/dev/shm) if they fit, else $TMPDIR]
    #[arg(long, value_name = "DIR", conflicts_with = "write_checkpoint")]
    dir: Option<PathBuf>,
    /// Print the figures as json
    #[arg(long, conflicts_with = "write_checkpoint")]
    json: bool,
    /// Only write the random weights, as this new directory
    #[arg(long, value_name = "DIR")]
    write_checkpoint: Option<PathBuf>,
    /// Type of the weights that are written; fp8 is 671B's
    #[arg(long, value_name = "TYPE", value_parser = ["bf16", "f16", "f32", "fp8"], requires = "write_checkpoint", conflicts_with = "quant")]
    dtype: Option<String>,
    /// Same seed, same weights
    #[arg(long, default_value = "0")]
    seed: u64,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Loading, and the first token of a prompt of 16.
    Start,
    /// Prompts, in the engine's pieces.
    Prefill,
    /// Single tokens behind others.
    Decode,
    /// 1024 and 4096 patches.
    Vision,
    /// A clip to patches, beside ffmpeg alone.
    Media,
}

impl Part {
    const ALL: [Self; 5] = [Self::Start, Self::Prefill, Self::Decode, Self::Vision, Self::Media];
}

/// What to measure, and how.
pub struct Plan {
    pub parts: Vec<Part>,
    /// Tokens of the prompts.
    pub prompts: Vec<usize>,
    /// Tokens behind which single ones are decoded.
    pub contexts: Vec<usize>,
    /// What computes.
    pub device: DeviceOptions,
    pub threads: usize,
    pub repeat: usize,
    pub kv_dtype: KvDtype,
}

/// How weights are stored.
#[derive(Clone, Copy)]
enum Weights {
    Plain(Dtype),
    Packed(PackedFormat),
}

pub fn run(args: Args) -> Result<()> {
    let preset = match &args.preset {
        Some(name) => {
            let preset = Preset::from_name(name).ok_or_else(|| Usage(format!("{name} is no preset")))?;
            let sizes = Sizes { layers: args.layers.map(usize::from), preset };
            if sizes.layers.is_some_and(|layers| layers > sizes.all_layers()) {
                return Err(Usage(format!("--layers: {name} has {} layers", sizes.all_layers())).into());
            }
            Some(sizes)
        }
        None => None,
    };
    let weights = match (args.quant.as_deref(), args.dtype.as_deref(), &args.write_checkpoint) {
        (Some("int8"), ..) => Weights::Packed(PackedFormat::Int8),
        (Some("int4"), ..) | (None, None, None) => Weights::Packed(PackedFormat::Int4),
        (_, Some("f32"), _) => Weights::Plain(Dtype::F32),
        (_, Some("fp8"), _) => Weights::Plain(Dtype::F8E4M3),
        (_, Some("f16"), _) => Weights::Plain(Dtype::F16),
        _ => Weights::Plain(Dtype::Bf16),
    };
    let mut status = Status::new(false);
    let guard = signals::guard();
    if let (true, Some(sizes)) = (args.context_curve, preset) {
        if args.device != Device::Cpu {
            return Err(Usage("--context-curve measures the CPU: leave --device out".into()).into());
        }
        args.svg.as_deref().map_or(Ok(()), check_output)?;
        let config = sizes.model_config(Dtype::Bf16)?;
        let threads = args.threads.map(usize::from);
        let curve = super::bench_context::measure(&config, threads, args.kv_cache.dtype(), &mut status, &|| {
            guard.interrupted()
        });
        let curve = match curve {
            Err(_) if guard.interrupted() => return Err(Interrupted.into()),
            curve => curve?,
        };
        if let Some(path) = &args.svg {
            let picture = super::bench_context_svg::svg(&curve);
            std::fs::write(path, picture).with_context(|| format!("cannot write {}", path.display()))?;
        }
        return ui::out(&if args.json { format!("{:#}\n", curve.json()) } else { curve.text() });
    }
    let result = match (&args.write_checkpoint, preset) {
        (Some(dir), Some(preset)) => {
            check_new_dir("--write-checkpoint", dir)?;
            let written = write(dir, preset, weights, args.seed, &guard, &mut status);
            written.map(|()| {
                status.line(&format!(
                    "{} with random weights (seed {}): {}",
                    preset.preset.name(),
                    args.seed,
                    dir.display()
                ))
            })
        }
        _ => bench(&args, preset, weights, &guard, &mut status),
    };
    match result {
        Err(_) if guard.interrupted() => Err(Interrupted.into()),
        result => result,
    }
}

fn write(
    dir: &std::path::Path,
    preset: Sizes,
    weights: Weights,
    seed: u64,
    guard: &signals::Guard,
    status: &mut Status,
) -> Result<()> {
    let progress = &mut |done: u64, total: u64| {
        let percent = 100.0 * done as f64 / total.max(1) as f64;
        let (done, total) = (ui::bytes(done), ui::bytes(total));
        status.progress(&format!("writing {}: {done} of {total} ({percent:.0}%)", dir.display()));
        !guard.interrupted()
    };
    match weights {
        Weights::Plain(dtype) => random_checkpoint::write(dir, preset, dtype, seed, progress),
        Weights::Packed(to) => random_checkpoint::write_packed(dir, preset, to, seed, progress),
    }
}

fn bench(
    args: &Args,
    preset: Option<Sizes>,
    weights: Weights,
    guard: &signals::Guard,
    status: &mut Status,
) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    super::args::warn_of_device(args.device, status);
    let plan = Plan {
        device: DeviceOptions {
            device: args.device,
            threads: Some(args.threads.map_or(cores, usize::from)),
            ranks: args.tp.into(),
            ..DeviceOptions::default()
        },
        parts: if args.only.is_empty() { Part::ALL.to_vec() } else { args.only.clone() },
        prompts: args.prompts.iter().map(|n| *n as usize).collect(),
        contexts: args.contexts.iter().map(|n| *n as usize).collect(),
        threads: args.threads.map_or(cores, usize::from),
        repeat: usize::from(args.repeat),
        kv_dtype: args.kv_cache.dtype(),
    };
    let mut model = match (preset, &args.model) {
        (Some(preset), _) => {
            let bytes = random_checkpoint::total_bytes(preset, packed(weights))?;
            let model = Model::temporary(&title(preset), &format_name(weights), args.dir.as_deref(), bytes)?;
            write(model.dir(), preset, weights, args.seed, guard, status)?;
            model
        }
        (None, Some(name)) => Model::stored(name, status)?,
        (None, None) => return Err(Usage("--preset or --model says what to measure".into()).into()),
    };
    let report = measure(&mut model, &plan, &|| guard.interrupted(), status)?;
    status.clear();
    match args.json {
        true => ui::out(&format!("{:#}\n", report.json())),
        false => ui::out(&report.text()),
    }
}

/// The preset's name, and how much of it there is.
fn title(sizes: Sizes) -> String {
    let name = sizes.preset.name();
    sizes.layers.map_or_else(|| name.to_owned(), |n| format!("{name}, {n} of {} layers", sizes.all_layers()))
}

fn packed(weights: Weights) -> Option<PackedFormat> {
    match weights {
        Weights::Packed(format) => Some(format),
        Weights::Plain(_) => None,
    }
}

fn format_name(weights: Weights) -> String {
    match weights {
        Weights::Packed(format) => format.name().to_owned(),
        Weights::Plain(dtype) => dtype.name().to_lowercase(),
    }
}
