//! The vision tower and the projector of 1.5 (`docs/spec/keye-vl-8b.md` §4 and 5) and their reverse.

use keye_backend::matmul::Old;
use keye_backend::training::{Angles, AttentionShape, Device, Gelu, Precision, Taps, View, ViewMut};
use keye_media::ProcessorConfig;
use keye_processor::VisionConfig;

use super::self_spans;
use crate::TrainError;
use crate::layers::angles::{angles, frequencies};
use crate::layers::linear::Linear;
use crate::layers::norm::Norm;
use crate::layers::{Result, copy};
use crate::pack::{PATCH_SIDE, PATCH_VALUES, Pack};
use crate::params::{Gradients, Layout, Params, Slot};

/// Epsilon of the projector's LayerNorm, torch's default.
const PROJECTOR_EPS: f32 = 1e-5;

pub(crate) struct Vision {
    pub(crate) config: VisionConfig,
    /// What the bytes of each channel stand for: `(byte * rescale - mean) / std`.
    pixels: [[f32; 256]; 3],
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

struct Activations<A> {
    stats1: A,
    h1: A,
    q_heads: A,
    k_heads: A,
    v_heads: A,
    /// What attention gave, `[heads, patches, d]`, and its logarithms of sums.
    attended: A,
    lse: A,
    merged: A,
    middle: A,
    stats2: A,
    h2: A,
    /// Before the GELU.
    wide: A,
    /// After it.
    active: A,
}

/// What the forward pass leaves for the reverse.
pub(crate) struct Trace<D: Device> {
    pixels: D::Array,
    /// Of every patch four places in the position table: `(patch, place, weight)`.
    places: Vec<(u32, u32, f32)>,
    inputs: Vec<D::Array>,
    activations: Vec<Option<Activations<D::Array>>>,
    /// Of the last layer, and its norm's statistics.
    last: D::Array,
    stats: D::Array,
    pass: Pass<D>,
}

/// What all layers of a pass share.
struct Pass<D: Device> {
    angles: Angles<D::Array>,
    spans: D::Spans,
}

pub(crate) fn linear(layout: &Layout, precision: Precision, name: &str) -> std::result::Result<Linear, TrainError> {
    let (weight, bias) = (layout.slot(&format!("{name}.weight"))?, Some(layout.slot(&format!("{name}.bias"))?));
    Ok(Linear { weight, bias, precision })
}

pub(crate) fn layer_norm(layout: &Layout, name: &str, eps: f32) -> std::result::Result<Norm, TrainError> {
    Ok(Norm { weight: layout.slot(&format!("{name}.weight"))?, bias: Some(layout.slot(&format!("{name}.bias"))?), eps })
}

impl Vision {
    pub(crate) fn new(
        layout: &Layout,
        config: &VisionConfig,
        processor: &ProcessorConfig,
        precision: Precision,
    ) -> std::result::Result<Self, TrainError> {
        if config.num_channels * config.patch_size * config.patch_size != PATCH_VALUES || config.spatial_merge_size != 2
        {
            return Err(TrainError::Model(format!(
                "patches of {} channels and side {}, merged by {}; 3, 14 and 2 are expected",
                config.num_channels, config.patch_size, config.spatial_merge_size
            )));
        }
        let rescale = if processor.do_rescale { processor.rescale_factor } else { 1.0 };
        let channel = |c: usize| {
            let (mean, std) = match processor.do_normalize {
                true => (f64::from(processor.image_mean[c]), f64::from(processor.image_std[c])),
                false => (0.0, 1.0),
            };
            std::array::from_fn(|byte| ((byte as f64 * rescale - mean) / std) as f32)
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
            .collect::<std::result::Result<_, TrainError>>()?;
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

    fn attention(&self) -> AttentionShape {
        let heads = self.config.num_attention_heads;
        AttentionShape { heads, kv_heads: heads, d: self.config.hidden_size / heads, causal: false }
    }

    /// The patches of all images and frames, each attending inside itself: `[patches, D]`.
    pub(crate) fn forward<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        pack: &Pack,
        recompute: bool,
    ) -> Result<(D::Array, Trace<D>)> {
        let pixels = device.pixels(&pack.patches, PATCH_SIDE, &self.pixels)?;
        let mut x = self.patch_embedding.forward(device, params, &pixels)?;
        let at: Vec<[u32; 2]> =
            pack.grids.iter().flat_map(|[h, w]| (0..*h).flat_map(move |y| (0..*w).map(move |x| [y, x]))).collect();
        let places = self.places(&pack.grids);
        let patches = ViewMut::of(&mut x, at.len(), self.config.hidden_size);
        let taps = Taps::new(at.len(), places.iter().copied());
        device.add_taps(patches, params.get(self.position_embedding), &taps)?;
        let half = self.frequencies.len() / 2;
        let axes: Vec<usize> = (0..2).flat_map(|axis| std::iter::repeat_n(axis, half)).collect();
        let angles = angles(device, &self.frequencies, &axes, &at)?;
        let pass = Pass { angles, spans: device.spans(self_spans(&pack.vit_cu_seqlens()))? };
        let (mut inputs, mut kept) = (Vec::new(), Vec::new());
        for layer in &self.layers {
            let (out, activations) = self.layer(device, params, layer, &x, &pass)?;
            inputs.push(std::mem::replace(&mut x, out));
            kept.push((!recompute).then_some(activations));
        }
        let (y, stats) = self.post_layernorm.forward(device, params, &x)?;
        Ok((y, Trace { pixels, places, inputs, activations: kept, last: x, stats, pass }))
    }

    /// Bilinear sampling of the position table without aligned corners (§4.1.2), all in f32.
    fn places(&self, grids: &[[u32; 2]]) -> Vec<(u32, u32, f32)> {
        let side = self.config.image_size / self.config.patch_size;
        let tap = |dst: u32, out: u32| {
            let scale = side as f32 / out as f32;
            let src = ((dst as f32 + 0.5) * scale - 0.5).max(0.0);
            let low = (src as usize).min(side - 1);
            (low, (low + 1).min(side - 1), src - low as f32)
        };
        let mut places = Vec::new();
        let mut patch = 0;
        for [h, w] in grids {
            for (y, x) in (0..*h).flat_map(|y| (0..*w).map(move |x| (y, x))) {
                let ((y0, y1, fy), (x0, x1, fx)) = (tap(y, *h), tap(x, *w));
                let mut add = |y: usize, x: usize, weight: f32| places.push((patch, (y * side + x) as u32, weight));
                add(y0, x0, (1.0 - fy) * (1.0 - fx));
                add(y0, x1, (1.0 - fy) * fx);
                add(y1, x0, fy * (1.0 - fx));
                add(y1, x1, fy * fx);
                patch += 1;
            }
        }
        places
    }

    fn layer<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        layer: &Layer,
        x: &D::Array,
        pass: &Pass<D>,
    ) -> Result<(D::Array, Activations<D::Array>)> {
        let AttentionShape { heads, d, .. } = self.attention();
        let (h1, stats1) = layer.layer_norm1.forward(device, params, x)?;
        let split = |projection: &Linear, angles| {
            device.split_heads(&projection.forward(device, params, &h1)?, heads, d, None, angles)
        };
        let q_heads = split(&layer.q_proj, Some(&pass.angles))?;
        let k_heads = split(&layer.k_proj, Some(&pass.angles))?;
        let v_heads = split(&layer.v_proj, None)?;
        let (attended, lse) = device.attention(self.attention(), &q_heads, &k_heads, &v_heads, &pass.spans)?;
        let merged = device.merge_heads(&attended, heads, d)?;
        let mut middle = copy(device, x)?;
        layer.out_proj.add_forward(device, params, &merged, &mut middle)?;
        let (h2, stats2) = layer.layer_norm2.forward(device, params, &middle)?;
        let wide = layer.fc1.forward(device, params, &h2)?;
        let active = device.gelu(Gelu::Tanh, &wide)?;
        let mut out = copy(device, &middle)?;
        layer.fc2.add_forward(device, params, &active, &mut out)?;
        let activations = Activations {
            stats1,
            h1,
            q_heads,
            k_heads,
            v_heads,
            attended,
            lse,
            merged,
            middle,
            stats2,
            h2,
            wide,
            active,
        };
        Ok((out, activations))
    }

    /// Gradients of the tower's parameters from that of its result.
    pub(crate) fn backward<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        gradients: &mut Gradients<D::Array>,
        mut trace: Trace<D>,
        dy: &D::Array,
    ) -> Result<()> {
        let mut dx = device.zeros(device.len(dy))?;
        self.post_layernorm.backward(device, params, gradients, &trace.last, &trace.stats, dy, &mut dx)?;
        for (i, layer) in self.layers.iter().enumerate().rev() {
            let activations = match trace.activations[i].take() {
                Some(activations) => activations,
                None => self.layer(device, params, layer, &trace.inputs[i], &trace.pass)?.1,
            };
            self.layer_backward(device, params, gradients, layer, &trace.inputs[i], activations, &trace.pass, &mut dx)?;
        }
        if let Some(table) = gradients.get_mut(self.position_embedding) {
            let back = trace.places.iter().map(|(patch, place, weight)| (*place, *patch, *weight));
            let taps = Taps::new(table.rows, back);
            let d = self.config.hidden_size;
            device.add_taps(table, View::of(&dx, device.len(&dx) / d, d), &taps)?;
        }
        self.patch_embedding.backward_params(device, gradients, &trace.pixels, &dx)
    }

    #[expect(clippy::too_many_arguments, reason = "an operation and its operands")]
    fn layer_backward<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        gradients: &mut Gradients<D::Array>,
        layer: &Layer,
        x: &D::Array,
        a: Activations<D::Array>,
        pass: &Pass<D>,
        dx: &mut D::Array,
    ) -> Result<()> {
        let AttentionShape { heads, d, .. } = self.attention();
        layer.fc2.backward_params(device, gradients, &a.active, dx)?;
        let mut dwide = layer.fc2.input_gradient(device, params, dx)?;
        device.gelu_backward(Gelu::Tanh, &a.wide, &mut dwide)?;
        layer.fc1.backward_params(device, gradients, &a.h2, &dwide)?;
        let mut dh = layer.fc1.input_gradient(device, params, &dwide)?;
        layer.layer_norm2.backward(device, params, gradients, &a.middle, &a.stats2, &dh, dx)?;

        layer.out_proj.backward_params(device, gradients, &a.merged, dx)?;
        let dmerged = layer.out_proj.input_gradient(device, params, dx)?;
        let dout = device.split_heads(&dmerged, heads, d, None, None)?;
        let [dq, dk, dv] = device.attention_backward(
            self.attention(),
            &a.q_heads,
            &a.k_heads,
            &a.v_heads,
            &pass.spans,
            &a.attended,
            &a.lse,
            &dout,
        )?;
        let back = |dy, angles| device.split_heads_backward(x, heads, d, None, angles, dy, None);
        let (dq, dk, dv) = (back(dq, Some(&pass.angles))?, back(dk, Some(&pass.angles))?, back(dv, None)?);
        for (projection, dy, old) in
            [(layer.q_proj, &dq, Old::Replace), (layer.k_proj, &dk, Old::Keep), (layer.v_proj, &dv, Old::Keep)]
        {
            projection.backward_params(device, gradients, &a.h1, dy)?;
            projection.backward_input(device, params, dy, &mut dh, old)?;
        }
        layer.layer_norm1.backward(device, params, gradients, x, &a.stats1, &dh, dx)
    }
}

/// `mlp_AR`: 2x2 patches to one token of the decoder.
pub(crate) struct Projector {
    pre_norm: Norm,
    linear_1: Linear,
    linear_2: Linear,
}

pub(crate) struct ProjectorTrace<A> {
    order: Vec<u32>,
    merged: A,
    stats: A,
    normed: A,
    wide: A,
    active: A,
}

impl Projector {
    pub(crate) fn new(layout: &Layout, precision: Precision) -> std::result::Result<Self, TrainError> {
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
    pub(crate) fn forward<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        patches: &D::Array,
        grids: &[[u32; 2]],
    ) -> Result<(D::Array, ProjectorTrace<D::Array>)> {
        let order = Self::order(grids);
        let d = device.len(patches) / order.len();
        let merged = device.gather(View::of(patches, order.len(), d), &order)?;
        let (normed, stats) = self.pre_norm.forward(device, params, &merged)?;
        let wide = self.linear_1.forward(device, params, &normed)?;
        let active = device.gelu(Gelu::Erf, &wide)?;
        let out = self.linear_2.forward(device, params, &active)?;
        Ok((out, ProjectorTrace { order, merged, stats, normed, wide, active }))
    }

    /// The gradient of the patches `[patches, D]`; not computed unless somebody below is trained.
    pub(crate) fn backward<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        gradients: &mut Gradients<D::Array>,
        trace: ProjectorTrace<D::Array>,
        dy: &D::Array,
        below: bool,
    ) -> Result<Option<D::Array>> {
        self.linear_2.backward_params(device, gradients, &trace.active, dy)?;
        let mut dwide = self.linear_2.input_gradient(device, params, dy)?;
        device.gelu_backward(Gelu::Erf, &trace.wide, &mut dwide)?;
        self.linear_1.backward_params(device, gradients, &trace.normed, &dwide)?;
        let dnormed = self.linear_1.input_gradient(device, params, &dwide)?;
        let n = device.len(&trace.merged);
        let mut dmerged = device.zeros(n)?;
        self.pre_norm.backward(device, params, gradients, &trace.merged, &trace.stats, &dnormed, &mut dmerged)?;
        if !below {
            return Ok(None);
        }
        let mut dx = device.zeros(n)?;
        let rows = trace.order.len();
        device.scatter(ViewMut::of(&mut dx, rows, n / rows), &trace.order, &dmerged)?;
        Ok(Some(dx))
    }
}
