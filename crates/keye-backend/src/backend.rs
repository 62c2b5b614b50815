//! The operations of the models.

use std::ops::Range;

use crate::{BackendError, WeightSource};

/// Tokens in a block of the KV cache.
pub const BLOCK_TOKENS: usize = 64;

/// What follows a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// `0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))`.
    GeluTanh,
    /// `0.5 z (1 + erf(z / sqrt 2))`.
    GeluErf,
}

/// Query rows that attend, in both directions, to key rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Rows of q (and of the result).
    pub queries: Range<usize>,
    /// Rows of k and v.
    pub keys: Range<usize>,
}

/// Heads of an attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; query head `i` uses `i / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// RMSNorm of each head of q and k.
#[derive(Debug)]
pub struct QkNorm<'a, W> {
    /// `[head_dim]`.
    pub q: &'a W,
    /// `[head_dim]`.
    pub k: &'a W,
    /// Epsilon.
    pub eps: f32,
}

/// An expert of a mixture: `down(silu(gate x) * (up x))`.
#[derive(Debug)]
pub struct Expert<W> {
    /// `[width, in]`
    pub gate: W,
    /// `[width, in]`
    pub up: W,
    /// `[in, width]`
    pub down: W,
}

/// Heads of an indexer: which keys sparse attention attends to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct IndexShape {
    /// Query heads; there is one key head.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Keys that a query selects.
    pub top_k: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// Heads of an attention whose keys and values are one cached row, the latent, for all heads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentShape {
    /// Query heads.
    pub heads: usize,
    /// Leading columns of a latent row that are its value; all of them are its key.
    pub value_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// How experts are chosen by groups (DeepSeek-V3's `noaux_tc`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupedRouting {
    /// Experts of a row.
    pub count: usize,
    /// Groups of equally many experts, numbered in order.
    pub groups: usize,
    /// Groups that a row may choose from.
    pub chosen_groups: usize,
    /// The chosen experts' weights are scaled to sum to one.
    pub normalise: bool,
    /// Factor of the weights.
    pub scale: f32,
}

/// Element type of cached keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvDtype {
    /// Exact.
    #[default]
    F32,
    /// Half the memory; keys and values are rounded to nearest even.
    Bf16,
    /// About a quarter: each head's key and value of a token in eight bits with a scale of its own, the largest magnitude
    /// over 127. Index keys and latent rows as [`KvDtype::Bf16`].
    Int8,
}

/// What is cached of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSpec {
    /// Layers.
    pub layers: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Element type.
    pub dtype: KvDtype,
    /// Width of the index key; 0 without sparse attention.
    pub index_dim: usize,
    /// Width of the latent row that stands for keys and values of all heads; 0 without latent attention.
    pub latent_dim: usize,
}

impl CacheSpec {
    /// Bytes of one block over all layers.
    pub fn block_bytes(&self) -> usize {
        // Of a head's key or value, and of the other rows' elements.
        let (head, element) = match self.dtype {
            KvDtype::F32 => (4 * self.head_dim, 4),
            KvDtype::Bf16 => (2 * self.head_dim, 2),
            KvDtype::Int8 => (self.head_dim + 4, 2),
        };
        let token = 2 * self.kv_heads * head + (self.index_dim + self.latent_dim) * element;
        self.layers * token * BLOCK_TOKENS
    }
}

/// Consecutive rows of a step that belong to one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceRows {
    /// Rows of the step.
    pub rows: Range<usize>,
    /// Index in the sequence of the first of them.
    pub start: usize,
    /// The sequence's blocks, enough for `start + rows.len()` tokens.
    pub block_table: Vec<u32>,
}

/// A device and its fused operations.
///
/// Tensors are rows of activations `[rows, cols]`. Operations may run asynchronously; [`Backend::download`] waits. Shapes are
/// known before a launch; a shape that does not fit is a bug of the caller and panics.
pub trait Backend: Send + Sync + Sized + 'static {
    /// Activations `[rows, cols]` on the device.
    type Tensor: Send + Sync;
    /// A weight on the device, in the device's own form.
    type Weight: Send + Sync;
    /// Small unsigned integers on the device: token ids, row numbers.
    type Index: Send + Sync;
    /// The pool of KV blocks.
    type Cache: Send;
    /// Sequences of a step, prepared once and used by all layers.
    type Plan: Send + Sync;

    /// Device and instruction set, for display.
    fn describe(&self) -> String;

    // Memory.

    /// Takes a weight over, in place where the device can.
    fn load(&self, source: &WeightSource) -> Result<Self::Weight, BackendError>;
    /// Columns of a stored matrix `[in, width]` as a weight `[out, in]`, in place where the device can.
    fn load_columns(&self, source: &WeightSource, columns: Range<usize>) -> Result<Self::Weight, BackendError>;
    /// All zeros.
    fn zeros(&self, rows: usize, cols: usize) -> Result<Self::Tensor, BackendError>;
    /// Host values `[rows, cols]`.
    fn upload(&self, rows: usize, cols: usize, values: &[f32]) -> Result<Self::Tensor, BackendError>;
    /// Host bytes `[rows, cols]`, each the number it stands for.
    fn upload_u8(&self, rows: usize, cols: usize, values: &[u8]) -> Result<Self::Tensor, BackendError>;
    /// Host integers.
    fn upload_index(&self, values: &[u32]) -> Result<Self::Index, BackendError>;
    /// Waits until everything launched so far has been done; nothing on a device that has done it when a call returns.
    fn synchronize(&self) -> Result<(), BackendError> {
        Ok(())
    }
    /// Values on the host, row-major; waits for the device.
    fn download(&self, x: &Self::Tensor) -> Result<Vec<f32>, BackendError>;
    /// Integers on the host; waits for the device.
    fn download_index(&self, index: &Self::Index) -> Result<Vec<u32>, BackendError>;
    /// Number of rows.
    fn rows(&self, x: &Self::Tensor) -> usize;
    /// Number of columns.
    fn cols(&self, x: &Self::Tensor) -> usize;

    /// The same values, row-major, as another number of rows.
    fn reshape(&self, x: Self::Tensor, rows: usize, cols: usize) -> Result<Self::Tensor, BackendError>;

    // Moving rows.

    /// A copy of some rows.
    fn slice_rows(&self, x: &Self::Tensor, rows: Range<usize>) -> Result<Self::Tensor, BackendError>;
    /// Writes rows `from` of `x` to `to` at row `at`.
    fn copy_rows(
        &self,
        x: &Self::Tensor,
        from: Range<usize>,
        to: &mut Self::Tensor,
        at: usize,
    ) -> Result<(), BackendError>;
    /// Row `i` of the result is the concatenation of the rows `index[group*i..group*(i+1)]` of x: `[len/group, group*cols]`.
    fn gather_rows(&self, x: &Self::Tensor, index: &Self::Index, group: usize) -> Result<Self::Tensor, BackendError>;
    /// Rows of a table: `[len, cols]`.
    fn embed(&self, table: &Self::Weight, ids: &Self::Index) -> Result<Self::Tensor, BackendError>;
    /// `x[i] += sum over t of weights[i, t] * table[index[taps*i + t]]`, taps from left to right; weights `[rows, taps]`.
    fn add_weighted_rows(
        &self,
        x: &mut Self::Tensor,
        table: &Self::Weight,
        index: &Self::Index,
        weights: &Self::Tensor,
    ) -> Result<(), BackendError>;

    // Arithmetic.

    /// `(x - mean) / sqrt(var + eps) * gamma + beta` over each row.
    fn layer_norm(
        &self,
        x: &Self::Tensor,
        gamma: &Self::Weight,
        beta: &Self::Weight,
        eps: f32,
    ) -> Result<Self::Tensor, BackendError>;
    /// `x / sqrt(mean(x^2) + eps) * gamma` over each row.
    fn rms_norm(&self, x: &Self::Tensor, gamma: &Self::Weight, eps: f32) -> Result<Self::Tensor, BackendError>;
    /// Of each row every element that is not below some bound, at least `count` (1 to 128) of them, with its column, in any
    /// order; of a row with fewer elements all. An empty list stands for a row that could not be cut. `None`: this device
    /// gains nothing over [`Backend::download`].
    #[allow(clippy::type_complexity, reason = "a list a row")]
    fn highest(&self, x: &Self::Tensor, count: usize) -> Result<Option<Vec<Vec<(u32, f32)>>>, BackendError> {
        let _ = (x, count);
        Ok(None)
    }
    /// `act(x w^T + bias)`; w `[out, in]`, bias `[out]`.
    fn linear(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        bias: Option<&Self::Weight>,
        activation: Activation,
    ) -> Result<Self::Tensor, BackendError>;
    /// `y += x w^T + bias`.
    fn linear_add(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        bias: Option<&Self::Weight>,
        y: &mut Self::Tensor,
    ) -> Result<(), BackendError>;
    /// `silu(x gate^T) * (x up^T)`.
    fn gated(&self, x: &Self::Tensor, gate: &Self::Weight, up: &Self::Weight) -> Result<Self::Tensor, BackendError>;
    /// Experts of each row, the most probable first (the lower number among equals): softmax over `x router^T`, the `count`
    /// largest `[rows * count]` and their probabilities `[rows, count]`, scaled to sum to one when `normalise` is set.
    fn route(
        &self,
        x: &Self::Tensor,
        router: &Self::Weight,
        count: usize,
        normalise: bool,
    ) -> Result<(Self::Index, Self::Tensor), BackendError>;
    /// Chosen experts as one of several devices counts them that have `experts` of them: from its first on, the others
    /// [`crate::UNSELECTED`].
    fn own_experts(&self, chosen: &Self::Index, experts: Range<usize>) -> Result<Self::Index, BackendError> {
        let own = |expert: u32| match experts.contains(&(expert as usize)) {
            true => expert - experts.start as u32,
            false => crate::UNSELECTED,
        };
        self.upload_index(&self.download_index(chosen)?.into_iter().map(own).collect::<Vec<_>>())
    }
    /// `y[i] += sum over t of weights[i, t] * experts[chosen[i, t]](x[i])`, summed from left to right; where chosen is
    /// [`crate::UNSELECTED`] nothing is added. All gates and ups have the same [`crate::Dtype::activation_bits`], and so have
    /// all downs.
    fn add_experts(
        &self,
        x: &Self::Tensor,
        experts: &[Expert<Self::Weight>],
        chosen: &Self::Index,
        weights: &Self::Tensor,
        y: &mut Self::Tensor,
    ) -> Result<(), BackendError>;
    /// Rotates the halves of each of `heads` heads of a row (NeoX); `angles` is `[rows, head_dim]`: cosines, then sines.
    fn rope(&self, x: &mut Self::Tensor, heads: usize, angles: &Self::Tensor) -> Result<(), BackendError>;
    /// Softmax attention without a mask, per span; q, k, v `[rows, heads*head_dim]`. Rows outside of every span are zero.
    fn attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        shape: AttentionShape,
        spans: &[Span],
    ) -> Result<Self::Tensor, BackendError>;

    // The KV cache.

    /// A pool of `blocks` blocks; memory is taken as it is first used where the device can.
    fn cache(&self, spec: &CacheSpec, blocks: usize) -> Result<Self::Cache, BackendError>;
    /// Prepares the sequences of a step.
    fn plan(&self, sequences: &[SequenceRows]) -> Result<Self::Plan, BackendError>;
    /// Norm (where given) and RoPE on q and k, then k and v into the cache at the rows' places; q stays in its tensor.
    #[allow(clippy::too_many_arguments, reason = "one fused launch")]
    fn norm_rope_write(
        &self,
        q: &mut Self::Tensor,
        k: Self::Tensor,
        v: Self::Tensor,
        norm: Option<QkNorm<'_, Self::Weight>>,
        angles: &Self::Tensor,
        cache: &mut Self::Cache,
        layer: usize,
        plan: &Self::Plan,
    ) -> Result<(), BackendError>;
    /// Causal softmax attention of each row over its own sequence in the cache: `[rows, heads*head_dim]`.
    fn paged_attention(
        &self,
        q: &Self::Tensor,
        cache: &Self::Cache,
        layer: usize,
        plan: &Self::Plan,
        shape: AttentionShape,
    ) -> Result<Self::Tensor, BackendError>;

    // Sparse attention.

    /// Makes each `width` columns of a row, a power of two, what the FP8 scorer sees of them ([`crate::fp8_rows`]): their
    /// Hadamard transform in 8-bit floats with a scale that is a power of two.
    fn round_to_fp8(&self, x: &mut Self::Tensor, width: usize) -> Result<(), BackendError>;
    /// Index keys `[rows, index_dim]` into the cache at the rows' places.
    fn write_index_keys(
        &self,
        keys: &Self::Tensor,
        cache: &mut Self::Cache,
        layer: usize,
        plan: &Self::Plan,
    ) -> Result<(), BackendError>;
    /// The `top_k` positions s of its own sequence, itself included, with the highest
    /// `scale * sum over heads h of weights[h] * max(0, q[h] . key[s])`, the lower position among equals (-0 equals 0):
    /// `[rows * top_k]`, ascending, then [`crate::UNSELECTED`]. q is `[rows, heads*head_dim]`, weights `[rows, heads]`.
    #[allow(clippy::too_many_arguments, reason = "one fused launch")]
    fn select(
        &self,
        q: &Self::Tensor,
        weights: &Self::Tensor,
        cache: &Self::Cache,
        layer: usize,
        plan: &Self::Plan,
        shape: IndexShape,
    ) -> Result<Self::Index, BackendError>;
    /// Softmax attention of each row over the positions that [`Backend::select`] gave; equals
    /// [`Backend::paged_attention`] bit for bit where everything is selected.
    #[allow(clippy::too_many_arguments, reason = "one fused launch")]
    fn sparse_attention(
        &self,
        q: &Self::Tensor,
        cache: &Self::Cache,
        layer: usize,
        plan: &Self::Plan,
        shape: AttentionShape,
        selected: &Self::Index,
    ) -> Result<Self::Tensor, BackendError>;

    // Latent attention and its models' experts; without them a device does not run these models.

    /// Experts of each row by score `s = sigmoid(x router^T)` and choice `c = s + bias` (bias `[experts]`): of the groups those
    /// with the highest sums of their two highest choices, in these the `count` highest choices, the highest first (the
    /// lower number among equals) `[rows * count]`; and their weights: the scores, scaled as `routing` says `[rows, count]`.
    fn route_grouped(
        &self,
        x: &Self::Tensor,
        router: &Self::Weight,
        bias: &Self::Weight,
        routing: GroupedRouting,
    ) -> Result<(Self::Index, Self::Tensor), BackendError> {
        let _ = (x, router, bias, routing);
        Err(self.without_latent_attention())
    }
    /// Rotates neighbouring pairs (GPT-J) of the last `width` columns of each of `heads` heads of a row; `angles` is
    /// `[rows, width]`: cosines, then sines.
    fn rope_pairs(&self, x: &mut Self::Tensor, heads: usize, angles: &Self::Tensor) -> Result<(), BackendError> {
        let _ = (x, heads, angles);
        Err(self.without_latent_attention())
    }
    /// Each head's leading columns times a matrix of its own, the others passed on behind the product: x is
    /// `[rows, heads*stride]`, one weight a head `[out, in]`, not packed, with `in <= stride`: `[rows, heads*(out + stride - in)]`.
    fn linear_heads(&self, x: &Self::Tensor, weights: &[Self::Weight]) -> Result<Self::Tensor, BackendError> {
        let _ = (x, weights);
        Err(self.without_latent_attention())
    }
    /// Rows `[rows, a]` and `[rows, b]` side by side, `a + b` being the latent's width, into the cache at the rows' places.
    fn write_latent(
        &self,
        a: &Self::Tensor,
        b: &Self::Tensor,
        cache: &mut Self::Cache,
        layer: usize,
        plan: &Self::Plan,
    ) -> Result<(), BackendError> {
        let _ = (a, b, cache, layer, plan);
        Err(self.without_latent_attention())
    }
    /// Causal softmax attention of each row over the latent rows of its own sequence: q `[rows, heads*latent_dim]`, result
    /// `[rows, heads*value_dim]`.
    fn latent_attention(
        &self,
        q: &Self::Tensor,
        cache: &Self::Cache,
        layer: usize,
        plan: &Self::Plan,
        shape: LatentShape,
    ) -> Result<Self::Tensor, BackendError> {
        let _ = (q, cache, layer, plan, shape);
        Err(self.without_latent_attention())
    }
    /// What operations of latent attention say that a device does not have.
    fn without_latent_attention(&self) -> BackendError {
        BackendError::Setting(format!("{}: no latent attention on this device; use the CPU", self.describe()))
    }
}
