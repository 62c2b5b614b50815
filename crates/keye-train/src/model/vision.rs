//! The vision tower and the projector of 1.5 (`docs/spec/keye-vl-8b.md` §4 and 5) and their reverse.

use keye_backend::Isa;
use keye_backend::matmul::Old;
use keye_media::ProcessorConfig;
use keye_processor::VisionConfig;
use rayon::prelude::*;

use crate::TrainError;
use crate::ops::attention::{Attended, Attention, Span, self_spans};
use crate::ops::heads::{self, Angles, frequencies};
use crate::ops::linear::{Linear, Precision};
use crate::ops::norm::{Norm, Stats};
use crate::ops::{kernels, rows};
use crate::pack::{PATCH_VALUES, Pack};
use crate::params::{Gradients, Layout, Params, Slot};

/// Epsilon of the projector's LayerNorm, torch's default.
const PROJECTOR_EPS: f32 = 1e-5;

pub(crate) struct Vision {
    pub(crate) config: VisionConfig,
    /// Factor and offset that bytes of each channel go through.
    pixels: [(f64, f64, f64); 3],
    patch_embedding: Linear,
    position_embedding: Slot,
    layers: Vec<Layer>,
    post_layernorm: Norm,
    frequencies: Vec<f32>,
}

struct Layer {
    layer_norm1: Norm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: Norm,
    fc1: Linear,
    fc2: Linear,
}

struct Activations {
    stats1: Stats,
    h1: Vec<f32>,
    q_heads: Vec<f32>,
    k_heads: Vec<f32>,
    v_heads: Vec<f32>,
    attended: Attended,
    merged: Vec<f32>,
    middle: Vec<f32>,
    stats2: Stats,
    h2: Vec<f32>,
    /// Before the GELU.
    wide: Vec<f32>,
    /// After it.
    active: Vec<f32>,
}

/// What the forward pass leaves for the reverse.
pub(crate) struct Trace {
    pixels: Vec<f32>,
    /// Four rows of the position table and their weights for every patch.
    taps: Vec<[(u32, f32); 4]>,
    inputs: Vec<Vec<f32>>,
    activations: Vec<Option<Activations>>,
    /// Of the last layer, and its norm's statistics.
    last: Vec<f32>,
    stats: Stats,
    angles: Angles,
    spans: Vec<Span>,
}

pub(crate) fn linear(layout: &Layout, precision: Precision, name: &str) -> Result<Linear, TrainError> {
    let (weight, bias) = (layout.slot(&format!("{name}.weight"))?, Some(layout.slot(&format!("{name}.bias"))?));
    Ok(Linear { weight, bias, precision })
}

pub(crate) fn layer_norm(layout: &Layout, name: &str, eps: f32) -> Result<Norm, TrainError> {
    Ok(Norm { weight: layout.slot(&format!("{name}.weight"))?, bias: Some(layout.slot(&format!("{name}.bias"))?), eps })
}

impl Vision {
    pub(crate) fn new(
        layout: &Layout,
        config: &VisionConfig,
        processor: &ProcessorConfig,
        precision: Precision,
    ) -> Result<Self, TrainError> {
        if config.num_channels * config.patch_size * config.patch_size != PATCH_VALUES || config.spatial_merge_size != 2
        {
            return Err(TrainError::Model(format!(
                "patches of {} channels and side {}, merged by {}; 3, 14 and 2 are expected",
                config.num_channels, config.patch_size, config.spatial_merge_size
            )));
        }
        let rescale = if processor.do_rescale { processor.rescale_factor } else { 1.0 };
        let channel = |c: usize| match processor.do_normalize {
            true => (rescale, f64::from(processor.image_mean[c]), f64::from(processor.image_std[c])),
            false => (rescale, 0.0, 1.0),
        };
        let tower = "visual.vision_model";
        let eps = config.layer_norm_eps;
        let layers = (0..config.num_hidden_layers)
            .map(|i| {
                let at = format!("{tower}.encoder.layers.{i}");
                Ok(Layer {
                    layer_norm1: layer_norm(layout, &format!("{at}.layer_norm1"), eps)?,
                    q_proj: linear(layout, precision, &format!("{at}.self_attn.q_proj"))?,
                    k_proj: linear(layout, precision, &format!("{at}.self_attn.k_proj"))?,
                    v_proj: linear(layout, precision, &format!("{at}.self_attn.v_proj"))?,
                    out_proj: linear(layout, precision, &format!("{at}.self_attn.out_proj"))?,
                    layer_norm2: layer_norm(layout, &format!("{at}.layer_norm2"), eps)?,
                    fc1: linear(layout, precision, &format!("{at}.mlp.fc1"))?,
                    fc2: linear(layout, precision, &format!("{at}.mlp.fc2"))?,
                })
            })
            .collect::<Result<_, TrainError>>()?;
        let half = frequencies(config.rope_theta, config.hidden_size / config.num_attention_heads / 2);
        Ok(Self {
            pixels: [channel(0), channel(1), channel(2)],
            patch_embedding: linear(layout, precision, &format!("{tower}.embeddings.patch_embedding"))?,
            position_embedding: layout.slot(&format!("{tower}.embeddings.position_embedding.weight"))?,
            layers,
            post_layernorm: layer_norm(layout, &format!("{tower}.post_layernorm"), eps)?,
            frequencies: [half.clone(), half].concat(),
            config: config.clone(),
        })
    }

    fn attention(&self) -> Attention {
        let heads = self.config.num_attention_heads;
        Attention { heads, kv_heads: heads, d: self.config.hidden_size / heads, causal: false }
    }

    /// Bytes to `(byte * rescale - mean) / std`.
    fn normalise(&self, bytes: &[u8]) -> Vec<f32> {
        let side = PATCH_VALUES / 3;
        let table: Vec<[f32; 256]> = (self.pixels.iter())
            .map(|(rescale, mean, std)| std::array::from_fn(|byte| ((byte as f64 * rescale - mean) / std) as f32))
            .collect();
        let mut out = vec![0.0; bytes.len()];
        out.par_chunks_mut(PATCH_VALUES).zip(bytes.par_chunks(PATCH_VALUES)).for_each(|(out, bytes)| {
            for (c, (out, bytes)) in out.chunks_mut(side).zip(bytes.chunks(side)).enumerate() {
                out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = table[c][*byte as usize]);
            }
        });
        out
    }

    /// The patches of all images and frames, each attending inside itself: `[patches, D]`.
    pub(crate) fn forward(&self, isa: Isa, params: &Params, pack: &Pack, recompute: bool) -> (Vec<f32>, Trace) {
        let d = self.config.hidden_size;
        let pixels = self.normalise(&pack.patches);
        let mut x = self.patch_embedding.forward(isa, params, &pixels);
        let places: Vec<[u32; 2]> =
            pack.grids.iter().flat_map(|[h, w]| (0..*h).flat_map(move |y| (0..*w).map(move |x| [y, x]))).collect();
        let taps = self.taps(&pack.grids);
        let table = params.get(self.position_embedding);
        rows::each_row(&mut x, d, |row, x| {
            for (from, weight) in taps[row] {
                kernels::add_scaled(isa, x, &table[from as usize * d..(from as usize + 1) * d], weight);
            }
        });
        let half = self.frequencies.len() / 2;
        let axes: Vec<usize> = (0..2).flat_map(|axis| std::iter::repeat_n(axis, half)).collect();
        let mut trace = Trace {
            pixels,
            taps,
            inputs: Vec::new(),
            activations: Vec::new(),
            last: Vec::new(),
            stats: Stats::new(),
            angles: Angles::new(&self.frequencies, &axes, &places),
            spans: self_spans(&pack.vit_cu_seqlens()),
        };
        for layer in &self.layers {
            let (out, activations) = self.layer(isa, params, layer, &x, &trace);
            trace.inputs.push(std::mem::replace(&mut x, out));
            trace.activations.push((!recompute).then_some(activations));
        }
        let (y, stats) = self.post_layernorm.forward(isa, params, &x);
        (trace.last, trace.stats) = (x, stats);
        (y, trace)
    }

    /// Bilinear sampling of the position table without aligned corners (§4.1.2), all in f32.
    fn taps(&self, grids: &[[u32; 2]]) -> Vec<[(u32, f32); 4]> {
        let side = self.config.image_size / self.config.patch_size;
        let tap = |dst: u32, out: u32| {
            let scale = side as f32 / out as f32;
            let src = ((dst as f32 + 0.5) * scale - 0.5).max(0.0);
            let low = (src as usize).min(side - 1);
            (low, (low + 1).min(side - 1), src - low as f32)
        };
        let mut taps = Vec::new();
        for [h, w] in grids {
            for (y, x) in (0..*h).flat_map(|y| (0..*w).map(move |x| (y, x))) {
                let ((y0, y1, fy), (x0, x1, fx)) = (tap(y, *h), tap(x, *w));
                let at = |y: usize, x: usize| (y * side + x) as u32;
                taps.push([
                    (at(y0, x0), (1.0 - fy) * (1.0 - fx)),
                    (at(y0, x1), (1.0 - fy) * fx),
                    (at(y1, x0), fy * (1.0 - fx)),
                    (at(y1, x1), fy * fx),
                ]);
            }
        }
        taps
    }

    fn layer(&self, isa: Isa, params: &Params, layer: &Layer, x: &[f32], trace: &Trace) -> (Vec<f32>, Activations) {
        let Attention { heads, d, .. } = self.attention();
        let (h1, stats1) = layer.layer_norm1.forward(isa, params, x);
        let split = |projection: &Linear, angles| {
            heads::split(isa, &projection.forward(isa, params, &h1), heads, d, None, angles)
        };
        let q_heads = split(&layer.q_proj, Some(&trace.angles));
        let k_heads = split(&layer.k_proj, Some(&trace.angles));
        let v_heads = split(&layer.v_proj, None);
        let attended = self.attention().forward(isa, &q_heads, &k_heads, &v_heads, &trace.spans);
        let merged = heads::merge(&attended.out, heads, d);
        let mut middle = x.to_vec();
        layer.out_proj.add_forward(isa, params, &merged, &mut middle);
        let (h2, stats2) = layer.layer_norm2.forward(isa, params, &middle);
        let wide = layer.fc1.forward(isa, params, &h2);
        let mut active = vec![0.0; wide.len()];
        rows::each_part(&mut active, |at, y| kernels::gelu_tanh(isa, &wide[at..at + y.len()], y));
        let mut out = middle.clone();
        layer.fc2.add_forward(isa, params, &active, &mut out);
        let activations =
            Activations { stats1, h1, q_heads, k_heads, v_heads, attended, merged, middle, stats2, h2, wide, active };
        (out, activations)
    }

    /// Gradients of the tower's parameters from that of its result.
    pub(crate) fn backward(&self, isa: Isa, params: &Params, gradients: &mut Gradients, mut trace: Trace, dy: &[f32]) {
        let d = self.config.hidden_size;
        let mut dx = vec![0.0; dy.len()];
        self.post_layernorm.backward(isa, params, gradients, &trace.last, &trace.stats, dy, &mut dx);
        for (i, layer) in self.layers.iter().enumerate().rev() {
            let activations = match trace.activations[i].take() {
                Some(activations) => activations,
                None => self.layer(isa, params, layer, &trace.inputs[i], &trace).1,
            };
            self.layer_backward(isa, params, gradients, layer, &trace.inputs[i], activations, &trace, &mut dx);
        }
        if let Some(table) = gradients.get_mut(self.position_embedding) {
            for (taps, dx) in trace.taps.iter().zip(dx.chunks_exact(d)) {
                for (to, weight) in taps {
                    kernels::add_scaled(isa, &mut table[*to as usize * d..(*to as usize + 1) * d], dx, *weight);
                }
            }
        }
        self.patch_embedding.backward_params(isa, gradients, &trace.pixels, &dx);
    }

    #[expect(clippy::too_many_arguments, reason = "an operation and its operands")]
    fn layer_backward(
        &self,
        isa: Isa,
        params: &Params,
        gradients: &mut Gradients,
        layer: &Layer,
        x: &[f32],
        a: Activations,
        trace: &Trace,
        dx: &mut [f32],
    ) {
        let Attention { heads, d, .. } = self.attention();
        layer.fc2.backward_params(isa, gradients, &a.active, dx);
        let mut dwide = vec![0.0; a.wide.len()];
        layer.fc2.backward_input(isa, params, dx, &mut dwide, Old::Replace);
        rows::each_part(&mut dwide, |at, dy| kernels::gelu_tanh_backward(isa, &a.wide[at..at + dy.len()], dy));
        layer.fc1.backward_params(isa, gradients, &a.h2, &dwide);
        let mut dh = vec![0.0; x.len()];
        layer.fc1.backward_input(isa, params, &dwide, &mut dh, Old::Replace);
        layer.layer_norm2.backward(isa, params, gradients, &a.middle, &a.stats2, &dh, dx);

        layer.out_proj.backward_params(isa, gradients, &a.merged, dx);
        let mut dmerged = vec![0.0; a.merged.len()];
        layer.out_proj.backward_input(isa, params, dx, &mut dmerged, Old::Replace);
        let dout = heads::split(isa, &dmerged, heads, d, None, None);
        let [dq, dk, dv] =
            self.attention().backward(isa, &a.q_heads, &a.k_heads, &a.v_heads, &trace.spans, &a.attended, &dout);
        // Without a norm the reverse does not look at what was split, only at its size.
        let back = |dy, angles| heads::split_backward(isa, x, heads, d, None, angles, dy, None);
        let (dq, dk, dv) = (back(dq, Some(&trace.angles)), back(dk, Some(&trace.angles)), back(dv, None));
        dh.fill(0.0);
        for (projection, dy) in [(layer.q_proj, &dq), (layer.k_proj, &dk), (layer.v_proj, &dv)] {
            projection.backward_params(isa, gradients, &a.h1, dy);
            projection.backward_input(isa, params, dy, &mut dh, Old::Keep);
        }
        layer.layer_norm1.backward(isa, params, gradients, x, &a.stats1, &dh, dx);
    }
}

/// `mlp_AR`: 2x2 patches to one token of the decoder.
pub(crate) struct Projector {
    pre_norm: Norm,
    linear_1: Linear,
    linear_2: Linear,
}

pub(crate) struct ProjectorTrace {
    order: Vec<u32>,
    merged: Vec<f32>,
    stats: Stats,
    normed: Vec<f32>,
    wide: Vec<f32>,
    active: Vec<f32>,
}

impl Projector {
    pub(crate) fn new(layout: &Layout, precision: Precision) -> Result<Self, TrainError> {
        Ok(Self {
            pre_norm: layer_norm(layout, "mlp_AR.pre_norm", PROJECTOR_EPS)?,
            linear_1: linear(layout, precision, "mlp_AR.linear_1")?,
            linear_2: linear(layout, precision, "mlp_AR.linear_2")?,
        })
    }

    /// Patches in the order of the merged tokens: token row, token column, row inside, column inside.
    fn order(grids: &[[u32; 2]]) -> Vec<u32> {
        let mut order = Vec::new();
        let mut start = 0;
        for [h, w] in grids {
            for (row, col) in (0..h / 2).flat_map(|row| (0..w / 2).map(move |col| (row, col))) {
                for (p1, p2) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    order.push(start + (2 * row + p1) * w + 2 * col + p2);
                }
            }
            start += h * w;
        }
        order
    }

    /// `[patches, D]` to `[patches / 4, H]`.
    pub(crate) fn forward(
        &self,
        isa: Isa,
        params: &Params,
        patches: &[f32],
        grids: &[[u32; 2]],
    ) -> (Vec<f32>, ProjectorTrace) {
        let order = Self::order(grids);
        let d = patches.len() / order.len();
        let merged: Vec<f32> =
            order.iter().flat_map(|p| &patches[*p as usize * d..(*p as usize + 1) * d]).copied().collect();
        let (normed, stats) = self.pre_norm.forward(isa, params, &merged);
        let wide = self.linear_1.forward(isa, params, &normed);
        let mut active = vec![0.0; wide.len()];
        rows::each_part(&mut active, |at, y| kernels::gelu_erf(isa, &wide[at..at + y.len()], y));
        let out = self.linear_2.forward(isa, params, &active);
        (out, ProjectorTrace { order, merged, stats, normed, wide, active })
    }

    /// The gradient of the patches `[patches, D]`; not computed unless somebody below is trained.
    pub(crate) fn backward(
        &self,
        isa: Isa,
        params: &Params,
        gradients: &mut Gradients,
        trace: ProjectorTrace,
        dy: &[f32],
        below: bool,
    ) -> Option<Vec<f32>> {
        self.linear_2.backward_params(isa, gradients, &trace.active, dy);
        let mut dwide = vec![0.0; trace.wide.len()];
        self.linear_2.backward_input(isa, params, dy, &mut dwide, Old::Replace);
        rows::each_part(&mut dwide, |at, dy| kernels::gelu_erf_backward(isa, &trace.wide[at..at + dy.len()], dy));
        self.linear_1.backward_params(isa, gradients, &trace.normed, &dwide);
        let mut dnormed = vec![0.0; trace.normed.len()];
        self.linear_1.backward_input(isa, params, &dwide, &mut dnormed, Old::Replace);
        let mut dmerged = vec![0.0; trace.merged.len()];
        self.pre_norm.backward(isa, params, gradients, &trace.merged, &trace.stats, &dnormed, &mut dmerged);
        below.then(|| {
            let d = dmerged.len() / trace.order.len();
            let mut dx = vec![0.0; dmerged.len()];
            for (from, dmerged) in trace.order.iter().zip(dmerged.chunks_exact(d)) {
                dx[*from as usize * d..(*from as usize + 1) * d].copy_from_slice(dmerged);
            }
            dx
        })
    }
}
