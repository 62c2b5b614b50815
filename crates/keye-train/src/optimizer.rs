//! AdamW and Muon with parameter groups, clipping by the global norm, and learning-rate schedules (spec §2.3, 4.2 and 4.3).

use keye_backend::BackendError;
use keye_backend::training::{AdamW, Device, Update};
use serde::{Deserialize, Serialize};

use crate::muon::Muon;
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
pub struct Means<A = Vec<f32>> {
    /// Running means of gradients.
    pub m: A,
    /// Running means of their squares; zero for what Muon trains.
    pub v: A,
    /// Steps taken.
    pub steps: u64,
}

const BETAS: [f32; 2] = [0.9, 0.95];
const EPS: f32 = 1e-8;

impl Means {
    /// No steps taken yet.
    pub fn new(layout: &Layout) -> Self {
        Self { m: vec![0.0; layout.len()], v: vec![0.0; layout.len()], steps: 0 }
    }

    /// To a device.
    pub fn onto<D: Device>(self, device: &D) -> Result<Means<D::Array>, BackendError> {
        Ok(Means { m: device.array(self.m)?, v: device.array(self.v)?, steps: self.steps })
    }
}

impl<A> Means<A> {
    /// Takes a step with gradients whose global norm is brought down to `clip` first; returns the norm before. Where the
    /// norm is not finite nothing is changed.
    pub fn step<D: Device<Array = A>>(
        &mut self,
        device: &D,
        params: &mut Params<A>,
        gradients: &Gradients<A>,
        groups: &[Group],
        lr: f64,
        clip: f64,
    ) -> Result<f64, BackendError> {
        let norm = device.square_sum(gradients.view())?.sqrt();
        if !norm.is_finite() {
            return Ok(norm);
        }
        self.steps += 1;
        let clip = if norm > clip { (clip / norm) as f32 } else { 1.0 };
        let correction = |beta: f32| (1.0 / (1.0 - f64::from(beta).powf(self.steps as f64))) as f32;
        let adamw = AdamW { clip, betas: BETAS, corrections: BETAS.map(correction), eps: EPS };
        let layout = params.layout.clone();
        let (mut updates, mut matrices) = (Vec::new(), Vec::new());
        for (i, group) in groups.iter().enumerate().filter(|(i, _)| gradients.trained()[*i]) {
            let (range, lr) = (layout.range(i), (lr * f64::from(group.lr_scale)) as f32);
            match group.optimizer {
                Optimizer::AdamW => updates.push(Update { range, lr, decay: group.decay }),
                Optimizer::Muon => {
                    let rows = layout.tensors()[i].shape[0];
                    let (start, cols) = (range.start, range.len() / rows);
                    matrices.push(Muon { start, rows, cols, lr, decay: group.decay, clip });
                }
            }
        }
        device.adamw(&mut params.values, &gradients.values, &mut self.m, &mut self.v, adamw, &updates)?;
        for matrix in matrices {
            matrix.step(device, &mut params.values, &gradients.values, &mut self.m)?;
        }
        Ok(norm)
    }
}
