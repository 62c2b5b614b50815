//! Reading the golden files, and running a prompt on a runner.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use keye_backend::{Backend, KvDtype, f32_to_bf16};
use keye_media::{MediaKind, Patches, Pixels};
use keye_model::{Batch, Chunk, FeatureId, FeatureRows, KeyeModel, LoadOptions, LogitRows, NoTap, Runner, Tap};
use keye_processor::{Checkpoint, Dtype, ModelConfig, NewTensor, StoredTensor, Variant, write_checkpoint};

pub const FIXTURES: [&str; 2] = ["keye-preview-tiny", "keye-1_5-tiny"];

/// Cargo names the crate's folder when it runs tests too: a binary that is carried to another machine finds its files by it.
pub fn fixture(name: &str) -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    here.join("../../fixtures").join(name)
}

pub fn load<B: Backend>(fixture_name: &str, backend: B) -> KeyeModel<B> {
    load_dir(&fixture(fixture_name).join("model"), backend)
}

pub fn load_dir<B: Backend>(dir: &Path, backend: B) -> KeyeModel<B> {
    let config = ModelConfig::load(dir).unwrap();
    let media = config.variant.facts().media;
    let checkpoint = Checkpoint::open(dir).unwrap();
    let options = LoadOptions { cache_tokens: 2048, kv_dtype: KvDtype::F32 };
    KeyeModel::load(backend, &config, &media.processor, &checkpoint, options).unwrap()
}

pub fn f32s(tensor: &StoredTensor) -> Vec<f32> {
    assert_eq!(tensor.dtype, Dtype::F32, "{}", tensor.name);
    tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

pub fn i64s(tensor: &StoredTensor) -> Vec<i64> {
    assert_eq!(tensor.dtype, Dtype::I64, "{}", tensor.name);
    tensor.bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The fixture's checkpoint with weights rounded to bf16, in several shards.
pub fn write_bf16(fixture_name: &str, dir: &Path) {
    let model = fixture(fixture_name).join("model");
    for file in ["config.json", "preprocessor_config.json"] {
        std::fs::copy(model.join(file), dir.join(file)).unwrap();
    }
    let checkpoint = Checkpoint::open(&model).unwrap();
    let new = |name: &str| {
        let shape = checkpoint.get(name).unwrap().shape;
        NewTensor { name: name.to_owned(), dtype: Dtype::Bf16, shape }
    };
    let tensors: Vec<NewTensor> = checkpoint.names().map(new).collect();
    write_checkpoint(dir, &tensors, 500_000, &mut |tensor, out| {
        for value in f32s(&checkpoint.get(&tensor.name).unwrap()) {
            out.write_all(&f32_to_bf16(value).to_le_bytes())?;
        }
        Ok(())
    })
    .unwrap();
}

/// One golden case: a prompt with its media and what the reference made of it.
pub struct Case {
    pub name: String,
    file: Checkpoint,
    pub input_ids: Vec<u32>,
    pub positions: Vec<[u32; 3]>,
    pub rope_delta: i64,
    pub generated: Vec<u32>,
    pub media: Vec<(MediaKind, Patches)>,
}

impl Case {
    /// `None` when the trimmed file has only some rows of the patches.
    pub fn open(fixture_name: &str, name: &str) -> Option<Self> {
        let dir = fixture(fixture_name);
        let file = Checkpoint::open_file(&dir.join("cases").join(format!("{name}.safetensors"))).unwrap();
        let ints = |name: &str| file.get(name).map(|t| i64s(&t)).unwrap_or_default();
        let input_ids: Vec<u32> = ints("input_ids").into_iter().map(|id| id as u32).collect();
        let n = input_ids.len();
        let axes = ints("position_ids");
        let positions = (0..n).map(|i| [0, 1, 2].map(|axis| axes[axis * n + i] as u32)).collect();
        let variant = ModelConfig::load(&dir.join("model")).unwrap().variant;
        let mut media = Vec::new();
        for (kind, pixels, grid) in [
            (MediaKind::Image, "pixel_values_u8", "image_grid_thw"),
            (MediaKind::Video, "pixel_values_videos_u8", "video_grid_thw"),
        ] {
            let Some(pixels) = file.get(pixels) else { continue };
            if file.get(&format!("{}.rows", pixels.name)).is_some() {
                return None;
            }
            let rows: Vec<[u32; 3]> =
                ints(grid).chunks_exact(3).map(|r| [r[0] as u32, r[1] as u32, r[2] as u32]).collect();
            // 1.5: as many rows as make up the video's frames; otherwise a row is an item.
            let mut frames = ints("num_frames").into_iter();
            let mut item: Vec<[u32; 3]> = Vec::new();
            let mut at = 0;
            let mut wanted = None;
            for row in rows {
                item.push(row);
                if kind == MediaKind::Video && variant == Variant::V1_5 {
                    let wanted = *wanted.get_or_insert_with(|| frames.next().unwrap());
                    if item.iter().map(|r| i64::from(r[0])).sum::<i64>() < wanted {
                        continue;
                    }
                }
                wanted = None;
                let mut patches =
                    Patches { pixels: Pixels::U8(Vec::new()), grid_thw: std::mem::take(&mut item), hash: [0; 32] };
                let bytes = patches.len() * 588;
                patches.pixels = Pixels::U8(pixels.bytes[at..at + bytes].to_vec());
                at += bytes;
                media.push((kind, patches));
            }
            assert_eq!(at, pixels.bytes.len());
        }
        let generated = ints("generated").into_iter().map(|id| id as u32).collect();
        let rope_delta = ints("rope_delta")[0];
        Some(Self { name: name.to_owned(), input_ids, positions, rope_delta, generated, media, file })
    }

    pub fn has(&self, tensor: &str) -> bool {
        self.file.get(tensor).is_some()
    }

    /// Largest absolute difference of `found [_, cols]` from the rows that the file has.
    pub fn difference(&self, tensor: &str, found: &[f32]) -> f32 {
        let golden = self.file.get(tensor).unwrap_or_else(|| panic!("{}: no {tensor}", self.name));
        let cols = golden.shape[1];
        let values = f32s(&golden);
        let rows: Vec<usize> = match self.file.get(&format!("{tensor}.rows")) {
            Some(rows) => i64s(&rows).into_iter().map(|row| row as usize).collect(),
            None => {
                assert_eq!(values.len(), found.len(), "{}: {tensor}", self.name);
                (0..golden.shape[0]).collect()
            }
        };
        let mut worst = 0.0f32;
        for (row, values) in rows.into_iter().zip(values.chunks_exact(cols)) {
            for (a, b) in found[row * cols..(row + 1) * cols].iter().zip(values) {
                let difference = (a - b).abs();
                assert!(difference.is_finite(), "{}: {tensor} row {row}: {a} for {b}", self.name);
                worst = worst.max(difference);
            }
        }
        worst
    }

    /// Feature rows of the tokens `range`, whose media were encoded in the order of `self.media`.
    pub fn features(&self, range: std::ops::Range<usize>, ids: &[FeatureId], pads: [u32; 2]) -> Vec<FeatureRows> {
        let mut next: Vec<(usize, usize)> = vec![(0, 0); 2]; // per kind: item number, row in it
        let mut out = Vec::new();
        let items = |kind: MediaKind| self.media.iter().zip(ids).filter(move |((k, _), _)| *k == kind);
        for (i, token) in self.input_ids.iter().enumerate() {
            for (at, kind) in [MediaKind::Image, MediaKind::Video].into_iter().enumerate() {
                if *token == pads[at] {
                    let (item, row) = next[at];
                    let ((_, patches), feature) = items(kind).nth(item).unwrap();
                    if range.contains(&i) {
                        out.push(FeatureRows { at: i - range.start, feature: *feature, row, len: 1 });
                    }
                    next[at] = if row + 1 == patches.len() / 4 { (item + 1, 0) } else { (item, row + 1) };
                }
            }
        }
        out
    }
}

/// Image and video pad of a fixture.
pub fn pads(fixture_name: &str) -> [u32; 2] {
    let config = ModelConfig::load(&fixture(fixture_name).join("model")).unwrap();
    [config.image_token_id, config.video_token_id]
}

/// Everything a runner records.
#[derive(Default)]
pub struct Recorder(pub BTreeMap<String, Vec<f32>>);

impl Tap for Recorder {
    fn wants(&self, _name: &str) -> bool {
        true
    }
    fn record(&mut self, name: &str, _cols: usize, rows: &[f32]) {
        self.0.entry(name.to_owned()).or_default().extend_from_slice(rows);
    }
}

pub fn encode(runner: &mut dyn Runner, case: &Case, tap: &mut dyn Tap) -> Vec<FeatureId> {
    case.media.iter().map(|(kind, patches)| runner.encode(*kind, patches, tap, &mut |_, _| true).unwrap()).collect()
}

/// The prompt in one step; logits of its last eight tokens.
pub fn prefill(runner: &mut dyn Runner, case: &Case, ids: &[FeatureId], pads: [u32; 2], tap: &mut dyn Tap) -> Vec<f32> {
    let n = case.input_ids.len();
    let chunk = Chunk {
        tokens: case.input_ids.clone(),
        start: 0,
        positions: case.positions.clone(),
        features: case.features(0..n, ids, pads),
        block_table: (0..32).collect(),
        logits: LogitRows::Range(n - 8..n),
    };
    runner.step(&Batch { chunks: vec![chunk] }, tap).unwrap().logits.remove(0)
}

pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// `count` greedy tokens after a prompt that is in the cache.
pub fn generate(runner: &mut dyn Runner, case: &Case, logits: &[f32], count: usize) -> Vec<u32> {
    let vocab = runner.info().vocab_size;
    let mut tokens = vec![argmax(&logits[logits.len() - vocab..])];
    while tokens.len() < count {
        let start = case.input_ids.len() + tokens.len() - 1;
        let position = (start as i64 + case.rope_delta) as u32;
        let chunk = Chunk {
            tokens: vec![tokens[tokens.len() - 1]],
            start,
            positions: vec![[position; 3]],
            features: vec![],
            block_table: (0..32).collect(),
            logits: LogitRows::Last,
        };
        let logits = runner.step(&Batch { chunks: vec![chunk] }, &mut NoTap).unwrap().logits.remove(0);
        tokens.push(argmax(&logits));
    }
    tokens
}
