//! What a stage does, as a TOML file says it.

use std::fs;
use std::path::{Path, PathBuf};

use keye_backend::training::Precision;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint_dir::io;
use crate::small_files::gather;
use crate::{Layout, Optimizer, Schedule, TrainError};

/// How a recipe spells a [`Precision`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "Precision", rename_all = "lowercase")]
enum PrecisionName {
    F32,
    Bf16,
}

/// What is learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// To predict the next token of answers.
    NextToken,
    /// To match images and texts (SigLIP's sigmoid loss).
    Contrastive,
}

/// How much a target counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weighting {
    /// All targets alike.
    #[default]
    Token,
    /// All samples alike: `1/n` for each of a sample's n targets.
    Sample,
    /// Between both: `1/sqrt(n)`.
    SquareRoot,
    /// The same for every answer of a conversation: otherwise a dense caption of 100 tokens outweighs all short answers about
    /// its clip.
    Answer,
}

/// When the loss on held-out data is measured, and on which.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Validation {
    /// Steps from one measurement to the next.
    pub every: u64,
    /// Packs; the same ones each time.
    pub packs: usize,
    /// Held-out data; without, the world's part of the recipe's data, of the split `validation`.
    pub data: Option<toml::Table>,
}

/// A stage. Paths are relative to the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Names the stage's folder under the output.
    pub name: String,
    /// What is learnt.
    pub objective: Objective,
    /// Folders with the small files of the exported directory: config.json, tokenizer, chat template, preprocessor and
    /// generation config.
    pub files: Vec<PathBuf>,
    /// The stage (its name) or the checkpoint directory (a path with a slash) to start from; random values without.
    pub start: Option<String>,
    /// Amplitude of sines and cosines of row and column that are added to the tower's position embeddings before the first step:
    /// a tower begun from nothing has hardly learnt where its patches are.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub sines: f32,
    /// Tensors whose names begin with one of these are trained, all others are frozen.
    pub trained: Vec<String>,
    /// The random values of a stage without `start` follow from it. The order of the data is `seed` under `[data]`.
    #[serde(default)]
    pub seed: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Steps of rising learning rate.
    pub warmup: u64,
    /// Highest learning rate.
    pub lr: f64,
    /// Last learning rate.
    pub min_lr: f64,
    /// Factor of the learning rate for the vision tower.
    #[serde(default = "vision_lr")]
    pub vision_lr: f32,
    /// Decay of matrices.
    #[serde(default = "weight_decay")]
    pub weight_decay: f32,
    /// How gradients become steps.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// What the operands of products with weights are rounded to.
    #[serde(default, with = "PrecisionName")]
    pub precision: Precision,
    /// Largest global norm of the gradient.
    #[serde(default = "clip")]
    pub clip: f64,
    /// Packs of a step.
    #[serde(default = "accumulate")]
    pub accumulate: usize,
    /// How much a target counts.
    #[serde(default)]
    pub weighting: Weighting,
    /// Compute layers again in the reverse instead of keeping all that they computed.
    #[serde(default)]
    pub recompute: bool,
    /// Steps between checkpoints.
    #[serde(default = "checkpoint_every")]
    pub checkpoint_every: u64,
    /// Held-out loss, in the metrics; without, it is not measured.
    pub validation: Option<Validation>,
    /// What the loader is told.
    pub data: toml::Table,
    /// Where the file lies.
    #[serde(skip)]
    pub folder: PathBuf,
}

fn is_zero(value: &f32) -> bool {
    *value == 0.0
}

fn vision_lr() -> f32 {
    0.1
}

fn weight_decay() -> f32 {
    0.1
}

fn clip() -> f64 {
    1.0
}

fn accumulate() -> usize {
    1
}

fn checkpoint_every() -> u64 {
    200
}

impl Recipe {
    /// Reads and checks a recipe; its paths become relative to the current directory.
    pub fn load(path: &Path) -> Result<Self, TrainError> {
        let text = fs::read_to_string(path).map_err(io(path))?;
        let wrong = |reason: String| TrainError::Recipe { path: path.to_owned(), reason };
        let mut recipe: Self = toml::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        recipe.folder = folder.to_owned();
        recipe.files.iter_mut().for_each(|file| *file = folder.join(&*file));
        if let Some(start) = recipe.start.as_mut().filter(|start| start.contains('/')) {
            *start = folder.join(&*start).to_string_lossy().into_owned();
            if !start.contains('/') {
                start.insert_str(0, "./");
            }
        }
        recipe.check().map_err(wrong)?;
        Ok(recipe)
    }

    fn check(&self) -> Result<(), String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if self.name.is_empty() || !self.name.chars().all(plain) {
            return Err(format!("name: expected letters, digits, - and _, found {:?}", self.name));
        }
        if self.files.is_empty() {
            return Err("files: expected at least the folder of config.json".into());
        }
        if self.steps == 0 || self.warmup >= self.steps {
            return Err(format!(
                "steps and warmup: expected 0 <= warmup < steps, found {} and {}",
                self.warmup, self.steps
            ));
        }
        if self.accumulate == 0 || self.checkpoint_every == 0 {
            return Err("accumulate and checkpoint_every: expected 1 or more".into());
        }
        if self.validation.as_ref().is_some_and(|validation| validation.every == 0 || validation.packs == 0) {
            return Err("validation: expected every and packs of 1 or more".into());
        }
        let positive = |v: f64| v.is_finite() && v > 0.0;
        if !positive(self.lr) || !positive(self.clip) || !(0.0..=self.lr).contains(&self.min_lr) {
            return Err("lr, min_lr, clip: expected 0 <= min_lr <= lr, and lr and clip above 0".into());
        }
        let rate = |v: f32| v.is_finite() && v >= 0.0;
        if !rate(self.vision_lr) || !rate(self.weight_decay) {
            return Err("vision_lr and weight_decay: expected 0 or more".into());
        }
        Ok(())
    }

    /// Its small files together in a temporary folder, as an exported directory has them.
    pub fn gather(&self) -> Result<tempfile::TempDir, TrainError> {
        let folder = tempfile::tempdir().map_err(io(&std::env::temp_dir()))?;
        gather(&self.files, folder.path())?;
        Ok(folder)
    }

    /// All that decides what a run computes: not where files lie, nor what is only told or kept.
    pub(crate) fn terms(&self) -> Value {
        let mut terms = serde_json::to_value(self).unwrap_or_default();
        if let Some(fields) = terms.as_object_mut() {
            for field in ["files", "recompute", "checkpoint_every", "validation"] {
                fields.remove(field);
            }
            // Where a directory lies depends on where the recipe is read from.
            if self.start.as_ref().is_some_and(|start| start.contains('/')) {
                fields.insert("start".into(), "a directory".into());
            }
        }
        if let Some(data) = terms["data"].as_object_mut() {
            data.remove("ahead");
        }
        terms
    }

    /// The terms that a checkpoint was saved with; fields that recipes did not have yet are at their defaults.
    pub(crate) fn saved_terms(saved: &Value) -> Value {
        let mut fields = saved.clone();
        if let Some(fields) = fields.as_object_mut() {
            fields.insert("files".into(), Value::Array(Vec::new()));
        }
        serde_json::from_value::<Self>(fields).map_or_else(|_| saved.clone(), |recipe| recipe.terms())
    }

    /// The learning rates of its steps.
    pub fn schedule(&self) -> Schedule {
        Schedule { peak: self.lr, min: self.min_lr, warmup: self.warmup, steps: self.steps }
    }

    /// Which tensors it trains. Error: a prefix that names none.
    pub fn trained(&self, layout: &Layout) -> Result<Vec<bool>, TrainError> {
        for prefix in &self.trained {
            if !layout.tensors().iter().any(|tensor| tensor.name.starts_with(prefix)) {
                return Err(TrainError::Model(format!("trained: no tensor's name begins with {prefix:?}")));
            }
        }
        let trained = |name: &str| self.trained.iter().any(|prefix| name.starts_with(prefix));
        Ok(layout.tensors().iter().map(|tensor| trained(&tensor.name)).collect())
    }
}
