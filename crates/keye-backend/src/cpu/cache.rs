//! The pool of KV blocks.

use crate::host::HostTensor;
use crate::int8_rows::{code, scale};
use crate::weight::f32_to_bf16;
use crate::{BLOCK_TOKENS, BackendError, CacheSpec, KvDtype, SequenceRows};

/// Values are padded to whole vectors of the widest set.
const PAD: usize = 16;
/// Columns of a padded value row.
pub(super) fn value_stride(head_dim: usize) -> usize {
    head_dim.next_multiple_of(PAD)
}

/// Blocks of all layers. Memory is asked for at once but only backed by pages as blocks are first written.
pub struct CpuCache {
    spec: CacheSpec,
    layers: Vec<Blocks>,
    /// Per block index keys `[index_dim, 64]`.
    index: Vec<Blocks>,
    /// Per block latent rows `[64, stride]`.
    latent: Vec<Blocks>,
}

/// Latent rows of one block, `[64, stride]`.
#[derive(Clone, Copy)]
pub(super) enum LatentBlock<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u16]),
}

/// Index keys of one block.
#[derive(Clone, Copy)]
pub(super) enum IndexBlock<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u16]),
}

/// Blocks of one layer: per block and head keys `[head_dim, 64]`, then values `[64, stride]`. With sparse attention keys are
/// gathered token by token, and lie that way: `[64, head_dim]`.
enum Blocks {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
    /// Keys lie token by token. Per block and head the scales of 64 keys, then of 64 values.
    Int8 {
        codes: Vec<i8>,
        scales: Vec<f32>,
    },
}

const HEADS_ONLY: &str = "eight bits are for keys and values of heads";

/// Keys and values of one block and head.
#[derive(Clone, Copy)]
pub(super) enum KvBlock<'a> {
    F32 {
        keys: &'a [f32],
        values: &'a [f32],
    },
    Bf16 {
        keys: &'a [u16],
        values: &'a [u16],
    },
    /// With the scales of its keys, then those of its values.
    Int8 {
        keys: &'a [i8],
        values: &'a [i8],
        scales: &'a [f32],
    },
}

impl CpuCache {
    pub(super) fn new(spec: CacheSpec, blocks: usize) -> Result<Self, BackendError> {
        let elements = Self::head_elements(&spec)
            .checked_mul(spec.kv_heads)
            .and_then(|n| n.checked_mul(blocks))
            .unwrap_or(usize::MAX);
        let layers = |elements: usize| {
            let layer = |_| {
                Ok(match spec.dtype {
                    KvDtype::F32 => Blocks::F32(zeroed(elements)?),
                    KvDtype::Bf16 | KvDtype::Int8 => Blocks::Bf16(zeroed(elements)?),
                })
            };
            (0..spec.layers).map(layer).collect::<Result<Vec<_>, BackendError>>()
        };
        let heads = match spec.dtype {
            KvDtype::Int8 => (0..spec.layers)
                .map(|_| {
                    let scales = 2 * BLOCK_TOKENS * spec.kv_heads * blocks;
                    Ok(Blocks::Int8 { codes: zeroed(elements)?, scales: zeroed(scales)? })
                })
                .collect::<Result<Vec<_>, BackendError>>()?,
            _ => layers(elements)?,
        };
        let index = (BLOCK_TOKENS * spec.index_dim).saturating_mul(blocks);
        let latent = (BLOCK_TOKENS * value_stride(spec.latent_dim)).saturating_mul(blocks);
        Ok(Self { spec, layers: heads, index: layers(index)?, latent: layers(latent)? })
    }

    fn head_elements(spec: &CacheSpec) -> usize {
        BLOCK_TOKENS * (spec.head_dim + value_stride(spec.head_dim))
    }

    /// Whether keys lie token by token.
    pub(super) fn token_major(&self) -> bool {
        self.spec.index_dim > 0 || self.spec.dtype == KvDtype::Int8
    }

    /// Element type of the heads' keys and values.
    pub(super) fn dtype(&self) -> KvDtype {
        self.spec.dtype
    }

    pub(super) fn block(&self, layer: usize, block: usize, kv_head: usize) -> KvBlock<'_> {
        let len = Self::head_elements(&self.spec);
        let at = (block * self.spec.kv_heads + kv_head) * len;
        let split = BLOCK_TOKENS * self.spec.head_dim;
        match &self.layers[layer] {
            Blocks::F32(data) => {
                let (keys, values) = data[at..at + len].split_at(split);
                KvBlock::F32 { keys, values }
            }
            Blocks::Bf16(data) => {
                let (keys, values) = data[at..at + len].split_at(split);
                KvBlock::Bf16 { keys, values }
            }
            Blocks::Int8 { codes, scales } => {
                let (keys, values) = codes[at..at + len].split_at(split);
                let at = (block * self.spec.kv_heads + kv_head) * 2 * BLOCK_TOKENS;
                KvBlock::Int8 { keys, values, scales: &scales[at..at + 2 * BLOCK_TOKENS] }
            }
        }
    }

    pub(super) fn index_block(&self, layer: usize, block: usize) -> IndexBlock<'_> {
        let len = BLOCK_TOKENS * self.spec.index_dim;
        match &self.index[layer] {
            Blocks::F32(data) => IndexBlock::F32(&data[block * len..(block + 1) * len]),
            Blocks::Bf16(data) => IndexBlock::Bf16(&data[block * len..(block + 1) * len]),
            Blocks::Int8 { .. } => unreachable!("{HEADS_ONLY}"),
        }
    }

    pub(super) fn write_index(&mut self, layer: usize, plan: &[SequenceRows], keys: &HostTensor) {
        match &mut self.index[layer] {
            Blocks::F32(data) => write_index(data, plan, keys, |value| value),
            Blocks::Bf16(data) => write_index(data, plan, keys, f32_to_bf16),
            Blocks::Int8 { .. } => unreachable!("{HEADS_ONLY}"),
        }
    }

    /// Width of a latent row.
    pub(super) fn latent_dim(&self) -> usize {
        self.spec.latent_dim
    }

    pub(super) fn latent_block(&self, layer: usize, block: usize) -> LatentBlock<'_> {
        let len = BLOCK_TOKENS * value_stride(self.spec.latent_dim);
        match &self.latent[layer] {
            Blocks::F32(data) => LatentBlock::F32(&data[block * len..(block + 1) * len]),
            Blocks::Bf16(data) => LatentBlock::Bf16(&data[block * len..(block + 1) * len]),
            Blocks::Int8 { .. } => unreachable!("{HEADS_ONLY}"),
        }
    }

    pub(super) fn write_latent(&mut self, layer: usize, plan: &[SequenceRows], a: &HostTensor, b: &HostTensor) {
        assert_eq!(a.cols + b.cols, self.spec.latent_dim, "columns of a latent row");
        match &mut self.latent[layer] {
            Blocks::F32(data) => write_latent(data, plan, a, b, |value| value),
            Blocks::Bf16(data) => write_latent(data, plan, a, b, f32_to_bf16),
            Blocks::Int8 { .. } => unreachable!("{HEADS_ONLY}"),
        }
    }

    pub(super) fn write(&mut self, layer: usize, plan: &[SequenceRows], k: &HostTensor, v: &HostTensor) {
        let spec = self.spec;
        match &mut self.layers[layer] {
            Blocks::F32(data) => write(data, &spec, plan, k, v, |value| value),
            Blocks::Bf16(data) => write(data, &spec, plan, k, v, f32_to_bf16),
            Blocks::Int8 { codes, scales } => write_int8(codes, scales, &spec, plan, k, v),
        }
    }
}

fn write_index<T>(data: &mut [T], plan: &[SequenceRows], keys: &HostTensor, store: impl Fn(f32) -> T) {
    for sequence in plan {
        for (i, row) in sequence.rows.clone().enumerate() {
            let token = sequence.start + i;
            let block = sequence.block_table[token / BLOCK_TOKENS] as usize * BLOCK_TOKENS * keys.cols;
            for (d, value) in keys.row(row).iter().enumerate() {
                data[block + d * BLOCK_TOKENS + token % BLOCK_TOKENS] = store(*value);
            }
        }
    }
}

fn write_latent<T>(data: &mut [T], plan: &[SequenceRows], a: &HostTensor, b: &HostTensor, store: impl Fn(f32) -> T) {
    let stride = value_stride(a.cols + b.cols);
    for sequence in plan {
        for (i, row) in sequence.rows.clone().enumerate() {
            let token = sequence.start + i;
            let slot = sequence.block_table[token / BLOCK_TOKENS] as usize * BLOCK_TOKENS + token % BLOCK_TOKENS;
            for (to, value) in data[slot * stride..].iter_mut().zip(a.row(row).iter().chain(b.row(row))) {
                *to = store(*value);
            }
        }
    }
}

fn write<T>(
    data: &mut [T],
    spec: &CacheSpec,
    plan: &[SequenceRows],
    k: &HostTensor,
    v: &HostTensor,
    store: impl Fn(f32) -> T,
) {
    let (hd, stride) = (spec.head_dim, value_stride(spec.head_dim));
    let len = CpuCache::head_elements(spec);
    for sequence in plan {
        for (i, row) in sequence.rows.clone().enumerate() {
            let token = sequence.start + i;
            let block = sequence.block_table[token / BLOCK_TOKENS] as usize;
            let slot = token % BLOCK_TOKENS;
            for head in 0..spec.kv_heads {
                let at = (block * spec.kv_heads + head) * len;
                let (keys, values) = data[at..at + len].split_at_mut(BLOCK_TOKENS * hd);
                let columns = head * hd..(head + 1) * hd;
                let (at, step) = if spec.index_dim > 0 { (slot * hd, 1) } else { (slot, BLOCK_TOKENS) };
                for (d, value) in k.row(row)[columns.clone()].iter().enumerate() {
                    keys[at + d * step] = store(*value);
                }
                for (to, value) in values[slot * stride..].iter_mut().zip(&v.row(row)[columns]) {
                    *to = store(*value);
                }
            }
        }
    }
}

fn write_int8(
    codes: &mut [i8],
    scales: &mut [f32],
    spec: &CacheSpec,
    plan: &[SequenceRows],
    k: &HostTensor,
    v: &HostTensor,
) {
    let (hd, stride, len) = (spec.head_dim, value_stride(spec.head_dim), CpuCache::head_elements(spec));
    for sequence in plan {
        for (i, row) in sequence.rows.clone().enumerate() {
            let token = sequence.start + i;
            let (block, slot) = (sequence.block_table[token / BLOCK_TOKENS] as usize, token % BLOCK_TOKENS);
            for head in 0..spec.kv_heads {
                let place = block * spec.kv_heads + head;
                let columns = head * hd..(head + 1) * hd;
                let starts = [slot * hd, BLOCK_TOKENS * hd + slot * stride];
                for (part, (values, start)) in [k, v].into_iter().zip(starts).enumerate() {
                    let values = &values.row(row)[columns.clone()];
                    let (scale, factor) = scale(values);
                    scales[(2 * place + part) * BLOCK_TOKENS + slot] = scale;
                    for (to, value) in codes[place * len + start..].iter_mut().zip(values) {
                        *to = code(*value, factor);
                    }
                }
            }
        }
    }
}

/// Zeros without touching the pages, or an error instead of an abort.
fn zeroed<T>(len: usize) -> Result<Vec<T>, BackendError> {
    let error = |bytes: usize| BackendError::Memory {
        what: "the KV cache of a layer".into(),
        bytes: bytes as u64,
        remedy: "lower --max-model-len",
    };
    if len == 0 {
        return Ok(Vec::new());
    }
    let layout = std::alloc::Layout::array::<T>(len).map_err(|_| error(usize::MAX))?;
    // SAFETY: the layout has a size; T is f32, u16 or i8, for which all bits zero is a value; the vector takes over exactly
    // this allocation with the layout that it will free.
    unsafe {
        let pointer = std::alloc::alloc_zeroed(layout).cast::<T>();
        if pointer.is_null() {
            return Err(error(layout.size()));
        }
        Ok(Vec::from_raw_parts(pointer, len, len))
    }
}
