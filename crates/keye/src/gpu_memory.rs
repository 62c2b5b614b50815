//! What a GPU's memory is divided into when a model is loaded: weights, activations, and the cache in what is left.

use keye_backend::BLOCK_TOKENS;
use keye_processor::Dtype;

use crate::WeightBytes;
use crate::units::bytes_text;

/// Bytes for what a clip's patches and a step's rows pass through, lists and scores included. An estimate: no GPU has
/// shown its peak yet.
pub(crate) const ACTIVATIONS: u64 = 3 << 30;
/// Fewest tokens that a cache is made for without being asked to.
const LEAST: usize = 1024;

/// A GPU's memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GpuMemory {
    pub total: u64,
    pub free: u64,
}

impl GpuMemory {
    /// What may still be taken when `part` (0 to 1) of all memory may be in use, by whomever.
    pub(crate) fn available(self, part: f64) -> u64 {
        ((self.total as f64 * part) as u64).saturating_sub(self.total.saturating_sub(self.free))
    }
}

/// Bytes of a checkpoint's weights as they lie on a GPU.
pub(crate) fn weight_bytes(stored: &WeightBytes) -> u64 {
    let on_gpu = |(dtype, bytes): (&Dtype, &u64)| match dtype {
        // Halves are widened.
        Dtype::F16 => bytes.saturating_mul(2),
        // A scale of four bytes for each row and 128 columns.
        Dtype::F8E4M3 => bytes.saturating_add(bytes / 32),
        _ => *bytes,
    };
    stored.by_type.iter().map(on_gpu).fold(0, u64::saturating_add)
}

/// Tokens of the cache: `wanted`, or as many as fit up to the model's `longest`.
///
/// # Errors
///
/// What does not fit, with figures and what helps.
pub(crate) fn fit_tokens(
    longest: usize,
    wanted: Option<usize>,
    weights: u64,
    bytes_per_token: usize,
    memory: GpuMemory,
    part: f64,
) -> Result<usize, String> {
    if let Some(wanted) = wanted.filter(|wanted| *wanted == 0 || *wanted > longest) {
        return Err(format!("a length (--max-model-len) of {wanted} tokens: this model takes 1 to {longest}"));
    }
    let available = memory.available(part);
    let room = format!(
        "of the GPU's {} {} are free, and --gpu-memory {part} lets {} be taken",
        bytes_text(memory.total),
        bytes_text(memory.free),
        bytes_text(available)
    );
    let block = (bytes_per_token as u64).saturating_mul(BLOCK_TOKENS as u64).max(1);
    let needed = wanted.unwrap_or(LEAST.min(longest)).div_ceil(BLOCK_TOKENS) as u64;
    let fixed = weights.saturating_add(ACTIVATIONS);
    let blocks = available.saturating_sub(fixed) / block;
    if fixed > available || (wanted.is_none() && blocks < needed) {
        return Err(format!(
            "this model needs {} for weights, {} for activations and {} for the shortest cache; {room}: take a quantised \
             model (keye quantize), a larger part, or end what else uses the GPU",
            bytes_text(weights),
            bytes_text(ACTIVATIONS),
            bytes_text(needed.saturating_mul(block))
        ));
    }
    if let Some(wanted) = wanted.filter(|_| blocks < needed) {
        return Err(format!(
            "{wanted} tokens of cache need {} beside {} of weights and {} for activations; {room}, in which {} tokens fit: \
             choose a smaller length (--max-model-len), or bf16 or int8 for the cache (--kv-cache)",
            bytes_text(needed.saturating_mul(block)),
            bytes_text(weights),
            bytes_text(ACTIVATIONS),
            blocks.saturating_mul(BLOCK_TOKENS as u64)
        ));
    }
    let affordable = usize::try_from(blocks).unwrap_or(usize::MAX).saturating_mul(BLOCK_TOKENS);
    Ok(wanted.unwrap_or(longest.min(affordable)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;
    /// 1.5's keys and values in bf16.
    const TOKEN: usize = 147_456;

    #[test]
    fn what_others_use_counts() {
        assert_eq!(GpuMemory { total: 80 * GB, free: 80 * GB }.available(0.9), 72 * GB);
        assert_eq!(GpuMemory { total: 80 * GB, free: 30 * GB }.available(0.9), 22 * GB);
        assert_eq!(GpuMemory { total: 80 * GB, free: 30 * GB }.available(0.5), 0);
    }

    #[test]
    fn the_cache_takes_what_is_left_in_whole_blocks() {
        let card = GpuMemory { total: 80 * GB, free: 80 * GB };
        let left = 72 * GB - 17 * GB - ACTIVATIONS;
        let tokens = fit_tokens(1 << 30, None, 17 * GB, TOKEN, card, 0.9).unwrap();
        assert_eq!(tokens, (left / (64 * TOKEN as u64)) as usize * 64);
        assert_eq!(fit_tokens(131_072, None, 17 * GB, TOKEN, card, 0.9), Ok(131_072));
        assert_eq!(fit_tokens(131_072, Some(100), 17 * GB, TOKEN, card, 0.9), Ok(100));
        assert_eq!(fit_tokens(1 << 30, Some(tokens), 17 * GB, TOKEN, card, 0.9), Ok(tokens));
        assert!(fit_tokens(1 << 30, Some(tokens + 1), 17 * GB, TOKEN, card, 0.9).is_err());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_figures() {
        let card = GpuMemory { total: 24 * GB, free: 23 * GB };
        let error = fit_tokens(131_072, None, 61 * GB, TOKEN, card, 0.9).unwrap_err();
        for figure in ["61.00 GB", "3.22 GB", "24.00 GB", "23.00 GB", "0.9", "20.60 GB", "keye quantize"] {
            assert!(error.contains(figure), "{figure}: {error}");
        }
        // 20.6 GB less 17 and 3.2 leave some hundred MB.
        let error = fit_tokens(131_072, Some(32_768), 17 * GB, TOKEN, card, 0.9).unwrap_err();
        for figure in ["32768 tokens", "4.83 GB", "2560 tokens fit", "--kv-cache"] {
            assert!(error.contains(figure), "{figure}: {error}");
        }
        for wanted in [0, 131_073] {
            assert!(fit_tokens(131_072, Some(wanted), 0, TOKEN, card, 0.9).unwrap_err().contains("1 to 131072"));
        }
    }

    #[test]
    fn halves_are_widened_and_8_bit_floats_have_scales() {
        let of = |dtype| weight_bytes(&WeightBytes::of([("w".to_owned(), dtype, 3200)]));
        assert_eq!([Dtype::Bf16, Dtype::F16, Dtype::F8E4M3].map(of), [3200, 6400, 3300]);
    }
}
