//! The indexer of sparse attention (spec of 2.0, §7.1): which keys each query attends to.

use keye_backend::{Activation, AttentionShape, Backend, BackendError, IndexShape, UNSELECTED};
use keye_processor::{IndexScorer, IndexerConfig, TextConfig};

use crate::step::Place;
use crate::tap::record;
use crate::weights::{LayerNorm, Weights};
use crate::{ModelError, Tap};

pub(crate) struct Indexer<B: Backend> {
    config: IndexerConfig,
    eps: f32,
    /// `[heads * head_dim, H]`
    q_proj: B::Weight,
    /// `[heads, H]`: the rows of the stored q_proj behind the queries'.
    gate: B::Weight,
    /// `[head_dim, H]`
    k_proj: B::Weight,
    /// `[head_dim]`
    q_norm: B::Weight,
    /// `[head_dim]`
    k_norm: LayerNorm<B>,
}

impl<B: Backend> Indexer<B> {
    pub(crate) fn load(attention: &Weights<'_, B>, text: &TextConfig) -> Result<Option<Self>, ModelError> {
        let Some(config) = text.indexer else { return Ok(None) };
        let weights = attention.at("sa_indexer");
        let (h, width) = (text.hidden_size, config.head_dim);
        let [q_proj, gate] = weights.split_rows("q_proj.weight", [config.num_heads * width, config.num_heads], h)?;
        Ok(Some(Self {
            config,
            eps: text.rms_norm_eps,
            q_proj,
            gate,
            k_proj: weights.matrix("k_proj.weight", width, h)?,
            q_norm: weights.vector("q_norm.weight", width)?,
            k_norm: weights.layer_norm("k_norm", width, text.rms_norm_eps)?,
        }))
    }

    /// Caches the rows' index keys. `x` is `[n, H]` as the projections of attention get it, `angles [n, head_dim]`.
    ///
    /// The Hadamard transform is the FP8 scorer's only: on both sides of a product it cancels.
    pub(crate) fn write_keys(
        &self,
        backend: &B,
        x: &B::Tensor,
        angles: &B::Tensor,
        place: &mut Place<'_, B>,
        tap: &mut dyn Tap,
    ) -> Result<(), BackendError> {
        let k = backend.linear(x, &self.k_proj, None, Activation::None)?;
        let mut k = self.k_norm.forward(backend, &k)?;
        backend.rope(&mut k, 1, angles)?;
        record(backend, tap, format_args!("idx_k.{}", place.layer), &k)?;
        self.round(backend, &mut k)?;
        backend.write_index_keys(&k, place.cache, place.layer, place.plan)
    }

    /// Heads of queries or keys as the scorer has them.
    fn round(&self, backend: &B, x: &mut B::Tensor) -> Result<(), BackendError> {
        match self.config.scorer {
            IndexScorer::F32 => Ok(()),
            IndexScorer::Fp8 => backend.round_to_fp8(x, self.config.head_dim),
        }
    }

    /// Positions that the rows attend to, `[n * topk]`.
    pub(crate) fn select(
        &self,
        backend: &B,
        x: &B::Tensor,
        angles: &B::Tensor,
        place: &Place<'_, B>,
        tap: &mut dyn Tap,
    ) -> Result<B::Index, BackendError> {
        let IndexerConfig { num_heads: heads, head_dim, topk: top_k, .. } = self.config;
        let (layer, rows) = (place.layer, backend.rows(x));
        let weights = backend.linear(x, &self.gate, None, Activation::None)?; // [n, heads]
        let q = backend.linear(x, &self.q_proj, None, Activation::None)?;
        // The norm is over each head: [n, heads * head_dim] seen as [n * heads, head_dim].
        let q = backend.rms_norm(&backend.reshape(q, rows * heads, head_dim)?, &self.q_norm, self.eps)?;
        let mut q = backend.reshape(q, rows, heads * head_dim)?;
        backend.rope(&mut q, heads, angles)?;
        record(backend, tap, format_args!("idx_q.{layer}"), &q)?;
        record(backend, tap, format_args!("idx_w.{layer}"), &weights)?;
        self.round(backend, &mut q)?;
        let shape = IndexShape { heads, head_dim, top_k, scale: (head_dim as f32).powf(-0.5) };
        let selected = backend.select(&q, &weights, place.cache, layer, place.plan, shape)?;
        let name = format!("selected.{layer}");
        if tap.wants(&name) {
            let value = |position: u32| if position == UNSELECTED { -1.0 } else { position as f32 };
            let values: Vec<f32> = backend.download_index(&selected)?.into_iter().map(value).collect();
            tap.record(&name, top_k, &values);
        }
        Ok(selected)
    }

    /// Sparse attention of the rows' queries `q`, `[n, heads*head_dim]`.
    #[allow(clippy::too_many_arguments, reason = "operands of one layer")]
    pub(crate) fn attend(
        &self,
        backend: &B,
        x: &B::Tensor,
        angles: &B::Tensor,
        q: &B::Tensor,
        longest: usize,
        shape: AttentionShape,
        mut place: Place<'_, B>,
        tap: &mut dyn Tap,
    ) -> Result<B::Tensor, BackendError> {
        self.write_keys(backend, x, angles, &mut place, tap)?;
        // While nothing can be left out the selection is not needed, unless someone looks.
        if longest <= self.config.topk {
            if tap.wants(&format!("selected.{}", place.layer)) {
                self.select(backend, x, angles, &place, tap)?;
            }
            return backend.paged_attention(q, place.cache, place.layer, place.plan, shape);
        }
        let selected = self.select(backend, x, angles, &place, tap)?;
        backend.sparse_attention(q, place.cache, place.layer, place.plan, shape, &selected)
    }
}
