//! What computes: the CPU, or a GPU where this build has one.

use std::str::FromStr;

use keye_backend::KvDtype;
use keye_media::ProcessorConfig;
use keye_model::{LoadOptions, Runner};
use keye_processor::{Checkpoint, ModelConfig};

use crate::api::LoadError;
use crate::memory::{CacheFit, fit_cache};
use crate::ranks::{ModelFiles, load_cpu};

/// A device by name: `cpu`, `cuda` (the first GPU) or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// A GPU by number.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(number))) => Ok(Self::Cuda(number)),
            _ => Err("expected cpu, cuda or cuda:N".into()),
        }
    }
}

/// What is computed with, and in how much memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceOptions {
    /// What computes.
    pub device: Device,
    /// Threads of the CPU; `None` is one per core.
    pub threads: Option<usize>,
    /// Ranks that the decoder is divided among, each with its part of the threads; of a GPU one.
    pub ranks: usize,
    /// Part of a GPU's memory that may be in use, 0 to 1.
    pub gpu_memory: f64,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self { device: Device::Cpu, threads: None, ranks: 1, gpu_memory: 0.9 }
    }
}

/// Tokens of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheSize {
    /// As many as fit, or this many if they do.
    Fit(Option<usize>),
    /// This many, whatever the model's longest sequence and the memory.
    Exactly(usize),
}

/// A model on a device.
pub struct Loaded {
    /// The model.
    pub runner: Box<dyn Runner>,
    /// What computes, for display.
    pub device: String,
    /// Its cache.
    pub fit: CacheFit,
}

impl Device {
    /// What is to be said before it is used.
    pub fn caution(self) -> Option<&'static str> {
        match self {
            // A build without it says so, and no more.
            _ if cfg!(not(feature = "cuda")) => None,
            Self::Cpu => None,
            Self::Cuda(_) => Some(
                "--device cuda has not been run on a GPU yet: its kernels were only checked on the CPU; compare what it says \
                 with --device cpu (docs/cuda.md)",
            ),
        }
    }
}

impl DeviceOptions {
    /// Loads a checkpoint's weights and makes the cache.
    pub fn load(
        &self,
        config: &ModelConfig,
        pixels: &ProcessorConfig,
        checkpoint: &Checkpoint,
        kv_dtype: KvDtype,
        size: CacheSize,
    ) -> Result<Loaded, LoadError> {
        match self.device {
            Device::Cpu => {
                let fit = match size {
                    CacheSize::Fit(tokens) => fit_cache(config, kv_dtype, tokens, checkpoint, self.ranks)
                        .map_err(|reason| of_length(reason, tokens, config))?,
                    CacheSize::Exactly(tokens) => CacheFit::of(config, kv_dtype, tokens, checkpoint, self.ranks),
                };
                let options = LoadOptions { cache_tokens: fit.tokens, kv_dtype };
                let files = ModelFiles { config, processor: pixels, checkpoint };
                let (runner, device) = load_cpu(self.ranks, self.threads, files, options)?;
                Ok(Loaded { runner, device, fit })
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(_) if self.ranks > 1 => Err(keye_backend::BackendError::Setting(
                "--tp divides a model among parts of the CPU, not GPUs yet: use --device cpu, or one GPU".into(),
            )
            .into()),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => {
                Parts { config, pixels, checkpoint, kv_dtype }.on_gpu(number, self.gpu_memory, size)
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => Err(keye_backend::BackendError::Setting(
                "this build has no CUDA: build with --features cuda, or use --device cpu".into(),
            )
            .into()),
        }
    }
}

/// Why there is no cache: a length that the model does not take, or one that the machine cannot hold.
fn of_length(reason: String, wanted: Option<usize>, config: &ModelConfig) -> LoadError {
    let longest = config.text.max_position_embeddings;
    match wanted {
        Some(wanted) if !(1..=longest).contains(&wanted) => LoadError::Setting(reason),
        _ => LoadError::Length(reason),
    }
}

/// What a model is made of.
#[cfg(feature = "cuda")]
struct Parts<'a> {
    config: &'a ModelConfig,
    pixels: &'a ProcessorConfig,
    checkpoint: &'a Checkpoint,
    kv_dtype: KvDtype,
}

#[cfg(feature = "cuda")]
impl Parts<'_> {
    fn on_gpu(&self, number: usize, part: f64, size: CacheSize) -> Result<Loaded, LoadError> {
        use keye_backend::{Backend, Cuda, CudaOptions};
        use keye_model::KeyeModel;

        use crate::gpu_memory::{ACTIVATIONS, GpuMemory, fit_tokens, weight_bytes};

        let cuda = Cuda::new(CudaOptions { device: number, ..CudaOptions::default() })?;
        // Before gigabytes of weights are on their way.
        if self.config.text.latent.is_some() {
            return Err(cuda.without_latent_attention().into());
        }
        let (free, total) = cuda.memory()?;
        let weights = weight_bytes(&crate::WeightBytes::stored(self.config, self.checkpoint));
        let mut fit = CacheFit::of(self.config, self.kv_dtype, 0, self.checkpoint, 1);
        let tokens = match size {
            CacheSize::Exactly(tokens) => tokens,
            CacheSize::Fit(wanted) => {
                let longest = self.config.text.max_position_embeddings;
                fit_tokens(longest, wanted, weights, fit.bytes_per_token, GpuMemory { total, free }, part)
                    .map_err(|reason| of_length(reason, wanted, self.config))?
            }
        };
        fit = CacheFit::of(self.config, self.kv_dtype, tokens, self.checkpoint, 1);
        fit.plan = fit.plan.on_gpu(weights, ACTIVATIONS, total);
        let device = cuda.describe();
        let options = LoadOptions { cache_tokens: fit.tokens, kv_dtype: self.kv_dtype };
        let runner = Box::new(KeyeModel::load(cuda, self.config, self.pixels, self.checkpoint, options)?);
        Ok(Loaded { runner, device, fit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let cases = [("cpu", Some(Device::Cpu)), ("cuda", Some(Device::Cuda(0))), ("cuda:3", Some(Device::Cuda(3)))];
        for (text, device) in cases.into_iter().chain([("cuda:", None), ("gpu", None), ("cuda:-1", None)]) {
            assert_eq!(text.parse::<Device>().ok(), device, "{text}");
        }
    }
}
