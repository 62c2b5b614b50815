//! `keye gpu-check`: is this machine's GPU right, and how fast is it?

mod answers;
mod checks;
mod report;
mod timings;

use anyhow::Result;
use clap::ValueEnum;

const AFTER_HELP: &str = "\
Examples:
  keye gpu-check
  keye gpu-check --quick
  keye gpu-check --only timings --json
  CUDA_VISIBLE_DEVICES=1 keye gpu-check

Needs NVIDIA's driver and nothing else; NVRTC for chips that this program carries no kernels for; cuBLASLt is measured where it \
is found. Answers may differ from the CPU's by rounding, which is told. Exit code 0: nothing is wrong. 1: something is, or there is \
no GPU.";

/// Check an NVIDIA GPU: every operation against its definition, a model's answers, timings beside the chip's own limits
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The GPU's number
    #[arg(long, value_name = "N", default_value = "0")]
    device: usize,
    /// Each operation in a few shapes, and no timings: some seconds
    #[arg(long)]
    quick: bool,
    /// What to do [default: everything]
    #[arg(long, value_name = "PARTS", value_delimiter = ',')]
    only: Vec<Part>,
    /// Print the report as json
    #[arg(long)]
    json: bool,
    /// Instead of a GPU the kernels compiled for the CPU
    #[cfg(feature = "cuda-emulator")]
    #[arg(long, hide = true)]
    emulated: bool,
}

/// What there is to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Every operation in a few shapes, each launch waited for: an error names its kernel
    Small,
    /// The whole conformance suite
    Suite,
    /// Every operation of training beside plain formulas
    Training,
    /// cuBLASLt beside our own products
    Library,
    /// keye-nano's answers on the GPU and on the CPU
    Answers,
    /// Products and attention beside the memory's bandwidth and cuBLASLt
    Timings,
}

impl Args {
    fn wants(&self, part: Part) -> bool {
        match self.only.is_empty() {
            true => !self.quick || matches!(part, Part::Small | Part::Library | Part::Answers),
            false => self.only.contains(&part),
        }
    }

    /// Whether the kernels run on the CPU.
    fn emulated(&self) -> bool {
        #[cfg(feature = "cuda-emulator")]
        return self.emulated;
        #[cfg(not(feature = "cuda-emulator"))]
        false
    }
}

pub fn run(args: &Args) -> Result<()> {
    let mut report = report::Report::default();
    let done = work(args, &mut report);
    if let Err(error) = &done {
        report.error = Some(super::failure::message(error));
    }
    if args.json {
        super::ui::out(&format!("{:#}\n", report.json()))?;
    }
    // Named in the report as well, since what came before it is worth knowing.
    done?;
    match report.passed() {
        true => Ok(()),
        false => anyhow::bail!("this GPU does not compute as it should: do not use --device cuda on it"),
    }
}

const ON_THE_CPU: &str = "the kernels are on the CPU";

/// All parts in order. The first error of the device ends it: what follows would fail with it.
fn work(args: &Args, report: &mut report::Report) -> Result<()> {
    let show = |text: &str| if args.json { Ok(()) } else { super::ui::out(text) };
    let device = checks::Device { number: args.device, emulated: args.emulated() };
    report.device = Some(checks::look(device)?);
    show(&report.head())?;
    for part in Part::value_variants().iter().copied().filter(|part| args.wants(*part)) {
        match part {
            Part::Small => checks::suite(device, true, &mut |check| report.add(check, show))?,
            Part::Suite => checks::suite(device, false, &mut |check| report.add(check, show))?,
            Part::Training => checks::training(device, &mut |check| report.add(check, show))?,
            Part::Library => match checks::library(device)? {
                Ok(check) => report.add(check, show)?,
                Err(reason) => report.skip("cuBLASLt", reason, show)?,
            },
            Part::Answers if args.emulated() => report.skip("answers", ON_THE_CPU.into(), show)?,
            Part::Answers => match answers::compare(args.device)? {
                Some(check) => report.add(check, show)?,
                None => report.skip(
                    "answers",
                    "this program has no model inside: build with --features nano".into(),
                    show,
                )?,
            },
            Part::Timings if args.emulated() => report.skip("timings", ON_THE_CPU.into(), show)?,
            Part::Timings => timings::measure(args.device, &mut |timing| report.time(timing, show))?,
        }
    }
    show(&report.foot())
}
