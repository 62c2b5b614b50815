//! How a model would lie on several devices: weights and cache of each, from sizes alone.
//!
//! As `--tp` does it (`docs/parallel.md`): matrices of the decoder are divided evenly, norms, routers, the indexer and the narrow
//! projections of latent attention are on every device. So that no device is short, each is counted as the first, which alone
//! has tower, projector and the table of embeddings. Keys and values are divided by their heads, as far as there are heads;
//! index keys and a latent cache have none and are whole on every device.

use std::collections::BTreeMap;

use keye_backend::{BLOCK_TOKENS, KvDtype};
use keye_model::{cache_spec, stored_layout};
use keye_processor::{Checkpoint, Dtype, ModelConfig};
use serde::Serialize;

/// Number of devices and gigabytes of each.
const SETS: [(u64, u64); 6] = [(1, 24), (1, 80), (8, 80), (8, 141), (16, 80), (32, 80)];
/// Per cent of a device's memory for weights and cache; the rest is for activations (`docs/spec/keye-vl-671b.md` §7).
const USED: u64 = 80;

/// Bytes of a model's weights.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// By stored type.
    pub by_type: BTreeMap<Dtype, u64>,
    /// That devices divide among themselves.
    pub divided: u64,
    /// That every device has, or the first alone.
    pub everywhere: u64,
    /// Of experts that tokens are sent to: of these a token reads a few.
    pub experts: u64,
}

impl WeightBytes {
    /// Sums up tensors: name, type, bytes.
    pub fn of(tensors: impl IntoIterator<Item = (String, Dtype, u64)>) -> Self {
        let mut sum = Self::default();
        for (name, dtype, bytes) in tensors {
            *sum.by_type.entry(dtype).or_default() += bytes;
            *if is_divided(&name) { &mut sum.divided } else { &mut sum.everywhere } += bytes;
            if name.contains(".mlp.experts.") {
                sum.experts += bytes;
            }
        }
        sum
    }

    /// Of what inference uses of a checkpoint, scales of 8-bit weights included; what is missing counts nothing.
    pub fn stored(config: &ModelConfig, checkpoint: &Checkpoint) -> Self {
        Self::of(stored_layout(config, checkpoint).into_iter().flat_map(|tensor| {
            let scales = format!("{}_scale_inv", tensor.name);
            let size = |name: String| checkpoint.get(&name).map(|t| (name, t.dtype, t.bytes.len() as u64));
            [tensor.name, scales].into_iter().filter_map(size)
        }))
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.divided + self.everywhere
    }

    /// Those on the first of `devices`.
    fn on_first(&self, devices: u64) -> u64 {
        self.divided.div_ceil(devices) + self.everywhere
    }
}

/// Whether `keye-model` loads a part of it on each device; a test holds this to what it loads.
fn is_divided(name: &str) -> bool {
    const WHOLE: [&str; 6] =
        ["embed_tokens.", ".q_a_proj.", ".kv_a_proj_with_mqa.", ".sa_indexer.", ".mlp.gate.", "norm."];
    let decoder = name.starts_with("model.") || name.starts_with("lm_head.");
    decoder && !WHOLE.iter().any(|part| name.contains(part))
}

/// A model on some devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DevicePlan {
    /// How many.
    pub devices: u64,
    /// Memory of one.
    pub device_bytes: u64,
    /// Of that, what weights and cache may take.
    pub usable_bytes: u64,
    /// Weights on each.
    pub weight_bytes: u64,
    /// Whether they leave room for a sequence of some length.
    pub fits: bool,
    /// Cache of one token on each device.
    pub cache_bytes_per_token: u64,
    /// Tokens that fit beside the weights, a device's.
    pub cache_tokens: u64,
}

/// Plans for devices of common sizes, the cache in bf16.
pub fn device_plans(config: &ModelConfig, weights: &WeightBytes) -> Vec<DevicePlan> {
    let plan = |(devices, gigabytes): (u64, u64)| {
        let device_bytes = gigabytes * 1_000_000_000;
        let usable_bytes = device_bytes / 100 * USED;
        let weight_bytes = weights.on_first(devices);
        let spec = cache_spec(&config.text, KvDtype::Bf16, usize::try_from(devices).unwrap_or(1));
        let cache_bytes_per_token = (spec.block_bytes() / BLOCK_TOKENS) as u64;
        let cache_tokens = usable_bytes.saturating_sub(weight_bytes) / cache_bytes_per_token.max(1);
        let fits = cache_tokens >= BLOCK_TOKENS as u64;
        DevicePlan { devices, device_bytes, usable_bytes, weight_bytes, fits, cache_bytes_per_token, cache_tokens }
    };
    SETS.into_iter().map(plan).collect()
}

#[cfg(test)]
mod counting;

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use keye_model::{KeyeModel, LoadOptions, ParallelModel, RankDevice, Runner};

    use super::counting::{Counting, Kept};
    use super::*;
    use crate::MemoryPlan;
    use crate::presets::{Preset, Sizes};

    fn plans(preset: Preset) -> (WeightBytes, Vec<DevicePlan>) {
        let dtype = preset.published_dtype();
        let tensors = preset.used_tensors(dtype).unwrap();
        let bytes = WeightBytes::of(tensors.into_iter().map(|t| {
            let bytes = t.bytes().unwrap();
            (t.name, t.dtype, bytes)
        }));
        let plans = device_plans(&Sizes::from(preset).model_config(dtype).unwrap(), &bytes);
        (bytes, plans)
    }

    /// 671B (spec §1 and §7): FP8 weights, 16 devices of 80 GB, 68.6 KiB of cache a token.
    #[test]
    fn the_largest_model_needs_sixteen_devices_of_80_gb() {
        let (bytes, plans) = plans(Preset::KeyeVl671b);
        // 61 layers: attention 187,105,280 weights each; 3 dense, 58 with 257 experts of 3 * 7168 * 2048.
        let attention = 7168 * 1536 + 1536 * 24_576 + 7168 * 576 + 512 * 32_768 + 16_384 * 7168;
        let fp8: u64 = 61 * attention + 3 * 3 * 7168 * 18_432 + 58 * 257 * 3 * 7168 * 2048;
        assert_eq!(bytes.by_type[&Dtype::F8E4M3], fp8);
        assert!((670e9..680e9).contains(&(bytes.total() as f64)), "{}", bytes.total());
        assert!(bytes.experts > bytes.total() / 100 * 96);
        let fits: Vec<_> =
            plans.iter().map(|plan| (plan.devices, plan.device_bytes / 1_000_000_000, plan.fits)).collect();
        assert_eq!(
            fits,
            [(1, 24, false), (1, 80, false), (8, 80, false), (8, 141, true), (16, 80, true), (32, 80, true)]
        );
        assert!(plans.iter().all(|plan| plan.cache_bytes_per_token == 61 * 1152));
        let sixteen = &plans[4];
        assert_eq!(sixteen.usable_bytes, 64_000_000_000);
        assert!((44e9..47e9).contains(&(sixteen.weight_bytes as f64)), "{sixteen:?}");
        assert_eq!(sixteen.cache_tokens, (sixteen.usable_bytes - sixteen.weight_bytes) / (61 * 1152));
    }

    #[test]
    fn keys_and_values_are_divided_by_their_heads() {
        let (bytes, plans) = plans(Preset::KeyeVl1_5_8b);
        assert_eq!(plans[1].weight_bytes, bytes.total());
        // 36 layers of 2 * 8 heads of 128 in bf16; eight heads make no more than eight parts.
        assert_eq!(plans[1].cache_bytes_per_token, 36 * 2 * 8 * 128 * 2);
        assert_eq!(plans[2].cache_bytes_per_token, plans[1].cache_bytes_per_token / 8);
        assert_eq!(plans[5].cache_bytes_per_token, plans[2].cache_bytes_per_token);
        assert!(plans[0].fits && plans[1].fits);
    }

    const TOKENS: usize = 3 * BLOCK_TOKENS;

    /// What each of `ranks` devices keeps of the model in `dir`, and what the model says that a block takes on all of them.
    fn loaded(dir: &Path, config: &ModelConfig, ranks: usize) -> (Vec<Kept>, usize) {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let (processor, options) =
            (config.facts().media.processor, LoadOptions { cache_tokens: TOKENS, kv_dtype: KvDtype::Bf16 });
        let devices: Vec<Counting> = (0..ranks).map(|rank| Counting { rank, ranks, ..Counting::default() }).collect();
        let device =
            |backend: &Counting| RankDevice { backend: backend.clone(), collective: Arc::new(backend.clone()) };
        let info = match &devices[..] {
            [one] => KeyeModel::load(one.clone(), config, &processor, &checkpoint, options).unwrap().info().clone(),
            several => {
                let several = several.iter().map(device).collect();
                ParallelModel::load(several, None, config, &processor, &checkpoint, options).unwrap().info().clone()
            }
        };
        let kept = devices.iter().map(|device| std::mem::take(&mut *device.kept.lock().unwrap()));
        (kept.collect(), info.block_bytes)
    }

    /// Dense, with experts and an indexer, and with latents: weights and cache of a plan are those that devices keep.
    #[test]
    fn plans_are_what_devices_keep() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
        let latent = tempfile::tempdir().unwrap();
        let latent = latent.path().join("model");
        crate::random_checkpoint::write(&latent, Preset::Keye671bTiny, Dtype::F32, 1, &mut |_, _| true).unwrap();
        for dir in [fixtures.join("keye-1_5-tiny/model"), fixtures.join("keye-2-tiny/model"), latent] {
            let config = ModelConfig::load(&dir).unwrap();
            let checkpoint = Checkpoint::open(&dir).unwrap();
            let weights = WeightBytes::stored(&config, &checkpoint);
            for ranks in [1, 2] {
                let (kept, block_bytes) = loaded(&dir, &config, ranks);
                for tensor in stored_layout(&config, &checkpoint) {
                    // The ranks' parts make up what they divide; of the rest the first has all.
                    let holders = if is_divided(&tensor.name) { &kept[..] } else { &kept[..1] };
                    let found: u64 = holders.iter().filter_map(|kept| kept.weights.get(&tensor.name)).sum();
                    let stored = checkpoint.get(&tensor.name).unwrap().bytes.len();
                    assert_eq!(found, stored as u64, "{} on {ranks}", tensor.name);
                }
                // Beside the patch embedding as stored there is one for bytes.
                let made = |name: &str| name.ends_with("(folded)");
                let first = kept[0].weights.iter().filter(|(name, _)| !made(name)).map(|(_, bytes)| bytes).sum::<u64>();
                assert_eq!(first, weights.on_first(ranks as u64), "{}", dir.display());

                let spec = cache_spec(&config.text, KvDtype::Bf16, ranks);
                let of_one = (spec.block_bytes() * TOKENS / BLOCK_TOKENS) as u64;
                assert!(of_one > 0 && kept.iter().all(|kept| kept.cache == of_one), "{kept:?}");
                let plan = MemoryPlan::new(&config, &checkpoint, KvDtype::Bf16, TOKENS, ranks);
                assert_eq!(plan.kv + plan.index_keys, of_one * ranks as u64);
                assert_eq!(block_bytes, spec.block_bytes() * ranks);
            }
        }
    }
}
