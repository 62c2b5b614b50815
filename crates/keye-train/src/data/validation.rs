//! Packs of held-out data.

use std::sync::Arc;

use keye_processor::Processor;

use super::config::DataConfig;
use super::packer::Packer;
use crate::{Pack, Recipe, TrainError};

/// The packs on which a recipe measures its held-out loss: the first of its validation data. None without validation.
///
/// # Errors
/// Data that cannot be read; files of records without held-out ones beside them.
pub fn held_out(recipe: &Recipe, processor: &Arc<Processor>) -> Result<Vec<Pack>, TrainError> {
    let Some(validation) = &recipe.validation else { return Ok(Vec::new()) };
    let config = match &validation.data {
        Some(table) => DataConfig::from_table(table)?.beside(&recipe.folder),
        None => DataConfig::from_table(&recipe.data)?.held_out()?,
    };
    let mut packer = Packer::new(config, Arc::clone(processor), rayon::current_num_threads())?;
    (0..validation.packs).map(|_| packer.next_pack()).collect()
}
