//! Encoding in pieces: patches through the vision tower and the projector, a little at a time.
//!
//! A clip takes as long to encode as hundreds of tokens to generate, so the state of an encoding is kept between calls and
//! every call does a bounded piece of it. Where it is cut changes no value: rows do not depend on what shares a call.

use std::ops::Range;

use keye_backend::{Backend, BackendError};
use keye_media::{MediaKind, Patches, Pixels};
use keye_processor::VisionConfig;

use crate::projector::Projector;
use crate::tap;
use crate::vision::{Grid, VisionTower, spans_of};
use crate::{EncodeProgress, ModelError, Tap};

/// Patches of small spans that go through the tower together.
const GROUP: usize = 4096;
/// Rows that go through a layer together: bounds the memory beside the hidden states of a long span.
const ROWS: usize = 1024;
/// Rows of a long span times its length: attention makes a piece of so many rows take about twice as long as a short
/// span's.
const ROWS_TIMES_SPAN: usize = 8 << 20;
/// Tokens that go through the projector together.
const PROJECTOR_ROWS: usize = 256;

/// Where the tower and the projector are told to look.
pub(crate) struct Parts<'a, B: Backend> {
    pub backend: &'a B,
    pub config: &'a VisionConfig,
    pub vision: &'a VisionTower<B>,
    pub projector: &'a Projector<B>,
}

/// An encoding that is under way.
pub(crate) struct Encoding<B: Backend> {
    /// `image_` or `video_`.
    prefix: &'static str,
    /// The patch rectangles that attend together.
    spans: Vec<Grid>,
    /// Spans that are done or in the group.
    begun: usize,
    group: Option<Group<B>>,
    /// `[tokens, H]`
    features: B::Tensor,
    /// Rows of `features` that are there.
    rows: usize,
    progress: EncodeProgress,
}

/// Spans that go through the tower together.
struct Group<B: Backend> {
    grids: Vec<Grid>,
    /// Which patches of the group attend to each other.
    spans: Vec<Range<usize>>,
    chunks: Vec<Range<usize>>,
    /// Rotations, per chunk.
    angles: Vec<B::Tensor>,
    /// `[n, D]` each: hidden states, rotated keys, values.
    x: B::Tensor,
    keys: B::Tensor,
    values: B::Tensor,
    /// The projector's order of patches.
    order: Vec<u32>,
    next: Piece,
}

/// The piece of work that comes next: a chunk of rows through a part of the model.
#[derive(Debug, Clone, Copy)]
enum Piece {
    Embed(usize),
    Keys { layer: usize, chunk: usize },
    Attend { layer: usize, chunk: usize },
    Project(usize),
}

impl<B: Backend> Encoding<B> {
    /// Allocates the features.
    pub(crate) fn begin(
        parts: &Parts<'_, B>,
        kind: MediaKind,
        patches: &Patches,
        spans: Vec<Grid>,
        hidden_size: usize,
    ) -> Result<Self, ModelError> {
        let prefix = match kind {
            MediaKind::Image => "image_",
            MediaKind::Video => "video_",
        };
        let merge = parts.config.spatial_merge_size.pow(2);
        let features = parts.backend.zeros(patches.len() / merge, hidden_size)?;
        let total = patches.len() as u64 * parts.vision.layers() as u64;
        let progress = EncodeProgress { done: 0, total, flops: 0.0 };
        Ok(Self { prefix, spans, begun: 0, group: None, features, rows: 0, progress })
    }

    /// Works until about `flops` operations are done, at least one piece. True when all is done.
    pub(crate) fn advance(
        &mut self,
        parts: &Parts<'_, B>,
        pixels: &Pixels,
        flops: f64,
        tap: &mut dyn Tap,
    ) -> Result<bool, ModelError> {
        self.progress.flops = 0.0;
        loop {
            let mut group = match self.group.take() {
                Some(group) => group,
                None if self.begun == self.spans.len() => return Ok(true),
                None => self.next_group(parts)?,
            };
            let (cost, over) = self.piece(parts, pixels, &mut group, tap)?;
            self.progress.flops += cost;
            if !over {
                self.group = Some(group);
            }
            if self.progress.flops >= flops {
                return Ok(over && self.begun == self.spans.len());
            }
        }
    }

    pub(crate) fn progress(&self) -> EncodeProgress {
        self.progress
    }

    /// The features, when all is done.
    pub(crate) fn finish(self) -> B::Tensor {
        self.features
    }

    /// As many of the next spans as fit a group, at least one; what is in a group changes no value.
    fn next_group(&mut self, parts: &Parts<'_, B>) -> Result<Group<B>, ModelError> {
        let rest = &self.spans[self.begun..];
        let mut n = 0;
        let fits = rest.iter().take_while(|grid| {
            n += grid.len();
            n <= GROUP
        });
        let grids = rest[..fits.count().max(1)].to_vec();
        self.begun += grids.len();
        let first = grids[0].start;
        let spans = grids.iter().map(|g| g.start - first..g.start - first + g.len()).collect();
        let n: usize = grids.iter().map(Grid::len).sum();
        let longest = grids.iter().map(Grid::len).max().unwrap_or(1);
        let rows = (ROWS_TIMES_SPAN / longest.max(1)).clamp(128, ROWS);
        let chunks: Vec<Range<usize>> = (0..n).step_by(rows).map(|at| at..n.min(at + rows)).collect();
        let (backend, d) = (parts.backend, parts.config.hidden_size);
        let angles = chunks.iter().map(|chunk| parts.vision.angles(backend, &grids, chunk.clone()));
        Ok(Group {
            spans,
            angles: angles.collect::<Result<_, _>>()?,
            chunks,
            x: backend.zeros(n, d)?,
            keys: backend.zeros(n, d)?,
            values: backend.zeros(n, d)?,
            order: parts.projector.order(&grids),
            grids,
            next: Piece::Embed(0),
        })
    }

    /// Does the next piece; says what it cost in floating-point operations and whether the group is done.
    fn piece(
        &mut self,
        parts: &Parts<'_, B>,
        pixels: &Pixels,
        group: &mut Group<B>,
        tap: &mut dyn Tap,
    ) -> Result<(f64, bool), ModelError> {
        let (backend, config) = (parts.backend, parts.config);
        let (d, i) = (config.hidden_size as f64, config.intermediate_size as f64);
        let merge = config.spatial_merge_size.pow(2);
        let (chunks, layers) = (group.chunks.len(), parts.vision.layers());
        let (cost, next) = match group.next {
            Piece::Embed(number) => {
                let chunk = group.chunks[number].clone();
                let embedded = parts.vision.embed(backend, pixels, &group.grids, chunk.clone())?;
                self.record(backend, tap, "vit_embeddings", &embedded)?;
                backend.copy_rows(&embedded, 0..chunk.len(), &mut group.x, chunk.start)?;
                let patch = config.num_channels * config.patch_size * config.patch_size;
                let next = match (number + 1 == chunks, layers) {
                    (false, _) => Piece::Embed(number + 1),
                    (true, 0) => Piece::Project(0),
                    (true, _) => Piece::Keys { layer: 0, chunk: 0 },
                };
                (chunk.len() as f64 * 2.0 * patch as f64 * d, Some(next))
            }
            Piece::Keys { layer, chunk: number } => {
                let chunk = group.chunks[number].clone();
                let rows = backend.slice_rows(&group.x, chunk.clone())?;
                let (k, v) = parts.vision.keys_and_values(backend, layer, &rows, &group.angles[number])?;
                backend.copy_rows(&k, 0..chunk.len(), &mut group.keys, chunk.start)?;
                backend.copy_rows(&v, 0..chunk.len(), &mut group.values, chunk.start)?;
                let next = match number + 1 == chunks {
                    false => Piece::Keys { layer, chunk: number + 1 },
                    true => Piece::Attend { layer, chunk: 0 },
                };
                (chunk.len() as f64 * 4.0 * d * d, Some(next))
            }
            Piece::Attend { layer, chunk: number } => {
                let chunk = group.chunks[number].clone();
                let mut rows = backend.slice_rows(&group.x, chunk.clone())?;
                let spans = spans_of(&group.spans, &chunk);
                let keyed: f64 = spans.iter().map(|span| (span.queries.len() * span.keys.len()) as f64).sum();
                let (keys, values) = (&group.keys, &group.values);
                parts.vision.attend(backend, layer, &mut rows, &group.angles[number], keys, values, &spans)?;
                if layer == 0 {
                    self.record(backend, tap, "vit_layer0", &rows)?;
                }
                backend.copy_rows(&rows, 0..chunk.len(), &mut group.x, chunk.start)?;
                self.progress.done += chunk.len() as u64;
                let next = match (number + 1 == chunks, layer + 1 == layers) {
                    (false, _) => Piece::Attend { layer, chunk: number + 1 },
                    (true, false) => Piece::Keys { layer: layer + 1, chunk: 0 },
                    (true, true) => Piece::Project(0),
                };
                (chunk.len() as f64 * 2.0 * (2.0 * d * d + 2.0 * d * i) + keyed * 4.0 * d, Some(next))
            }
            Piece::Project(at) => {
                if at == 0 && tap.wants(&format!("{}vit_out", self.prefix)) {
                    let out = parts.vision.post_layernorm.forward(backend, &group.x)?;
                    self.record(backend, tap, "vit_out", &out)?;
                }
                let end = group.order.len().min(at + PROJECTOR_ROWS * merge);
                let order = &group.order[at..end];
                let rows = backend.gather_rows(&group.x, &backend.upload_index(order)?, 1)?;
                let rows = parts.vision.post_layernorm.forward(backend, &rows)?;
                let projected = parts.projector.forward(backend, &rows)?;
                self.record(backend, tap, "projector", &projected)?;
                let tokens = order.len() / merge;
                backend.copy_rows(&projected, 0..tokens, &mut self.features, self.rows)?;
                self.rows += tokens;
                let (merged, hidden) = (d * merge as f64, backend.cols(&projected) as f64);
                let cost = tokens as f64 * 2.0 * (merged * merged + merged * hidden);
                (cost, (end < group.order.len()).then_some(Piece::Project(end)))
            }
        };
        if let Some(next) = next {
            group.next = next;
        }
        Ok((cost, next.is_none()))
    }

    fn record(&self, backend: &B, tap: &mut dyn Tap, name: &str, x: &B::Tensor) -> Result<(), BackendError> {
        tap::record(backend, tap, format_args!("{}{name}", self.prefix), x)
    }
}
