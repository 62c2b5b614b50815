//! Checkpoint directories in Hugging Face layout, read and written.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use keye_backend::training::Device;
use keye_backend::{WeightSource, f32_to_bf16};
use keye_processor::{Checkpoint, Claim, Dtype, NewTensor, StoredTensor, claim_dir, write_checkpoint};
use serde_json::Value;

use crate::params::{Layout, Params};
use crate::small_files::gather;
use crate::{Model, TrainError};

/// Bytes of a shard, as the published checkpoints have them.
const SHARD_BYTES: u64 = 5 << 30;
/// What a checkpoint of a run has in place of a model's weights.
pub(crate) const STATE_TENSORS: &str = "state.safetensors";
pub(crate) const STATE_JSON: &str = "state.json";

/// Element type of exported weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportDtype {
    /// 32 bits: what training goes on from.
    F32,
    /// 16 bits, rounded to nearest even: what is shipped.
    Bf16,
}

pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> TrainError + '_ {
    |source| TrainError::Io { path: path.to_owned(), source }
}

/// The tensors of a checkpoint directory or of a run's `step-N`.
pub(crate) fn open_weights(dir: &Path) -> Result<Checkpoint, TrainError> {
    let state = dir.join(STATE_TENSORS);
    Ok(if state.exists() { Checkpoint::open_file(&state)? } else { Checkpoint::open(dir)? })
}

/// Reads the parameters of a checkpoint directory of any float type, or of a run's `step-N`, into `params`. Tensors of stage 0 that are not there
/// keep their values; any other that is missing is an error.
pub fn load_params<D: Device>(model: &Model<D>, dir: &Path, params: &mut Params) -> Result<(), TrainError> {
    let checkpoint = open_weights(dir)?;
    let layout: &Layout = model.layout();
    for (i, tensor) in layout.tensors().iter().enumerate() {
        if model.is_extra(&tensor.name) && checkpoint.get(&tensor.name).is_none() {
            continue;
        }
        let stored = checkpoint.tensor(&tensor.name, &tensor.shape)?;
        params.values[layout.range(i)].copy_from_slice(&floats(&stored)?);
    }
    Ok(())
}

fn floats(stored: &StoredTensor) -> Result<Vec<f32>, TrainError> {
    let dtype = match stored.dtype {
        Dtype::F32 => keye_backend::Dtype::F32,
        Dtype::Bf16 => keye_backend::Dtype::Bf16,
        Dtype::F16 => keye_backend::Dtype::F16,
        other => {
            let name = &stored.name;
            return Err(TrainError::Model(format!(
                "{name} is stored as {other:?}; F32, BF16 or F16 is expected: of a quantised model take the one that it was \
                 made from"
            )));
        }
    };
    let source = WeightSource {
        name: stored.name.clone(),
        dtype,
        rows: 1,
        cols: stored.len(),
        bytes: stored.bytes.clone(),
        scales: None,
    };
    source.check()?;
    Ok(source.to_f32().into_owned())
}

/// Writes `out`, which must not exist, with the weights and the small files (config, tokenizer, template, preprocessor and
/// generation config) of `files`. Appears whole or not at all. The tensors of stage 0 are left out without `extras`.
pub fn export<D: Device>(
    model: &Model<D>,
    params: &Params,
    files: &[PathBuf],
    out: &Path,
    dtype: ExportDtype,
    extras: bool,
) -> Result<(), TrainError> {
    let partial = partial(out);
    let _claim = empty_dir(&partial)?;
    let written = write_model(model, params, files, &partial, dtype, extras);
    let done = written.and_then(|()| fs::rename(&partial, out).map_err(io(out)));
    if done.is_err() {
        // On a full disk what was written is best gone; the error that is told is the first.
        let _ = fs::remove_dir_all(&partial);
    }
    done
}

fn write_model<D: Device>(
    model: &Model<D>,
    params: &Params,
    files: &[PathBuf],
    partial: &Path,
    dtype: ExportDtype,
    extras: bool,
) -> Result<(), TrainError> {
    gather(files, partial)?;
    set_dtype(&partial.join("config.json"), dtype)?;
    let stored = match dtype {
        ExportDtype::F32 => Dtype::F32,
        ExportDtype::Bf16 => Dtype::Bf16,
    };
    let layout = model.layout();
    let tensors: Vec<NewTensor> = (layout.tensors().iter())
        .filter(|tensor| extras || !model.is_extra(&tensor.name))
        .map(|tensor| NewTensor { name: tensor.name.clone(), dtype: stored, shape: tensor.shape.clone() })
        .collect();
    let written = write_checkpoint(partial, &tensors, SHARD_BYTES, &mut |tensor: &NewTensor, to: &mut dyn Write| {
        let values = params.tensor(&tensor.name).unwrap_or_default();
        match dtype {
            ExportDtype::F32 => values.iter().try_for_each(|v| to.write_all(&v.to_le_bytes())),
            ExportDtype::Bf16 => values.iter().try_for_each(|v| to.write_all(&f32_to_bf16(*v).to_le_bytes())),
        }
    });
    Ok(written?)
}

/// Makes `dir`, empties it of what a killed run left, and keeps other runs from it for as long as the claim lives.
fn empty_dir(dir: &Path) -> Result<Claim, TrainError> {
    let claim = claimed(dir)?;
    for entry in fs::read_dir(dir).map_err(io(dir))? {
        let path = entry.map_err(io(dir))?.path();
        fs::remove_file(&path).map_err(io(&path))?;
    }
    Ok(claim)
}

/// Makes `dir` and keeps other runs from it for as long as the claim lives.
pub(crate) fn claimed(dir: &Path) -> Result<Claim, TrainError> {
    match claim_dir(dir).map_err(io(dir))? {
        Claim::Taken => {
            let busy = "another run is writing it; wait for it or choose another name";
            Err(io(dir)(std::io::Error::new(ErrorKind::ResourceBusy, busy)))
        }
        claim => Ok(claim),
    }
}

/// `NAME.partial` beside a directory that is being made.
pub(crate) fn partial(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    out.with_file_name(name)
}

fn set_dtype(path: &Path, dtype: ExportDtype) -> Result<(), TrainError> {
    let text = fs::read(path).map_err(io(path))?;
    let mut config: Value = serde_json::from_slice(&text)
        .map_err(|error| TrainError::Recipe { path: path.to_owned(), reason: error.to_string() })?;
    let name = if dtype == ExportDtype::F32 { "float32" } else { "bfloat16" };
    if let Some(fields) = config.as_object_mut() {
        fields.insert("torch_dtype".into(), name.into());
    }
    let text = format!("{config:#}\n");
    fs::write(path, text).map_err(io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_runs_do_not_empty_one_directory() {
        let root = tempfile::tempdir().unwrap();
        let dir = partial(&root.path().join("model"));
        fs::create_dir(&dir).unwrap();
        let file = dir.join("model.safetensors");
        fs::write(&file, "of a killed run").unwrap();
        let ours = empty_dir(&dir).unwrap();
        assert!(!file.exists());
        fs::write(&file, "ours").unwrap();
        let error = empty_dir(&dir).unwrap_err().to_string();
        assert!(error.contains("model.partial") && error.contains("another run"), "{error}");
        assert!(file.exists());
        drop(ours);
        empty_dir(&dir).unwrap();
        assert!(!file.exists());
    }
}
