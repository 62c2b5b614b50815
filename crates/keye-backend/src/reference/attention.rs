//! Attention by its formula: all scores of one query, softmax, weighted sum.

use crate::host::HostTensor;
use crate::weight::{bf16_to_f32, f32_to_bf16};
use crate::{
    AttentionShape, BLOCK_TOKENS, CacheSpec, IndexShape, KvDtype, LatentShape, SequenceRows, Span, UNSELECTED,
    int8_rows, select,
};

/// One query head over the keys and values that `kv(i)` names, `i < count`.
fn attend<'a>(q: &[f32], count: usize, scale: f32, kv: impl Fn(usize) -> (&'a [f32], &'a [f32]), out: &mut [f32]) {
    let mut scores: Vec<f32> = (0..count).map(|i| super::math::dot(q, kv(i).0) * scale).collect();
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for score in &mut scores {
        *score = (*score - max).exp();
    }
    let sum: f64 = scores.iter().map(|s| f64::from(*s)).sum();
    for (d, out) in out.iter_mut().enumerate() {
        let weighted: f64 = scores.iter().enumerate().map(|(i, s)| f64::from(*s) * f64::from(kv(i).1[d])).sum();
        *out = (weighted / sum) as f32;
    }
}

pub(super) fn spans(
    q: &HostTensor,
    k: &HostTensor,
    v: &HostTensor,
    shape: AttentionShape,
    spans: &[Span],
) -> HostTensor {
    let (hd, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let mut out = HostTensor::zeros(q.rows, q.cols);
    for span in spans {
        for row in span.queries.clone() {
            for head in 0..shape.heads {
                let kv_at = head / group * hd;
                let kv = |i: usize| {
                    let row = span.keys.start + i;
                    (&k.row(row)[kv_at..kv_at + hd], &v.row(row)[kv_at..kv_at + hd])
                };
                let q = &q.row(row)[head * hd..(head + 1) * hd];
                attend(q, span.keys.len(), shape.scale, kv, &mut out.row_mut(row)[head * hd..(head + 1) * hd]);
            }
        }
    }
    out
}

/// Keys and values by slot: block, token in block, `[kv_heads * head_dim]`.
pub struct ReferenceCache {
    spec: CacheSpec,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    index: Vec<Vec<f32>>,
    latent: Vec<Vec<f32>>,
}

impl ReferenceCache {
    pub(super) fn new(spec: CacheSpec, blocks: usize) -> Self {
        let layers = |width: usize| (0..spec.layers).map(|_| vec![0.0; blocks * BLOCK_TOKENS * width]).collect();
        let width = spec.kv_heads * spec.head_dim;
        Self {
            spec,
            keys: layers(width),
            values: layers(width),
            index: layers(spec.index_dim),
            latent: layers(spec.latent_dim),
        }
    }

    fn slot(sequence: &SequenceRows, token: usize) -> usize {
        sequence.block_table[token / BLOCK_TOKENS] as usize * BLOCK_TOKENS + token % BLOCK_TOKENS
    }

    /// What the cache keeps of a value.
    fn store(dtype: KvDtype) -> impl Fn(f32) -> f32 {
        move |value| match dtype {
            KvDtype::F32 => value,
            KvDtype::Bf16 | KvDtype::Int8 => bf16_to_f32(f32_to_bf16(value)),
        }
    }

    pub(super) fn write_index(&mut self, layer: usize, plan: &[SequenceRows], keys: &HostTensor) {
        let store = Self::store(self.spec.dtype);
        for sequence in plan {
            for (i, row) in sequence.rows.clone().enumerate() {
                let at = Self::slot(sequence, sequence.start + i) * keys.cols;
                for (to, value) in self.index[layer][at..].iter_mut().zip(keys.row(row)) {
                    *to = store(*value);
                }
            }
        }
    }

    pub(super) fn select(
        &self,
        q: &HostTensor,
        weights: &HostTensor,
        layer: usize,
        plan: &[SequenceRows],
        shape: IndexShape,
    ) -> Vec<u32> {
        let width = shape.head_dim;
        let mut selected = vec![UNSELECTED; q.rows * shape.top_k];
        for sequence in plan {
            for (i, row) in sequence.rows.clone().enumerate() {
                let score = |token: usize| {
                    let at = Self::slot(sequence, token) * width;
                    let key = &self.index[layer][at..at + width];
                    let mut sum = 0.0;
                    for (head, weight) in weights.row(row).iter().enumerate() {
                        sum += weight * super::math::dot(&q.row(row)[head * width..(head + 1) * width], key).max(0.0);
                    }
                    sum * shape.scale
                };
                let scores: Vec<f32> = (0..sequence.start + i + 1).map(score).collect();
                select::highest(&scores, &mut selected[row * shape.top_k..(row + 1) * shape.top_k]);
            }
        }
        selected
    }

    pub(super) fn write_latent(&mut self, layer: usize, plan: &[SequenceRows], a: &HostTensor, b: &HostTensor) {
        let (store, width) = (Self::store(self.spec.dtype), self.spec.latent_dim);
        assert_eq!(a.cols + b.cols, width, "columns of a latent row");
        for sequence in plan {
            for (i, row) in sequence.rows.clone().enumerate() {
                let at = Self::slot(sequence, sequence.start + i) * width;
                for (to, value) in self.latent[layer][at..].iter_mut().zip(a.row(row).iter().chain(b.row(row))) {
                    *to = store(*value);
                }
            }
        }
    }

    pub(super) fn attend_latent(
        &self,
        q: &HostTensor,
        layer: usize,
        plan: &[SequenceRows],
        shape: LatentShape,
    ) -> HostTensor {
        let (width, value_dim) = (self.spec.latent_dim, shape.value_dim);
        let mut out = HostTensor::zeros(q.rows, shape.heads * value_dim);
        for sequence in plan {
            for (i, row) in sequence.rows.clone().enumerate() {
                let kv = |token: usize| {
                    let at = Self::slot(sequence, token) * width;
                    let latent = &self.latent[layer][at..at + width];
                    (latent, &latent[..value_dim])
                };
                let heads = q.row(row).chunks_exact(width).zip(out.row_mut(row).chunks_exact_mut(value_dim));
                heads.for_each(|(q, out)| attend(q, sequence.start + i + 1, shape.scale, kv, out));
            }
        }
        out
    }

    pub(super) fn write(&mut self, layer: usize, plan: &[SequenceRows], k: &HostTensor, v: &HostTensor) {
        let store = Self::store(self.spec.dtype);
        for sequence in plan {
            for (i, row) in sequence.rows.clone().enumerate() {
                let at = Self::slot(sequence, sequence.start + i) * k.cols;
                for (to, from) in [(&mut self.keys, k), (&mut self.values, v)] {
                    let heads = from.row(row).chunks_exact(self.spec.head_dim.max(1));
                    for (to, from) in to[layer][at..].chunks_exact_mut(self.spec.head_dim.max(1)).zip(heads) {
                        let (scale, factor) = int8_rows::scale(from);
                        for (to, value) in to.iter_mut().zip(from) {
                            *to = match self.spec.dtype {
                                KvDtype::Int8 => f32::from(int8_rows::code(*value, factor)) * scale,
                                KvDtype::F32 | KvDtype::Bf16 => store(*value),
                            };
                        }
                    }
                }
            }
        }
    }

    pub(super) fn attend(
        &self,
        q: &HostTensor,
        layer: usize,
        plan: &[SequenceRows],
        shape: AttentionShape,
    ) -> HostTensor {
        self.attend_to(q, layer, plan, shape, |_, row_count| (0..row_count).collect())
    }

    pub(super) fn attend_selected(
        &self,
        q: &HostTensor,
        layer: usize,
        plan: &[SequenceRows],
        shape: AttentionShape,
        selected: &[u32],
    ) -> HostTensor {
        let top_k = selected.len() / q.rows.max(1);
        self.attend_to(q, layer, plan, shape, |row, _| {
            let places = selected[row * top_k..(row + 1) * top_k].iter();
            places.filter(|position| **position != UNSELECTED).map(|position| *position as usize).collect()
        })
    }

    /// Attention of each row over the positions `places(row, keys in sight)`.
    fn attend_to(
        &self,
        q: &HostTensor,
        layer: usize,
        plan: &[SequenceRows],
        shape: AttentionShape,
        places: impl Fn(usize, usize) -> Vec<usize>,
    ) -> HostTensor {
        let (hd, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let width = shape.kv_heads * hd;
        let mut out = HostTensor::zeros(q.rows, q.cols);
        for sequence in plan {
            for (i, row) in sequence.rows.clone().enumerate() {
                let places = places(row, sequence.start + i + 1);
                for head in 0..shape.heads {
                    let kv = |place: usize| {
                        let at = Self::slot(sequence, places[place]) * width + head / group * hd;
                        (&self.keys[layer][at..at + hd], &self.values[layer][at..at + hd])
                    };
                    let q = &q.row(row)[head * hd..(head + 1) * hd];
                    let out = &mut out.row_mut(row)[head * hd..(head + 1) * hd];
                    attend(q, places.len(), shape.scale, kv, out);
                }
            }
        }
        out
    }
}
