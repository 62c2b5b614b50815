//! Stage 0: SigLIP's sigmoid loss (spec §2.2), its attention-pooling head, and a text side made of the language model's
//! mean-pooled states.

use keye_backend::Isa;
use keye_backend::matmul::{Matrix, Old, matmul};
use keye_backend::training::{AttentionShape, Device, Gelu, Precision, Span, View};
use keye_model::TensorShape;
use keye_processor::ModelConfig;

use super::vision::{layer_norm, linear};
use crate::TrainError;
use crate::cpu::kernels;
use crate::layers::linear::Linear;
use crate::layers::norm::Norm;
use crate::layers::{Result, copy};
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
struct Pooled<D: Device> {
    spans: D::Spans,
    probes: D::Array,
    q: D::Array,
    k: D::Array,
    v: D::Array,
    /// What attention gave, and its logarithms of sums.
    attended: D::Array,
    lse: D::Array,
    merged: D::Array,
    x: D::Array,
    stats: D::Array,
    h: D::Array,
    wide: D::Array,
    active: D::Array,
}

impl Contrast {
    pub(crate) fn new(
        layout: &Layout,
        config: &ModelConfig,
        precision: Precision,
    ) -> std::result::Result<Self, TrainError> {
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

    fn attention(&self) -> AttentionShape {
        let d = self.probe.len() / self.heads;
        AttentionShape { heads: self.heads, kv_heads: self.heads, d, causal: false }
    }

    /// One embedding an image, over its own patches only: `[images, D]`.
    fn pool<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        patches: &D::Array,
        cu_seqlens: &[u32],
    ) -> Result<(D::Array, Pooled<D>)> {
        let AttentionShape { heads, d, .. } = self.attention();
        let images = cu_seqlens.len() - 1;
        let span = |i: usize| Span { queries: i..i + 1, keys: cu_seqlens[i] as usize..cu_seqlens[i + 1] as usize };
        let spans = device.spans((0..images).map(span).collect())?;
        let probes = device.repeat(params.get(self.probe), images)?;
        let project = |part: usize, x: &D::Array| {
            device.split_heads(&self.in_proj[part].forward(device, params, x)?, heads, d, None, None)
        };
        let (q, k, v) = (project(0, &probes)?, project(1, patches)?, project(2, patches)?);
        let (attended, lse) = device.attention(self.attention(), &q, &k, &v, &spans)?;
        let merged = device.merge_heads(&attended, heads, d)?;
        let x = self.out_proj.forward(device, params, &merged)?;
        let (h, stats) = self.layernorm.forward(device, params, &x)?;
        let wide = self.fc1.forward(device, params, &h)?;
        let active = device.gelu(Gelu::Tanh, &wide)?;
        let mut out = copy(device, &x)?;
        self.fc2.add_forward(device, params, &active, &mut out)?;
        Ok((out, Pooled { spans, probes, q, k, v, attended, lse, merged, x, stats, h, wide, active }))
    }

    /// The gradient of the patches.
    fn pool_backward<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        gradients: &mut Gradients<D::Array>,
        patches: &D::Array,
        p: Pooled<D>,
        mut dx: D::Array,
    ) -> Result<D::Array> {
        let AttentionShape { heads, d, .. } = self.attention();
        self.fc2.backward_params(device, gradients, &p.active, &dx)?;
        let mut dwide = self.fc2.input_gradient(device, params, &dx)?;
        device.gelu_backward(Gelu::Tanh, &p.wide, &mut dwide)?;
        self.fc1.backward_params(device, gradients, &p.h, &dwide)?;
        let dh = self.fc1.input_gradient(device, params, &dwide)?;
        self.layernorm.backward(device, params, gradients, &p.x, &p.stats, &dh, &mut dx)?;
        self.out_proj.backward_params(device, gradients, &p.merged, &dx)?;
        let dmerged = self.out_proj.input_gradient(device, params, &dx)?;
        let dout = device.split_heads(&dmerged, heads, d, None, None)?;
        let shape = self.attention();
        let [dq, dk, dv] = device.attention_backward(shape, &p.q, &p.k, &p.v, &p.spans, &p.attended, &p.lse, &dout)?;
        let dq = device.merge_heads(&dq, heads, d)?;
        self.in_proj[0].backward_params(device, gradients, &p.probes, &dq)?;
        let dprobes = self.in_proj[0].input_gradient(device, params, &dq)?;
        if let Some(dprobe) = gradients.get_mut(self.probe) {
            device.add_column_sums(&dprobes, dprobe)?;
        }
        let mut dpatches = device.zeros(device.len(patches))?;
        for (part, dy) in [(1, dk), (2, dv)] {
            let dy = device.merge_heads(&dy, heads, d)?;
            self.in_proj[part].backward_params(device, gradients, patches, &dy)?;
            self.in_proj[part].backward_input(device, params, &dy, &mut dpatches, Old::Keep)?;
        }
        Ok(dpatches)
    }

    /// Loss and, with gradients, those of the tower's patches and of the texts' mean states. The loss itself is computed on the
    /// host: it is of as many embeddings as there are images.
    #[expect(clippy::too_many_arguments, reason = "an operation and its operands")]
    pub(crate) fn step<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        gradients: Option<&mut Gradients<D::Array>>,
        pack: &Pack,
        patches: &D::Array,
        texts: &D::Array,
        scale: f32,
    ) -> Result<(f64, Option<[D::Array; 2]>)> {
        let (isa, d) = (device.host(), self.probe.len());
        let (x, pooled) = self.pool(device, params, patches, &pack.vit_cu_seqlens())?;
        let y = self.text_projection.forward(device, params, texts)?;
        let host = |x: &D::Array| Ok(device.values(View::of(x, 1, device.len(x)))?.into_owned());
        let (mut x, mut y): (Vec<f32>, Vec<f32>) = (host(&x)?, host(&y)?);
        let (x_lengths, y_lengths) = (normalise(isa, &mut x, d), normalise(isa, &mut y, d));
        let number = |slot: Slot| Ok(device.values(params.get(slot))?[0]);
        let (log_scale, bias): (f32, f32) = (number(self.logit_scale)?, number(self.logit_bias)?);
        let mut loss = sigmoid_loss(isa, &x, &y, d, log_scale, bias, 256);
        let Some(gradients) = gradients else { return Ok((loss.loss, None)) };
        for (slot, gradient) in [(self.logit_scale, loss.dscale), (self.logit_bias, loss.dbias)] {
            if let Some(sum) = gradients.get_mut(slot) {
                device.combine(1.0, sum, 1.0, View::of(&device.array(vec![gradient * scale])?, 1, 1))?;
            }
        }
        loss.dx.iter_mut().chain(&mut loss.dy).for_each(|g| *g *= scale);
        normalise_backward(isa, &x, &x_lengths, d, &mut loss.dx);
        normalise_backward(isa, &y, &y_lengths, d, &mut loss.dy);
        let (dx, dy) = (device.array(loss.dx)?, device.array(loss.dy)?);
        self.text_projection.backward_params(device, gradients, texts, &dy)?;
        let dtexts = self.text_projection.input_gradient(device, params, &dy)?;
        let dpatches = self.pool_backward(device, params, gradients, patches, pooled, dx)?;
        Ok((loss.loss, Some([dpatches, dtexts])))
    }
}
