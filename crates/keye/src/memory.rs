//! How many tokens the KV cache may hold.

use keye_backend::{BLOCK_TOKENS, CacheSpec, KvDtype};
use keye_processor::ModelConfig;

/// Fewest tokens that a cache is made for when little memory is free.
const LEAST: usize = 1024;

/// The size chosen for the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheFit {
    /// Tokens.
    pub tokens: usize,
    /// Bytes of one token over all layers.
    pub bytes_per_token: usize,
}

/// What is cached of a token.
pub fn cache_spec(config: &ModelConfig, dtype: KvDtype) -> CacheSpec {
    let text = &config.text;
    let index_dim = text.indexer.map_or(0, |indexer| indexer.head_dim);
    let latent_dim = text.latent.map_or(0, |latent| latent.latent_dim());
    // With latents nothing is kept per head.
    let (kv_heads, head_dim) = if latent_dim > 0 { (0, 0) } else { (text.num_key_value_heads, text.head_dim) };
    CacheSpec { layers: text.num_hidden_layers, kv_heads, head_dim, dtype, index_dim, latent_dim }
}

/// Tokens of the cache: `wanted`, or the model's longest sequence cut to half of the memory that is free.
///
/// # Errors
///
/// What is wrong with `wanted`: longer than the model's positions, or weights and cache exceed the machine's memory.
pub fn fit_cache(
    config: &ModelConfig,
    dtype: KvDtype,
    wanted: Option<usize>,
    weight_bytes: u64,
) -> Result<CacheFit, String> {
    let bytes_per_token = cache_spec(config, dtype).block_bytes() / BLOCK_TOKENS;
    fit(config.text.max_position_embeddings, bytes_per_token, wanted, weight_bytes, &Memory::read())
        .map(|tokens| CacheFit { tokens, bytes_per_token })
}

fn fit(
    longest: usize,
    bytes_per_token: usize,
    wanted: Option<usize>,
    weight_bytes: u64,
    memory: &Memory,
) -> Result<usize, String> {
    let Some(wanted) = wanted else {
        let affordable = memory.available.map_or(usize::MAX, |bytes| (bytes / 2) as usize / bytes_per_token.max(1));
        return Ok(longest.min(affordable.max(LEAST)));
    };
    if wanted == 0 || wanted > longest {
        return Err(format!("a length (--max-model-len) of {wanted} tokens: this model takes 1 to {longest}"));
    }
    let cache = (wanted as u64).saturating_mul(bytes_per_token as u64);
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    match memory.total {
        Some(total) if weight_bytes.saturating_add(cache) > total => Err(format!(
            "a length of {wanted} tokens needs a KV cache of {:.1} GB beside {:.1} GB of weights; this machine has {:.1} GB: \
             choose a smaller length, or bf16 for the cache",
            gigabytes(cache),
            gigabytes(weight_bytes),
            gigabytes(total)
        )),
        _ => Ok(wanted),
    }
}

/// The machine's memory in bytes, where the system tells.
#[derive(Debug, Default)]
struct Memory {
    total: Option<u64>,
    available: Option<u64>,
}

impl Memory {
    fn read() -> Self {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes.saturating_mul(1024))
        };
        Self { total: field("MemTotal:"), available: field("MemAvailable:") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    #[test]
    fn the_default_leaves_half_of_the_free_memory() {
        let memory = Memory { total: Some(24 * GB), available: Some(8 * GB) };
        assert_eq!(fit(131_072, 294_912, None, 17 * GB, &memory), Ok((4 * GB) as usize / 294_912));
        assert_eq!(fit(4096, 294_912, None, 17 * GB, &memory), Ok(4096));
        assert_eq!(fit(131_072, 294_912, None, 0, &Memory { available: Some(0), total: None }), Ok(LEAST));
        assert_eq!(fit(131_072, 294_912, None, 0, &Memory::default()), Ok(131_072));
    }

    #[test]
    fn a_length_that_was_asked_for_is_kept_or_refused_with_figures() {
        let memory = Memory { total: Some(24 * GB), available: Some(0) };
        assert_eq!(fit(131_072, 294_912, Some(8192), 17 * GB, &memory), Ok(8192));
        let error = fit(131_072, 294_912, Some(131_072), 17 * GB, &memory).unwrap_err();
        assert!(error.contains("38.7 GB") && error.contains("17.0 GB") && error.contains("24.0 GB"), "{error}");
        for wanted in [0, 131_073] {
            assert!(fit(131_072, 294_912, Some(wanted), 0, &memory).unwrap_err().contains("1 to 131072"));
        }
    }
}
