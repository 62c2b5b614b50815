//! `keye bench --context-curve`: what attention costs a token, by the number of tokens before it.
//!
//! One layer with the model's heads over a cache of random rows, so that nothing but attention is measured and any context
//! fits; a model's cost is that of a layer times its layers.

use std::time::Instant;

use anyhow::{Result, bail};
use keye::KvDtype;
use keye_backend::{
    AttentionShape, BLOCK_TOKENS, Backend, BackendError, CacheSpec, Cpu, CpuOptions, IndexShape, SequenceRows,
};
use keye_processor::ModelConfig;
use serde_json::{Value, json};

use super::ui::{Status, grouped};

const CONTEXTS: [usize; 9] = [1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 18];
/// Rows of the prompt's chunk that is measured.
const CHUNK: usize = 64;
/// Rows that are written at a time.
const ROWS: usize = 4096;
/// A measurement is repeated until it has taken this long, in seconds.
const LONG_ENOUGH: f64 = 0.3;

/// Seconds of one layer for one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    pub dense: f64,
    /// Scoring of all keys and the choice among them; nothing while all are chosen.
    pub index: Option<f64>,
    /// Attention to those chosen.
    pub sparse: Option<f64>,
}

/// Costs behind `context` tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub context: usize,
    pub decode: Cost,
    pub prefill: Cost,
}

/// The curve of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    pub device: String,
    pub layers: usize,
    /// Keys that are chosen.
    pub topk: Option<usize>,
    pub points: Vec<Point>,
}

/// Measures one layer of `config`'s attention.
pub fn measure(
    config: &ModelConfig,
    threads: Option<usize>,
    dtype: KvDtype,
    status: &mut Status,
    stop: &dyn Fn() -> bool,
) -> Result<Curve> {
    let backend = Cpu::new(CpuOptions { threads, isa: None })?;
    let text = &config.text;
    let longest = CONTEXTS.into_iter().filter(|n| *n <= text.max_position_embeddings).max().unwrap_or(CONTEXTS[0]);
    let spec = CacheSpec { layers: 1, ..keye::cache_spec(config, dtype) };
    let mut layer = Layer {
        cache: backend.cache(&spec, longest / BLOCK_TOKENS)?,
        heads: AttentionShape {
            heads: text.num_attention_heads,
            kv_heads: text.num_key_value_heads,
            head_dim: text.head_dim,
            scale: (text.head_dim as f32).powf(-0.5),
        },
        index: text.indexer.map(|indexer| IndexShape {
            heads: indexer.num_heads,
            head_dim: indexer.head_dim,
            top_k: indexer.topk,
            scale: (indexer.head_dim as f32).powf(-0.5),
        }),
        backend,
        random: 1,
        filled: 0,
    };
    let mut points = Vec::new();
    for context in CONTEXTS.into_iter().filter(|n| *n <= longest) {
        status.progress(&format!("attention behind {} tokens", grouped(context as u64)));
        layer.fill(context)?;
        if stop() {
            bail!("given up");
        }
        points.push(Point { context, decode: layer.cost(context, 1)?, prefill: layer.cost(context, CHUNK)? });
    }
    status.clear();
    let topk = text.indexer.map(|indexer| indexer.topk);
    Ok(Curve { device: layer.backend.describe(), layers: text.num_hidden_layers, topk, points })
}

struct Layer {
    backend: Cpu,
    cache: <Cpu as Backend>::Cache,
    heads: AttentionShape,
    index: Option<IndexShape>,
    random: u64,
    filled: usize,
}

impl Layer {
    /// Random rows, uniform in -1..1.
    fn rows(&mut self, rows: usize, cols: usize) -> Result<<Cpu as Backend>::Tensor> {
        let mut next = || {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            (self.random >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let values: Vec<f32> = (0..rows * cols).map(|_| next()).collect();
        Ok(self.backend.upload(rows, cols, &values)?)
    }

    /// Writes the cache up to `tokens`.
    fn fill(&mut self, tokens: usize) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.heads;
        while self.filled < tokens {
            let rows = ROWS.min(tokens - self.filled);
            let plan = self.plan(self.filled, rows)?;
            // A rotation by nothing: cosines of one, sines of zero.
            let angles: Vec<f32> = (0..rows * head_dim).map(|i| f32::from(i % head_dim < head_dim / 2)).collect();
            let angles = self.backend.upload(rows, head_dim, &angles)?;
            let mut q = self.rows(rows, heads * head_dim)?;
            let (k, v) = (self.rows(rows, kv_heads * head_dim)?, self.rows(rows, kv_heads * head_dim)?);
            self.backend.norm_rope_write(&mut q, k, v, None, &angles, &mut self.cache, 0, &plan)?;
            if let Some(index) = self.index {
                let keys = self.rows(rows, index.head_dim)?;
                self.backend.write_index_keys(&keys, &mut self.cache, 0, &plan)?;
            }
            self.filled += rows;
        }
        Ok(())
    }

    fn plan(&self, start: usize, rows: usize) -> Result<<Cpu as Backend>::Plan> {
        let blocks = (start + rows).div_ceil(BLOCK_TOKENS) as u32;
        Ok(self.backend.plan(&[SequenceRows { rows: 0..rows, start, block_table: (0..blocks).collect() }])?)
    }

    /// Of one of the last `rows` tokens of `context`.
    fn cost(&mut self, context: usize, rows: usize) -> Result<Cost> {
        let plan = self.plan(context - rows, rows)?;
        let q = self.rows(rows, self.heads.heads * self.heads.head_dim)?;
        let dense = seconds(rows, || self.backend.paged_attention(&q, &self.cache, 0, &plan, self.heads))?;
        let Some(index) = self.index.filter(|index| index.top_k < context) else {
            return Ok(Cost { dense, index: None, sparse: None });
        };
        let index_q = self.rows(rows, index.heads * index.head_dim)?;
        let weights = self.rows(rows, index.heads)?;
        let b = &self.backend;
        let select = || b.select(&index_q, &weights, &self.cache, 0, &plan, index);
        let scored = seconds(rows, select)?;
        let selected = select()?;
        let attend = || b.sparse_attention(&q, &self.cache, 0, &plan, self.heads, &selected);
        Ok(Cost { dense, index: Some(scored), sparse: Some(seconds(rows, attend)?) })
    }
}

/// The shortest run of `work`, for each of its rows.
fn seconds<T>(rows: usize, mut work: impl FnMut() -> Result<T, BackendError>) -> Result<f64> {
    let (mut shortest, mut spent) = (f64::INFINITY, 0.0);
    while spent < LONG_ENOUGH {
        let start = Instant::now();
        work()?;
        let taken = start.elapsed().as_secs_f64();
        shortest = shortest.min(taken);
        spent += taken;
    }
    Ok(shortest / rows as f64)
}

impl Curve {
    pub fn json(&self) -> Value {
        let micros = |seconds: f64| (seconds * 1e8).round() / 100.0;
        let cost = |cost: &Cost| {
            json!({
                "dense_us": micros(cost.dense),
                "index_us": cost.index.map(micros),
                "sparse_us": cost.sparse.map(micros),
            })
        };
        let points = self.points.iter().map(
            |point| json!({"context": point.context, "decode": cost(&point.decode), "prefill": cost(&point.prefill)}),
        );
        json!({
            "device": self.device,
            "layers": self.layers,
            "topk": self.topk,
            "microseconds_per_token_and_layer": points.collect::<Vec<_>>(),
        })
    }

    pub fn text(&self) -> String {
        let mut text = format!(
            "attention of one of {} layers, microseconds a token; {}\n\
             {:>9}  {:>27}    {:>27}\n{:>9}  {:>8} {:>8} {:>9}    {:>8} {:>8} {:>9}\n",
            self.layers,
            self.device,
            "",
            "decode",
            "prefill",
            "context",
            "dense",
            "indexer",
            "selected",
            "dense",
            "indexer",
            "selected"
        );
        let cell = |seconds: Option<f64>| seconds.map_or("-".to_owned(), |s| format!("{:.1}", s * 1e6));
        for Point { context, decode, prefill } in &self.points {
            text += &format!("{:>9}", grouped(*context as u64));
            for (cost, gap) in [(decode, "  "), (prefill, "    ")] {
                let (dense, index, sparse) = (cell(Some(cost.dense)), cell(cost.index), cell(cost.sparse));
                text += &format!("{gap}{dense:>8} {index:>8} {sparse:>9}");
            }
            text += "\n";
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn while_all_keys_are_chosen_there_is_no_indexer() {
        let cost = Cost { dense: 1e-6, index: None, sparse: None };
        let long = Cost { dense: 5e-6, index: Some(1e-6), sparse: Some(2.25e-6) };
        let points = vec![
            Point { context: 1024, decode: cost, prefill: cost },
            Point { context: 262_144, decode: long, prefill: cost },
        ];
        let curve = Curve { device: "d".into(), layers: 48, topk: Some(2048), points };
        let points = &curve.json()["microseconds_per_token_and_layer"];
        assert_eq!(points[0]["decode"], json!({"dense_us": 1.0, "index_us": null, "sparse_us": null}));
        assert_eq!(points[1]["decode"], json!({"dense_us": 5.0, "index_us": 1.0, "sparse_us": 2.25}));
        let text = curve.text();
        assert!(text.contains("262,144") && text.contains(" 2.2") && text.contains(" - "), "{text}");
    }
}
