//! AdamW and Muon with parameter groups, clipping by the global norm, and learning-rate schedules (spec §2.3, 4.2 and 4.3).

use keye_backend::Isa;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::muon;
use crate::ops::kernels;
use crate::params::{Gradients, Layout, Params};

/// How the learning rate goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Highest learning rate.
    pub peak: f64,
    /// The last one; equal to `peak` it stays constant after the warm-up.
    pub min: f64,
    /// Steps over which it rises linearly from 0.
    pub warmup: u64,
    /// Steps in all.
    pub steps: u64,
}

impl Schedule {
    /// The rate after `step` steps: `peak step / warmup`, then `peak (0.5 (1 + cos(pi p)) (1 - r) + r)`, `r = min / peak`.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        let length = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let p = ((step - self.warmup) as f64 / length).min(1.0);
        let r = self.min / self.peak;
        self.peak * (0.5 * (1.0 + (std::f64::consts::PI * p).cos()) * (1.0 - r) + r)
    }
}

/// How gradients become steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// AdamW for every tensor.
    #[default]
    AdamW,
    /// Muon for the matrices inside layers and the projector, AdamW for the rest: embeddings, output head, vectors.
    Muon,
}

/// What one group of tensors has of its own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// How its gradients become steps.
    pub optimizer: Optimizer,
    /// Factor of the learning rate.
    pub lr_scale: f32,
    /// Weight decay.
    pub decay: f32,
}

/// The group of every tensor: the vision tower learns at `vision_lr` times the rate; vectors (norms, biases) do not decay.
pub fn groups(layout: &Layout, optimizer: Optimizer, vision_lr: f32, decay: f32) -> Vec<Group> {
    let group = |tensor: &keye_model::TensorShape| {
        let is_matrix = tensor.shape.len() > 1 && !tensor.name.ends_with("bias");
        let inside = is_matrix && (tensor.name.contains(".layers.") || tensor.name.starts_with("mlp_AR."));
        Group {
            optimizer: if inside { optimizer } else { Optimizer::AdamW },
            lr_scale: if tensor.name.starts_with("visual.") { vision_lr } else { 1.0 },
            decay: if is_matrix { decay } else { 0.0 },
        }
    };
    layout.tensors().iter().map(group).collect()
}

/// What an optimiser remembers. AdamW: betas 0.9 and 0.95, epsilon 1e-8; Muon: momentum 0.95, of Nesterov's kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Means {
    /// Running means of gradients.
    pub m: Vec<f32>,
    /// Running means of their squares; zero for what Muon trains.
    pub v: Vec<f32>,
    /// Steps taken.
    pub steps: u64,
}

const BETAS: [f32; 2] = [0.9, 0.95];
const EPS: f32 = 1e-8;
/// Elements of a task.
const PART: usize = 1 << 13;

impl Means {
    /// No steps taken yet.
    pub fn new(layout: &Layout) -> Self {
        Self { m: vec![0.0; layout.len()], v: vec![0.0; layout.len()], steps: 0 }
    }

    /// Takes a step with gradients whose global norm is brought down to `clip` first; returns the norm before. Where the
    /// norm is not finite nothing is changed.
    pub fn step(
        &mut self,
        isa: Isa,
        params: &mut Params,
        gradients: &Gradients,
        groups: &[Group],
        lr: f64,
        clip: f64,
    ) -> f64 {
        let parts: Vec<f64> =
            gradients.values.par_chunks(PART).map(|g| g.iter().map(|g| f64::from(*g).powi(2)).sum()).collect();
        let norm = parts.iter().sum::<f64>().sqrt();
        if !norm.is_finite() {
            return norm;
        }
        self.steps += 1;
        let factor = if norm > clip { (clip / norm) as f32 } else { 1.0 };
        let correction = |beta: f32| (1.0 / (1.0 - f64::from(beta).powf(self.steps as f64))) as f32;
        let (m_scale, v_scale) = (correction(BETAS[0]), correction(BETAS[1]));
        let layout = params.layout.clone();
        let [mut values, mut m, mut v] = [&mut params.values[..], &mut self.m, &mut self.v];
        let mut jobs = Vec::new();
        for (i, group) in groups.iter().enumerate() {
            let range = layout.range(i);
            let [p, m, v] = [&mut values, &mut m, &mut v].map(|rest| rest.split_off_mut(..range.len()));
            let (Some(p), Some(m), Some(v)) = (p, m, v) else { break };
            if gradients.trained()[i] {
                jobs.push((&layout.tensors()[i], group, p, &gradients.values[range], m, v));
            }
        }
        jobs.into_par_iter().for_each(|(tensor, group, p, g, m, v)| {
            let lr = (lr * f64::from(group.lr_scale)) as f32;
            match group.optimizer {
                Optimizer::AdamW => {
                    kernels::adamw(isa, p, g, m, v, factor, BETAS, m_scale, v_scale, EPS, lr, group.decay);
                }
                Optimizer::Muon => muon::step(isa, tensor.shape[0], p, g, m, factor, lr, group.decay),
            }
        });
        norm
    }
}
