//! Multi-head latent attention (spec of 671B, §4): a token's keys and values of all heads come from one row of
//! `kv_lora_rank` values and one rotated key, and only these are cached.
//!
//! Attention runs in the latent space, for prompts as for single tokens: a head's key matrix is multiplied into its query
//! and its value matrix after the weighted sum, so that what a row yields does not depend on how a prompt is cut.
//! Ranks divide the heads; the latent rows are every rank's.

use keye_backend::{Activation, Backend, BackendError, LatentShape, WeightSource};
use keye_processor::{LatentConfig, TextConfig};

use crate::ModelError;
use crate::step::Place;
use crate::weights::{Linear, Weights};

pub(crate) struct LatentAttention<B: Backend> {
    shape: LatentShape,
    eps: f32,
    /// `[q_rank, H]`
    q_a_proj: Linear<B>,
    /// `[q_rank]`
    q_a_layernorm: B::Weight,
    /// `[heads * (nope + rope), q_rank]`
    q_b_proj: Linear<B>,
    /// The first rows of the stored kv_a_proj_with_mqa: `[rank, H]`.
    kv_a_proj: B::Weight,
    /// Its last rows, the key that all heads share: `[rope, H]`.
    k_rope_proj: B::Weight,
    /// `[rank]`
    kv_a_layernorm: B::Weight,
    /// Per head, transposed: `[rank, nope]`.
    key_up: Vec<B::Weight>,
    /// Per head `[v, rank]`.
    value_up: Vec<B::Weight>,
}

impl<B: Backend> LatentAttention<B> {
    pub(crate) fn load(
        attention: &Weights<'_, B>,
        text: &TextConfig,
        config: &LatentConfig,
    ) -> Result<Self, ModelError> {
        let (h, heads) = (text.hidden_size, text.num_attention_heads);
        let own = attention.shard().heads(text);
        let LatentConfig { q_lora_rank: q_rank, kv_lora_rank: rank, qk_nope_head_dim: nope, .. } = *config;
        let (rope, v) = (config.qk_rope_head_dim, config.v_head_dim);
        let [kv_a_proj, k_rope_proj] = attention.split_rows("kv_a_proj_with_mqa.weight", [rank, rope], h)?;
        let stored = unpacked(attention.source("kv_b_proj.weight", &[heads * (nope + v), rank])?);
        let (mut key_up, mut value_up) = (Vec::with_capacity(own.len()), Vec::with_capacity(own.len()));
        for head in own.clone() {
            let first = head * (nope + v);
            key_up.push(attention.backend().load(&transposed(&stored.slice_rows(first..first + nope)?))?);
            value_up.push(attention.backend().load(&stored.slice_rows(first + nope..first + nope + v)?)?);
        }
        Ok(Self {
            shape: LatentShape { heads: own.len(), value_dim: rank, scale: scale(config) },
            eps: text.rms_norm_eps,
            q_a_proj: attention.linear("q_a_proj", q_rank, h, false)?,
            q_a_layernorm: attention.vector("q_a_layernorm.weight", q_rank)?,
            q_b_proj: {
                let part = own.start * (nope + rope)..own.end * (nope + rope);
                attention.linear_outputs("q_b_proj", heads * (nope + rope), q_rank, false, part)?
            },
            kv_a_proj,
            k_rope_proj,
            kv_a_layernorm: attention.vector("kv_a_layernorm.weight", rank)?,
            key_up,
            value_up,
        })
    }

    /// Attention of the normed rows `x [n, H]` before the output projection, `[n, heads * v]`; `angles [n, rope]`.
    pub(crate) fn attend(
        &self,
        backend: &B,
        x: &B::Tensor,
        angles: &B::Tensor,
        place: Place<'_, B>,
    ) -> Result<B::Tensor, BackendError> {
        let q = self.q_a_proj.forward(backend, x, Activation::None)?;
        let q = backend.rms_norm(&q, &self.q_a_layernorm, self.eps)?;
        let mut q = self.q_b_proj.forward(backend, &q, Activation::None)?; // [n, heads * (nope + rope)]
        backend.rope_pairs(&mut q, self.shape.heads, angles)?;
        let q = backend.linear_heads(&q, &self.key_up)?; // [n, heads * (rank + rope)]
        let latent = backend.linear(x, &self.kv_a_proj, None, Activation::None)?;
        let latent = backend.rms_norm(&latent, &self.kv_a_layernorm, self.eps)?; // [n, rank]
        let mut k_rope = backend.linear(x, &self.k_rope_proj, None, Activation::None)?; // [n, rope]
        backend.rope_pairs(&mut k_rope, 1, angles)?;
        backend.write_latent(&latent, &k_rope, place.cache, place.layer, place.plan)?;
        let attended = backend.latent_attention(&q, place.cache, place.layer, place.plan, self.shape)?; // [n, heads * rank]
        backend.linear_heads(&attended, &self.value_up)
    }
}

/// `(nope + rope)^-1/2 * m(factor, mscale_all_dim)^2`
fn scale(config: &LatentConfig) -> f32 {
    let width = (config.qk_nope_head_dim + config.qk_rope_head_dim) as f64;
    let m = crate::rope::yarn_length(config.yarn.factor, config.yarn.mscale_all_dim);
    (width.powf(-0.5) * m * m) as f32
}

/// Packed weights as f32: products per head take plain ones.
fn unpacked(source: WeightSource) -> WeightSource {
    match source.dtype.is_packed() {
        true => WeightSource::from_f32(source.name.clone(), source.rows, source.cols, &source.to_f32()),
        false => source,
    }
}

/// `[cols, rows]` in f32.
fn transposed(source: &WeightSource) -> WeightSource {
    let (rows, cols, values) = (source.rows, source.cols, source.to_f32());
    let turned: Vec<f32> =
        (0..cols).flat_map(|c| (0..rows).map(move |r| (r, c))).map(|(r, c)| values[r * cols + c]).collect();
    WeightSource::from_f32(source.name.clone(), cols, rows, &turned)
}
