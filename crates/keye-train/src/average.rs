//! The mean of several models' weights (spec §4.3).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use keye_backend::training::Device;

use crate::checkpoint_dir::{load_params, open_weights};
use crate::params::Params;
use crate::small_files::different_file;
use crate::state::is_mean;
use crate::{Model, TrainError};

/// The mean of several models.
#[derive(Debug, Clone, PartialEq)]
pub struct Mean {
    /// Its values; those of stage 0 are the start's, and none of the mean, without `extras`.
    pub params: Params,
    /// Every one of the models has the tensors of stage 0.
    pub extras: bool,
}

/// The mean of several directories' parameters, in f64, for averaging annealed runs (spec §4.3).
///
/// # Errors
/// No directories; those whose tensors differ in name or shape (those of stage 0 may be missing), or whose config, tokenizer or
/// preprocessor config do.
pub fn average<D: Device>(model: &Model<D>, dirs: &[PathBuf], start: &Params) -> Result<Mean, TrainError> {
    let Some(first) = dirs.first() else { return Err(TrainError::Model("no checkpoints to average".into())) };
    let names = Names::read(model, first)?;
    let mut extras = names.extras;
    let mut sums = vec![0.0f64; start.values.len()];
    for dir in dirs {
        let (here, there) = (dir.display(), first.display());
        if let Some(name) = different_file(first, dir)? {
            return Err(TrainError::Model(format!(
                "{name} is not the same in {there} and {here}: only models of one config, tokenizer and preprocessor config \
                 are averaged"
            )));
        }
        let of_dir = Names::read(model, dir)?;
        if let Some(name) = names.model.symmetric_difference(&of_dir.model).next() {
            return Err(TrainError::Model(format!(
                "the tensor {name} is in only one of {there} and {here}: only models of equal shape are averaged"
            )));
        }
        extras &= of_dir.extras;
        let mut params = start.clone();
        load_params(model, dir, &mut params)?;
        sums.iter_mut().zip(&params.values).for_each(|(sum, v)| *sum += f64::from(*v));
    }
    let mut params = start.clone();
    for (i, tensor) in model.layout().tensors().iter().enumerate() {
        if extras || !model.is_extra(&tensor.name) {
            let range = model.layout().range(i);
            let mean = |sum: &f64| (sum / dirs.len() as f64) as f32;
            params.values[range.clone()].iter_mut().zip(&sums[range]).for_each(|(v, sum)| *v = mean(sum));
        }
    }
    Ok(Mean { params, extras })
}

/// What a directory holds.
struct Names {
    /// Its tensors but those of stage 0, by the layout's names where it has them.
    model: BTreeSet<String>,
    /// All tensors of stage 0 are there.
    extras: bool,
}

impl Names {
    fn read<D: Device>(model: &Model<D>, dir: &Path) -> Result<Self, TrainError> {
        let checkpoint = open_weights(dir)?;
        let mut others: BTreeSet<&str> = checkpoint.names().filter(|name| !is_mean(name)).collect();
        let (mut names, mut extras) = (BTreeSet::new(), true);
        for tensor in model.layout().tensors() {
            let (stored, extra) = (checkpoint.get(&tensor.name), model.is_extra(&tensor.name));
            if let Some(stored) = &stored {
                others.remove(stored.name.as_str());
                if !extra {
                    names.insert(tensor.name.clone());
                }
            }
            extras &= stored.is_some() || !extra;
        }
        names.extend(others.into_iter().map(str::to_owned));
        Ok(Self { model: names, extras })
    }
}
