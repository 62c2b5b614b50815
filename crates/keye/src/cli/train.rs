//! `keye train`: stages of the training recipe, averages and exports.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use keye::Device;
use keye_backend::Isa;
use keye_backend::training;
use keye_processor::{Overrides, Processor};
use keye_train::data::{DataConfig, Stream, held_out};
use keye_train::{
    Cpu, ExportDtype, Model, Outcome, Params, Recipe, StepMetrics, average, export, load_model, load_params, loss_of,
    model_of, run,
};
use serde_json::json;

use super::failure::{Interrupted, Usage};
use super::signals;
use super::ui::{self, Status};

const AFTER_HELP: &str = "\
Examples:
  keye train run recipes/keye-nano/*.toml --out runs/nano
  keye train run recipes/keye-nano/07-multitask.toml --out runs/nano
  keye train average runs/mean runs/nano/anneal/model runs/other/anneal/model
  keye train average runs/nano/mean runs/nano/sft-[34]/model --measure recipes/keye-nano/16-sft-3.toml
  keye train export runs/nano/mean ./keye-nano
  keye train export runs/nano/multitask/step-00000400 ./half-way
  keye ask -m ./keye-nano clip.mp4 \"What happens?\"

A run that was stopped, by Ctrl-C or by a kill, goes on from its last checkpoint when the same command is given again.";

/// Train a model by a recipe, on this machine's cores
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Run stages, one after the other; those that are done are left alone
    Run(RunArgs),
    /// The mean of several models' weights, as 32-bit floats
    Average {
        /// The new directory
        #[arg(value_name = "NEW_DIR")]
        out: PathBuf,
        /// Models of one config, tokenizer and preprocessor config
        #[arg(value_name = "DIR", required = true)]
        models: Vec<PathBuf>,
        /// Measure the loss of each on this recipe's held-out data; write the mean only if its own is the lowest
        #[arg(long, value_name = "RECIPE.toml")]
        measure: Option<PathBuf>,
        /// Print what was measured as json
        #[arg(long)]
        json: bool,
    },
    /// A model in 16-bit floats without what only training uses
    Export {
        /// A stage's model, or a checkpoint from the middle of a stage (`step-N`)
        #[arg(value_name = "DIR")]
        model: PathBuf,
        /// The new directory
        #[arg(value_name = "NEW_DIR")]
        out: PathBuf,
    },
}

#[derive(clap::Args)]
struct RunArgs {
    /// Recipes, in order
    #[arg(value_name = "RECIPE.toml", required = true)]
    recipes: Vec<PathBuf>,
    /// Where checkpoints, metrics and models are written, a folder a stage
    #[arg(short, long, value_name = "DIR", default_value = "runs")]
    out: PathBuf,
    /// Only this stage of the recipes
    #[arg(long, value_name = "NAME")]
    stage: Option<String>,
    /// Threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// What computes: cpu, cuda (the first GPU) or cuda:N. A run can go on on another device
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Device,
}

pub fn run_command(args: Args) -> Result<()> {
    match args.command {
        Command::Run(args) => run_stages(&args),
        Command::Average { out, models, measure, json } => {
            absent(&out)?;
            let model = model_of(&models[0], cpu()?)?;
            let mean = average(&model, &models, &model.init(0))?;
            let losses = measure.map(|recipe| held_out_losses(&recipe, &model, &models, &mean.params)).transpose()?;
            let lowest = losses.iter().flat_map(|losses| &losses.models).copied().fold(f64::INFINITY, f64::min);
            let better = losses.as_ref().is_none_or(|losses| losses.mean < lowest);
            if better {
                export(&model, &mean.params, &models[..1], &out, ExportDtype::F32, mean.extras)?;
            }
            if json {
                let of = |losses: &Losses| losses.models.iter().map(|loss| Some(*loss)).collect();
                let of_models = losses.as_ref().map_or_else(|| vec![None; models.len()], of);
                let measured = models.iter().zip(of_models);
                let measured: Vec<_> = measured.map(|(dir, loss)| json!({"model": dir, "held_out": loss})).collect();
                let mean = losses.as_ref().map(|losses| losses.mean);
                let report = json!({"model": out, "written": better, "held_out": mean, "models": measured});
                ui::out(&format!("{report}\n"))?;
            }
            match losses {
                Some(Losses { mean, .. }) if !better => bail!(
                    "the mean's held-out loss, {mean:.4}, is not below the best model's, {lowest:.4}: nothing is written"
                ),
                _ if json => Ok(()),
                _ => ui::out(&format!("{}\n", out.display())),
            }
        }
        Command::Export { model: dir, out } => {
            absent(&out)?;
            let model = model_of(&dir, cpu()?)?;
            let mut params = model.init(0);
            load_params(&model, &dir, &mut params)?;
            export(&model, &params, &[dir], &out, ExportDtype::Bf16, false)?;
            ui::out(&format!("{}\n", out.display()))
        }
    }
}

fn cpu() -> Result<Cpu> {
    Ok(Cpu { isa: Isa::from_env()? })
}

/// A directory that is to be made: told before the work that fills it.
fn absent(out: &Path) -> Result<()> {
    keye::check_new_dir(out).map_err(|error| Usage(error.to_string()).into())
}

/// Of models and their mean, on the same packs.
struct Losses {
    models: Vec<f64>,
    mean: f64,
}

fn held_out_losses(path: &Path, model: &Model, models: &[PathBuf], mean: &Params) -> Result<Losses> {
    let recipe = Recipe::load(path)?;
    let files = recipe.gather()?;
    let processor = Arc::new(Processor::load(files.path(), &Overrides::default())?);
    let packs = held_out(&recipe, &processor)?;
    if packs.is_empty() {
        return Err(Usage(format!("--measure {}: the recipe has no [validation]", path.display())).into());
    }
    let status = &mut Status::new(false);
    let mut losses = Vec::with_capacity(models.len());
    for dir in models {
        let mut params = model.init(0);
        load_params(model, dir, &mut params)?;
        let loss = loss_of(&recipe, model, &params, None, &packs)?;
        status.line(&format!("{}: held-out loss {loss:.4}", dir.display()));
        losses.push(loss);
    }
    let mean = loss_of(&recipe, model, mean, None, &packs)?;
    status.line(&format!("mean: held-out loss {mean:.4}"));
    Ok(Losses { models: losses, mean })
}

fn run_stages(args: &RunArgs) -> Result<()> {
    let recipes = args.recipes.iter().map(|path| Recipe::load(path)).collect::<Result<Vec<_>, _>>()?;
    let wanted = |recipe: &&Recipe| args.stage.as_ref().is_none_or(|stage| *stage == recipe.name);
    let names: Vec<&str> = recipes.iter().map(|recipe| recipe.name.as_str()).collect();
    if let Some(stage) = args.stage.as_ref().filter(|stage| !names.contains(&stage.as_str())) {
        return Err(Usage(format!("--stage {stage}: the recipes are {}", names.join(", "))).into());
    }
    let mut pool = rayon::ThreadPoolBuilder::new();
    if let Some(threads) = args.threads {
        pool = pool.num_threads(threads.into());
    }
    let pool = pool.build().context("cannot start threads")?;
    super::args::warn_of_device(args.device, &mut Status::new(false));
    let device = Opened::open(args.device)?;
    let guard = signals::guard();
    for recipe in recipes.iter().filter(wanted) {
        match pool.install(|| stage(&device, recipe, args, &guard))? {
            Outcome::Done(model) => ui::out(&format!("{}\n", model.display()))?,
            Outcome::Stopped(step) => {
                let name = &recipe.name;
                Status::new(false).line(&format!("{name}: saved after step {step}; the same command goes on"));
                return Err(Interrupted.into());
            }
        }
    }
    Ok(())
}

/// A step allocates and frees hundreds of arrays of megabytes. Left alone, the C library maps and returns each, and a sixth of
/// the time goes into fresh pages.
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only changes thresholds.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

/// What computes; a GPU is opened once for all stages.
enum Opened {
    Cpu(Cpu),
    #[cfg(feature = "cuda")]
    Cuda(keye_backend::Cuda),
}

impl Opened {
    fn open(device: Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Cpu(cpu()?)),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => {
                use keye_backend::{Cuda, CudaOptions};
                Ok(Self::Cuda(Cuda::new(CudaOptions { device: number, ..CudaOptions::default() })?))
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => {
                Err(Usage("--device cuda: this build has no CUDA: build with --features cuda".into()).into())
            }
        }
    }
}

fn stage(device: &Opened, recipe: &Recipe, args: &RunArgs, guard: &signals::Guard) -> Result<Outcome> {
    keep_freed_memory();
    match device {
        Opened::Cpu(cpu) => stage_on(*cpu, recipe, args, guard),
        #[cfg(feature = "cuda")]
        Opened::Cuda(cuda) => stage_on(cuda.clone(), recipe, args, guard),
    }
}

fn stage_on<D: training::Device>(
    device: D,
    recipe: &Recipe,
    args: &RunArgs,
    guard: &signals::Guard,
) -> Result<Outcome> {
    let data = DataConfig::from_table(&recipe.data).with_context(|| recipe.name.clone())?.beside(&recipe.folder);
    let files = recipe.gather()?;
    let processor = Arc::new(Processor::load(files.path(), &Overrides::default())?);
    let model = load_model(recipe, device)?;
    let validation = held_out(recipe, &processor).with_context(|| format!("{}: validation", recipe.name))?;
    let status = Rc::new(RefCell::new(Status::new(false)));
    let (name, log) = (recipe.name.clone(), Rc::clone(&status));
    let left_out = move |reason: &str| log.borrow_mut().line(&format!("{name}: left out: {reason}"));
    let mut source = Stream::new(data, processor)?.telling(left_out);
    let parameters = model.layout().len() as u64;
    status.borrow_mut().line(&format!(
        "{}: {} parameters, {} steps",
        recipe.name,
        ui::grouped(parameters),
        recipe.steps
    ));
    let progress = RefCell::new(Progress::new(recipe.steps));
    let outcome = run(recipe, &model, &args.out, &mut source, &validation, &|| guard.interrupted(), &mut |line| {
        if let Some(text) = progress.borrow_mut().add(line) {
            status.borrow_mut().progress(&format!("{}: {text}", recipe.name));
        }
    });
    status.borrow_mut().clear();
    Ok(outcome?)
}

/// Means over the last while, so that the line can be read.
struct Progress {
    steps: u64,
    recent: Vec<StepMetrics>,
    /// The newest loss on held-out data.
    held_out: Option<f64>,
    shown: Instant,
}

const REDRAW: Duration = Duration::from_millis(500);
/// Steps of a mean.
const RECENT: usize = 20;

impl Progress {
    fn new(steps: u64) -> Self {
        Self { steps, recent: Vec::new(), held_out: None, shown: Instant::now() }
    }

    fn add(&mut self, line: &StepMetrics) -> Option<String> {
        if self.recent.len() == RECENT {
            self.recent.remove(0);
        }
        self.recent.push(*line);
        self.held_out = line.held_out.or(self.held_out);
        if self.shown.elapsed() < REDRAW && line.step != self.steps {
            return None;
        }
        self.shown = Instant::now();
        let n = self.recent.len() as f64;
        let mean = |f: fn(&StepMetrics) -> f64| self.recent.iter().map(f).sum::<f64>() / n;
        let seconds = mean(|l| l.seconds);
        let left = seconds * self.steps.saturating_sub(line.step) as f64;
        Some(format!(
            "step {}/{}, loss {:.3}{}, {:.0} tokens/s, {:.0} GFLOP/s, {:.0}% waiting for data, {} left",
            line.step,
            self.steps,
            mean(|l| l.loss),
            self.held_out.map_or_else(String::new, |loss| format!(" (held out {loss:.3})")),
            mean(|l| l.tokens as f64) / seconds,
            mean(|l| l.gflops * l.seconds) / seconds,
            100.0 * mean(|l| l.waiting) / seconds,
            duration(left)
        ))
    }
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
