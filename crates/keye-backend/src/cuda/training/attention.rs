//! Attention of training.

use std::collections::BTreeSet;

use super::Array;
use crate::BackendError;
use crate::cuda::Cuda;
use crate::cuda::device::{Arg, Grid, Memory};
use crate::training::{AttentionShape, Span};

/// Queries of a block, and keys, as in train_attention.cu.
const SIDE: usize = 64;
/// Bytes of shared memory: two stages of two chunks; a square of scores.
const STAGES: usize = 4 * SIDE * 36 * 4;
const SQUARE: usize = SIDE * 68 * 4;

/// Kernels for heads of up to 32, 64, 96 and 128 columns.
struct Kernels {
    forward: &'static str,
    queries: &'static str,
    keys: &'static str,
}

const KERNELS: [Kernels; 4] = [
    Kernels { forward: "train_attention_32", queries: "train_attention_queries_32", keys: "train_attention_keys_32" },
    Kernels { forward: "train_attention_64", queries: "train_attention_queries_64", keys: "train_attention_keys_64" },
    Kernels { forward: "train_attention_96", queries: "train_attention_queries_96", keys: "train_attention_keys_96" },
    Kernels {
        forward: "train_attention_128",
        queries: "train_attention_queries_128",
        keys: "train_attention_keys_128",
    },
];

/// Spans, cut into what blocks do; on the device.
pub struct Spans {
    /// `{first query, queries, its place in the span, the span's first key, its keys}`
    query_tiles: List,
    /// `{first key, keys, first of its spans, spans}`
    key_tiles: List,
    /// `{first query, queries, first key}` of every span that has keys of a tile.
    key_spans: List,
    /// Queries and keys that are in spans.
    queries: usize,
    keys: usize,
}

/// Records of u32.
struct List {
    memory: Memory,
    len: usize,
}

/// As [`Spans`], on the host.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tiles {
    queries: Vec<[u32; 5]>,
    keys: Vec<[u32; 4]>,
    key_spans: Vec<[u32; 3]>,
    covered_queries: usize,
    covered_keys: usize,
}

impl Tiles {
    fn of(spans: &[Span]) -> Self {
        let mut tiles = Self::default();
        for span in spans {
            tiles.covered_queries += span.queries.len();
            let keys = [span.keys.start as u32, span.keys.len() as u32];
            tiles.queries.extend(span.queries.clone().step_by(SIDE).map(|first| {
                let count = SIDE.min(span.queries.end - first);
                [first as u32, count as u32, (first - span.queries.start) as u32, keys[0], keys[1]]
            }));
        }
        // Keys may be in several spans: where any begins or ends a tile ends, so that one list of spans holds for all its keys.
        let full = |i: &usize| !spans[*i].queries.is_empty() && !spans[*i].keys.is_empty();
        let mut starts: Vec<usize> = (0..spans.len()).filter(full).collect();
        let mut ends = starts.clone();
        starts.sort_by_key(|&i| spans[i].keys.start);
        ends.sort_by_key(|&i| spans[i].keys.end);
        let mut bounds: Vec<usize> = starts.iter().flat_map(|&i| [spans[i].keys.start, spans[i].keys.end]).collect();
        bounds.sort_unstable();
        bounds.dedup();
        let (mut starts, mut ends) = (starts.into_iter().peekable(), ends.into_iter().peekable());
        let mut active = BTreeSet::new();
        for bound in bounds.windows(2) {
            while let Some(i) = ends.next_if(|&i| spans[i].keys.end <= bound[0]) {
                active.remove(&i);
            }
            while let Some(i) = starts.next_if(|&i| spans[i].keys.start <= bound[0]) {
                active.insert(i);
            }
            if active.is_empty() {
                continue;
            }
            tiles.covered_keys += bound[1] - bound[0];
            let list = [tiles.key_spans.len() as u32, active.len() as u32];
            tiles.key_spans.extend(active.iter().map(|&i| {
                let Span { queries, keys } = &spans[i];
                [queries.start as u32, queries.len() as u32, keys.start as u32]
            }));
            tiles.keys.extend((bound[0]..bound[1]).step_by(SIDE).map(|first| {
                let count = SIDE.min(bound[1] - first);
                [first as u32, count as u32, list[0], list[1]]
            }));
        }
        tiles
    }
}

/// Rows and what all kernels take of a shape.
struct Launch {
    kernels: &'static Kernels,
    nq: usize,
    nk: usize,
    args: [Arg; 7],
}

impl Launch {
    fn of(shape: AttentionShape, q: &Array, k: &Array, v: &Array) -> Result<Self, BackendError> {
        let AttentionShape { heads, kv_heads, d, causal } = shape;
        assert!(heads.is_multiple_of(kv_heads), "groups of heads");
        assert!(q.len.is_multiple_of(heads * d) && k.len.is_multiple_of(kv_heads * d), "whole rows");
        assert_eq!(k.len, v.len, "a value for each key");
        let Some(kernels) = KERNELS.get(d.div_ceil(32).saturating_sub(1)) else {
            return Err(BackendError::Setting(format!("heads of {d} columns cannot be trained on a GPU, 128 at most")));
        };
        let (nq, nk) = (q.len / (heads * d), k.len / (kv_heads * d));
        let flags = u32::from(causal) | u32::from(d.is_multiple_of(4)) << 1;
        let [heads, kv_heads, rows, keys, width] = [heads, kv_heads, nq, nk, d].map(|n| Arg::U32(n as u32));
        let args = [heads, kv_heads, rows, keys, width, Arg::U32(flags), Arg::F32((d as f32).powf(-0.5))];
        Ok(Self { kernels, nq, nk, args })
    }

    fn with(&self, operands: &[&Memory]) -> Vec<Arg> {
        operands.iter().map(|memory| memory.arg()).chain(self.args).collect()
    }
}

impl Cuda {
    /// Spans for [`Cuda::training_attention`], in the order of their queries, of which none is in two.
    pub(in crate::cuda) fn training_spans(&self, spans: Vec<Span>) -> Result<Spans, BackendError> {
        let tiles = Tiles::of(&spans);
        let list = |values: &[u32], len: usize| Ok(List { memory: self.device.upload_u32("spans", values)?, len });
        Ok(Spans {
            query_tiles: list(tiles.queries.as_flattened(), tiles.queries.len())?,
            key_tiles: list(tiles.keys.as_flattened(), tiles.keys.len())?,
            key_spans: list(tiles.key_spans.as_flattened(), tiles.key_spans.len())?,
            queries: tiles.covered_queries,
            keys: tiles.covered_keys,
        })
    }

    /// The result, shaped like q, and the logarithms of the sums of exponentials.
    pub(in crate::cuda) fn training_attention(
        &self,
        shape: AttentionShape,
        q: &Array,
        k: &Array,
        v: &Array,
        spans: &Spans,
    ) -> Result<(Array, Array), BackendError> {
        let launch = Launch::of(shape, q, k, v)?;
        let (out, lse) = (Array::room(&self.device, q.len)?, Array::room(&self.device, shape.heads * launch.nq)?);
        let tiles = &spans.query_tiles;
        let operands = [&q.memory, &k.memory, &v.memory, &tiles.memory, &out.memory, &lse.memory];
        let grid = Grid::of(tiles.len, shape.heads, 256).shared(STAGES + SQUARE);
        self.device.launch(launch.kernels.forward, grid, &launch.with(&operands))?;
        Ok((out, lse))
    }

    /// Gradients of q, k and v from that of the result. Those of rows in no span are zero.
    #[expect(clippy::too_many_arguments, reason = "an operation and its operands")]
    pub(in crate::cuda) fn training_attention_backward(
        &self,
        shape: AttentionShape,
        q: &Array,
        k: &Array,
        v: &Array,
        spans: &Spans,
        out: &Array,
        lse: &Array,
        dout: &Array,
    ) -> Result<[Array; 3], BackendError> {
        let launch = Launch::of(shape, q, k, v)?;
        let rows = shape.heads * launch.nq;
        assert_eq!((out.len, dout.len, lse.len), (q.len, q.len, rows), "what the attention gave");
        let room = |len: usize, covered: bool| match covered {
            true => Array::room(&self.device, len),
            false => Ok(Array { memory: self.device.zeros("training", len * 4)?, len }),
        };
        let dq = room(q.len, spans.queries == launch.nq)?;
        let dk = room(k.len, spans.keys == launch.nk)?;
        let dv = room(v.len, spans.keys == launch.nk)?;
        let delta = Array::room(&self.device, rows)?;
        let args =
            [out.memory.arg(), dout.memory.arg(), delta.memory.arg(), Arg::U32(rows as u32), Arg::U32(shape.d as u32)];
        self.device.launch("train_attention_delta", Grid::of(rows.div_ceil(8), 1, 256), &args)?;
        let (inputs, tiles) = ([&q.memory, &k.memory, &v.memory], &spans.query_tiles);
        let operands = [&tiles.memory, &lse.memory, &delta.memory, &dout.memory, &dq.memory];
        let grid = Grid::of(tiles.len, shape.heads, 256).shared(STAGES + SQUARE);
        self.device.launch(launch.kernels.queries, grid, &launch.with(&[&inputs[..], &operands].concat()))?;
        let (tiles, lists) = (&spans.key_tiles, &spans.key_spans);
        let operands = [&tiles.memory, &lists.memory, &lse.memory, &delta.memory, &dout.memory, &dk.memory, &dv.memory];
        let grid = Grid::of(tiles.len, shape.kv_heads, 256).shared(STAGES + 2 * SQUARE);
        self.device.launch(launch.kernels.keys, grid, &launch.with(&[&inputs[..], &operands].concat()))?;
        Ok([dq, dk, dv])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(queries: std::ops::Range<usize>, keys: std::ops::Range<usize>) -> Span {
        Span { queries, keys }
    }

    #[test]
    fn tiles_end_with_their_spans() {
        let tiles = Tiles::of(&[span(0..70, 0..70), span(70..73, 70..73)]);
        assert_eq!(tiles.queries, [[0, 64, 0, 0, 70], [64, 6, 64, 0, 70], [70, 3, 0, 70, 3]]);
        assert_eq!(tiles.keys, [[0, 64, 0, 1], [64, 6, 0, 1], [70, 3, 1, 1]]);
        assert_eq!(tiles.key_spans, [[0, 70, 0], [70, 3, 70]]);
        assert_eq!((tiles.covered_queries, tiles.covered_keys), (73, 73));
    }

    #[test]
    fn keys_may_be_in_several_spans() {
        let tiles = Tiles::of(&[span(0..1, 4..10), span(1..2, 0..6), span(2..2, 0..20), span(3..4, 12..14)]);
        assert_eq!(tiles.keys, [[0, 4, 0, 1], [4, 2, 1, 2], [6, 4, 3, 1], [12, 2, 4, 1]]);
        assert_eq!(tiles.key_spans, [[1, 1, 0], [0, 1, 4], [1, 1, 0], [0, 1, 4], [3, 1, 12]]);
        assert_eq!((tiles.covered_queries, tiles.covered_keys), (3, 12));
    }
}
