//! The language model (`docs/spec/keye-vl-8b.md` §6) and its reverse.

use keye_backend::matmul::Old;
use keye_backend::training::{Angles, AttentionShape, Device, HeadNorm, Precision, Taps, View};
use keye_processor::TextConfig;

use crate::TrainError;
use crate::layers::angles::{angles, frequencies};
use crate::layers::linear::Linear;
use crate::layers::norm::Norm;
use crate::layers::{Result, copy};
use crate::params::{Gradients, Layout, Params, Slot};

pub(crate) struct Decoder {
    pub(crate) config: TextConfig,
    /// `[V, H]`
    pub(crate) embed_tokens: Slot,
    layers: Vec<Layer>,
    pub(crate) norm: Norm,
    /// `[V, H]`; `embed_tokens` where they are tied.
    pub(crate) lm_head: Slot,
    frequencies: Vec<f32>,
    axes: Vec<usize>,
}

struct Layer {
    input_layernorm: Norm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: Slot,
    k_norm: Slot,
    post_attention_layernorm: Norm,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

/// What a layer computed on its way, for the reverse.
struct Activations<A> {
    stats1: A,
    /// `[n, H]`, normalised.
    h1: A,
    /// Projections before norm and rotation.
    q: A,
    k: A,
    /// Head after head, as attention takes them.
    q_heads: A,
    k_heads: A,
    v_heads: A,
    /// What attention gave, `[heads, n, d]`, and its logarithms of sums.
    attended: A,
    lse: A,
    /// `[n, heads * d]`
    merged: A,
    /// After attention, `[n, H]`.
    middle: A,
    stats2: A,
    h2: A,
    gate: A,
    up: A,
    /// `silu(gate) up`
    product: A,
}

/// What the forward pass leaves for the reverse: every layer's input, and all else unless it is computed again.
pub(crate) struct Trace<D: Device> {
    inputs: Vec<D::Array>,
    activations: Vec<Option<Activations<D::Array>>>,
    angles: Angles<D::Array>,
    spans: D::Spans,
}

impl Decoder {
    pub(crate) fn new(
        layout: &Layout,
        config: &TextConfig,
        precision: Precision,
    ) -> std::result::Result<Self, TrainError> {
        if config.experts.is_some() || config.indexer.is_some() {
            return Err(TrainError::Model(
                "experts and sparse attention are not trained; a dense 1.5 is expected".into(),
            ));
        }
        let norm = |name: String| -> std::result::Result<Norm, TrainError> {
            Ok(Norm { weight: layout.slot(&name)?, bias: None, eps: config.rms_norm_eps })
        };
        let linear = |name: String, bias: bool| -> std::result::Result<Linear, TrainError> {
            let bias = if bias { Some(layout.slot(&format!("{name}.bias"))?) } else { None };
            Ok(Linear { weight: layout.slot(&format!("{name}.weight"))?, bias, precision })
        };
        let layers = (0..config.num_hidden_layers)
            .map(|i| {
                let at = format!("model.layers.{i}");
                let bias = config.attention_bias;
                Ok(Layer {
                    input_layernorm: norm(format!("{at}.input_layernorm.weight"))?,
                    q_proj: linear(format!("{at}.self_attn.q_proj"), bias)?,
                    k_proj: linear(format!("{at}.self_attn.k_proj"), bias)?,
                    v_proj: linear(format!("{at}.self_attn.v_proj"), bias)?,
                    o_proj: linear(format!("{at}.self_attn.o_proj"), bias)?,
                    q_norm: layout.slot(&format!("{at}.self_attn.q_norm.weight"))?,
                    k_norm: layout.slot(&format!("{at}.self_attn.k_norm.weight"))?,
                    post_attention_layernorm: norm(format!("{at}.post_attention_layernorm.weight"))?,
                    gate_proj: linear(format!("{at}.mlp.gate_proj"), false)?,
                    up_proj: linear(format!("{at}.mlp.up_proj"), false)?,
                    down_proj: linear(format!("{at}.mlp.down_proj"), false)?,
                })
            })
            .collect::<std::result::Result<_, TrainError>>()?;
        let embed_tokens = layout.slot("model.embed_tokens.weight")?;
        let lm_head = if config.tie_word_embeddings { embed_tokens } else { layout.slot("lm_head.weight")? };
        Ok(Self {
            embed_tokens,
            layers,
            norm: norm("model.norm.weight".into())?,
            lm_head,
            frequencies: frequencies(config.rope_theta, config.head_dim),
            axes: (0..3).flat_map(|axis| std::iter::repeat_n(axis, config.mrope_section[axis])).collect(),
            config: config.clone(),
        })
    }

    fn attention(&self) -> AttentionShape {
        let c = &self.config;
        AttentionShape { heads: c.num_attention_heads, kv_heads: c.num_key_value_heads, d: c.head_dim, causal: true }
    }

    /// `[n, H]`
    pub(crate) fn embed<D: Device>(&self, device: &D, params: &Params<D::Array>, ids: &[u32]) -> Result<D::Array> {
        device.gather(params.get(self.embed_tokens), ids)
    }

    /// Adds the gradients of the rows that came from the table.
    pub(crate) fn embed_backward<D: Device>(
        &self,
        device: &D,
        gradients: &mut Gradients<D::Array>,
        ids: &[u32],
        replaced: &[u32],
        dx: &D::Array,
    ) -> Result<()> {
        let Some(table) = gradients.get_mut(self.embed_tokens) else { return Ok(()) };
        let mut taken = vec![true; ids.len()];
        replaced.iter().for_each(|row| taken[*row as usize] = false);
        let rows = (0..ids.len()).filter(|row| taken[*row]);
        let taps = Taps::new(table.rows, rows.map(|row| (ids[row], row as u32, 1.0)));
        device.add_taps(table, View::of(dx, ids.len(), self.config.hidden_size), &taps)
    }

    /// All layers, before the final norm: `[n, H]` to `[n, H]`. With `recompute` only the layers' inputs are kept.
    pub(crate) fn forward<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        mut x: D::Array,
        positions: &[[u32; 3]],
        spans: D::Spans,
        recompute: bool,
    ) -> Result<(D::Array, Trace<D>)> {
        let angles = angles(device, &self.frequencies, &self.axes, positions)?;
        let mut trace = Trace { inputs: Vec::new(), activations: Vec::new(), angles, spans };
        for layer in &self.layers {
            let (out, activations) = self.layer(device, params, layer, &x, &trace)?;
            trace.inputs.push(std::mem::replace(&mut x, out));
            trace.activations.push((!recompute).then_some(activations));
        }
        Ok((x, trace))
    }

    fn layer<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        layer: &Layer,
        x: &D::Array,
        trace: &Trace<D>,
    ) -> Result<(D::Array, Activations<D::Array>)> {
        let AttentionShape { heads, kv_heads, d, .. } = self.attention();
        let (h1, stats1) = layer.input_layernorm.forward(device, params, x)?;
        let q = layer.q_proj.forward(device, params, &h1)?;
        let k = layer.k_proj.forward(device, params, &h1)?;
        let v = layer.v_proj.forward(device, params, &h1)?;
        let angles = Some(&trace.angles);
        let q_heads = device.split_heads(&q, heads, d, Some(self.head_norm(params, layer.q_norm)), angles)?;
        let k_heads = device.split_heads(&k, kv_heads, d, Some(self.head_norm(params, layer.k_norm)), angles)?;
        let v_heads = device.split_heads(&v, kv_heads, d, None, None)?;
        let (attended, lse) = device.attention(self.attention(), &q_heads, &k_heads, &v_heads, &trace.spans)?;
        let merged = device.merge_heads(&attended, heads, d)?;
        let mut middle = copy(device, x)?;
        layer.o_proj.add_forward(device, params, &merged, &mut middle)?;
        let (h2, stats2) = layer.post_attention_layernorm.forward(device, params, &middle)?;
        let gate = layer.gate_proj.forward(device, params, &h2)?;
        let up = layer.up_proj.forward(device, params, &h2)?;
        let product = device.silu_mul(&gate, &up)?;
        let mut out = copy(device, &middle)?;
        layer.down_proj.add_forward(device, params, &product, &mut out)?;
        let activations = Activations {
            stats1,
            h1,
            q,
            k,
            q_heads,
            k_heads,
            v_heads,
            attended,
            lse,
            merged,
            middle,
            stats2,
            h2,
            gate,
            up,
            product,
        };
        Ok((out, activations))
    }

    fn head_norm<'a, A>(&self, params: &'a Params<A>, weight: Slot) -> HeadNorm<'a, A> {
        HeadNorm { weight: params.get(weight), eps: self.config.rms_norm_eps }
    }

    /// The gradient of what [`Self::forward`] took, from that of what it gave.
    pub(crate) fn backward<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        gradients: &mut Gradients<D::Array>,
        mut trace: Trace<D>,
        mut dx: D::Array,
    ) -> Result<D::Array> {
        for (i, layer) in self.layers.iter().enumerate().rev() {
            let activations = match trace.activations[i].take() {
                Some(activations) => activations,
                None => self.layer(device, params, layer, &trace.inputs[i], &trace)?.1,
            };
            self.layer_backward(device, params, gradients, layer, i, activations, &trace, &mut dx)?;
        }
        Ok(dx)
    }

    /// Turns the gradient of layer i's output into that of its input.
    #[expect(clippy::too_many_arguments, reason = "an operation and its operands")]
    fn layer_backward<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        gradients: &mut Gradients<D::Array>,
        layer: &Layer,
        i: usize,
        a: Activations<D::Array>,
        trace: &Trace<D>,
        dx: &mut D::Array,
    ) -> Result<()> {
        let AttentionShape { heads, kv_heads, d, .. } = self.attention();
        // Feed-forward block.
        layer.down_proj.backward_params(device, gradients, &a.product, dx)?;
        let dproduct = layer.down_proj.input_gradient(device, params, dx)?;
        let (mut dgate, mut dup) = (a.gate, a.up);
        device.silu_mul_backward(&mut dgate, &mut dup, &dproduct)?;
        layer.gate_proj.backward_params(device, gradients, &a.h2, &dgate)?;
        layer.up_proj.backward_params(device, gradients, &a.h2, &dup)?;
        let mut dh = layer.gate_proj.input_gradient(device, params, &dgate)?;
        layer.up_proj.backward_input(device, params, &dup, &mut dh, Old::Keep)?;
        layer.post_attention_layernorm.backward(device, params, gradients, &a.middle, &a.stats2, &dh, dx)?;
        // Attention.
        layer.o_proj.backward_params(device, gradients, &a.merged, dx)?;
        let dmerged = layer.o_proj.input_gradient(device, params, dx)?;
        let dout = device.split_heads(&dmerged, heads, d, None, None)?;
        let [dq, dk, dv] = device.attention_backward(
            self.attention(),
            &a.q_heads,
            &a.k_heads,
            &a.v_heads,
            &trace.spans,
            &a.attended,
            &a.lse,
            &dout,
        )?;
        let angles = Some(&trace.angles);
        let (q_norm, k_norm) = (self.head_norm(params, layer.q_norm), self.head_norm(params, layer.k_norm));
        let dw = gradients.get_mut(layer.q_norm);
        let dq = device.split_heads_backward(&a.q, heads, d, Some(q_norm), angles, dq, dw)?;
        let dw = gradients.get_mut(layer.k_norm);
        let dk = device.split_heads_backward(&a.k, kv_heads, d, Some(k_norm), angles, dk, dw)?;
        let dv = device.merge_heads(&dv, kv_heads, d)?;
        for (projection, dy, old) in
            [(layer.q_proj, &dq, Old::Replace), (layer.k_proj, &dk, Old::Keep), (layer.v_proj, &dv, Old::Keep)]
        {
            projection.backward_params(device, gradients, &a.h1, dy)?;
            projection.backward_input(device, params, dy, &mut dh, old)?;
        }
        layer.input_layernorm.backward(device, params, gradients, &trace.inputs[i], &a.stats1, &dh, dx)
    }
}
