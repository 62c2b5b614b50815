//! A stage from its first step, or its last checkpoint, to its exported model.

use std::path::{Path, PathBuf};
use std::time::Instant;

use keye_backend::training::{Device, Precision};
use keye_processor::{Overrides, Processor};
use rayon::prelude::*;
use serde_json::Value;

use crate::checkpoint_dir::{ExportDtype, claimed, export, load_params};
use crate::metrics::{Metrics, StepMetrics};
use crate::optimizer::{Means, groups};
use crate::params::{Gradients, Params};
use crate::recipe::{Objective, Recipe, Weighting};
use crate::state::{State, check_made_by};
use crate::{Model, Pack, PackSource, TrainError, training_flops};

/// Steps in a row without a finite gradient after which a run gives up.
const LOST: u32 = 10;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done; the exported model is here.
    Done(PathBuf),
    /// It was told to stop, and can go on after this step.
    Stopped(u64),
}

/// The model that a recipe's files describe.
pub fn load_model<D: Device>(recipe: &Recipe, device: D) -> Result<Model<D>, TrainError> {
    let mut model = model_in(recipe.gather()?.path(), device, recipe.precision)?;
    model.recompute = recipe.recompute;
    Ok(model)
}

/// The model that the small files of a checkpoint directory describe.
pub fn model_of<D: Device>(dir: &Path, device: D) -> Result<Model<D>, TrainError> {
    model_in(dir, device, Precision::F32)
}

fn model_in<D: Device>(dir: &Path, device: D, precision: Precision) -> Result<Model<D>, TrainError> {
    let processor = Processor::load(dir, &Overrides::default())?;
    Model::new(&processor.config, &processor.media.processor, device, precision)
}

/// Runs a stage under `out`. Without steps left it only exports. `told` hears of every step, and as often as the recipe says of
/// the loss on `held_out`; once `stop` is true the run saves and returns. What ends it with an error loses no finished step.
///
/// # Errors
/// A stage, ended or not, of a recipe that has been changed since; data, files and models that do not fit; gradients that stay
/// infinite.
pub fn run<D: Device>(
    recipe: &Recipe,
    model: &Model<D>,
    out: &Path,
    source: &mut dyn PackSource,
    held_out: &[Pack],
    stop: &dyn Fn() -> bool,
    told: &mut dyn FnMut(&StepMetrics),
) -> Result<Outcome, TrainError> {
    let folder = out.join(&recipe.name);
    let exported = folder.join("model");
    if exported.exists() {
        check_made_by(&folder, recipe)?;
        return Ok(Outcome::Done(exported));
    }
    if let Some(start) = recipe.start.as_ref().filter(|_| !folder.exists()) {
        let from = start_dir(start, out);
        if !from.is_dir() {
            let (name, from) = (&recipe.name, from.display());
            let reason = "is not there: train that stage first, under the same folder";
            return Err(TrainError::Model(format!("{name} starts from {start}, but {from} {reason}")));
        }
    }
    let _claim = claimed(&folder)?;
    let layout = model.layout();
    let trained = recipe.trained(layout)?;
    let mut state =
        State { step: 0, params: model.init(recipe.seed), optimizer: Means::new(layout), loader: Value::Null };
    if state.resume(&folder, &trained, recipe)? {
        source.restore(&state.loader)?;
    } else {
        if let Some(start) = &recipe.start {
            load_params(model, &start_dir(start, out), &mut state.params)?;
        }
        model.add_sines(&mut state.params, recipe.sines)?;
    }
    let (saved, metrics) = (state.step, Metrics::open(&folder, state.step)?);
    let state = state.onto(model.device())?;
    let mut stage = Stage { recipe, model, folder, trained, state, saved, metrics };
    match stage.steps(source, held_out, stop, told) {
        Ok(true) => return Ok(Outcome::Stopped(stage.state.step)),
        Ok(false) => {}
        Err(error) => {
            return Err(match stage.save() {
                Ok(()) => error,
                Err(reason) => {
                    TrainError::Unsaved { error: Box::new(error), step: stage.saved, reason: Box::new(reason) }
                }
            });
        }
    }
    let params = stage.state.params.onto_host(model.device())?;
    export(model, &params, &recipe.files, &exported, ExportDtype::F32, true)?;
    Ok(Outcome::Done(exported))
}

/// A stage on its way.
struct Stage<'a, D: Device> {
    recipe: &'a Recipe,
    model: &'a Model<D>,
    folder: PathBuf,
    trained: Vec<bool>,
    /// After the last finished step, at any time.
    state: State<D::Array>,
    /// The step of the newest checkpoint.
    saved: u64,
    metrics: Metrics,
}

impl<D: Device> Stage<'_, D> {
    /// The steps that are left; true when told to stop.
    fn steps(
        &mut self,
        source: &mut dyn PackSource,
        held_out: &[Pack],
        stop: &dyn Fn() -> bool,
        told: &mut dyn FnMut(&StepMetrics),
    ) -> Result<bool, TrainError> {
        let (recipe, model, device) = (self.recipe, self.model, self.model.device());
        let groups = groups(model.layout(), recipe.optimizer, recipe.vision_lr, recipe.weight_decay);
        let mut gradients = Gradients::zeros(device, model.layout(), self.trained.clone())?;
        let schedule = recipe.schedule();
        let mut lost = 0;
        while self.state.step < recipe.steps {
            let begin = Instant::now();
            let packs = (0..recipe.accumulate).map(|_| source.next_pack()).collect::<Result<Vec<_>, _>>()?;
            let waiting = begin.elapsed().as_secs_f64();
            device.clear(&mut gradients.values)?;
            let loss = loss_of(recipe, model, &self.state.params, Some(&mut gradients), &packs)?;
            let State { step, params, optimizer, loader } = &mut self.state;
            let lr = schedule.at(*step + 1);
            let norm = optimizer.step(device, params, &gradients, &groups, lr, recipe.clip)?;
            (*step, *loader) = (*step + 1, source.state());
            let step = *step;
            let seconds = begin.elapsed().as_secs_f64();
            let measured = recipe.validation.as_ref().is_some_and(|validation| {
                !held_out.is_empty() && (step.is_multiple_of(validation.every) || step == recipe.steps)
            });
            let held_out_loss = match measured {
                true => Some(loss_of(recipe, model, &self.state.params, None, held_out)?),
                false => None,
            };
            let sum = |f: fn(&Pack) -> usize| packs.iter().map(f).sum::<usize>() as u64;
            let line = StepMetrics {
                step,
                loss,
                lr,
                gradient_norm: norm,
                tokens: sum(Pack::len),
                targets: sum(Pack::targets),
                patches: sum(|pack| pack.patches.len() / crate::PATCH_VALUES),
                seconds,
                waiting,
                held_out: held_out_loss,
                gflops: packs.iter().map(|pack| training_flops(&model.config, pack)).sum::<f64>() / seconds / 1e9,
            };
            self.metrics.add(line)?;
            told(&line);
            lost = if norm.is_finite() { 0 } else { lost + 1 };
            if lost == LOST {
                let lr = recipe.lr;
                return Err(TrainError::Model(format!(
                    "no finite gradient for {LOST} steps up to {step}; lower lr ({lr}) and start the stage again"
                )));
            }
            let stopped = stop();
            if stopped || step.is_multiple_of(recipe.checkpoint_every) || step == recipe.steps {
                self.save()?;
            }
            if stopped {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// A checkpoint of what was done since the newest.
    fn save(&mut self) -> Result<(), TrainError> {
        if self.state.step > self.saved {
            self.state.save(self.model.device(), &self.folder, &self.trained, self.recipe)?;
            self.saved = self.state.step;
            self.metrics.draw()?;
        }
        Ok(())
    }
}

/// The loss of a step of these packs, as the recipe weights it; its gradients are added up where they are wanted.
///
/// Packs are computed side by side, one in each of the device's lanes, and their gradients added in order, so that threads wait for
/// one another once a step and the sums do not depend on how many there are.
///
/// # Errors
/// Packs that do not fit the model or have nothing to learn.
pub fn loss_of<D: Device>(
    recipe: &Recipe,
    model: &Model<D>,
    params: &Params<D::Array>,
    mut gradients: Option<&mut Gradients<D::Array>>,
    packs: &[Pack],
) -> Result<f64, TrainError> {
    let weights: Vec<Vec<f32>> = packs.iter().map(|pack| weights(pack, recipe.weighting)).collect();
    let total: f64 = match recipe.objective {
        Objective::NextToken => weights.iter().flatten().map(|w| f64::from(*w)).sum(),
        Objective::Contrastive => packs.len() as f64,
    };
    if total == 0.0 {
        return Err(TrainError::Pack("no token of the step carries loss".into()));
    }
    let one = |pack: &Pack, weights: &[f32], gradients: Option<&mut Gradients<D::Array>>| match recipe.objective {
        Objective::NextToken => model.next_token(params, gradients, pack, weights, (1.0 / total) as f32),
        Objective::Contrastive => model.contrastive(params, gradients, pack, (1.0 / total) as f32),
    };
    let mut loss = 0.0;
    let device = model.device();
    let lanes = device.lanes();
    for (packs, weights) in packs.chunks(lanes).zip(weights.chunks(lanes)) {
        let like = gradients.as_deref();
        let computed = packs.par_iter().zip(weights).map(|(pack, weights)| {
            let mut part = like.map(|sums| sums.alike(device)).transpose()?;
            let sum = one(pack, weights, part.as_mut())?;
            Ok((sum, part))
        });
        for (sum, part) in computed.collect::<Result<Vec<_>, TrainError>>()? {
            loss += sum / total;
            if let (Some(gradients), Some(part)) = (gradients.as_deref_mut(), part) {
                gradients.add(device, &part)?;
            }
        }
    }
    Ok(loss)
}

/// The weight of every token, `[n]`; 0 where it carries no loss.
pub fn weights(pack: &Pack, weighting: Weighting) -> Vec<f32> {
    let mut weights: Vec<f32> = pack.loss_mask.iter().map(|m| f32::from(*m)).collect();
    for rows in pack.cu_seqlens.windows(2) {
        let sample = &mut weights[rows[0] as usize..rows[1] as usize];
        let n = sample.iter().sum::<f32>().max(1.0);
        let scale = |targets: &mut [f32], factor: f32| targets.iter_mut().for_each(|w| *w *= factor);
        match weighting {
            Weighting::Token => {}
            Weighting::Sample => scale(sample, 1.0 / n),
            Weighting::SquareRoot => scale(sample, n.powf(-0.5)),
            Weighting::Answer => {
                sample.chunk_by_mut(|a, b| a == b).for_each(|run| scale(run, (run.len() as f32).powf(-0.5)))
            }
        }
    }
    weights
}

fn start_dir(start: &str, out: &Path) -> PathBuf {
    if start.contains('/') { PathBuf::from(start) } else { out.join(start).join("model") }
}
