//! Random parameters: each tensor's values depend on the seed and its name only.

use std::sync::Arc;

use crate::params::{Layout, Params};

/// Scale and bias with which SigLIP begins.
const LOGIT_SCALE: f32 = std::f32::consts::LN_10;
const LOGIT_BIAS: f32 = -10.0;
/// Deviation of embeddings.
const EMBEDDING: f32 = 0.02;

pub(super) fn init(layout: &Arc<Layout>, layers: usize, seed: u64) -> Params {
    let mut params = Params::zeros(layout.clone());
    for (i, tensor) in layout.tensors().iter().enumerate() {
        let values = &mut params.values[layout.range(i)];
        let name = tensor.name.as_str();
        let inputs: usize = tensor.shape.iter().skip(1).product();
        // What is added to the residual stream starts small, the more layers add to it.
        let residual = [".o_proj.", ".down_proj.", ".out_proj.", ".fc2."].iter().any(|part| name.contains(part));
        let deviation = match name {
            "siglip.logit_scale" => {
                values.fill(LOGIT_SCALE);
                continue;
            }
            "siglip.logit_bias" => {
                values.fill(LOGIT_BIAS);
                continue;
            }
            _ if name.contains("norm") && name.ends_with(".weight") => {
                values.fill(1.0);
                continue;
            }
            _ if name.ends_with("bias") => continue,
            _ if name.contains("embed_tokens") || name.contains("position_embedding") => EMBEDDING,
            _ if name.ends_with("probe") => EMBEDDING,
            _ if residual => (inputs as f32 * 2.0 * layers.max(1) as f32).powf(-0.5),
            _ => (inputs as f32).powf(-0.5),
        };
        let mut random = Random::new(seed, name);
        values.iter_mut().for_each(|v| *v = deviation * random.normal());
    }
    params
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn new(seed: u64, name: &str) -> Self {
        // FNV-1a
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        Self(hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In (0, 1].
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Box and Muller.
    fn normal(&mut self) -> f32 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }
}
