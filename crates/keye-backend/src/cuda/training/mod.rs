//! What training computes with, on a GPU: [`crate::training::Device`].
//!
//! Sums over rows are cut into slices whose number depends on shapes alone; the slices' sums are added in order.

mod attention;
mod product;
mod rows;
mod step;

use std::borrow::Cow;
use std::sync::Arc;

use super::Cuda;
use super::device::{Arg, Device, Grid, Memory};
use crate::matmul::Old;
use crate::training::{
    AdamW, Angles, AttentionShape, Gelu, HeadNorm, Operand, Precision, Span, Taps, Update, View, ViewMut,
};

use crate::{BackendError, Isa};

type Result<T> = std::result::Result<T, BackendError>;

/// Elements that are converted at a time on their way between host and device.
const PIECE: usize = 1 << 22;

/// f32 on the device.
pub struct Array {
    pub(super) memory: Memory,
    pub(super) len: usize,
}

impl Array {
    /// Room for `len` elements, of no value yet.
    pub(super) fn room(device: &Arc<Device>, len: usize) -> Result<Self> {
        let bytes = len.checked_mul(4).unwrap_or(usize::MAX / 2);
        let memory = device.allocate("training", bytes).map_err(|error| match error {
            BackendError::Memory { what, bytes, .. } => BackendError::Memory {
                what,
                bytes,
                remedy: "lower max_tokens of the recipe's data, or set recompute = true",
            },
            other => other,
        });
        Ok(Self { memory: memory?, len })
    }

    fn upload(device: &Arc<Device>, values: &[f32]) -> Result<Self> {
        let out = Self::room(device, values.len())?;
        let mut bytes = vec![[0; 4]; values.len().min(PIECE)];
        for (i, piece) in values.chunks(PIECE).enumerate() {
            for (to, value) in bytes.iter_mut().zip(piece) {
                *to = value.to_le_bytes();
            }
            device.write(&out.memory, i * PIECE * 4, bytes[..piece.len()].as_flattened())?;
        }
        Ok(out)
    }

    fn download(&self, start: usize, len: usize) -> Result<Vec<f32>> {
        assert!(start + len <= self.len, "inside the array");
        let mut out = vec![0.0; len];
        let mut bytes = vec![[0; 4]; len.min(PIECE)];
        for (i, piece) in out.chunks_mut(PIECE).enumerate() {
            let bytes = &mut bytes[..piece.len()];
            self.memory.read((start + i * PIECE) * 4, bytes.as_flattened_mut())?;
            for (to, value) in piece.iter_mut().zip(bytes) {
                *to = f32::from_le_bytes(*value);
            }
        }
        Ok(out)
    }

    fn arg(&self) -> Arg {
        self.memory.arg()
    }

    fn at(&self, start: usize) -> Arg {
        Arg::Address(self.memory.address() + 4 * start as u64)
    }
}

/// Where a matrix begins that lies inside its array.
fn matrix(view: View<'_, Array>) -> Arg {
    assert!(view.range().end <= view.array.len, "the matrix lies inside its array");
    view.array.at(view.start)
}

/// As [`matrix`], to write to.
fn target(view: &ViewMut<'_, Array>) -> Arg {
    assert!(view.range().end <= view.array.len, "the matrix lies inside its array");
    view.array.at(view.start)
}

/// As [`matrix`], a vector as wide as what it is combined with.
fn vector(view: View<'_, Array>, width: usize) -> Arg {
    assert_eq!(view.rows * view.cols, width, "width");
    matrix(view)
}

fn number(n: usize) -> Arg {
    assert!(n <= u32::MAX as usize, "dimensions below 2^32");
    Arg::U32(n as u32)
}

fn count(n: usize) -> Arg {
    Arg::U64(n as u64)
}

/// How many rows of `cols` elements an array has.
fn rows_of(x: &Array, cols: usize) -> usize {
    assert!(cols > 0 && x.len.is_multiple_of(cols), "{} elements in rows of {cols}", x.len);
    x.len / cols
}

/// 1024 elements a block.
fn elements(n: usize) -> Grid {
    Grid::of(n.div_ceil(1024), 1, 256)
}

impl crate::training::Device for Cuda {
    type Array = Array;
    type Spans = attention::Spans;

    // A GPU is filled by one pack.
    fn lanes(&self) -> usize {
        1
    }

    fn host(&self) -> Isa {
        Isa::detect()
    }

    fn len(&self, x: &Array) -> usize {
        x.len
    }

    fn array(&self, values: Vec<f32>) -> Result<Array> {
        Array::upload(&self.device, &values)
    }

    fn zeros(&self, len: usize) -> Result<Array> {
        let mut out = Array::room(&self.device, len)?;
        self.clear(&mut out)?;
        Ok(out)
    }

    fn values<'a>(&self, x: View<'a, Array>) -> Result<Cow<'a, [f32]>> {
        x.array.download(x.start, x.rows * x.cols).map(Cow::Owned)
    }

    fn repeat(&self, x: View<'_, Array>, times: usize) -> Result<Array> {
        self.training_repeat(x, times)
    }

    fn clear(&self, x: &mut Array) -> Result<()> {
        self.device.clear(&x.memory)
    }

    fn combine(&self, a: f32, to: ViewMut<'_, Array>, b: f32, x: View<'_, Array>) -> Result<()> {
        let n = to.rows * to.cols;
        let args = [Arg::F32(a), target(&to), Arg::F32(b), vector(x, n), count(n)];
        self.device.launch("train_combine", elements(n), &args)
    }

    fn add_row(&self, x: &mut Array, row: View<'_, Array>) -> Result<()> {
        self.training_add_row(x, row)
    }

    fn add_column_sums(&self, x: &Array, sums: ViewMut<'_, Array>) -> Result<()> {
        self.training_column_sums(x, sums)
    }

    fn product(
        &self,
        precision: Precision,
        a: Operand<'_, Array>,
        b: Operand<'_, Array>,
        c: ViewMut<'_, Array>,
        old: Old,
    ) -> Result<()> {
        self.training_product(precision, a, b, c, old)
    }

    fn norm(
        &self,
        x: &Array,
        weight: View<'_, Array>,
        bias: Option<View<'_, Array>>,
        eps: f32,
    ) -> Result<(Array, Array)> {
        self.training_norm(x, weight, bias, eps)
    }

    fn norm_backward(
        &self,
        x: &Array,
        stats: &Array,
        weight: View<'_, Array>,
        centred: bool,
        dy: &Array,
        dx: &mut Array,
    ) -> Result<()> {
        self.training_norm_backward(x, stats, weight, centred, dy, dx)
    }

    fn norm_weight_backward(&self, x: &Array, stats: &Array, dy: &Array, dw: ViewMut<'_, Array>) -> Result<()> {
        self.training_norm_weight_backward(x, stats, dy, dw)
    }

    fn split_heads(
        &self,
        x: &Array,
        heads: usize,
        d: usize,
        norm: Option<HeadNorm<'_, Array>>,
        angles: Option<&Angles<Array>>,
    ) -> Result<Array> {
        self.training_split_heads(x, [heads, d], norm, angles)
    }

    fn merge_heads(&self, x: &Array, heads: usize, d: usize) -> Result<Array> {
        self.training_merge_heads(x, [heads, d])
    }

    fn split_heads_backward(
        &self,
        x: &Array,
        heads: usize,
        d: usize,
        norm: Option<HeadNorm<'_, Array>>,
        angles: Option<&Angles<Array>>,
        dy: Array,
        dw: Option<ViewMut<'_, Array>>,
    ) -> Result<Array> {
        self.training_split_heads_backward(x, [heads, d], norm, angles, &dy, dw)
    }

    fn spans(&self, spans: Vec<Span>) -> Result<Self::Spans> {
        self.training_spans(spans)
    }

    fn attention(
        &self,
        shape: AttentionShape,
        q: &Array,
        k: &Array,
        v: &Array,
        spans: &Self::Spans,
    ) -> Result<(Array, Array)> {
        self.training_attention(shape, q, k, v, spans)
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        q: &Array,
        k: &Array,
        v: &Array,
        spans: &Self::Spans,
        out: &Array,
        lse: &Array,
        dout: &Array,
    ) -> Result<[Array; 3]> {
        self.training_attention_backward(shape, q, k, v, spans, out, lse, dout)
    }

    fn silu_mul(&self, gate: &Array, up: &Array) -> Result<Array> {
        assert_eq!(gate.len, up.len, "elements");
        let out = Array::room(&self.device, gate.len)?;
        let args = [gate.arg(), up.arg(), out.arg(), count(out.len)];
        self.device.launch("train_silu_mul", elements(out.len), &args)?;
        Ok(out)
    }

    fn silu_mul_backward(&self, gate: &mut Array, up: &mut Array, dproduct: &Array) -> Result<()> {
        assert_eq!((gate.len, up.len), (dproduct.len, dproduct.len), "elements");
        let args = [gate.arg(), up.arg(), dproduct.arg(), count(gate.len)];
        self.device.launch("train_silu_mul_backward", elements(gate.len), &args)
    }

    fn gelu(&self, form: Gelu, z: &Array) -> Result<Array> {
        let out = Array::room(&self.device, z.len)?;
        let args = [z.arg(), out.arg(), count(z.len), step::form(form)];
        self.device.launch("train_gelu", elements(z.len), &args)?;
        Ok(out)
    }

    fn gelu_backward(&self, form: Gelu, z: &Array, dy: &mut Array) -> Result<()> {
        assert_eq!(z.len, dy.len, "elements");
        let args = [z.arg(), dy.arg(), count(z.len), step::form(form)];
        self.device.launch("train_gelu_backward", elements(z.len), &args)
    }

    fn gather(&self, from: View<'_, Array>, rows: &[u32]) -> Result<Array> {
        self.training_gather(from, rows)
    }

    fn scatter(&self, to: ViewMut<'_, Array>, rows: &[u32], from: &Array) -> Result<()> {
        self.training_scatter(to, rows, from)
    }

    fn add_taps(&self, to: ViewMut<'_, Array>, from: View<'_, Array>, taps: &Taps) -> Result<()> {
        self.training_add_taps(to, from, taps)
    }

    fn pixels(&self, bytes: &[u8], side: usize, table: &[[f32; 256]; 3]) -> Result<Array> {
        self.training_pixels(bytes, side, table)
    }

    fn softmax_loss(&self, logits: &mut Array, targets: &[(u32, f32)]) -> Result<Array> {
        self.training_softmax_loss(logits, targets)
    }

    fn square_sum(&self, x: View<'_, Array>) -> Result<f64> {
        self.training_square_sum(x)
    }

    fn adamw(
        &self,
        p: &mut Array,
        g: &Array,
        m: &mut Array,
        v: &mut Array,
        adamw: AdamW,
        updates: &[Update],
    ) -> Result<()> {
        self.training_adamw([p, m, v], g, adamw, updates)
    }
}
