//! A model on one device, or divided among several ranks (`docs/parallel.md`).

use std::sync::Arc;

use keye_backend::{Backend, BackendError, Collective, Cpu, CpuOptions, SharedMemory};
use keye_media::ProcessorConfig;
use keye_model::{KeyeModel, LoadOptions, ParallelModel, RankDevice, Runner};
use keye_processor::{Checkpoint, ModelConfig};

use crate::LoadError;

/// What is loaded.
#[derive(Clone, Copy)]
pub struct ModelFiles<'a> {
    /// Of config.json.
    pub config: &'a ModelConfig,
    /// Of preprocessor_config.json.
    pub processor: &'a ProcessorConfig,
    /// The weights.
    pub checkpoint: &'a Checkpoint,
}

/// A model on `ranks` devices of this process that `make` makes. `encoder` runs the vision tower where there are several.
pub fn load_ranks<B: Backend>(
    ranks: usize,
    make: impl Fn() -> Result<B, BackendError>,
    encoder: Option<B>,
    ModelFiles { config, processor, checkpoint }: ModelFiles<'_>,
    options: LoadOptions,
) -> Result<Box<dyn Runner>, LoadError>
where
    SharedMemory: Collective<B>,
{
    if ranks == 1 {
        return Ok(Box::new(KeyeModel::load(make()?, config, processor, checkpoint, options)?));
    }
    let device = |member: SharedMemory| Ok(RankDevice { backend: make()?, collective: Arc::new(member) });
    let devices = SharedMemory::group(ranks).into_iter().map(device).collect::<Result<_, BackendError>>()?;
    Ok(Box::new(ParallelModel::load(devices, encoder, config, processor, checkpoint, options)?))
}

/// A model on the CPU, and what computes, for display. Of `threads`, or one per core, each rank gets as many as the others
/// and at least one; the vision tower runs on all of them.
pub fn load_cpu(
    ranks: usize,
    threads: Option<usize>,
    files: ModelFiles<'_>,
    options: LoadOptions,
) -> Result<(Box<dyn Runner>, String), LoadError> {
    let make = |threads| Cpu::new(CpuOptions { threads: Some(threads), isa: None });
    let all = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let each = (all / ranks.max(1)).max(1);
    let first = make(each)?;
    let device = match ranks {
        1 => first.describe(),
        _ => format!("{ranks} ranks of {}", first.describe()),
    };
    let encoder = if ranks > 1 { Some(make(all)?) } else { None };
    Ok((load_ranks(ranks, || make(each), encoder, files, options)?, device))
}
