//! The language model (`docs/spec/keye-vl-8b.md` §6) and its reverse.

use keye_backend::Isa;
use keye_backend::matmul::Old;
use keye_processor::TextConfig;

use crate::TrainError;
use crate::ops::attention::{Attended, Attention, Span};
use crate::ops::heads::{self, Angles, frequencies};
use crate::ops::linear::{Linear, Precision};
use crate::ops::norm::{Norm, Stats};
use crate::ops::{kernels, rows};
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
struct Activations {
    stats1: Stats,
    /// `[n, H]`, normalised.
    h1: Vec<f32>,
    /// Projections before norm and rotation.
    q: Vec<f32>,
    k: Vec<f32>,
    /// Head after head, as attention takes them.
    q_heads: Vec<f32>,
    k_heads: Vec<f32>,
    v_heads: Vec<f32>,
    attended: Attended,
    /// `[n, heads * d]`
    merged: Vec<f32>,
    /// After attention, `[n, H]`.
    middle: Vec<f32>,
    stats2: Stats,
    h2: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// `silu(gate) up`
    product: Vec<f32>,
}

/// What the forward pass leaves for the reverse: every layer's input, and all else unless it is computed again.
pub(crate) struct Trace {
    inputs: Vec<Vec<f32>>,
    activations: Vec<Option<Activations>>,
    angles: Angles,
    spans: Vec<Span>,
}

impl Decoder {
    pub(crate) fn new(layout: &Layout, config: &TextConfig, precision: Precision) -> Result<Self, TrainError> {
        if config.experts.is_some() || config.indexer.is_some() {
            return Err(TrainError::Model(
                "experts and sparse attention are not trained; a dense 1.5 is expected".into(),
            ));
        }
        let norm = |name: String| -> Result<Norm, TrainError> {
            Ok(Norm { weight: layout.slot(&name)?, bias: None, eps: config.rms_norm_eps })
        };
        let linear = |name: String, bias: bool| -> Result<Linear, TrainError> {
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
            .collect::<Result<_, TrainError>>()?;
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

    fn attention(&self) -> Attention {
        let c = &self.config;
        Attention { heads: c.num_attention_heads, kv_heads: c.num_key_value_heads, d: c.head_dim, causal: true }
    }

    /// `[n, H]`
    pub(crate) fn embed(&self, params: &Params, ids: &[u32]) -> Vec<f32> {
        let (h, table) = (self.config.hidden_size, params.get(self.embed_tokens));
        ids.iter().flat_map(|id| &table[*id as usize * h..(*id as usize + 1) * h]).copied().collect()
    }

    /// Adds the gradients of the rows that came from the table.
    pub(crate) fn embed_backward(
        &self,
        isa: Isa,
        gradients: &mut Gradients,
        ids: &[u32],
        replaced: &[usize],
        dx: &[f32],
    ) {
        let h = self.config.hidden_size;
        let Some(table) = gradients.get_mut(self.embed_tokens) else { return };
        let mut replaced = replaced.iter().peekable();
        for (row, id) in ids.iter().enumerate() {
            if replaced.next_if(|r| **r == row).is_none() {
                let to = &mut table[*id as usize * h..(*id as usize + 1) * h];
                kernels::add(isa, to, &dx[row * h..(row + 1) * h]);
            }
        }
    }

    /// All layers, before the final norm: `[n, H]` to `[n, H]`. With `recompute` only the layers' inputs are kept.
    pub(crate) fn forward(
        &self,
        isa: Isa,
        params: &Params,
        mut x: Vec<f32>,
        positions: &[[u32; 3]],
        spans: Vec<Span>,
        recompute: bool,
    ) -> (Vec<f32>, Trace) {
        let angles = Angles::new(&self.frequencies, &self.axes, positions);
        let mut trace = Trace { inputs: Vec::new(), activations: Vec::new(), angles, spans };
        for layer in &self.layers {
            let (out, activations) = self.layer(isa, params, layer, &x, &trace.angles, &trace.spans);
            trace.inputs.push(std::mem::replace(&mut x, out));
            trace.activations.push((!recompute).then_some(activations));
        }
        (x, trace)
    }

    fn layer(
        &self,
        isa: Isa,
        params: &Params,
        layer: &Layer,
        x: &[f32],
        angles: &Angles,
        spans: &[Span],
    ) -> (Vec<f32>, Activations) {
        let c = &self.config;
        let (d, eps) = (c.head_dim, c.rms_norm_eps);
        let (h1, stats1) = layer.input_layernorm.forward(isa, params, x);
        let q = layer.q_proj.forward(isa, params, &h1);
        let k = layer.k_proj.forward(isa, params, &h1);
        let v = layer.v_proj.forward(isa, params, &h1);
        let q_norm = Some((params.get(layer.q_norm), eps));
        let k_norm = Some((params.get(layer.k_norm), eps));
        let q_heads = heads::split(isa, &q, c.num_attention_heads, d, q_norm, Some(angles));
        let k_heads = heads::split(isa, &k, c.num_key_value_heads, d, k_norm, Some(angles));
        let v_heads = heads::split(isa, &v, c.num_key_value_heads, d, None, None);
        let attended = self.attention().forward(isa, &q_heads, &k_heads, &v_heads, spans);
        let merged = heads::merge(&attended.out, c.num_attention_heads, d);
        let mut middle = x.to_vec();
        layer.o_proj.add_forward(isa, params, &merged, &mut middle);
        let (h2, stats2) = layer.post_attention_layernorm.forward(isa, params, &middle);
        let gate = layer.gate_proj.forward(isa, params, &h2);
        let up = layer.up_proj.forward(isa, params, &h2);
        let mut product = vec![0.0; gate.len()];
        rows::each_part(&mut product, |at, a| {
            let part = at..at + a.len();
            kernels::silu_mul(isa, &gate[part.clone()], &up[part], a);
        });
        let mut out = middle.clone();
        layer.down_proj.add_forward(isa, params, &product, &mut out);
        let activations = Activations {
            stats1,
            h1,
            q,
            k,
            q_heads,
            k_heads,
            v_heads,
            attended,
            merged,
            middle,
            stats2,
            h2,
            gate,
            up,
            product,
        };
        (out, activations)
    }

    /// The gradient of what [`Self::forward`] took, from that of what it gave.
    pub(crate) fn backward(
        &self,
        isa: Isa,
        params: &Params,
        gradients: &mut Gradients,
        mut trace: Trace,
        mut dx: Vec<f32>,
    ) -> Vec<f32> {
        for (i, layer) in self.layers.iter().enumerate().rev() {
            let x = &trace.inputs[i];
            let activations = match trace.activations[i].take() {
                Some(activations) => activations,
                None => self.layer(isa, params, layer, x, &trace.angles, &trace.spans).1,
            };
            self.layer_backward(isa, params, gradients, layer, x, activations, &trace, &mut dx);
        }
        dx
    }

    /// Turns the gradient of a layer's output into that of its input.
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
        let c = &self.config;
        let (d, eps) = (c.head_dim, c.rms_norm_eps);
        let n = x.len() / c.hidden_size;
        // Feed-forward block.
        layer.down_proj.backward_params(isa, gradients, &a.product, dx);
        let mut dproduct = vec![0.0; a.product.len()];
        layer.down_proj.backward_input(isa, params, dx, &mut dproduct, Old::Replace);
        let (mut dgate, mut dup) = (a.gate, a.up);
        rows::each_pair(&mut dgate, &mut dup, |at, gate, up| {
            kernels::silu_mul_backward(isa, gate, up, &dproduct[at..at + gate.len()]);
        });
        layer.gate_proj.backward_params(isa, gradients, &a.h2, &dgate);
        layer.up_proj.backward_params(isa, gradients, &a.h2, &dup);
        let mut dh = vec![0.0; n * c.hidden_size];
        layer.gate_proj.backward_input(isa, params, &dgate, &mut dh, Old::Replace);
        layer.up_proj.backward_input(isa, params, &dup, &mut dh, Old::Keep);
        layer.post_attention_layernorm.backward(isa, params, gradients, &a.middle, &a.stats2, &dh, dx);
        // Attention.
        layer.o_proj.backward_params(isa, gradients, &a.merged, dx);
        let mut dmerged = vec![0.0; a.merged.len()];
        layer.o_proj.backward_input(isa, params, dx, &mut dmerged, Old::Replace);
        let dout = heads::split(isa, &dmerged, c.num_attention_heads, d, None, None);
        let [dq, dk, dv] =
            self.attention().backward(isa, &a.q_heads, &a.k_heads, &a.v_heads, &trace.spans, &a.attended, &dout);
        let q_norm = Some((params.get(layer.q_norm), eps));
        let k_norm = Some((params.get(layer.k_norm), eps));
        let angles = Some(&trace.angles);
        let dw = gradients.get_mut(layer.q_norm);
        let dq = heads::split_backward(isa, &a.q, c.num_attention_heads, d, q_norm, angles, dq, dw);
        let dw = gradients.get_mut(layer.k_norm);
        let dk = heads::split_backward(isa, &a.k, c.num_key_value_heads, d, k_norm, angles, dk, dw);
        let dv = heads::merge(&dv, c.num_key_value_heads, d);
        dh.fill(0.0);
        for (projection, dy) in [(layer.q_proj, &dq), (layer.k_proj, &dk), (layer.v_proj, &dv)] {
            projection.backward_params(isa, gradients, &a.h1, dy);
            projection.backward_input(isa, params, dy, &mut dh, Old::Keep);
        }
        layer.input_layernorm.backward(isa, params, gradients, x, &a.stats1, &dh, dx);
    }
}
