//! Checkpoints of a run: all that is needed to go on as if nothing had happened.
//!
//! `STAGE/step-N/` holds `state.safetensors` (parameters, and the optimiser's two means as `exp_avg.NAME` and
//! `exp_avg_sq.NAME` for what is trained), `state.json` (step, loader, recipe) and the small files of the model, so that it can be
//! exported; `STAGE/latest` names the newest. Directories
//! and the pointer appear by renaming, so a kill at any time leaves the last one whole.

use std::fs;
use std::path::{Path, PathBuf};

use keye_backend::training::{Device, View};
use keye_processor::{Checkpoint, Dtype, NewTensor, write_file};
use serde_json::{Value, json};

use crate::checkpoint_dir::{STATE_JSON, STATE_TENSORS, io, partial};
use crate::optimizer::Means;
use crate::params::Params;
use crate::small_files::{different_file, gather};
use crate::{Recipe, TrainError};

/// Checkpoints that stay.
const KEPT: usize = 2;
const LATEST: &str = "latest";
const MEANS: [&str; 2] = ["exp_avg.", "exp_avg_sq."];

/// Where a run is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct State<A = Vec<f32>> {
    /// Steps done.
    pub(crate) step: u64,
    pub(crate) params: Params<A>,
    pub(crate) optimizer: Means<A>,
    /// The loader's, after the packs of the last step.
    pub(crate) loader: Value,
}

impl<A> State<A> {
    /// Writes `folder/step-N`, points `latest` to it and removes old ones.
    pub(crate) fn save<D: Device<Array = A>>(
        &self,
        device: &D,
        folder: &Path,
        trained: &[bool],
        recipe: &Recipe,
    ) -> Result<(), TrainError> {
        let name = format!("step-{:08}", self.step);
        let out = folder.join(&name);
        let temporary = partial(&out);
        remove(&temporary)?;
        if let Err(error) = self.write(device, &temporary, trained, recipe) {
            // On a full disk what was written is best gone; the error that is told is the first.
            let _ = remove(&temporary);
            return Err(error);
        }
        // A step that was saved before the run was killed and is reached again.
        remove(&out)?;
        fs::rename(&temporary, &out).map_err(io(&out))?;
        let pointer = folder.join(LATEST);
        let temporary = partial(&pointer);
        let written = fs::write(&temporary, &name).map_err(io(&temporary));
        if let Err(error) = written.and_then(|()| fs::rename(&temporary, &pointer).map_err(io(&pointer))) {
            // Nothing points to it.
            let _ = remove(&out);
            return Err(error);
        }
        let old = checkpoints(folder)?;
        old.iter().rev().filter(|dir| **dir != out).skip(KEPT - 1).try_for_each(|dir| remove(dir))
    }

    fn write<D: Device<Array = A>>(
        &self,
        device: &D,
        dir: &Path,
        trained: &[bool],
        recipe: &Recipe,
    ) -> Result<(), TrainError> {
        fs::create_dir_all(dir).map_err(io(dir))?;
        gather(&recipe.files, dir)?;
        let layout = &self.params.layout;
        let mut bytes = Vec::new();
        let mut add = |prefix: &str, array: &A, i: usize| -> Result<(), TrainError> {
            let (tensor, range) = (&layout.tensors()[i], layout.range(i));
            let name = format!("{prefix}{}", tensor.name);
            let values = device.values(View { array, start: range.start, rows: 1, cols: range.len() })?;
            let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            bytes.push((NewTensor { name, dtype: Dtype::F32, shape: tensor.shape.clone() }, data));
            Ok(())
        };
        for (i, trained) in trained.iter().enumerate() {
            add("", &self.params.values, i)?;
            if *trained {
                add(MEANS[0], &self.optimizer.m, i)?;
                add(MEANS[1], &self.optimizer.v, i)?;
            }
        }
        let tensors: Vec<(NewTensor, &[u8])> = bytes.iter().map(|(t, data)| (t.clone(), data.as_slice())).collect();
        write_file(&dir.join(STATE_TENSORS), &tensors)?;
        let state = json!({
            "step": self.step, "optimizer_steps": self.optimizer.steps, "loader": self.loader,
            "recipe": recipe.terms(),
        });
        let path = dir.join(STATE_JSON);
        fs::write(&path, format!("{state:#}\n")).map_err(io(&path))
    }
}

impl State {
    /// To a device.
    pub(crate) fn onto<D: Device>(self, device: &D) -> Result<State<D::Array>, TrainError> {
        let (params, optimizer) = (self.params.onto(device)?, self.optimizer.onto(device)?);
        Ok(State { step: self.step, params, optimizer, loader: self.loader })
    }

    /// Goes on from the newest checkpoint; `self` is the state of a run that begins. False without a checkpoint. Error: one of
    /// another recipe.
    pub(crate) fn resume(&mut self, folder: &Path, trained: &[bool], recipe: &Recipe) -> Result<bool, TrainError> {
        let Some(dir) = newest(folder)? else { return Ok(false) };
        let state = state_of(&dir, recipe)?;
        let path = dir.join(STATE_JSON);
        let wrong = |reason: String| TrainError::Recipe { path: path.clone(), reason };
        let number = |name: &str| state[name].as_u64().ok_or_else(|| wrong(format!("{name}: expected a number")));
        (self.step, self.optimizer.steps) = (number("step")?, number("optimizer_steps")?);
        self.loader = state["loader"].clone();
        let file = Checkpoint::open_file(&dir.join(STATE_TENSORS))?;
        let layout = self.params.layout.clone();
        for (i, trained) in trained.iter().enumerate() {
            let tensor = &layout.tensors()[i];
            let range = layout.range(i);
            let read = |prefix: &str, to: &mut [f32]| -> Result<(), TrainError> {
                let stored = file.tensor(&format!("{prefix}{}", tensor.name), &tensor.shape)?;
                if stored.dtype != Dtype::F32 {
                    return Err(TrainError::Model(format!("{}: expected F32, found {:?}", stored.name, stored.dtype)));
                }
                let values = stored.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                to.iter_mut().zip(values).for_each(|(to, v)| *to = v);
                Ok(())
            };
            read("", &mut self.params.values[range.clone()])?;
            if *trained {
                read(MEANS[0], &mut self.optimizer.m[range.clone()])?;
                read(MEANS[1], &mut self.optimizer.v[range])?;
            }
        }
        Ok(true)
    }
}

/// The newest checkpoint of a stage.
fn newest(folder: &Path) -> Result<Option<PathBuf>, TrainError> {
    let pointer = folder.join(LATEST);
    match fs::read_to_string(&pointer) {
        Ok(name) => Ok(Some(folder.join(name.trim()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io(&pointer)(error)),
    }
}

/// Refuses a stage whose newest checkpoint, where there still is one, is of another recipe.
pub(crate) fn check_made_by(folder: &Path, recipe: &Recipe) -> Result<(), TrainError> {
    match newest(folder)?.filter(|dir| dir.is_dir()) {
        Some(dir) => state_of(&dir, recipe).map(drop),
        None => Ok(()),
    }
}

/// The state.json of a checkpoint that this recipe made.
fn state_of(dir: &Path, recipe: &Recipe) -> Result<Value, TrainError> {
    let path = dir.join(STATE_JSON);
    let wrong = |reason: String| TrainError::Recipe { path: path.clone(), reason };
    let remedy = || {
        let folder = dir.parent().unwrap_or(dir).display();
        format!("to go on, or begin again: remove {folder}, or give the recipe another name")
    };
    let text = fs::read(&path).map_err(io(&path))?;
    let state: Value = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    // Checkpoints of the first runs do not tell their recipe, later ones not what it started from.
    let saved = state.get("recipe").map(|saved| {
        let mut now = recipe.terms();
        if saved.get("start").is_none() {
            now["start"] = Value::Null;
        }
        (Recipe::saved_terms(saved), now)
    });
    if let Some((field, before, now)) = saved.and_then(|(saved, now)| difference("", &saved, &now)) {
        let remedy = remedy();
        return Err(wrong(format!(
            "this stage was begun with {field} = {before}, the recipe now says {now}; put the old value back {remedy}"
        )));
    }
    if let Some(name) = different_file(dir, recipe.gather()?.path())? {
        let (dir, remedy) = (dir.display(), remedy());
        return Err(wrong(format!(
            "this stage was begun with another {name} than the recipe's `files` now have; put that of {dir} back {remedy}"
        )));
    }
    Ok(state)
}

/// Whether a tensor of a checkpoint is one of the optimiser's.
pub(crate) fn is_mean(name: &str) -> bool {
    MEANS.iter().any(|prefix| name.starts_with(prefix))
}

/// The first field in which two recipes differ, and its values.
fn difference(at: &str, before: &Value, now: &Value) -> Option<(String, String, String)> {
    let name = |key: &str| if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") };
    match (before, now) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys = a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)));
            keys.find_map(|key| {
                difference(&name(key), a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null))
            })
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).enumerate().find_map(|(i, (a, b))| difference(&format!("{at}[{i}]"), a, b))
        }
        (a, b) if a == b => None,
        (a, b) => Some((at.to_owned(), a.to_string(), b.to_string())),
    }
}

/// Whole checkpoints of a stage, oldest first.
fn checkpoints(folder: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let mut dirs = Vec::new();
    for entry in fs::read_dir(folder).map_err(io(folder))? {
        let path = entry.map_err(io(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.strip_prefix("step-").is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit())) {
            dirs.push(path);
        }
    }
    dirs.sort();
    Ok(dirs)
}

fn remove(dir: &Path) -> Result<(), TrainError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io(dir)(error)),
        _ => Ok(()),
    }
}
