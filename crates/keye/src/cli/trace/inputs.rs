//! A trace from given token ids and pixels, for checkpoints without a tokenizer: every layer's tensors of the prompt, then
//! greedy tokens that are all fed back.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use keye::{IndexScorer, KvDtype, MediaKind};
use keye_backend::fp8_rows;
use keye_media::{Patches, Pixels};
use keye_model::{Batch, Chunk, FeatureRows, LoadOptions, LogitRows, Runner, Tap};
use keye_processor::{ModelConfig, PositionRule, Variant, prompt_positions, sequential_positions};

use super::super::golden::{Golden, Tensor, Values};

/// Most values of the logits, and of the index scores of all layers: 1 GiB.
const VALUES: usize = 1 << 28;
/// Names of a kind: pixels, grids, what the projector gives, the tap's name of that.
const IMAGE: [&str; 4] = ["pixel_values", "image_grid_thw", "image_embeds", "image_projector"];
const VIDEO: [&str; 4] = ["pixel_values_videos", "video_grid_thw", "video_embeds", "video_projector"];

/// The inputs of a run, as the file has them.
pub struct Inputs {
    tensors: Vec<Tensor>,
    tokens: Vec<u32>,
    positions: Vec<[u32; 3]>,
    rope_delta: i64,
    /// Kind, its pad, its patches.
    media: Vec<(MediaKind, u32, Patches)>,
    generate: usize,
}

impl Inputs {
    /// Reads and checks them; `generate` tokens have to fit after them.
    pub fn read(path: &Path, config: &ModelConfig, generate: usize) -> Result<Self> {
        if !matches!(config.variant, Variant::V2 | Variant::V671b) {
            bail!("--inputs: expected a Keye-VL-2.0 or 671B checkpoint; others have a tokenizer, use --request");
        }
        let file = Golden::open(path)?;
        let at = path.display();
        let mut tensors = Vec::new();
        let ids = file.whole("input_ids")?.with_context(|| format!("{at}: no tensor input_ids"))?;
        let text = &config.text;
        let tokens = match (&ids.values, ids.shape.as_slice()) {
            (Values::I64(values), [n]) if *n > 0 => {
                let id = |v: &i64| u32::try_from(*v).ok().filter(|id| (*id as usize) < text.vocab_size);
                let wrong = values.iter().find(|v| id(v).is_none());
                let vocab = text.vocab_size;
                wrong.map_or(Ok(()), |v| Err(anyhow::anyhow!("{at}: input_ids: {v} is no id below {vocab}")))?;
                values.iter().filter_map(id).collect::<Vec<u32>>()
            }
            (_, shape) => {
                bail!("{at}: input_ids: expected I64 [n], one token or more, found {} {shape:?}", ids.dtype())
            }
        };
        let n = tokens.len();
        tensors.push(ids);
        let longest = text.max_position_embeddings;
        if n.checked_add(generate).is_none_or(|sum| sum > longest) {
            bail!("{at}: {n} tokens and --generate {generate}: the model's longest is {longest} together");
        }
        let scores = if text.indexer.is_some() { n.saturating_mul(n * text.num_hidden_layers) } else { 0 };
        if n.saturating_add(generate).saturating_mul(text.vocab_size).max(scores) > VALUES {
            bail!("{at}: {n} tokens: logits or index scores of all of them have more than 1 GiB; shorten the prompt");
        }
        let mut media = Vec::new();
        let mut grids = [Vec::new(), Vec::new()];
        let kinds =
            [(MediaKind::Image, IMAGE, config.image_token_id), (MediaKind::Video, VIDEO, config.video_token_id)];
        for ((kind, names, pad), grids) in kinds.into_iter().zip(&mut grids) {
            let [pixels_name, grid_name, ..] = names;
            let (pixels, grid) = match (file.whole(pixels_name)?, file.whole(grid_name)?) {
                (None, None) => continue,
                (Some(pixels), Some(grid)) => (pixels, grid),
                (Some(_), None) => bail!("{at}: {pixels_name} without {grid_name}"),
                (None, Some(_)) => bail!("{at}: {grid_name} without {pixels_name}"),
            };
            *grids = rows(&grid, config).with_context(|| path.display().to_string())?;
            let patches = grids.iter().try_fold(0u64, |sum, [t, h, w]| {
                let patches = u64::from(*t).checked_mul(u64::from(*h) * u64::from(*w))?;
                sum.checked_add(patches)
            });
            let vision = &config.vision;
            let width = vision.num_channels * vision.patch_size * vision.patch_size;
            let Values::F32(values) = &pixels.values else {
                bail!("{at}: {pixels_name}: expected type F32, found {}", pixels.dtype());
            };
            let inner: usize = pixels.shape.get(1..).unwrap_or_default().iter().product();
            if pixels.shape.len() < 2 || inner != width || Some(pixels.shape[0] as u64) != patches {
                let expected = patches.map_or("too many".to_owned(), |n| n.to_string());
                bail!(
                    "{at}: {pixels_name}: expected {expected} patches of {width} values as {grid_name} says, found {:?}",
                    pixels.shape
                );
            }
            let patches = Patches { pixels: Pixels::F32(values.clone()), grid_thw: grids.clone(), hash: [0; 32] };
            media.push((kind, pad, patches));
            tensors.extend([pixels, grid]);
        }
        let [image, video] = &grids;
        let merge = config.vision.spatial_merge_size as u32;
        let (image, video) = ((config.image_token_id, image.as_slice()), (config.video_token_id, video.as_slice()));
        // They also tell whether pads and grids fit each other.
        let by_axes = prompt_positions(&tokens, image, video, merge).with_context(|| at.to_string())?;
        let (positions, rope_delta) = match config.facts().positions {
            PositionRule::ThreeAxis => by_axes,
            PositionRule::Sequential => sequential_positions(tokens.len())?,
        };
        Ok(Self { tensors, tokens, positions, rope_delta, media, generate })
    }

    /// Room for prompt and answer.
    pub fn options(&self) -> LoadOptions {
        LoadOptions { cache_tokens: self.tokens.len() + self.generate, kv_dtype: KvDtype::F32 }
    }

    /// Runs the prompt and the greedy tokens after it; gives all tensors, the inputs first.
    pub fn run(mut self, runner: &mut dyn Runner, config: &ModelConfig) -> Result<Vec<Tensor>> {
        let n = self.tokens.len();
        let mut tensors = std::mem::take(&mut self.tensors);
        let axes = (0..3).flat_map(|axis| self.positions.iter().map(move |position| i64::from(position[axis])));
        tensors.push(Tensor::new("position_ids", &[3, n], Values::I64(axes.collect())));
        tensors.push(Tensor::new("rope_delta", &[1], Values::I64(vec![self.rope_delta])));

        let mut recorder = Recorder { prompt: true, tensors: BTreeMap::new() };
        let mut features = Vec::new();
        for (kind, pad, patches) in &self.media {
            let feature = runner.encode(*kind, patches, &mut recorder, &mut |_, _| true)?;
            let places = self.tokens.iter().enumerate().filter(|(_, token)| *token == pad);
            features.extend(places.enumerate().map(|(row, (at, _))| FeatureRows { at, feature, row, len: 1 }));
        }
        let info = runner.info().clone();
        let block_table: Vec<u32> = (0..info.num_blocks as u32).collect();
        let mut chunk = Chunk {
            tokens: self.tokens,
            start: 0,
            positions: self.positions,
            features,
            block_table: block_table.clone(),
            logits: LogitRows::Range(0..n),
        };
        let (mut generated, mut step_logits) = (Vec::new(), Vec::new());
        loop {
            let logits = runner.step(&Batch { chunks: vec![chunk] }, &mut recorder)?.logits.pop().unwrap_or_default();
            let last = logits[logits.len().saturating_sub(info.vocab_size)..].to_vec();
            if recorder.prompt {
                tensors.push(Tensor::new("logits", &[n, info.vocab_size], Values::F32(logits)));
                recorder.prompt = false;
            }
            if generated.len() == self.generate {
                break;
            }
            let index = n + generated.len();
            let token = argmax(&last);
            generated.push(i64::from(token));
            step_logits.extend(last);
            chunk = Chunk {
                tokens: vec![token],
                start: index,
                positions: vec![[(index as i64 + self.rope_delta) as u32; 3]],
                features: Vec::new(),
                block_table: block_table.clone(),
                logits: LogitRows::Last,
            };
        }
        if self.generate > 0 {
            let count = generated.len();
            tensors.push(Tensor::new("generated", &[count], Values::I64(generated)));
            tensors.push(Tensor::new("step_logits", &[count, info.vocab_size], Values::F32(step_logits)));
        }
        tensors.extend(recorder.tensors(config));
        Ok(tensors)
    }
}

/// Rows `(t, h, w)` of patches, sides multiples of the merge.
fn rows(grid: &Tensor, config: &ModelConfig) -> Result<Vec<[u32; 3]>> {
    let (Values::I64(values), [_, 3]) = (&grid.values, grid.shape.as_slice()) else {
        bail!("{}: expected I64 [n, 3], found {} {:?}", grid.name, grid.dtype(), grid.shape);
    };
    let merge = config.vision.spatial_merge_size as i64;
    let row = |row: &[i64; 3]| {
        // No side of a picture has so many patches.
        let sides = row.iter().all(|side| (1..=1 << 20).contains(side));
        match sides && row[1] % merge == 0 && row[2] % merge == 0 {
            true => Ok(row.map(|side| side as u32)),
            false => bail!(
                "{}: row {row:?}: expected positive (t, h, w), h and w multiples of {merge} and at most {}",
                grid.name,
                1 << 20
            ),
        }
    };
    values.as_chunks().0.iter().map(row).collect()
}

/// The lowest of the largest.
fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best });
    best.unwrap_or(0) as u32
}

/// Keeps the layers' tensors of the prompt; selections of what is generated too.
struct Recorder {
    prompt: bool,
    tensors: BTreeMap<String, (usize, Vec<f32>)>,
}

impl Tap for Recorder {
    fn wants(&self, name: &str) -> bool {
        match self.prompt {
            true => name.contains('.') || ["lm_final_norm", IMAGE[3], VIDEO[3]].contains(&name),
            false => name.starts_with("selected."),
        }
    }

    fn record(&mut self, name: &str, cols: usize, rows: &[f32]) {
        let (_, values) = self.tensors.entry(name.to_owned()).or_insert_with(|| (cols, Vec::new()));
        values.extend_from_slice(rows);
    }
}

impl Recorder {
    /// Under the golden files' names and shapes, with the scores of the indexers.
    fn tensors(self, config: &ModelConfig) -> Vec<Tensor> {
        let mut tensors = Vec::new();
        if let Some(indexer) = config.text.indexer {
            for layer in 0..config.text.num_hidden_layers {
                let get = |name: &str| self.tensors.get(&format!("{name}.{layer}")).map(|(_, values)| &values[..]);
                if let (Some(q), Some(k), Some(w)) = (get("idx_q"), get("idx_k"), get("idx_w")) {
                    let (n, heads, width) = (k.len() / indexer.head_dim, indexer.num_heads, indexer.head_dim);
                    let scores = match indexer.scorer {
                        IndexScorer::F32 => index_scores(q, k, w, heads, width),
                        IndexScorer::Fp8 => {
                            let ([q, k], fp8) = fp8_tensors(layer, q, k, heads, width);
                            tensors.extend(fp8);
                            index_scores(&q, &k, w, heads, width)
                        }
                    };
                    tensors.push(Tensor::new(format!("index_scores.{layer}"), &[n, n], Values::F32(scores)));
                }
            }
        }
        for (name, (cols, values)) in self.tensors {
            let rows = values.len() / cols;
            let golden = match name.as_str() {
                "lm_final_norm" => "final_hidden",
                name if name == IMAGE[3] => IMAGE[2],
                name if name == VIDEO[3] => VIDEO[2],
                name => name,
            };
            let whole = golden.starts_with("selected.") || golden.starts_with("router_index.");
            tensors.push(match (whole, config.text.indexer) {
                (true, _) => {
                    Tensor::new(golden, &[rows, cols], Values::I32(values.iter().map(|v| *v as i32).collect()))
                }
                (false, Some(indexer)) if golden.starts_with("idx_q.") => {
                    Tensor::new(golden, &[rows, indexer.num_heads, indexer.head_dim], Values::F32(values))
                }
                _ => Tensor::new(golden, &[rows, cols], Values::F32(values)),
            });
        }
        tensors
    }
}

/// Queries and keys as the FP8 scorer has them: their values, and their bytes and scales under the golden file's names.
fn fp8_tensors(layer: usize, q: &[f32], k: &[f32], heads: usize, width: usize) -> ([Vec<f32>; 2], Vec<Tensor>) {
    let mut tensors = Vec::new();
    let values = [("q", q, &[heads][..]), ("k", k, &[][..])].map(|(name, rows, heads)| {
        let (mut bytes, mut scales, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for row in rows.chunks_exact(width) {
            let (row, scale) = fp8_rows::quantize(row);
            values.extend(row.iter().map(|bits| fp8_rows::widen(*bits) * scale));
            bytes.extend(row);
            scales.push(scale);
        }
        let shape = [&[k.len() / width][..], heads].concat();
        let name = format!("fp8_{name}");
        tensors.push(Tensor::new(format!("{name}_scale.{layer}"), &shape, Values::F32(scales)));
        tensors.push(Tensor::new(format!("{name}.{layer}"), &[&shape[..], &[width]].concat(), Values::U8(bytes)));
        values
    });
    (values, tensors)
}

/// `head_dim^-0.5 * sum over h of w[t, h] * max(0, q[t, h] . k[s])` of the keys that a token sees, else 0: `[n, n]`.
fn index_scores(q: &[f32], k: &[f32], w: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let n = k.len() / head_dim;
    let scale = (head_dim as f32).powf(-0.5);
    let mut scores = vec![0.0; n * n];
    for t in 0..n {
        for (s, key) in k.chunks_exact(head_dim).take(t + 1).enumerate() {
            let head = |h: usize| -> f32 {
                let q = &q[(t * heads + h) * head_dim..][..head_dim];
                w[t * heads + h] * q.iter().zip(key).map(|(q, k)| q * k).sum::<f32>().max(0.0)
            };
            scores[t * n + s] = scale * (0..heads).map(head).sum::<f32>();
        }
    }
    scores
}
