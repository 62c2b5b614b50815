//! Vision tower, projector and decoder under one roof: the [`Runner`] of a backend.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use keye_backend::{Activation, BLOCK_TOKENS, Backend, KvDtype, SequenceRows, WeightSource};
use keye_media::{MediaKind, Patches, Pixels, ProcessorConfig};
use keye_processor::{Checkpoint, Facts, ModelConfig, VisionSpan};

use crate::decoder::Decoder;
use crate::encode::{Encoding, Parts};
use crate::projector::Projector;
use crate::ranks::{Peers, Shard, cache_spec};
use crate::step::Rows;
use crate::tap::record;
use crate::vision::{Grid, VisionTower};
use crate::weights::Weights;
use crate::{
    Batch, Chunk, Cost, EncodeProgress, FeatureId, LogitRows, ModelError, Outputs, Runner, RunnerInfo, Tap, cost,
};

/// What can be chosen when a model is loaded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadOptions {
    /// Tokens that the KV cache holds, over all sequences.
    pub cache_tokens: usize,
    /// Element type of the KV cache.
    pub kv_dtype: KvDtype,
}

/// A loaded model; or rank 0 of one on several devices, which has the tower and projector alone.
pub struct KeyeModel<B: Backend> {
    backend: B,
    /// What runs tower and projector, if it is not `backend`; its tensors are the same device's.
    encoder: Option<B>,
    config: ModelConfig,
    facts: Facts,
    info: RunnerInfo,
    vision: VisionTower<B>,
    projector: Projector<B>,
    decoder: Decoder<B>,
    cache: B::Cache,
    features: BTreeMap<FeatureId, B::Tensor>,
    /// Features that are not finished.
    encodings: BTreeMap<FeatureId, Encoding<B>>,
    next_feature: u64,
    flops: Option<f64>,
}

impl<B: Backend> KeyeModel<B> {
    /// Takes the weights over and makes the cache. Weights are checked by name, shape and type, but not read where the
    /// backend can use them in place.
    pub fn load(
        backend: B,
        config: &ModelConfig,
        processor: &ProcessorConfig,
        checkpoint: &Checkpoint,
        options: LoadOptions,
    ) -> Result<Self, ModelError> {
        Self::load_rank(backend, None, Peers(None), config, processor, checkpoint, options)
    }

    /// As [`KeyeModel::load`], the part of rank 0.
    pub(crate) fn load_rank(
        backend: B,
        encoder: Option<B>,
        peers: Peers<B>,
        config: &ModelConfig,
        processor: &ProcessorConfig,
        checkpoint: &Checkpoint,
        options: LoadOptions,
    ) -> Result<Self, ModelError> {
        let facts = config.variant.facts();
        let shard = peers.shard();
        let weights = Weights::new(checkpoint, encoder.as_ref().unwrap_or(&backend), config.fp8_block, Shard::WHOLE);
        let vision = VisionTower::load(&weights, &config.vision, processor)?;
        let projector = Projector::load(&weights, &config.vision, facts.projector_norm, config.text.hidden_size)?;
        let weights = Weights::new(checkpoint, &backend, config.fp8_block, shard);
        let decoder = Decoder::load(&weights, &config.text, peers)?;
        let spec = cache_spec(&config.text, options.kv_dtype, shard.ranks);
        let num_blocks = options.cache_tokens.div_ceil(BLOCK_TOKENS);
        let cache = backend.cache(&spec, num_blocks)?;
        let info = RunnerInfo {
            vocab_size: config.text.vocab_size,
            max_positions: config.text.max_position_embeddings,
            block_tokens: BLOCK_TOKENS,
            num_blocks,
            block_bytes: spec.block_bytes() * shard.ranks,
            feature_row_bytes: config.text.hidden_size * 4,
        };
        Ok(Self {
            backend,
            encoder,
            config: config.clone(),
            facts,
            info,
            vision,
            projector,
            decoder,
            cache,
            features: BTreeMap::new(),
            encodings: BTreeMap::new(),
            next_feature: 0,
            flops: None,
        })
    }

    /// Device and instruction set.
    pub fn describe(&self) -> String {
        self.backend.describe()
    }

    fn parts(&self) -> Parts<'_, B> {
        let Self { config, vision, projector, .. } = self;
        Parts { backend: self.encoder(), config: &config.vision, vision, projector }
    }

    fn encoder(&self) -> &B {
        self.encoder.as_ref().unwrap_or(&self.backend)
    }

    /// Says what is wrong with a batch.
    pub(crate) fn check(&self, batch: &Batch) -> Result<(), ModelError> {
        batch.chunks.iter().try_for_each(|chunk| self.check_chunk(chunk))
    }

    /// The patch rectangles that attend together, one per span.
    fn spans(&self, kind: MediaKind, grid_thw: &[[u32; 3]]) -> Vec<Grid> {
        let mut start = 0;
        let mut spans = Vec::new();
        for [t, h, w] in grid_thw.iter().map(|row| row.map(|n| n as usize)) {
            let per_frame = kind == MediaKind::Video && self.facts.vision_span == VisionSpan::Frame;
            let (count, t) = if per_frame { (t, 1) } else { (1, t) };
            for _ in 0..count {
                spans.push(Grid { t, h, w, start });
                start += t * h * w;
            }
        }
        spans
    }

    fn check_patches(&self, patches: &Patches) -> Result<(), ModelError> {
        let vision = &self.config.vision;
        let patch = vision.num_channels * vision.patch_size * vision.patch_size;
        let values = match &patches.pixels {
            Pixels::U8(data) => data.len(),
            Pixels::F32(data) => data.len(),
        };
        let merge = vision.spatial_merge_size as u32;
        let mut n = 0usize;
        for [t, h, w] in &patches.grid_thw {
            if *t == 0 || *h == 0 || *w == 0 || h % merge != 0 || w % merge != 0 {
                let reason =
                    format!("grid ({t}, {h}, {w}): expected positive sides, height and width multiples of {merge}");
                return Err(ModelError::Media(reason));
            }
            let row = (*t as usize).checked_mul(*h as usize).and_then(|n| n.checked_mul(*w as usize));
            n = row.and_then(|row| n.checked_add(row)).unwrap_or(usize::MAX);
        }
        if n == 0 || n.checked_mul(patch) != Some(values) {
            return Err(ModelError::Media(format!("grids of {n} patches of {patch} values, {values} values found")));
        }
        Ok(())
    }

    fn check_chunk(&self, chunk: &Chunk) -> Result<(), ModelError> {
        let n = chunk.tokens.len();
        let error = |reason: String| Err(ModelError::Batch(reason));
        if n == 0 || chunk.positions.len() != n {
            return error(format!("{n} tokens with {} positions", chunk.positions.len()));
        }
        if let Some(token) = chunk.tokens.iter().find(|token| **token as usize >= self.info.vocab_size) {
            return error(format!("token {token}, the vocabulary has {}", self.info.vocab_size));
        }
        let blocks = (chunk.start + n).div_ceil(BLOCK_TOKENS);
        if chunk.block_table.len() < blocks {
            return error(format!("{} blocks for {} tokens", chunk.block_table.len(), chunk.start + n));
        }
        if let Some(block) = chunk.block_table.iter().find(|block| **block as usize >= self.info.num_blocks) {
            return error(format!("block {block}, the pool has {}", self.info.num_blocks));
        }
        for rows in &chunk.features {
            let have = self.feature_rows(rows.feature);
            if rows.at + rows.len > n || rows.row + rows.len > have {
                return error(format!("feature rows {rows:?} in {n} tokens, of {have} rows"));
            }
        }
        if let LogitRows::Range(range) | LogitRows::Hidden(range) = &chunk.logits
            && (range.start > range.end || range.end > n)
        {
            return error(format!("logits of rows {range:?} of {n}"));
        }
        Ok(())
    }
}

/// The rows of a batch that has been checked.
pub(crate) fn rows_of(batch: &Batch) -> Rows {
    let mut rows = Rows { positions: Vec::new(), sequences: Vec::new(), wanted: Vec::new() };
    for chunk in &batch.chunks {
        let first = rows.positions.len();
        rows.positions.extend_from_slice(&chunk.positions);
        let (start, block_table) = (chunk.start, chunk.block_table.clone());
        rows.sequences.push(SequenceRows { rows: first..rows.positions.len(), start, block_table });
        rows.wanted.extend(logit_rows(chunk).map(|row| (first + row) as u32));
    }
    rows
}

/// Rows of a chunk whose logits are wanted.
fn logit_rows(chunk: &Chunk) -> Range<usize> {
    let n = chunk.tokens.len();
    match &chunk.logits {
        LogitRows::None | LogitRows::Hidden(_) => 0..0,
        LogitRows::Last | LogitRows::Highest(_) => n - 1..n,
        LogitRows::Range(range) => range.clone(),
    }
}

/// The logits of a batch on the host: whole rows, or only what decides where that is enough for all and the device can tell.
fn download_logits<B: Backend>(backend: &B, logits: &B::Tensor, batch: &Batch) -> Result<Vec<f32>, ModelError> {
    let deciding = batch.chunks.iter().filter(|chunk| !logit_rows(chunk).is_empty());
    let deciding = deciding.map(|chunk| if let LogitRows::Highest(count) = chunk.logits { Some(count) } else { None });
    let most = deciding.reduce(|a, b| Some(a?.max(b?))).flatten().filter(|count| (1..=128).contains(count));
    let found = most.map(|count| backend.highest(logits, count)).transpose()?.flatten();
    let Some(found) = found else { return Ok(backend.download(logits)?) };
    let cols = backend.cols(logits);
    let mut out = vec![f32::NEG_INFINITY; found.len() * cols];
    for (row, (out, found)) in out.chunks_exact_mut(cols).zip(&found).enumerate() {
        if says_all_that_decides(found) {
            found.iter().for_each(|(column, value)| out[*column as usize] = *value);
        } else {
            out.copy_from_slice(&backend.download(&backend.slice_rows(logits, row..row + 1)?)?);
        }
    }
    Ok(out)
}

/// Whether the rest of a row need not be looked at: it could be cut, and its numbers have an order.
fn says_all_that_decides(found: &[(u32, f32)]) -> bool {
    !found.is_empty() && found.iter().all(|(_, value)| !value.is_nan())
}

/// Rows of a chunk whose hidden states are wanted.
fn hidden_rows(chunk: &Chunk) -> Range<usize> {
    if let LogitRows::Hidden(range) = &chunk.logits { range.clone() } else { 0..0 }
}

impl<B: Backend> Runner for KeyeModel<B> {
    fn info(&self) -> &RunnerInfo {
        &self.info
    }

    fn begin_encode(&mut self, kind: MediaKind, patches: &Patches) -> Result<FeatureId, ModelError> {
        self.check_patches(patches)?;
        let spans = self.spans(kind, &patches.grid_thw);
        let encoding = Encoding::begin(&self.parts(), kind, patches, spans, self.config.text.hidden_size)?;
        let id = FeatureId(self.next_feature);
        self.next_feature += 1;
        self.encodings.insert(id, encoding);
        Ok(id)
    }

    fn encode_step(
        &mut self,
        feature: FeatureId,
        patches: &Patches,
        flops: f64,
        tap: &mut dyn Tap,
    ) -> Result<EncodeProgress, ModelError> {
        // Taken out, so that it is gone after an error.
        let unknown = || ModelError::Media(format!("{feature:?} is not being encoded"));
        let mut encoding = self.encodings.remove(&feature).ok_or_else(unknown)?;
        let done = encoding.advance(&self.parts(), &patches.pixels, flops, tap)?;
        let progress = encoding.progress();
        if done {
            self.features.insert(feature, encoding.finish());
        } else {
            self.encodings.insert(feature, encoding);
        }
        Ok(progress)
    }

    fn feature_rows(&self, feature: FeatureId) -> usize {
        self.features.get(&feature).map_or(0, |features| self.backend.rows(features))
    }

    fn release(&mut self, feature: FeatureId) {
        self.features.remove(&feature);
        self.encodings.remove(&feature);
    }

    fn step(&mut self, batch: &Batch, tap: &mut dyn Tap) -> Result<Outputs, ModelError> {
        self.check(batch)?;
        if batch.chunks.is_empty() {
            return Ok(Outputs::default());
        }
        let backend = &self.backend;
        let tokens: Vec<u32> = batch.chunks.iter().flat_map(|chunk| &chunk.tokens).copied().collect();
        let rows = rows_of(batch);
        let sequences = &rows.sequences;
        let mut x = self.decoder.embed(backend, &tokens)?; // [n, H]
        for (chunk, sequence) in batch.chunks.iter().zip(sequences) {
            for rows in &chunk.features {
                let features = &self.features[&rows.feature];
                backend.copy_rows(features, rows.row..rows.row + rows.len, &mut x, sequence.rows.start + rows.at)?;
            }
        }
        record(backend, tap, format_args!("inputs_embeds"), &x)?;
        let x = self.decoder.forward(backend, Some(x), &rows, &mut self.cache, tap)?;
        if tap.wants("lm_final_norm") {
            record(backend, tap, format_args!("lm_final_norm"), &self.decoder.final_norm(backend, &x)?)?;
        }
        let mut hidden = Vec::new();
        for (chunk, sequence) in batch.chunks.iter().zip(sequences) {
            hidden.push(match hidden_rows(chunk) {
                rows if rows.is_empty() => Vec::new(),
                rows => {
                    let rows =
                        backend.slice_rows(&x, sequence.rows.start + rows.start..sequence.rows.start + rows.end)?;
                    backend.download(&self.decoder.final_norm(backend, &rows)?)?
                }
            });
        }
        if rows.wanted.is_empty() {
            return Ok(Outputs { logits: vec![Vec::new(); batch.chunks.len()], hidden });
        }
        let logits = self.decoder.logits(backend, &x, &rows)?.expect("rank 0 gets the logits");
        let mut all = download_logits(backend, &logits, batch)?.into_iter();
        let vocab_size = self.info.vocab_size;
        let logits = batch
            .chunks
            .iter()
            .map(|chunk| all.by_ref().take(logit_rows(chunk).len() * vocab_size).collect())
            .collect();
        Ok(Outputs { logits, hidden })
    }

    fn synchronize(&mut self) -> Result<(), ModelError> {
        self.encoder().synchronize()?;
        Ok(self.backend.synchronize()?)
    }

    fn cost(&self, kind: MediaKind, grid_thw: &[[u32; 3]], tokens: usize) -> Cost {
        let spans: Vec<usize> = self.spans(kind, grid_thw).iter().map(Grid::len).collect();
        let text = &self.config.text;
        let vision = cost::vision_flops(&self.config.vision, text.hidden_size, &spans);
        Cost { vision, prefill: cost::prefill(text, tokens) }
    }

    fn flops_per_second(&mut self) -> f64 {
        if let Some(flops) = self.flops {
            return flops;
        }
        // The shortest of a few products, so that one interruption does not make an estimate several times too long.
        let (rows, width) = (256, 1024);
        let measure = || -> Result<f64, ModelError> {
            let b = self.encoder();
            let weight = b.load(&WeightSource::from_f32("probe", width, width, &vec![0.5; width * width]))?;
            let x = b.upload(rows, width, &vec![0.5; rows * width])?;
            let mut seconds = f64::INFINITY;
            for _ in 0..4 {
                let start = Instant::now();
                b.download(&b.linear(&x, &weight, None, Activation::None)?)?;
                seconds = seconds.min(start.elapsed().as_secs_f64());
            }
            Ok((2 * rows * width * width) as f64 / seconds.max(1e-9))
        };
        // Without a figure there is no estimate; that is not worth an error.
        let flops = measure().unwrap_or(f64::INFINITY);
        self.flops = Some(flops);
        flops
    }
}

#[cfg(test)]
mod tests {
    use keye_backend::Reference;

    use super::*;

    /// A chunk of one token.
    fn chunk(logits: LogitRows) -> Chunk {
        let (tokens, positions) = (vec![0], vec![[0; 3]]);
        Chunk { tokens, start: 0, positions, features: vec![], block_table: vec![0], logits }
    }

    /// Two rows of logits, the first with a lowest and a highest, the second with a NaN, as a step with `wanted` gets them.
    fn downloaded(wanted: [LogitRows; 2]) -> Vec<u32> {
        let logits = Reference.upload(2, 4, &[1.0, 4.0, 3.0, 2.0, 1.0, f32::NAN, 3.0, 2.0]).unwrap();
        let mut chunks = wanted.map(chunk).to_vec();
        chunks.insert(1, chunk(LogitRows::None));
        let found = download_logits(&Reference, &logits, &Batch { chunks }).unwrap();
        found.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn rows_are_cut_where_every_request_lets_them() {
        use LogitRows::{Highest, Last, Range};
        let whole = [1.0, 4.0, 3.0, 2.0, 1.0, f32::NAN, 3.0, 2.0].map(f32::to_bits);
        let none = f32::NEG_INFINITY.to_bits();
        // As many as the most demanding wants; of a row with a NaN all.
        let cut = |kept: f32| whole.map(|bits| if f32::from_bits(bits) < kept { none } else { bits });
        assert_eq!(downloaded([Highest(1), Highest(1)])[..4], cut(4.0)[..4]);
        assert_eq!(downloaded([Highest(1), Highest(3)])[..4], cut(2.0)[..4]);
        assert_eq!(downloaded([Highest(2), Highest(1)])[4..], whole[4..]);
        for other in [Last, Range(0..1), Highest(129)] {
            assert_eq!(downloaded([Highest(1), other.clone()]), whole, "{other:?}");
            assert_eq!(downloaded([other.clone(), Highest(1)]), whole, "{other:?}");
        }
    }

    #[test]
    fn lists_that_do_not_decide_are_known() {
        assert!(says_all_that_decides(&[(7, 1.0), (3, f32::NEG_INFINITY)]));
        assert!(!says_all_that_decides(&[]));
        assert!(!says_all_that_decides(&[(7, 1.0), (3, f32::NAN)]));
    }
}
