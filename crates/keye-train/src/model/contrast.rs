//! Stage 0: SigLIP's sigmoid loss (spec §2.2), its attention-pooling head, and a text side made of the language model's
//! mean-pooled states.

use keye_backend::Isa;
use keye_backend::matmul::{Matrix, Old, matmul};
use keye_model::TensorShape;
use keye_processor::ModelConfig;

use super::vision::{layer_norm, linear};
use crate::TrainError;
use crate::ops::attention::{Attended, Attention, Span};
use crate::ops::linear::{Linear, Precision};
use crate::ops::norm::{Norm, Stats};
use crate::ops::{heads, kernels, rows};
use crate::pack::Pack;
use crate::params::{Gradients, Layout, Params, Slot};

const HEAD: &str = "visual.vision_model.head";
const TEXT_PROJECTION: &str = "siglip.text_projection.weight";
const LOGIT_SCALE: &str = "siglip.logit_scale";
const LOGIT_BIAS: &str = "siglip.logit_bias";

/// Tensors beside the model's own; the engine does not use them.
pub(crate) fn tensors(config: &ModelConfig) -> Vec<TensorShape> {
    let (d, i) = (config.vision.hidden_size, config.vision.intermediate_size);
    let head = |name: &str, shape: &[usize]| TensorShape { name: format!("{HEAD}.{name}"), shape: shape.to_vec() };
    vec![
        head("probe", &[1, 1, d]),
        head("attention.in_proj_weight", &[3 * d, d]),
        head("attention.in_proj_bias", &[3 * d]),
        head("attention.out_proj.weight", &[d, d]),
        head("attention.out_proj.bias", &[d]),
        head("layernorm.weight", &[d]),
        head("layernorm.bias", &[d]),
        head("mlp.fc1.weight", &[i, d]),
        head("mlp.fc1.bias", &[i]),
        head("mlp.fc2.weight", &[d, i]),
        head("mlp.fc2.bias", &[d]),
        TensorShape { name: TEXT_PROJECTION.into(), shape: vec![d, config.text.hidden_size] },
        TensorShape { name: LOGIT_SCALE.into(), shape: vec![1] },
        TensorShape { name: LOGIT_BIAS.into(), shape: vec![1] },
    ]
}

/// Whether a tensor is one of [`tensors`].
pub(crate) fn is_extra(name: &str) -> bool {
    name.starts_with("siglip.") || name.starts_with(HEAD)
}

/// Loss and gradients of [`sigmoid_loss`].
#[derive(Debug, Clone, PartialEq)]
pub struct SigmoidLoss {
    /// The loss.
    pub loss: f64,
    /// Gradient of the images' embeddings `[b, d]`.
    pub dx: Vec<f32>,
    /// Gradient of the texts' embeddings `[b, d]`.
    pub dy: Vec<f32>,
    /// Gradient of the logarithm of the scale.
    pub dscale: f32,
    /// Gradient of the bias.
    pub dbias: f32,
}

/// `-(1/b) sum_ij log sigmoid(z_ij (e^log_scale <x_i, y_j> + bias))`, z 1 for i = j and -1 elsewhere, for normalised x and
/// y `[b, d]`. Texts are taken `chunk` at a time, as ranks that exchange them would; the value does not depend on it.
pub fn sigmoid_loss(isa: Isa, x: &[f32], y: &[f32], d: usize, log_scale: f32, bias: f32, chunk: usize) -> SigmoidLoss {
    let b = x.len() / d;
    let scale = log_scale.exp();
    let (mut dx, mut dy) = (vec![0.0; x.len()], vec![0.0; y.len()]);
    let (mut loss, mut dscale, mut dbias) = (0.0f64, 0.0f64, 0.0f64);
    for first in (0..b).step_by(chunk) {
        let n = chunk.min(b - first);
        let texts = Matrix::new(&y[first * d..(first + n) * d], n, d);
        let images = Matrix::new(x, b, d);
        let mut dots = vec![0.0; b * n];
        matmul(isa, images, texts.t(), &mut dots, Old::Replace);
        for (i, row) in dots.chunks_exact_mut(n).enumerate() {
            for (j, dot) in row.iter_mut().enumerate() {
                let z = if i == first + j { 1.0 } else { -1.0 };
                let s = z * (f64::from(scale * *dot) + f64::from(bias));
                // log(1 + e^-s), stable on both sides.
                loss += (-s).max(0.0) + (-s.abs()).exp().ln_1p();
                let ds = -z / (1.0 + s.exp()) / b as f64;
                dscale += ds * f64::from(scale * *dot);
                dbias += ds;
                *dot = (ds * f64::from(scale)) as f32;
            }
        }
        let ds = Matrix::new(&dots, b, n);
        matmul(isa, ds, texts, &mut dx, Old::Keep);
        matmul(isa, ds.t(), images, &mut dy[first * d..(first + n) * d], Old::Keep);
    }
    SigmoidLoss { loss: loss / b as f64, dx, dy, dscale: dscale as f32, dbias: dbias as f32 }
}

/// Rows divided by their lengths, and the lengths.
fn normalise(isa: Isa, x: &mut [f32], d: usize) -> Vec<f32> {
    x.chunks_exact_mut(d)
        .map(|row| {
            let length = kernels::dot(isa, row, row).sqrt().max(1e-12);
            row.iter_mut().for_each(|v| *v /= length);
            length
        })
        .collect()
}

/// The reverse, in place: `dx` becomes `(dx - x <x, dx>) / length`.
fn normalise_backward(isa: Isa, x: &[f32], lengths: &[f32], d: usize, dx: &mut [f32]) {
    for ((x, length), dx) in x.chunks_exact(d).zip(lengths).zip(dx.chunks_exact_mut(d)) {
        let along = kernels::dot(isa, x, dx);
        dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = (*dx - x * along) / length);
    }
}

/// Pooling head, text projection, scale and bias.
pub(crate) struct Contrast {
    heads: usize,
    probe: Slot,
    in_proj: [Linear; 3],
    out_proj: Linear,
    layernorm: Norm,
    fc1: Linear,
    fc2: Linear,
    text_projection: Linear,
    logit_scale: Slot,
    logit_bias: Slot,
}

/// What pooling leaves for its reverse.
struct Pooled {
    spans: Vec<Span>,
    probes: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Attended,
    merged: Vec<f32>,
    x: Vec<f32>,
    stats: Stats,
    h: Vec<f32>,
    wide: Vec<f32>,
    active: Vec<f32>,
}

impl Contrast {
    pub(crate) fn new(layout: &Layout, config: &ModelConfig, precision: Precision) -> Result<Self, TrainError> {
        let d = config.vision.hidden_size;
        let weight = layout.slot(&format!("{HEAD}.attention.in_proj_weight"))?;
        let bias = layout.slot(&format!("{HEAD}.attention.in_proj_bias"))?;
        let part = |i: usize| Linear { weight: weight.part(i * d, d), bias: Some(bias.columns(i * d, d)), precision };
        Ok(Self {
            heads: config.vision.num_attention_heads,
            probe: layout.slot(&format!("{HEAD}.probe"))?,
            in_proj: [part(0), part(1), part(2)],
            out_proj: linear(layout, precision, &format!("{HEAD}.attention.out_proj"))?,
            layernorm: layer_norm(layout, &format!("{HEAD}.layernorm"), config.vision.layer_norm_eps)?,
            fc1: linear(layout, precision, &format!("{HEAD}.mlp.fc1"))?,
            fc2: linear(layout, precision, &format!("{HEAD}.mlp.fc2"))?,
            text_projection: Linear { weight: layout.slot(TEXT_PROJECTION)?, bias: None, precision },
            logit_scale: layout.slot(LOGIT_SCALE)?,
            logit_bias: layout.slot(LOGIT_BIAS)?,
        })
    }

    fn attention(&self) -> Attention {
        Attention { heads: self.heads, kv_heads: self.heads, d: self.probe.len() / self.heads, causal: false }
    }

    /// One embedding an image, over its own patches only: `[images, D]`.
    fn pool(&self, isa: Isa, params: &Params, patches: &[f32], cu_seqlens: &[u32]) -> (Vec<f32>, Pooled) {
        let Attention { heads, d, .. } = self.attention();
        let images = cu_seqlens.len() - 1;
        let span = |i: usize| Span { queries: i..i + 1, keys: cu_seqlens[i] as usize..cu_seqlens[i + 1] as usize };
        let spans: Vec<Span> = (0..images).map(span).collect();
        let probes = params.get(self.probe).repeat(images);
        let project = |part: usize, x: &[f32]| {
            heads::split(isa, &self.in_proj[part].forward(isa, params, x), heads, d, None, None)
        };
        let (q, k, v) = (project(0, &probes), project(1, patches), project(2, patches));
        let attended = self.attention().forward(isa, &q, &k, &v, &spans);
        let merged = heads::merge(&attended.out, heads, d);
        let x = self.out_proj.forward(isa, params, &merged);
        let (h, stats) = self.layernorm.forward(isa, params, &x);
        let wide = self.fc1.forward(isa, params, &h);
        let mut active = vec![0.0; wide.len()];
        rows::each_part(&mut active, |at, y| kernels::gelu_tanh(isa, &wide[at..at + y.len()], y));
        let mut out = x.clone();
        self.fc2.add_forward(isa, params, &active, &mut out);
        (out, Pooled { spans, probes, q, k, v, attended, merged, x, stats, h, wide, active })
    }

    /// The gradient of the patches.
    fn pool_backward(
        &self,
        isa: Isa,
        params: &Params,
        gradients: &mut Gradients,
        patches: &[f32],
        p: Pooled,
        mut dx: Vec<f32>,
    ) -> Vec<f32> {
        let Attention { heads, d, .. } = self.attention();
        self.fc2.backward_params(isa, gradients, &p.active, &dx);
        let mut dwide = vec![0.0; p.wide.len()];
        self.fc2.backward_input(isa, params, &dx, &mut dwide, Old::Replace);
        rows::each_part(&mut dwide, |at, dy| kernels::gelu_tanh_backward(isa, &p.wide[at..at + dy.len()], dy));
        self.fc1.backward_params(isa, gradients, &p.h, &dwide);
        let mut dh = vec![0.0; p.h.len()];
        self.fc1.backward_input(isa, params, &dwide, &mut dh, Old::Replace);
        self.layernorm.backward(isa, params, gradients, &p.x, &p.stats, &dh, &mut dx);
        self.out_proj.backward_params(isa, gradients, &p.merged, &dx);
        let mut dmerged = vec![0.0; p.merged.len()];
        self.out_proj.backward_input(isa, params, &dx, &mut dmerged, Old::Replace);
        let dout = heads::split(isa, &dmerged, heads, d, None, None);
        let [dq, dk, dv] = self.attention().backward(isa, &p.q, &p.k, &p.v, &p.spans, &p.attended, &dout);
        let dq = heads::merge(&dq, heads, d);
        self.in_proj[0].backward_params(isa, gradients, &p.probes, &dq);
        let mut dprobes = vec![0.0; p.probes.len()];
        self.in_proj[0].backward_input(isa, params, &dq, &mut dprobes, Old::Replace);
        if let Some(dprobe) = gradients.get_mut(self.probe) {
            rows::add_column_sums(isa, &dprobes, dprobe);
        }
        let mut dpatches = vec![0.0; patches.len()];
        for (part, dy) in [(1, dk), (2, dv)] {
            let dy = heads::merge(&dy, heads, d);
            self.in_proj[part].backward_params(isa, gradients, patches, &dy);
            self.in_proj[part].backward_input(isa, params, &dy, &mut dpatches, Old::Keep);
        }
        dpatches
    }

    #[expect(clippy::too_many_arguments, reason = "an operation and its operands")]
    /// Loss and, with gradients, those of the tower's patches and of the texts' mean states.
    pub(crate) fn step(
        &self,
        isa: Isa,
        params: &Params,
        gradients: Option<&mut Gradients>,
        pack: &Pack,
        patches: &[f32],
        texts: &[f32],
        scale: f32,
    ) -> (f64, Option<[Vec<f32>; 2]>) {
        let d = self.probe.len();
        let (mut x, pooled) = self.pool(isa, params, patches, &pack.vit_cu_seqlens());
        let mut y = self.text_projection.forward(isa, params, texts);
        let (x_lengths, y_lengths) = (normalise(isa, &mut x, d), normalise(isa, &mut y, d));
        let (log_scale, bias) = (params.get(self.logit_scale)[0], params.get(self.logit_bias)[0]);
        let mut loss = sigmoid_loss(isa, &x, &y, d, log_scale, bias, 256);
        let Some(gradients) = gradients else { return (loss.loss, None) };
        for (slot, gradient) in [(self.logit_scale, loss.dscale), (self.logit_bias, loss.dbias)] {
            if let Some(sum) = gradients.get_mut(slot) {
                sum[0] += gradient * scale;
            }
        }
        loss.dx.iter_mut().chain(&mut loss.dy).for_each(|g| *g *= scale);
        normalise_backward(isa, &x, &x_lengths, d, &mut loss.dx);
        normalise_backward(isa, &y, &y_lengths, d, &mut loss.dy);
        self.text_projection.backward_params(isa, gradients, texts, &loss.dy);
        let mut dtexts = vec![0.0; texts.len()];
        self.text_projection.backward_input(isa, params, &loss.dy, &mut dtexts, Old::Replace);
        let dpatches = self.pool_backward(isa, params, gradients, patches, pooled, loss.dx);
        (loss.loss, Some([dpatches, dtexts]))
    }
}
