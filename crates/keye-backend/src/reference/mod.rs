//! The definition of every operation: scalar f32, one loop a formula. Slow on purpose.

mod attention;
mod math;

use std::cmp::Ordering::Less;
use std::ops::Range;

use crate::coded_rows::{NarrowRows, WideRows};
use crate::host::{HostTensor, HostWeight};
use crate::{
    Activation, AttentionShape, Backend, BackendError, CacheSpec, Dtype, Expert, GroupedRouting, IndexShape,
    LatentShape, QkNorm, SequenceRows, Span, WeightSource, fp8_rows, grouped_routing, select,
};

pub use attention::ReferenceCache;
pub(crate) use math::gelu_erf;

/// Scalar f32 on one thread. Weights of other types are widened when they are loaded.
#[derive(Debug, Default, Clone, Copy)]
pub struct Reference;

/// A weight as f32, `[rows, cols]`.
#[derive(Debug)]
pub struct ReferenceWeight {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
    /// Packed weights are multiplied with activations in as many bits as kernels do.
    packed: Option<Dtype>,
}

impl ReferenceWeight {
    fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.cols..(row + 1) * self.cols]
    }
}

impl Backend for Reference {
    type Tensor = HostTensor;
    type Weight = ReferenceWeight;
    type Index = Vec<u32>;
    type Cache = ReferenceCache;
    type Plan = Vec<SequenceRows>;

    fn describe(&self) -> String {
        "reference (scalar f32, 1 thread)".into()
    }

    fn load(&self, source: &WeightSource) -> Result<ReferenceWeight, BackendError> {
        let weight = HostWeight::load(source)?;
        Ok(ReferenceWeight { rows: weight.rows, cols: weight.cols, data: weight.widen(), packed: weight.packed() })
    }

    fn load_columns(&self, source: &WeightSource, columns: Range<usize>) -> Result<ReferenceWeight, BackendError> {
        let weight = HostWeight::load_columns(source, columns)?;
        Ok(ReferenceWeight { rows: weight.rows, cols: weight.cols, data: weight.widen(), packed: None })
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<HostTensor, BackendError> {
        Ok(HostTensor::zeros(rows, cols))
    }

    fn upload(&self, rows: usize, cols: usize, values: &[f32]) -> Result<HostTensor, BackendError> {
        Ok(HostTensor::from_f32(rows, cols, values))
    }

    fn upload_u8(&self, rows: usize, cols: usize, values: &[u8]) -> Result<HostTensor, BackendError> {
        Ok(HostTensor::from_u8(rows, cols, values))
    }

    fn upload_index(&self, values: &[u32]) -> Result<Vec<u32>, BackendError> {
        Ok(values.to_vec())
    }

    fn download(&self, x: &HostTensor) -> Result<Vec<f32>, BackendError> {
        Ok(x.data.clone())
    }

    fn rows(&self, x: &HostTensor) -> usize {
        x.rows
    }

    fn cols(&self, x: &HostTensor) -> usize {
        x.cols
    }

    fn reshape(&self, x: HostTensor, rows: usize, cols: usize) -> Result<HostTensor, BackendError> {
        Ok(x.reshape(rows, cols))
    }

    fn slice_rows(&self, x: &HostTensor, rows: Range<usize>) -> Result<HostTensor, BackendError> {
        Ok(x.slice_rows(rows))
    }

    fn copy_rows(
        &self,
        x: &HostTensor,
        from: Range<usize>,
        to: &mut HostTensor,
        at: usize,
    ) -> Result<(), BackendError> {
        x.copy_rows(from, to, at);
        Ok(())
    }

    fn gather_rows(&self, x: &HostTensor, index: &Vec<u32>, group: usize) -> Result<HostTensor, BackendError> {
        Ok(x.gather_rows(index, group))
    }

    fn embed(&self, table: &ReferenceWeight, ids: &Vec<u32>) -> Result<HostTensor, BackendError> {
        let data = ids.iter().flat_map(|id| table.row(*id as usize)).copied().collect();
        Ok(HostTensor { rows: ids.len(), cols: table.cols, data })
    }

    fn add_weighted_rows(
        &self,
        x: &mut HostTensor,
        table: &ReferenceWeight,
        index: &Vec<u32>,
        weights: &HostTensor,
    ) -> Result<(), BackendError> {
        let taps = weights.cols;
        for row in 0..x.rows {
            for c in 0..x.cols {
                let mut sum = 0.0;
                for t in 0..taps {
                    sum += weights.row(row)[t] * table.row(index[row * taps + t] as usize)[c];
                }
                x.row_mut(row)[c] += sum;
            }
        }
        Ok(())
    }

    fn layer_norm(
        &self,
        x: &HostTensor,
        gamma: &ReferenceWeight,
        beta: &ReferenceWeight,
        eps: f32,
    ) -> Result<HostTensor, BackendError> {
        let mut out = x.clone();
        for row in 0..out.rows {
            math::layer_norm(out.row_mut(row), &gamma.data, &beta.data, eps);
        }
        Ok(out)
    }

    fn rms_norm(&self, x: &HostTensor, gamma: &ReferenceWeight, eps: f32) -> Result<HostTensor, BackendError> {
        let mut out = x.clone();
        for row in 0..out.rows {
            math::rms_norm(out.row_mut(row), &gamma.data, eps);
        }
        Ok(out)
    }

    fn highest(&self, x: &HostTensor, count: usize) -> Result<Option<Vec<Vec<(u32, f32)>>>, BackendError> {
        let of_row = |row: &[f32]| {
            let mut sorted = row.to_vec();
            sorted.sort_unstable_by(|a, b| b.total_cmp(a));
            let bound = sorted.get(count - 1).copied().unwrap_or(f32::NEG_INFINITY);
            // A NaN is not below either.
            (0..).zip(row.iter().copied()).filter(|(_, value)| value.partial_cmp(&bound) != Some(Less)).collect()
        };
        Ok(Some((0..x.rows).map(|row| of_row(x.row(row))).collect()))
    }

    fn linear(
        &self,
        x: &HostTensor,
        weight: &ReferenceWeight,
        bias: Option<&ReferenceWeight>,
        activation: Activation,
    ) -> Result<HostTensor, BackendError> {
        assert_eq!(x.cols, weight.cols, "input features");
        let quantized = weight
            .packed
            .map(|dtype| if dtype.high_bits().is_some() { WideRows::rounded(x) } else { NarrowRows::rounded(x) });
        let x = quantized.as_ref().unwrap_or(x);
        let mut out = HostTensor::zeros(x.rows, weight.rows);
        for row in 0..x.rows {
            for n in 0..weight.rows {
                let z = math::dot(x.row(row), weight.row(n)) + bias.map_or(0.0, |b| b.data[n]);
                out.row_mut(row)[n] = math::activate(z, activation);
            }
        }
        Ok(out)
    }

    fn linear_add(
        &self,
        x: &HostTensor,
        weight: &ReferenceWeight,
        bias: Option<&ReferenceWeight>,
        y: &mut HostTensor,
    ) -> Result<(), BackendError> {
        let z = self.linear(x, weight, bias, Activation::None)?;
        for (y, z) in y.data.iter_mut().zip(&z.data) {
            *y += z;
        }
        Ok(())
    }

    fn gated(&self, x: &HostTensor, gate: &ReferenceWeight, up: &ReferenceWeight) -> Result<HostTensor, BackendError> {
        let mut out = self.linear(x, gate, None, Activation::None)?;
        let up = self.linear(x, up, None, Activation::None)?;
        for (z, up) in out.data.iter_mut().zip(&up.data) {
            *z = *z / (1.0 + (-*z).exp()) * up;
        }
        Ok(out)
    }

    fn rope(&self, x: &mut HostTensor, heads: usize, angles: &HostTensor) -> Result<(), BackendError> {
        for row in 0..x.rows {
            math::rope(x.row_mut(row), heads, angles.row(row));
        }
        Ok(())
    }

    fn rope_pairs(&self, x: &mut HostTensor, heads: usize, angles: &HostTensor) -> Result<(), BackendError> {
        for row in 0..x.rows {
            math::rope_pairs(x.row_mut(row), heads, angles.row(row));
        }
        Ok(())
    }

    fn linear_heads(&self, x: &HostTensor, weights: &[ReferenceWeight]) -> Result<HostTensor, BackendError> {
        let stride = x.cols / weights.len();
        let mut data = Vec::new();
        for row in 0..x.rows {
            for (head, weight) in x.row(row).chunks_exact(stride).zip(weights) {
                let (input, rest) = head.split_at(weight.cols);
                let input = HostTensor::from_f32(1, weight.cols, input);
                data.extend_from_slice(&self.linear(&input, weight, None, Activation::None)?.data);
                data.extend_from_slice(rest);
            }
        }
        Ok(HostTensor { rows: x.rows, cols: data.len() / x.rows.max(1), data })
    }

    fn attention(
        &self,
        q: &HostTensor,
        k: &HostTensor,
        v: &HostTensor,
        shape: AttentionShape,
        spans: &[Span],
    ) -> Result<HostTensor, BackendError> {
        Ok(attention::spans(q, k, v, shape, spans))
    }

    fn cache(&self, spec: &CacheSpec, blocks: usize) -> Result<ReferenceCache, BackendError> {
        Ok(ReferenceCache::new(*spec, blocks))
    }

    fn plan(&self, sequences: &[SequenceRows]) -> Result<Vec<SequenceRows>, BackendError> {
        Ok(sequences.to_vec())
    }

    fn norm_rope_write(
        &self,
        q: &mut HostTensor,
        mut k: HostTensor,
        v: HostTensor,
        norm: Option<QkNorm<'_, ReferenceWeight>>,
        angles: &HostTensor,
        cache: &mut ReferenceCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
    ) -> Result<(), BackendError> {
        let head_dim = angles.cols;
        for row in 0..q.rows {
            if let Some(norm) = &norm {
                for head in q.row_mut(row).chunks_exact_mut(head_dim) {
                    math::rms_norm(head, &norm.q.data, norm.eps);
                }
                for head in k.row_mut(row).chunks_exact_mut(head_dim) {
                    math::rms_norm(head, &norm.k.data, norm.eps);
                }
            }
            let (heads, kv_heads) = (q.cols / head_dim, k.cols / head_dim);
            math::rope(q.row_mut(row), heads, angles.row(row));
            math::rope(k.row_mut(row), kv_heads, angles.row(row));
        }
        cache.write(layer, plan, &k, &v);
        Ok(())
    }

    fn paged_attention(
        &self,
        q: &HostTensor,
        cache: &ReferenceCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
        shape: AttentionShape,
    ) -> Result<HostTensor, BackendError> {
        Ok(cache.attend(q, layer, plan, shape))
    }

    fn download_index(&self, index: &Vec<u32>) -> Result<Vec<u32>, BackendError> {
        Ok(index.clone())
    }

    fn route(
        &self,
        x: &HostTensor,
        router: &ReferenceWeight,
        count: usize,
        normalise: bool,
    ) -> Result<(Vec<u32>, HostTensor), BackendError> {
        let logits = self.linear(x, router, None, Activation::None)?;
        Ok(select::route_rows(&logits, count, normalise))
    }

    fn route_grouped(
        &self,
        x: &HostTensor,
        router: &ReferenceWeight,
        bias: &ReferenceWeight,
        routing: GroupedRouting,
    ) -> Result<(Vec<u32>, HostTensor), BackendError> {
        let logits = self.linear(x, router, None, Activation::None)?;
        Ok(grouped_routing::route_rows(&logits, &bias.data, &routing))
    }

    fn add_experts(
        &self,
        x: &HostTensor,
        experts: &[Expert<ReferenceWeight>],
        chosen: &Vec<u32>,
        weights: &HostTensor,
        y: &mut HostTensor,
    ) -> Result<(), BackendError> {
        for row in 0..x.rows {
            let input = x.slice_rows(row..row + 1);
            let mut sum = vec![0.0f32; y.cols];
            for (t, weight) in weights.row(row).iter().enumerate() {
                let number = chosen[row * weights.cols + t];
                if number == select::UNSELECTED {
                    continue;
                }
                let expert = &experts[number as usize];
                let h = self.gated(&input, &expert.gate, &expert.up)?;
                let out = self.linear(&h, &expert.down, None, Activation::None)?;
                for (sum, value) in sum.iter_mut().zip(&out.data) {
                    *sum += weight * value;
                }
            }
            for (y, sum) in y.row_mut(row).iter_mut().zip(&sum) {
                *y += sum;
            }
        }
        Ok(())
    }

    fn round_to_fp8(&self, x: &mut HostTensor, width: usize) -> Result<(), BackendError> {
        x.data.chunks_exact_mut(width).for_each(fp8_rows::round);
        Ok(())
    }

    fn write_index_keys(
        &self,
        keys: &HostTensor,
        cache: &mut ReferenceCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
    ) -> Result<(), BackendError> {
        cache.write_index(layer, plan, keys);
        Ok(())
    }

    fn select(
        &self,
        q: &HostTensor,
        weights: &HostTensor,
        cache: &ReferenceCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
        shape: IndexShape,
    ) -> Result<Vec<u32>, BackendError> {
        Ok(cache.select(q, weights, layer, plan, shape))
    }

    fn sparse_attention(
        &self,
        q: &HostTensor,
        cache: &ReferenceCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
        shape: AttentionShape,
        selected: &Vec<u32>,
    ) -> Result<HostTensor, BackendError> {
        Ok(cache.attend_selected(q, layer, plan, shape, selected))
    }

    fn write_latent(
        &self,
        a: &HostTensor,
        b: &HostTensor,
        cache: &mut ReferenceCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
    ) -> Result<(), BackendError> {
        cache.write_latent(layer, plan, a, b);
        Ok(())
    }

    fn latent_attention(
        &self,
        q: &HostTensor,
        cache: &ReferenceCache,
        layer: usize,
        plan: &Vec<SequenceRows>,
        shape: LatentShape,
    ) -> Result<HostTensor, BackendError> {
        Ok(cache.attend_latent(q, layer, plan, shape))
    }
}
