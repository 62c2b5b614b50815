//! Attention: what there is to do, laid out in lists for the kernels, and their launches.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::device::{Arg, AttentionArg, Device, Grid, MOST_BLOCKS, Memory};
use super::tensor::{Index, Tensor};
use super::{Cuda, Products};
use crate::{AttentionShape, BLOCK_TOKENS, BackendError, CacheSpec, IndexShape, KvDtype, SequenceRows, Span};

/// Keys of a segment, whose results are merged from left to right: SEGMENT_BLOCKS of attention.cu.
const SEGMENT: usize = 4 * BLOCK_TOKENS;
/// Items (a row with one of the query heads of a key head) of a block of `attend_rows`, and of `attend_segment`.
const ITEMS: usize = 64;
const FEW_ITEMS: usize = 16;
/// Scores of index keys that are held at once: 256 MiB.
const SCORES: usize = 64 << 20;

/// KV blocks of all layers: per layer keys and values `[block, head, token, head_dim]`, in eight bits with scales
/// `[block, head, token]` of their own, index keys `[block, token, width]`.
pub struct Cache {
    pub(super) spec: CacheSpec,
    keys: Vec<Memory>,
    values: Vec<Memory>,
    /// Of keys, then of values; none without eight bits.
    scales: Vec<[Memory; 2]>,
    index: Vec<Memory>,
}

/// Sequences of a step on the device.
pub struct Plan {
    sequences: Vec<Sequence>,
    rows: usize,
    longest: usize,
    /// Place in the cache of each row.
    slots: Memory,
    /// Block tables, one after the other.
    tables: Memory,
    /// `{row, first entry of its block table, keys in sight}` of each row.
    sights: Memory,
    /// Lists for the kernels, made when they are first needed and used by all layers.
    work: Mutex<HashMap<WorkKey, Arc<Work>>>,
}

/// Rows of a sequence: its first row, how many, keys that the first sees, first entry of its block table.
struct Sequence {
    row: usize,
    rows: usize,
    keys: usize,
    base: usize,
}

/// Query heads of a key head; selected keys when attention is sparse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct WorkKey {
    group: usize,
    top_k: Option<usize>,
}

/// Lists of `attend_rows`, `attend_segment` and `merge_segments`.
pub(super) struct Work {
    tiles: List,
    segments: List,
    merges: List,
    /// Items of the fullest merge.
    items: usize,
}

/// Entries on the device.
struct List {
    memory: Memory,
    len: usize,
}

fn list(device: &Arc<Device>, entries: &[u32], width: usize) -> Result<List, BackendError> {
    Ok(List { memory: device.upload_u32("a plan", entries)?, len: entries.len() / width })
}

impl Cache {
    pub(super) fn new(device: &Arc<Device>, spec: &CacheSpec, blocks: usize) -> Result<Self, BackendError> {
        if spec.dtype == KvDtype::Int8 && !spec.head_dim.is_multiple_of(8) {
            return Err(BackendError::Setting(format!(
                "a cache in eight bits needs heads of a multiple of 8 columns on a GPU, these have {}; use bf16 or f32",
                spec.head_dim
            )));
        }
        let (head, other) = match spec.dtype {
            KvDtype::F32 => (4, 4),
            KvDtype::Bf16 => (2, 2),
            KvDtype::Int8 => (1, 2),
        };
        let layers = |token_bytes: usize| {
            let bytes = blocks.checked_mul(BLOCK_TOKENS).and_then(|tokens| tokens.checked_mul(token_bytes));
            let bytes = bytes.unwrap_or(usize::MAX / 2);
            (0..spec.layers).map(|_| device.zeros("the KV cache of a layer", bytes)).collect::<Result<Vec<_>, _>>()
        };
        let width = spec.kv_heads * spec.head_dim;
        let scales = match spec.dtype {
            KvDtype::Int8 => {
                let (keys, values) = (layers(4 * spec.kv_heads)?, layers(4 * spec.kv_heads)?);
                keys.into_iter().zip(values).map(|(keys, values)| [keys, values]).collect()
            }
            KvDtype::F32 | KvDtype::Bf16 => Vec::new(),
        };
        let (keys, values) = (layers(head * width)?, layers(head * width)?);
        Ok(Self { spec: *spec, keys, values, scales, index: layers(other * spec.index_dim)? })
    }

    /// Addresses of the scales of a layer's keys and values; zeros where there are none.
    fn scales(&self, layer: usize) -> [u64; 2] {
        self.scales.get(layer).map_or([0; 2], |scales| scales.each_ref().map(Memory::address))
    }
}

impl Plan {
    pub(super) fn new(device: &Arc<Device>, sequences: &[SequenceRows]) -> Result<Self, BackendError> {
        let rows = sequences.iter().map(|sequence| sequence.rows.end).max().unwrap_or(0);
        let (mut slots, mut tables, mut sights) = (vec![0u32; rows], Vec::new(), Vec::new());
        let mut planned = Vec::new();
        for sequence in sequences {
            let base = tables.len();
            tables.extend_from_slice(&sequence.block_table);
            for (i, row) in sequence.rows.clone().enumerate() {
                let token = sequence.start + i;
                let block = sequence.block_table[token / BLOCK_TOKENS] as usize;
                slots[row] = (block * BLOCK_TOKENS + token % BLOCK_TOKENS) as u32;
                sights.extend([row as u32, base as u32, token as u32 + 1]);
            }
            let (row, keys) = (sequence.rows.start, sequence.start + 1);
            planned.push(Sequence { row, rows: sequence.rows.len(), keys, base });
        }
        let longest = planned.iter().map(|sequence| sequence.keys + sequence.rows).max().unwrap_or(1) - 1;
        Ok(Self {
            sequences: planned,
            rows: sights.len() / 3,
            longest,
            slots: device.upload_u32("a plan", &slots)?,
            tables: device.upload_u32("a plan", &tables)?,
            sights: device.upload_u32("a plan", &sights)?,
            work: Mutex::default(),
        })
    }

    fn work(&self, device: &Arc<Device>, key: WorkKey) -> Result<Arc<Work>, BackendError> {
        let mut known = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(work) = known.get(&key) {
            return Ok(Arc::clone(work));
        }
        let (mut tiles, mut segments, mut merges) = (Vec::new(), Vec::new(), Vec::new());
        let mut items = 0;
        for sequence in &self.sequences {
            // Sparse rows have keys of their own, so each stands alone.
            let few = if key.top_k.is_some() { 1 } else { FEW_ITEMS / key.group };
            if key.top_k.is_none() && sequence.rows > few {
                for first in (0..sequence.rows).step_by(ITEMS / key.group) {
                    let rows = (ITEMS / key.group).min(sequence.rows - first);
                    tiles.extend([sequence.row + first, rows, sequence.keys + first, sequence.base].map(|n| n as u32));
                }
                continue;
            }
            for first in (0..sequence.rows).step_by(few) {
                let rows = few.min(sequence.rows - first);
                let sight = (sequence.keys + first).min(key.top_k.unwrap_or(usize::MAX));
                let (parts, at) = ((sight + rows - 1).div_ceil(SEGMENT), segments.len() / 5);
                for part in 0..parts {
                    segments.extend([sequence.row + first, rows, sight, sequence.base, part].map(|n| n as u32));
                }
                merges.extend([sequence.row + first, rows, at, parts].map(|n| n as u32));
                items = items.max(rows * key.group);
            }
        }
        let work = Arc::new(Work {
            tiles: list(device, &tiles, 4)?,
            segments: list(device, &segments, 5)?,
            merges: list(device, &merges, 4)?,
            items,
        });
        known.insert(key, Arc::clone(&work));
        Ok(work)
    }
}

/// The matrix cores' kernels are made for heads of two widths, narrower ones filled up.
fn matrix_width(head_dim: usize) -> Option<usize> {
    match head_dim {
        _ if !head_dim.is_multiple_of(8) => None,
        ..=80 => Some(80),
        81..=128 => Some(128),
        _ => None,
    }
}

fn tile_bytes(width: usize) -> usize {
    2 * 64 * (width + 8) * 2
}

impl Cuda {
    /// Spans of rows; both directions.
    pub(super) fn attend_spans(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: AttentionShape,
        spans: &[Span],
    ) -> Result<Tensor, BackendError> {
        assert_eq!((q.cols, k.cols), (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim), "heads");
        let device = &self.device;
        let out = Tensor::new(device.zeros("activations", q.bytes())?, q.rows, q.cols);
        let group = shape.heads / shape.kv_heads;
        let mut arg = AttentionArg { q: q.memory.address(), out: out.memory.address(), ..arg(shape) };
        let width = matrix_width(shape.head_dim).filter(|_| self.products == Products::Bf16 && group <= ITEMS);
        let Some(width) = width else {
            let sights = spans.iter().flat_map(|span| {
                let keys = [span.keys.start as u32, span.keys.len() as u32];
                span.queries.clone().flat_map(move |row| [row as u32, keys[0], keys[1]])
            });
            let sights = list(device, &sights.collect::<Vec<_>>(), 3)?;
            (arg.keys, arg.values, arg.kv_stride) = (k.memory.address(), v.memory.address(), k.cols as u32);
            arg.work = sights.memory.address();
            self.attend_exact("attend_exact_f32", arg, sights.len)?;
            return Ok(out);
        };
        let mut tiles = Vec::new();
        for span in spans.iter().filter(|span| !span.keys.is_empty()) {
            for row in span.queries.clone().step_by(ITEMS / group) {
                let rows = (ITEMS / group).min(span.queries.end - row);
                tiles.extend([row, rows, span.keys.len(), span.keys.start].map(|n| n as u32));
            }
        }
        let tiles = list(device, &tiles, 4)?;
        let (keys, values) = (k.narrow(device)?, v.narrow(device)?);
        (arg.keys, arg.values, arg.kv_stride) = (keys.address(), values.address(), k.narrow_stride() as u32);
        arg.work = tiles.memory.address();
        let kernel = if width == 80 { "attend_rows_80_bf16" } else { "attend_rows_128_bf16" };
        let grid = Grid::of(tiles.len, shape.kv_heads, 128).shared(tile_bytes(width));
        device.launch(kernel, grid, &[Arg::Attention(arg)])?;
        Ok(out)
    }

    fn attend_exact(&self, kernel: &'static str, arg: AttentionArg, rows: usize) -> Result<(), BackendError> {
        let grid = Grid::of(rows.div_ceil(4), arg.heads as usize, 128).shared(4 * (8 * arg.head_dim as usize + 768));
        self.device.launch(kernel, grid, &[Arg::Attention(arg), Arg::U32(rows as u32)])
    }

    /// Rows over their own sequences in the cache; over selected positions where given.
    pub(super) fn attend_cached(
        &self,
        q: &Tensor,
        cache: &Cache,
        layer: usize,
        plan: &Plan,
        shape: AttentionShape,
        selected: Option<&Index>,
    ) -> Result<Tensor, BackendError> {
        let spec = &cache.spec;
        assert_eq!((shape.kv_heads, shape.head_dim), (spec.kv_heads, spec.head_dim), "the cache's heads");
        assert_eq!(q.cols, shape.heads * shape.head_dim, "heads");
        let device = &self.device;
        let out = Tensor::new(device.zeros("activations", q.bytes())?, q.rows, q.cols);
        if plan.rows == 0 {
            return Ok(out);
        }
        let group = shape.heads / shape.kv_heads;
        let top_k = selected.map(|selected| selected.len / q.rows);
        let [key_scales, value_scales] = cache.scales(layer);
        let mut arg = AttentionArg {
            q: q.memory.address(),
            out: out.memory.address(),
            keys: cache.keys[layer].address(),
            values: cache.values[layer].address(),
            tables: plan.tables.address(),
            selected: selected.map_or(0, |selected| selected.memory.address()),
            top_k: top_k.unwrap_or(0) as u32,
            growth: u32::from(top_k.is_none()),
            key_scales,
            value_scales,
            ..arg(shape)
        };
        let width = matrix_width(shape.head_dim).filter(|_| self.products == Products::Bf16 && group <= FEW_ITEMS);
        let Some(width) = width else {
            let limited;
            arg.work = plan.sights.address();
            if let Some(top_k) = top_k {
                limited = self.limited_sights(plan, top_k)?;
                arg.work = limited.memory.address();
            }
            let kernel = match spec.dtype {
                KvDtype::F32 => "attend_exact_f32",
                KvDtype::Bf16 => "attend_exact_bf16",
                KvDtype::Int8 => "attend_exact_int8",
            };
            self.attend_exact(kernel, arg, plan.rows)?;
            return Ok(out);
        };
        let work = plan.work(device, WorkKey { group, top_k })?;
        let [rows, segment, merge] = match (width, spec.dtype) {
            (80, KvDtype::F32) => ["attend_rows_80_f32", "attend_segment_80_f32", "merge_segments_80"],
            (80, KvDtype::Bf16) => ["attend_rows_80_bf16", "attend_segment_80_bf16", "merge_segments_80"],
            (80, KvDtype::Int8) => ["attend_rows_80_int8", "attend_segment_80_int8", "merge_segments_80"],
            (_, KvDtype::F32) => ["attend_rows_128_f32", "attend_segment_128_f32", "merge_segments_128"],
            (_, KvDtype::Bf16) => ["attend_rows_128_bf16", "attend_segment_128_bf16", "merge_segments_128"],
            (_, KvDtype::Int8) => ["attend_rows_128_int8", "attend_segment_128_int8", "merge_segments_128"],
        };
        let heads = shape.kv_heads;
        arg.work = work.tiles.memory.address();
        let merged = 128 * width / 2 * 4;
        let grid = Grid::of(work.tiles.len, heads, 128).shared(tile_bytes(width) + merged);
        device.launch(rows, grid, &[Arg::Attention(arg)])?;
        if work.segments.len > 0 {
            let partials = work.segments.len * heads * FEW_ITEMS * (width + 2) * 4;
            let partials = device.allocate("parts of attention", partials)?;
            arg.partials = partials.address();
            arg.work = work.segments.memory.address();
            let grid = Grid::of(work.segments.len, heads, 32).shared(tile_bytes(width));
            device.launch(segment, grid, &[Arg::Attention(arg)])?;
            arg.work = work.merges.memory.address();
            let blocks = [work.merges.len as u32, heads as u32, work.items as u32];
            device.launch(merge, Grid { blocks, threads: 128, shared: 0 }, &[Arg::Attention(arg)])?;
        }
        Ok(out)
    }

    /// Rows with no more keys than are selected.
    fn limited_sights(&self, plan: &Plan, top_k: usize) -> Result<List, BackendError> {
        let sights = plan.sequences.iter().flat_map(|sequence| {
            (0..sequence.rows)
                .flat_map(move |i| [sequence.row + i, sequence.base, (sequence.keys + i).min(top_k)].map(|n| n as u32))
        });
        list(&self.device, &sights.collect::<Vec<_>>(), 3)
    }

    /// Norm and rotation of q in place and of k into the cache, v into the cache.
    #[allow(clippy::too_many_arguments, reason = "one launch")]
    pub(super) fn write_cache(
        &self,
        q: &mut Tensor,
        k: &Tensor,
        v: &Tensor,
        gammas: [u64; 2],
        eps: f32,
        angles: &Tensor,
        cache: &mut Cache,
        layer: usize,
        plan: &Plan,
    ) -> Result<(), BackendError> {
        let (head_dim, kv_heads) = (cache.spec.head_dim, cache.spec.kv_heads);
        assert_eq!((angles.cols, k.cols, v.cols), (head_dim, kv_heads * head_dim, kv_heads * head_dim), "heads");
        assert_eq!((q.rows, k.rows, v.rows, angles.rows), (plan.rows, plan.rows, plan.rows, plan.rows), "rows");
        let heads = q.cols / head_dim;
        let kernel = match cache.spec.dtype {
            KvDtype::F32 => "norm_rope_write_f32",
            KvDtype::Bf16 => "norm_rope_write_bf16",
            KvDtype::Int8 => "norm_rope_write_int8",
        };
        let mut args = vec![
            q.change(),
            k.memory.arg(),
            v.memory.arg(),
            Arg::Address(gammas[0]),
            Arg::Address(gammas[1]),
            Arg::F32(eps),
            angles.memory.arg(),
            cache.keys[layer].arg(),
            cache.values[layer].arg(),
            plan.slots.arg(),
            Arg::U32(heads as u32),
            Arg::U32(kv_heads as u32),
            Arg::U32(head_dim as u32),
        ];
        args.extend(cache.scales.get(layer).into_iter().flatten().map(Memory::arg));
        let grid = Grid::of(plan.rows, (heads + 2 * kv_heads).div_ceil(8), 256);
        self.device.launch(kernel, grid, &args)
    }

    pub(super) fn write_index(
        &self,
        keys: &Tensor,
        cache: &mut Cache,
        layer: usize,
        plan: &Plan,
    ) -> Result<(), BackendError> {
        assert_eq!((keys.cols, keys.rows), (cache.spec.index_dim, plan.rows), "index keys");
        let kernel = if cache.spec.dtype == KvDtype::F32 { "write_index_f32" } else { "write_index_bf16" };
        let args = [keys.memory.arg(), cache.index[layer].arg(), plan.slots.arg(), Arg::U32(keys.cols as u32)];
        self.device.launch(kernel, Grid::of(keys.rows, 1, 256), &args)
    }

    /// Positions of the highest scores, some rows at a time.
    pub(super) fn select_keys(
        &self,
        q: &Tensor,
        weights: &Tensor,
        cache: &Cache,
        layer: usize,
        plan: &Plan,
        shape: IndexShape,
    ) -> Result<Index, BackendError> {
        assert_eq!((q.cols, weights.cols), (shape.heads * shape.head_dim, shape.heads), "index heads");
        let device = &self.device;
        let len = q.rows * shape.top_k;
        let selected = Index { memory: device.allocate("selected keys", len * 4)?, len };
        if plan.rows == 0 {
            return Ok(selected);
        }
        let stride = plan.longest;
        let at_once = (SCORES / stride).clamp(1, plan.rows.min(MOST_BLOCKS as usize));
        let scores = device.allocate("scores of index keys", at_once * stride * 4)?;
        let kernel = if cache.spec.dtype == KvDtype::F32 { "score_f32" } else { "score_bf16" };
        for first in (0..plan.rows).step_by(at_once) {
            let rows = at_once.min(plan.rows - first);
            let sights = Arg::Address(plan.sights.address() + 12 * first as u64);
            if plan.longest > shape.top_k {
                let args = [
                    q.memory.arg(),
                    weights.memory.arg(),
                    cache.index[layer].arg(),
                    plan.tables.arg(),
                    sights,
                    scores.arg(),
                    Arg::U32(shape.heads as u32),
                    Arg::U32(shape.head_dim as u32),
                    Arg::U32(stride as u32),
                    Arg::F32(shape.scale),
                ];
                let grid = Grid::of(stride.div_ceil(256), rows, 256).shared(4 * q.cols);
                device.launch(kernel, grid, &args)?;
            }
            let args =
                [scores.arg(), sights, selected.memory.arg(), Arg::U32(stride as u32), Arg::U32(shape.top_k as u32)];
            device.launch("select_highest", Grid::of(rows, 1, 256), &args)?;
        }
        Ok(selected)
    }
}

fn arg(shape: AttentionShape) -> AttentionArg {
    AttentionArg {
        heads: shape.heads as u32,
        kv_heads: shape.kv_heads as u32,
        head_dim: shape.head_dim as u32,
        scale: shape.scale,
        ..Default::default()
    }
}
