//! The vision tower `visual.vision_model` (spec §4): patches to features, at native resolution.

use std::ops::Range;

use keye_backend::{Activation, AttentionShape, Backend, BackendError, Span, WeightSource};
use keye_media::{Pixels, ProcessorConfig};
use keye_processor::VisionConfig;

use crate::ModelError;
use crate::rope::Rope;
use crate::weights::{LayerNorm, Linear, Weights};

/// A rectangle of patches, `t` frames of `h` by `w`, from patch `start` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    pub t: usize,
    pub h: usize,
    pub w: usize,
    pub start: usize,
}

impl Grid {
    pub(crate) fn len(&self) -> usize {
        self.t * self.h * self.w
    }
}

pub(crate) struct VisionTower<B: Backend> {
    config: VisionConfig,
    rope: Rope,
    /// `[D, 3*14*14]` for normalised values, and the same with rescaling, mean and deviation folded in, for bytes.
    patch_embedding: Linear<B>,
    folded_patch_embedding: Linear<B>,
    /// `[side*side, D]`
    position_embedding: B::Weight,
    layers: Vec<EncoderLayer<B>>,
    pub(crate) post_layernorm: LayerNorm<B>,
}

struct EncoderLayer<B: Backend> {
    layer_norm1: LayerNorm<B>,
    q_proj: Linear<B>,
    k_proj: Linear<B>,
    v_proj: Linear<B>,
    out_proj: Linear<B>,
    layer_norm2: LayerNorm<B>,
    fc1: Linear<B>,
    fc2: Linear<B>,
}

impl<B: Backend> VisionTower<B> {
    pub(crate) fn load(
        weights: &Weights<'_, B>,
        config: &VisionConfig,
        processor: &ProcessorConfig,
    ) -> Result<Self, ModelError> {
        let (d, i) = (config.hidden_size, config.intermediate_size);
        let weights = weights.at("visual.vision_model");
        let embeddings = weights.at("embeddings");
        let patch = config.num_channels * config.patch_size * config.patch_size;
        let shape = [d, config.num_channels, config.patch_size, config.patch_size];
        let weight = embeddings.source("patch_embedding.weight", &shape)?;
        let bias = embeddings.source("patch_embedding.bias", &[d])?;
        let (folded_weight, folded_bias) = fold(&weight, &bias, config.num_channels, processor);
        let side = config.image_size / config.patch_size;
        let backend = weights.backend();
        let linear = |weight: &WeightSource, bias: &WeightSource| -> Result<_, BackendError> {
            Ok(Linear { weight: backend.load(weight)?, bias: Some(backend.load(bias)?) })
        };
        debug_assert_eq!(weight.cols, patch);
        let layers = (0..config.num_hidden_layers)
            .map(|layer| {
                let layer = weights.at(format_args!("encoder.layers.{layer}"));
                let attention = layer.at("self_attn");
                Ok(EncoderLayer {
                    layer_norm1: layer.layer_norm("layer_norm1", d, config.layer_norm_eps)?,
                    q_proj: attention.linear("q_proj", d, d, true)?,
                    k_proj: attention.linear("k_proj", d, d, true)?,
                    v_proj: attention.linear("v_proj", d, d, true)?,
                    out_proj: attention.linear("out_proj", d, d, true)?,
                    layer_norm2: layer.layer_norm("layer_norm2", d, config.layer_norm_eps)?,
                    fc1: layer.linear("mlp.fc1", i, d, true)?,
                    fc2: layer.linear("mlp.fc2", d, i, true)?,
                })
            })
            .collect::<Result<_, ModelError>>()?;
        Ok(Self {
            rope: Rope::vision(config.rope_theta, d / config.num_attention_heads),
            patch_embedding: linear(&weight, &bias)?,
            folded_patch_embedding: linear(&folded_weight, &folded_bias)?,
            position_embedding: embeddings.matrix("position_embedding.weight", side * side, d)?,
            layers,
            post_layernorm: weights.layer_norm("post_layernorm", d, config.layer_norm_eps)?,
            config: config.clone(),
        })
    }

    pub(crate) fn layers(&self) -> usize {
        self.layers.len()
    }

    fn attention_shape(&self) -> AttentionShape {
        let heads = self.config.num_attention_heads;
        let head_dim = self.config.hidden_size / heads;
        AttentionShape { heads, kv_heads: heads, head_dim, scale: (head_dim as f32).powf(-0.5) }
    }

    /// Keys, rotated, and values of rows for one layer: `[n, D]` each.
    pub(crate) fn keys_and_values(
        &self,
        backend: &B,
        layer: usize,
        rows: &B::Tensor,
        angles: &B::Tensor,
    ) -> Result<(B::Tensor, B::Tensor), BackendError> {
        let layer = &self.layers[layer];
        let h = layer.layer_norm1.forward(backend, rows)?;
        let mut k = layer.k_proj.forward(backend, &h, Activation::None)?;
        backend.rope(&mut k, self.config.num_attention_heads, angles)?;
        Ok((k, layer.v_proj.forward(backend, &h, Activation::None)?))
    }

    /// Takes rows through one layer whose keys and values are there for all rows that they attend to.
    #[expect(clippy::too_many_arguments, reason = "an operation of the model and its operands")]
    pub(crate) fn attend(
        &self,
        backend: &B,
        layer: usize,
        rows: &mut B::Tensor,
        angles: &B::Tensor,
        keys: &B::Tensor,
        values: &B::Tensor,
        spans: &[Span],
    ) -> Result<(), BackendError> {
        let layer = &self.layers[layer];
        let h = layer.layer_norm1.forward(backend, rows)?;
        let mut q = layer.q_proj.forward(backend, &h, Activation::None)?;
        backend.rope(&mut q, self.config.num_attention_heads, angles)?;
        let attended = backend.attention(&q, keys, values, self.attention_shape(), spans)?;
        layer.out_proj.add(backend, &attended, rows)?;
        let h = layer.layer_norm2.forward(backend, rows)?;
        let h = layer.fc1.forward(backend, &h, Activation::GeluTanh)?;
        layer.fc2.add(backend, &h, rows)
    }

    /// Patch embedding plus interpolated positions of the rows `chunk` (spec §4.1): `[chunk, D]`.
    pub(crate) fn embed(
        &self,
        backend: &B,
        pixels: &Pixels,
        grids: &[Grid],
        chunk: Range<usize>,
    ) -> Result<B::Tensor, BackendError> {
        let patch = self.config.num_channels * self.config.patch_size * self.config.patch_size;
        let first = grids[0].start;
        let values = (first + chunk.start) * patch..(first + chunk.end) * patch;
        let (patches, embedding) = match pixels {
            Pixels::U8(data) => (backend.upload_u8(chunk.len(), patch, &data[values])?, &self.folded_patch_embedding),
            Pixels::F32(data) => (backend.upload(chunk.len(), patch, &data[values])?, &self.patch_embedding),
        };
        let mut x = embedding.forward(backend, &patches, Activation::None)?;
        let side = self.config.image_size / self.config.patch_size;
        let mut index = Vec::with_capacity(chunk.len() * 4);
        let mut weights = Vec::with_capacity(chunk.len() * 4);
        for_each_patch(grids, chunk, |grid, row, col| {
            let (y0, y1, fy) = tap(row, grid.h, side);
            let (x0, x1, fx) = tap(col, grid.w, side);
            index.extend([y0 * side + x0, y0 * side + x1, y1 * side + x0, y1 * side + x1].map(|i| i as u32));
            weights.extend([(1.0 - fy) * (1.0 - fx), (1.0 - fy) * fx, fy * (1.0 - fx), fy * fx]);
        });
        let index = backend.upload_index(&index)?;
        let weights = backend.upload(weights.len() / 4, 4, &weights)?;
        backend.add_weighted_rows(&mut x, &self.position_embedding, &index, &weights)?;
        Ok(x)
    }

    pub(crate) fn angles(&self, backend: &B, grids: &[Grid], chunk: Range<usize>) -> Result<B::Tensor, BackendError> {
        let rows = chunk.len();
        let mut table = Vec::with_capacity(rows * self.config.hidden_size / self.config.num_attention_heads);
        for_each_patch(grids, chunk, |_, row, col| self.rope.push(&[row as u32, col as u32], &mut table));
        backend.upload(rows, table.len() / rows, &table)
    }
}

/// Calls `f(grid, row, column)` for the patches `chunk`, counted over all grids.
fn for_each_patch(grids: &[Grid], chunk: Range<usize>, mut f: impl FnMut(&Grid, usize, usize)) {
    let mut start = 0;
    for grid in grids {
        let end = start + grid.len();
        for patch in chunk.start.max(start)..chunk.end.min(end) {
            let in_frame = (patch - start) % (grid.h * grid.w);
            f(grid, in_frame / grid.w, in_frame % grid.w);
        }
        start = end;
    }
}

/// Source rows and the weight of the second for bilinear sampling without aligned corners (spec §4.1.2), all in f32.
fn tap(dst: usize, out: usize, side: usize) -> (usize, usize, f32) {
    let scale = side as f32 / out as f32;
    let src = ((dst as f32 + 0.5) * scale - 0.5).max(0.0);
    let low = (src as usize).min(side - 1);
    (low, (low + 1).min(side - 1), src - low as f32)
}

/// The part of each span that lies in the chunk, as queries counted from the chunk's start.
pub(crate) fn spans_of(spans: &[Range<usize>], chunk: &Range<usize>) -> Vec<Span> {
    let mut out = Vec::new();
    for span in spans {
        let (start, end) = (span.start.max(chunk.start), span.end.min(chunk.end));
        if start < end {
            out.push(Span { queries: start - chunk.start..end - chunk.start, keys: span.clone() });
        }
    }
    out
}

/// Weight and bias that take bytes where the originals take `(byte * rescale - mean) / std`.
fn fold(
    weight: &WeightSource,
    bias: &WeightSource,
    channels: usize,
    processor: &ProcessorConfig,
) -> (WeightSource, WeightSource) {
    let rescale = if processor.do_rescale { processor.rescale_factor } else { 1.0 };
    let per_channel = weight.cols / channels;
    let mut values = weight.to_f32().into_owned();
    let mut biases: Vec<f64> = bias.to_f32().iter().map(|b| f64::from(*b)).collect();
    for (row, bias) in values.chunks_exact_mut(weight.cols).zip(&mut biases) {
        for (c, part) in row.chunks_exact_mut(per_channel).enumerate() {
            let (mean, std) = match processor.do_normalize {
                true => (f64::from(processor.image_mean[c % 3]), f64::from(processor.image_std[c % 3])),
                false => (0.0, 1.0),
            };
            for w in part {
                *bias -= f64::from(*w) * mean / std;
                *w = (f64::from(*w) * rescale / std) as f32;
            }
        }
    }
    let biases: Vec<f32> = biases.iter().map(|b| *b as f32).collect();
    (
        WeightSource::from_f32(format!("{} (folded)", weight.name), weight.rows, weight.cols, &values),
        WeightSource::from_f32(format!("{} (folded)", bias.name), 1, biases.len(), &biases),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_position_map_at_its_own_size_is_the_identity() {
        for i in 0..27 {
            let (low, _, fraction) = tap(i, 27, 27);
            assert_eq!((low, fraction), (i, 0.0));
        }
        // Shrinking keeps torch's rule, and the clamp at the low edge holds when enlarging.
        assert_eq!(tap(0, 100, 27), (0, 1, 0.0));
        assert_eq!(tap(99, 100, 27).0, 26);
        assert_eq!(tap(99, 100, 27).1, 26);
    }

    #[test]
    fn spans_are_cut_at_chunks() {
        let spans = [0..10, 10..15];
        assert_eq!(
            spans_of(&spans, &(8..12)),
            [Span { queries: 0..2, keys: 0..10 }, Span { queries: 2..4, keys: 10..15 }]
        );
    }
}
