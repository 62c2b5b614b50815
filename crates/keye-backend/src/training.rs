//! What training computes with: the operations of a dense model with a vision tower, and their reverses.
//!
//! **In** and **out** are arrays of f32 that lie on a [`Device`]; matrices are rows, one after the other. A device may compute
//! later than it is asked: an error of one call may come out of another.
//!
//! What it promises: every sum has an order that depends on shapes alone, so the same calls give the same bits, again and on any
//! number of threads. Different devices differ by rounding; all are compared with plain formulas by one suite
//! ([`crate::conformance::training`]).

use std::borrow::Cow;
use std::ops::Range;

use crate::matmul::Old;
use crate::{BackendError, Isa};

/// What the operands of products with weights are rounded to; sums, parameters and all else stay f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// Not at all.
    #[default]
    F32,
    /// Mixed precision.
    Bf16,
}

/// A matrix in an array, from element `start` on.
#[derive(Debug)]
pub struct View<'a, A> {
    /// Where it lies.
    pub array: &'a A,
    /// Its first element.
    pub start: usize,
    /// Its rows.
    pub rows: usize,
    /// Its columns.
    pub cols: usize,
}

impl<A> Clone for View<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for View<'_, A> {}

impl<'a, A> View<'a, A> {
    /// All elements of an array of `rows * cols`.
    pub fn of(array: &'a A, rows: usize, cols: usize) -> Self {
        Self { array, start: 0, rows, cols }
    }

    /// Its elements in the array.
    pub fn range(&self) -> Range<usize> {
        self.start..self.start + self.rows * self.cols
    }

    /// As an operand of a product.
    pub fn plain(self) -> Operand<'a, A> {
        Operand { matrix: self, transposed: false }
    }

    /// Its transpose, as an operand of a product.
    pub fn t(self) -> Operand<'a, A> {
        Operand { matrix: self, transposed: true }
    }
}

/// A [`View`] to write to.
#[derive(Debug)]
pub struct ViewMut<'a, A> {
    /// Where it lies.
    pub array: &'a mut A,
    /// Its first element.
    pub start: usize,
    /// Its rows.
    pub rows: usize,
    /// Its columns.
    pub cols: usize,
}

impl<'a, A> ViewMut<'a, A> {
    /// All elements of an array of `rows * cols`.
    pub fn of(array: &'a mut A, rows: usize, cols: usize) -> Self {
        Self { array, start: 0, rows, cols }
    }

    /// Its elements in the array.
    pub fn range(&self) -> Range<usize> {
        self.start..self.start + self.rows * self.cols
    }
}

/// A factor of a product.
#[derive(Debug)]
pub struct Operand<'a, A> {
    /// As it is stored.
    pub matrix: View<'a, A>,
    /// Whether its transpose is meant.
    pub transposed: bool,
}

impl<A> Clone for Operand<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for Operand<'_, A> {}

impl<A> Operand<'_, A> {
    /// Rows and columns of what is meant.
    pub fn shape(&self) -> [usize; 2] {
        let View { rows, cols, .. } = self.matrix;
        if self.transposed { [cols, rows] } else { [rows, cols] }
    }
}

/// Queries that attend to keys; in causal attention both are the same rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Rows of the queries.
    pub queries: Range<usize>,
    /// Rows of the keys and values.
    pub keys: Range<usize>,
}

/// Shape and masking of an attention. Scores are scaled by `d^-1/2`; query head h sees key/value head `h kv_heads / heads`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub d: usize,
    /// Whether query i of a span sees its keys 0 to i only.
    pub causal: bool,
}

/// Cosines and sines that turn the heads of every row, `[n, half]` each, half the width of a head: `(a, b)`, a head's two halves, become
/// `(a cos - b sin, b cos + a sin)`.
#[derive(Debug)]
pub struct Angles<A> {
    /// Columns of both.
    pub half: usize,
    /// `[n, half]`
    pub cos: A,
    /// `[n, half]`
    pub sin: A,
}

/// Norm of a head before it is turned: `x / sqrt(mean(x^2) + eps) * w`.
#[derive(Debug)]
pub struct HeadNorm<'a, A> {
    /// `[d]`
    pub weight: View<'a, A>,
    /// Added to the mean square.
    pub eps: f32,
}

impl<A> Clone for HeadNorm<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for HeadNorm<'_, A> {}

/// Which form of the GELU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gelu {
    /// `0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))`
    Tanh,
    /// `z Phi(z)`
    Erf,
}

/// Weighted rows of one matrix that are added to rows of another: row i takes those from `starts[i]` to `starts[i + 1]`, in
/// order.
#[derive(Debug, Clone, PartialEq)]
pub struct Taps {
    /// `[rows of the sum + 1]`
    pub starts: Vec<u32>,
    /// Rows that are added.
    pub from: Vec<u32>,
    /// Their weights.
    pub weight: Vec<f32>,
}

impl Taps {
    /// Of `(row of the sum, row that is added, weight)`, for `rows` rows; those of one row keep their order.
    pub fn new(rows: usize, taps: impl Iterator<Item = (u32, u32, f32)> + Clone) -> Self {
        let mut starts = vec![0u32; rows + 1];
        taps.clone().for_each(|(to, ..)| starts[to as usize + 1] += 1);
        (0..rows).for_each(|row| starts[row + 1] += starts[row]);
        let mut next = starts.clone();
        let n = starts[rows] as usize;
        let (mut from, mut weight) = (vec![0; n], vec![0.0; n]);
        for (to, source, w) in taps {
            let at = next[to as usize] as usize;
            next[to as usize] += 1;
            (from[at], weight[at]) = (source, w);
        }
        Self { starts, from, weight }
    }
}

/// What is updated by [`Device::adamw`], and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    /// Elements.
    pub range: Range<usize>,
    /// Learning rate.
    pub lr: f32,
    /// Weight decay.
    pub decay: f32,
}

/// What all updates of a step share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// What gradients are multiplied with first.
    pub clip: f32,
    /// Of the running means of gradients and of their squares.
    pub betas: [f32; 2],
    /// What the two means are multiplied with, for they begin at zero.
    pub corrections: [f32; 2],
    /// Added to the root of the second mean.
    pub eps: f32,
}

/// Where training computes.
///
/// Shapes that do not fit are the caller's error and panic; so may indices beyond an array, if they do not write elsewhere.
pub trait Device: Send + Sync {
    /// f32 on the device.
    type Array: Send + Sync;
    /// Spans of an attention in the form in which the device takes them.
    type Spans: Send + Sync;

    /// How many packs are computed side by side.
    fn lanes(&self) -> usize;

    /// The instructions for the little that is computed on the host.
    fn host(&self) -> Isa;

    /// Number of elements.
    fn len(&self, x: &Self::Array) -> usize;

    /// An array of these values.
    fn array(&self, values: Vec<f32>) -> Result<Self::Array, BackendError>;

    /// An array of zeros.
    fn zeros(&self, len: usize) -> Result<Self::Array, BackendError>;

    /// Values on the host; waits for all that was asked before.
    fn values<'a>(&self, x: View<'a, Self::Array>) -> Result<Cow<'a, [f32]>, BackendError>;

    /// A matrix `times` times, one below the other.
    fn repeat(&self, x: View<'_, Self::Array>, times: usize) -> Result<Self::Array, BackendError>;

    /// Sets all to zero.
    fn clear(&self, x: &mut Self::Array) -> Result<(), BackendError>;

    /// `to = a to + b x`, of as many elements. With `a` 0 it does not matter what `to` holds.
    fn combine(
        &self,
        a: f32,
        to: ViewMut<'_, Self::Array>,
        b: f32,
        x: View<'_, Self::Array>,
    ) -> Result<(), BackendError>;

    /// Adds `row [d]` to every row of `x [n, d]`.
    fn add_row(&self, x: &mut Self::Array, row: View<'_, Self::Array>) -> Result<(), BackendError>;

    /// Adds the sums of the columns of `x [n, d]` to `sums [d]`.
    fn add_column_sums(&self, x: &Self::Array, sums: ViewMut<'_, Self::Array>) -> Result<(), BackendError>;

    /// `c (+)= a b`; in [`Precision::Bf16`] both operands are rounded.
    fn product(
        &self,
        precision: Precision,
        a: Operand<'_, Self::Array>,
        b: Operand<'_, Self::Array>,
        c: ViewMut<'_, Self::Array>,
        old: Old,
    ) -> Result<(), BackendError>;

    /// LayerNorm where there is a bias, else RMSNorm, of `x [n, d]`: the result, and `[n, 2]`: each row's mean (0 in RMSNorm) and
    /// `1 / sqrt(variance or mean square + eps)`.
    fn norm(
        &self,
        x: &Self::Array,
        weight: View<'_, Self::Array>,
        bias: Option<View<'_, Self::Array>>,
        eps: f32,
    ) -> Result<(Self::Array, Self::Array), BackendError>;

    /// `dx += ..` of [`Device::norm`]: with `g = dy w` and `xhat = (x - mean) r`, `r (g - mean(g) - xhat mean(g xhat))`, where
    /// `mean(g)` is left out unless `centred`.
    fn norm_backward(
        &self,
        x: &Self::Array,
        stats: &Self::Array,
        weight: View<'_, Self::Array>,
        centred: bool,
        dy: &Self::Array,
        dx: &mut Self::Array,
    ) -> Result<(), BackendError>;

    /// `dw += ..` of [`Device::norm`]: the sum over rows of `dy xhat`.
    fn norm_weight_backward(
        &self,
        x: &Self::Array,
        stats: &Self::Array,
        dy: &Self::Array,
        dw: ViewMut<'_, Self::Array>,
    ) -> Result<(), BackendError>;

    /// Rows of heads side by side `[n, heads * d]` to head after head `[heads, n, d]`, each head normalised, then turned, where
    /// that is asked for.
    fn split_heads(
        &self,
        x: &Self::Array,
        heads: usize,
        d: usize,
        norm: Option<HeadNorm<'_, Self::Array>>,
        angles: Option<&Angles<Self::Array>>,
    ) -> Result<Self::Array, BackendError>;

    /// `[heads, n, d]` to `[n, heads * d]`.
    fn merge_heads(&self, x: &Self::Array, heads: usize, d: usize) -> Result<Self::Array, BackendError>;

    /// The reverse of [`Device::split_heads`]: `dy [heads, n, d]` to the gradient of x, and that of the norm's weight is added to
    /// `dw [d]`. Without a norm neither `x` nor `dw` is looked at.
    #[expect(clippy::too_many_arguments, reason = "an operation and its operands")]
    fn split_heads_backward(
        &self,
        x: &Self::Array,
        heads: usize,
        d: usize,
        norm: Option<HeadNorm<'_, Self::Array>>,
        angles: Option<&Angles<Self::Array>>,
        dy: Self::Array,
        dw: Option<ViewMut<'_, Self::Array>>,
    ) -> Result<Self::Array, BackendError>;

    /// Spans for [`Device::attention`], in the order of their queries, of which none is in two.
    fn spans(&self, spans: Vec<Span>) -> Result<Self::Spans, BackendError>;

    /// Attention of `q [heads, nq, d]` over `k` and `v [kv_heads, nk, d]`: the result, shaped like q, and the logarithms of the
    /// sums of exponentials `[heads, nq]`. Queries in no span are undefined.
    fn attention(
        &self,
        shape: AttentionShape,
        q: &Self::Array,
        k: &Self::Array,
        v: &Self::Array,
        spans: &Self::Spans,
    ) -> Result<(Self::Array, Self::Array), BackendError>;

    /// Gradients of q, k and v, shaped like them, from that of the result; `out` and `lse` are what [`Device::attention`] gave.
    #[expect(clippy::too_many_arguments, reason = "an operation and its operands")]
    fn attention_backward(
        &self,
        shape: AttentionShape,
        q: &Self::Array,
        k: &Self::Array,
        v: &Self::Array,
        spans: &Self::Spans,
        out: &Self::Array,
        lse: &Self::Array,
        dout: &Self::Array,
    ) -> Result<[Self::Array; 3], BackendError>;

    /// `silu(gate) up`
    fn silu_mul(&self, gate: &Self::Array, up: &Self::Array) -> Result<Self::Array, BackendError>;

    /// Takes gate and up and leaves their gradients.
    fn silu_mul_backward(
        &self,
        gate: &mut Self::Array,
        up: &mut Self::Array,
        dproduct: &Self::Array,
    ) -> Result<(), BackendError>;

    /// The GELU of every element.
    fn gelu(&self, form: Gelu, z: &Self::Array) -> Result<Self::Array, BackendError>;

    /// `dy = dy gelu'(z)`
    fn gelu_backward(&self, form: Gelu, z: &Self::Array, dy: &mut Self::Array) -> Result<(), BackendError>;

    /// The rows of a matrix that are listed, one below the other.
    fn gather(&self, from: View<'_, Self::Array>, rows: &[u32]) -> Result<Self::Array, BackendError>;

    /// Row i of `from [rows.len(), cols]` takes the place of row `rows[i]`; none is listed twice.
    fn scatter(&self, to: ViewMut<'_, Self::Array>, rows: &[u32], from: &Self::Array) -> Result<(), BackendError>;

    /// Adds weighted rows of `from` to rows of `to`; both have the same number of columns.
    fn add_taps(
        &self,
        to: ViewMut<'_, Self::Array>,
        from: View<'_, Self::Array>,
        taps: &Taps,
    ) -> Result<(), BackendError>;

    /// Bytes of patches `[patches, 3, side, side]` to `table[channel][byte]`.
    fn pixels(&self, bytes: &[u8], side: usize, table: &[[f32; 256]; 3]) -> Result<Self::Array, BackendError>;

    /// Of logits `[n, V]` and a target `(token, weight)` a row: `-log softmax(row)[token]`, `[n]`, not weighted. The logits become
    /// `weight (softmax(row) - onehot(token))`.
    fn softmax_loss(&self, logits: &mut Self::Array, targets: &[(u32, f32)]) -> Result<Self::Array, BackendError>;

    /// The sum of all squares; what is not finite gives what is not finite.
    fn square_sum(&self, x: View<'_, Self::Array>) -> Result<f64, BackendError>;

    /// `m = b0 m + (1 - b0) g`, `v = b1 v + (1 - b1) g^2`, `p -= lr (m c0 / (sqrt(v c1) + eps) + decay p)` for the elements of all
    /// updates, which come in order and do not overlap; g is the clipped gradient.
    fn adamw(
        &self,
        p: &mut Self::Array,
        g: &Self::Array,
        m: &mut Self::Array,
        v: &mut Self::Array,
        adamw: AdamW,
        updates: &[Update],
    ) -> Result<(), BackendError>;
}
