//! Random parameters: each tensor's values depend on the seed and its name only.

use std::sync::Arc;

use crate::TrainError;
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

/// Adds sines and cosines of row and column to the tower's position embeddings (`[side * side, D]`, a square of patches), half
/// of the width each, from a quarter of a period across the square to two.
pub(super) fn add_sines(params: &mut Params, amplitude: f32) -> Result<(), TrainError> {
    if amplitude == 0.0 {
        return Ok(());
    }
    const NAME: &str = "visual.vision_model.embeddings.position_embedding.weight";
    let table = params.layout.find(NAME).map(|i| params.layout.tensors()[i].shape.clone());
    let Some(&[positions, width]) = table.as_deref() else {
        return Err(TrainError::Model(format!("sines: no matrix {NAME} to add them to")));
    };
    let side = positions.isqrt();
    let waves = width / 4;
    let values = params.tensor_mut(NAME).unwrap_or_default();
    for (at, row) in values.chunks_exact_mut(width).enumerate() {
        for (axis, half) in [at / side, at % side].into_iter().zip(row.chunks_exact_mut(waves * 2)) {
            let (sines, cosines) = half.split_at_mut(waves);
            for (wave, (sine, cosine)) in sines.iter_mut().zip(cosines).enumerate() {
                let periods = 0.25 * 8f32.powf(wave as f32 / waves as f32);
                let angle = std::f32::consts::TAU * periods * (axis as f32 + 0.5) / side as f32;
                *sine += amplitude * angle.sin();
                *cosine += amplitude * angle.cos();
            }
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use keye_model::TensorShape;

    use super::*;

    fn params(name: &str) -> Params {
        let name = format!("visual.vision_model.embeddings.{name}.weight");
        Params::zeros(Arc::new(Layout::new(vec![TensorShape { name, shape: vec![16, 8] }])))
    }

    #[test]
    fn sines_tell_rows_from_columns_and_near_from_far() {
        let mut params = params("position_embedding");
        add_sines(&mut params, 0.5).unwrap();
        let row = |at: usize| &params.values[at * 8..][..8];
        // A square of 4 x 4: half of the width is the row's, half the column's.
        assert!((0..16).all(|at| row(at)[..4] == row(at / 4 * 4)[..4] && row(at)[4..] == row(at % 4)[4..]));
        let apart = |a: usize, b: usize| row(a).iter().zip(row(b)).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
        assert!((1..3).all(|at| apart(0, at) < apart(0, at + 1) && apart(0, at * 4) < apart(0, at * 4 + 4)));
        // A quarter of a period across four columns: the first is at a thirty-second of one.
        let first = std::f32::consts::TAU / 32.0;
        assert!((row(0)[4] - 0.5 * first.sin()).abs() < 1e-6 && (row(0)[6] - 0.5 * first.cos()).abs() < 1e-6);
    }

    #[test]
    fn sines_need_a_table() {
        let mut params = params("other");
        let error = add_sines(&mut params, 0.5).unwrap_err().to_string();
        assert!(error.contains("position_embedding"), "{error}");
        add_sines(&mut params, 0.0).unwrap();
        assert!(params.values.iter().all(|value| *value == 0.0));
    }
}
