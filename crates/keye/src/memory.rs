//! How many tokens the KV cache may hold.

use keye_backend::{BLOCK_TOKENS, CacheSpec, KvDtype};
use keye_engine::EngineOptions;
use keye_processor::{Checkpoint, ModelConfig};

use crate::machine_memory::MachineMemory;
use crate::units::bytes_text;

/// Fewest tokens that a cache is made for when little memory is free.
const LEAST: usize = 1024;

/// The size chosen for the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheFit {
    /// Tokens.
    pub tokens: usize,
    /// Bytes of one token over all layers.
    pub bytes_per_token: usize,
    /// What it all takes.
    pub plan: MemoryPlan,
}

impl CacheFit {
    /// A cache of `tokens` tokens, whether it fits or not.
    pub(crate) fn of(
        config: &ModelConfig,
        dtype: KvDtype,
        tokens: usize,
        checkpoint: &Checkpoint,
        ranks: usize,
    ) -> Self {
        let bytes_per_token = cache_spec_of_ranks(config, dtype, ranks).block_bytes() / BLOCK_TOKENS;
        Self { tokens, bytes_per_token, plan: MemoryPlan::new(config, checkpoint, dtype, tokens, ranks) }
    }
}

/// What is cached of a token.
pub fn cache_spec(config: &ModelConfig, dtype: KvDtype) -> CacheSpec {
    cache_spec_of_ranks(config, dtype, 1)
}

/// What is cached of a token on all of `ranks` devices together ([`keye_model::cache_spec`]).
pub fn cache_spec_of_ranks(config: &ModelConfig, dtype: KvDtype, ranks: usize) -> CacheSpec {
    let one = keye_model::cache_spec(&config.text, dtype, ranks);
    let [kv_heads, index_dim, latent_dim] = [one.kv_heads, one.index_dim, one.latent_dim].map(|n| n * ranks);
    CacheSpec { kv_heads, index_dim, latent_dim, ..one }
}

/// What a model needs in memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights that every token reads, and those of the media.
    pub weights: u64,
    /// Weights of experts: a token reads some of them, and what has not been read lately may be on the disk only.
    pub experts: u64,
    /// Keys and values of the cache's tokens.
    pub kv: u64,
    /// Index keys of the cache's tokens.
    pub index_keys: u64,
    /// Rows of a step, a bound.
    pub activations: u64,
    /// The machine's memory, or what a container or control group leaves of it, where the system tells.
    pub machine: Option<u64>,
}

impl MemoryPlan {
    /// For a cache of `tokens` tokens on `ranks` devices of this machine, with what the checkpoint stores.
    pub fn new(config: &ModelConfig, checkpoint: &Checkpoint, dtype: KvDtype, tokens: usize, ranks: usize) -> Self {
        let bytes = |name: &str| checkpoint.get(name).map_or(0, |tensor| tensor.bytes.len() as u64);
        let experts = checkpoint.names().filter(|name| name.contains(".mlp.experts.")).map(bytes).sum();
        let weights = checkpoint.total_bytes().saturating_sub(experts);
        let spec = cache_spec_of_ranks(config, dtype, ranks);
        let cache = |spec: CacheSpec| (spec.block_bytes() as u64).saturating_mul(tokens.div_ceil(BLOCK_TOKENS) as u64);
        let kv = cache(CacheSpec { index_dim: 0, ..spec });
        let index_keys = cache(spec).saturating_sub(kv);
        let activations = activations(config).saturating_mul(ranks as u64);
        Self { weights, experts, kv, index_keys, activations, machine: MachineMemory::read().total }
    }

    /// The same cache in a GPU's memory of `total` bytes, where experts do not wait on the disk.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_gpu(self, weights: u64, activations: u64, total: u64) -> Self {
        Self { weights, experts: 0, activations, machine: Some(total), ..self }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        [self.experts, self.kv, self.index_keys, self.activations]
            .iter()
            .fold(self.weights, |sum, n| sum.saturating_add(*n))
    }

    /// Whether it needs more than the machine has although only experts' weights may wait on the disk.
    pub fn exceeds(&self) -> bool {
        self.machine.is_some_and(|machine| self.total().saturating_sub(self.experts) > machine)
    }

    /// Whether it fits only because experts' weights may wait on the disk: it runs, but slower.
    pub fn reads_experts_from_disk(&self) -> bool {
        !self.exceeds() && self.machine.is_some_and(|machine| self.total() > machine)
    }

    /// Tokens that fit beside the weights and activations, where the machine's memory is known.
    pub fn tokens_that_fit(&self, bytes_per_token: usize) -> Option<u64> {
        let taken = self.weights.saturating_add(self.experts).saturating_add(self.activations);
        Some(self.machine?.saturating_sub(taken) / (bytes_per_token as u64).max(1))
    }
}

impl std::fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "weights {}", bytes_text(self.weights.saturating_add(self.experts)))?;
        if self.experts > 0 {
            write!(f, " (experts {})", bytes_text(self.experts))?;
        }
        write!(f, ", keys and values {}", bytes_text(self.kv))?;
        if self.index_keys > 0 {
            write!(f, ", index keys {}", bytes_text(self.index_keys))?;
        }
        write!(f, ", activations {}: {}", bytes_text(self.activations), bytes_text(self.total()))
    }
}

/// A bound of the bytes that a step of the decoder works in: f32 rows of all widths that are there at a time.
fn activations(config: &ModelConfig) -> u64 {
    let text = &config.text;
    let (h, q) = (text.hidden_size, text.num_attention_heads * text.head_dim);
    let kv = text.num_key_value_heads * text.head_dim;
    let wide = match &text.experts {
        // Rows are sent to several experts at a time: in, through and out.
        Some(experts) => experts.num_experts_per_tok * (2 * h + experts.moe_intermediate_size),
        None => text.intermediate_size,
    };
    let index = text.indexer.map_or(0, |i| i.num_heads * (i.head_dim + 1) + i.head_dim + i.topk);
    // A tile of index scores, and the logits of some rows.
    let fixed = if text.indexer.is_some() { 16 << 20 } else { 0 } + 16 * text.vocab_size as u64 * 4;
    let rows = EngineOptions::default().max_batch_tokens as u64;
    rows * 4 * (4 * h + 3 * q + 2 * kv + wide + index) as u64 + fixed
}

/// Tokens of the cache, which `ranks` devices of this machine divide: `wanted`, or the model's longest sequence cut to half of the memory that is free and to what the
/// weights leave.
///
/// # Errors
///
/// What is wrong with `wanted`: longer than the model's positions, or weights and cache exceed the machine's memory.
/// Weights of experts may: they stay in the memory map.
pub fn fit_cache(
    config: &ModelConfig,
    dtype: KvDtype,
    wanted: Option<usize>,
    checkpoint: &Checkpoint,
    ranks: usize,
) -> Result<CacheFit, String> {
    let bytes_per_token = cache_spec_of_ranks(config, dtype, ranks).block_bytes() / BLOCK_TOKENS;
    let plan = |tokens: usize| MemoryPlan::new(config, checkpoint, dtype, tokens, ranks);
    let tokens = fit(config.text.max_position_embeddings, bytes_per_token, wanted, &plan, &MachineMemory::read())?;
    Ok(CacheFit::of(config, dtype, tokens, checkpoint, ranks))
}

fn fit(
    longest: usize,
    bytes_per_token: usize,
    wanted: Option<usize>,
    plan: &dyn Fn(usize) -> MemoryPlan,
    memory: &MachineMemory,
) -> Result<usize, String> {
    let Some(wanted) = wanted else {
        let least = plan(LEAST.min(longest));
        if least.exceeds() {
            return Err(format!(
                "this model needs {least}; this machine has {}, and only weights of experts may wait on the disk: take \
                 a quantised model (keye quantize) or a machine with more memory; keye inspect plans it",
                bytes_text(least.machine.unwrap_or(0))
            ));
        }
        let free = memory.available.map_or(u64::MAX, |bytes| bytes / 2 / bytes_per_token.max(1) as u64);
        let left = plan(0).tokens_that_fit(bytes_per_token).unwrap_or(u64::MAX);
        let affordable = usize::try_from(free.min(left)).unwrap_or(usize::MAX);
        return Ok(longest.min(affordable.max(LEAST)));
    };
    if wanted == 0 || wanted > longest {
        return Err(format!("a length (--max-model-len) of {wanted} tokens: this model takes 1 to {longest}"));
    }
    let needed = plan(wanted);
    if !needed.exceeds() {
        return Ok(wanted);
    }
    let fits = needed.tokens_that_fit(bytes_per_token).unwrap_or(0);
    Err(format!(
        "a length of {wanted} tokens needs {needed}; this machine has {}, in which {fits} tokens fit beside the \
         weights: choose a smaller length (--max-model-len), or bf16 or int8 for the cache (--kv-cache)",
        bytes_text(needed.machine.unwrap_or(0))
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    /// A plan of `weights` bytes, `experts` of them experts', and so many bytes a token.
    fn plans(weights: u64, experts: u64, token: u64, machine: Option<u64>) -> impl Fn(usize) -> MemoryPlan {
        move |tokens| MemoryPlan {
            weights: weights - experts,
            experts,
            kv: token * tokens as u64,
            index_keys: 0,
            activations: 0,
            machine,
        }
    }

    #[test]
    fn the_default_leaves_half_of_the_free_memory_and_the_weights() {
        let memory = MachineMemory { total: Some(24 * GB), available: Some(8 * GB) };
        let plan = plans(17 * GB, 0, 294_912, memory.total);
        assert_eq!(fit(131_072, 294_912, None, &plan, &memory), Ok((4 * GB) as usize / 294_912));
        assert_eq!(fit(4096, 294_912, None, &plan, &memory), Ok(4096));
        // Mapped weights that have been read count as free memory; the cache must not take their place.
        let cached = MachineMemory { available: Some(22 * GB), ..memory };
        assert_eq!(fit(131_072, 294_912, None, &plan, &cached), Ok((7 * GB) as usize / 294_912));
        let none = MachineMemory { available: Some(0), total: None };
        assert_eq!(fit(131_072, 294_912, None, &plans(0, 0, 294_912, None), &none), Ok(LEAST));
        assert_eq!(fit(131_072, 294_912, None, &plans(0, 0, 1, None), &MachineMemory::default()), Ok(131_072));
    }

    #[test]
    fn a_length_that_was_asked_for_is_kept_or_refused_with_figures() {
        let memory = MachineMemory { total: Some(24 * GB), available: Some(0) };
        let plan = plans(17 * GB, 0, 294_912, memory.total);
        assert_eq!(fit(131_072, 294_912, Some(8192), &plan, &memory), Ok(8192));
        let error = fit(131_072, 294_912, Some(131_072), &plan, &memory).unwrap_err();
        for figure in ["17.00 GB", "38.65 GB", "55.65 GB", "24.00 GB", "23735 tokens"] {
            assert!(error.contains(figure), "{figure}: {error}");
        }
        for wanted in [0, 131_073] {
            assert!(fit(131_072, 294_912, Some(wanted), &plan, &memory).unwrap_err().contains("1 to 131072"));
        }
    }

    #[test]
    fn experts_may_wait_on_the_disk() {
        let memory = MachineMemory { total: Some(24 * GB), available: Some(20 * GB) };
        let plan = plans(62 * GB, 58 * GB, 100_000, memory.total);
        assert_eq!(fit(262_144, 100_000, Some(65_536), &plan, &memory), Ok(65_536));
        assert!(plan(65_536).reads_experts_from_disk() && !plan(65_536).exceeds());
        assert!(fit(262_144, 100_000, Some(262_144), &plan, &memory).unwrap_err().contains("(experts 58.00 GB)"));
        assert!(!plans(17 * GB, 16 * GB, 100_000, memory.total)(1024).reads_experts_from_disk());
    }

    #[test]
    fn a_model_that_cannot_fit_is_refused_with_figures() {
        let memory = MachineMemory { total: Some(24 * GB), available: Some(20 * GB) };
        let refused = |weights, experts| {
            let plan = plans(weights * GB, experts * GB, 70_272, memory.total);
            fit(163_840, 70_272, None, &plan, &memory)
        };
        let error = refused(680, 650).unwrap_err();
        assert!(error.contains("680.00 GB (experts 650.00 GB)") && error.contains("has 24.00 GB"), "{error}");
        assert!(refused(670, 650).is_ok());
        assert!(refused(25, 0).is_err());
    }
}
