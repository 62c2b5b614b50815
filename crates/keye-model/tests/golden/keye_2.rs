//! Keye-VL-2.0: experts, sparse attention and pictures against the golden data, on every backend of this machine.

use keye_backend::{Backend, Cpu, CpuOptions, Isa, KvDtype, Reference, fp8_rows};
use keye_media::{MediaKind, Patches, Pixels};
use keye_model::{Batch, Chunk, FeatureRows, KeyeModel, LoadOptions, LogitRows, NoTap, Runner, Tap};
use keye_processor::{AttentionKind, Checkpoint, IndexScorer, ModelConfig, prompt_positions};

use crate::support::{Recorder, argmax, f32s, fixture, i64s};

const FIXTURE: &str = "keye-2-tiny";
const VOCAB: usize = 320;

pub fn load<B: Backend>(backend: B, sparse: bool) -> KeyeModel<B> {
    load_with(backend, sparse, KvDtype::F32)
}

fn load_with<B: Backend>(backend: B, sparse: bool, kv_dtype: KvDtype) -> KeyeModel<B> {
    let kind = if sparse { AttentionKind::Sparse } else { AttentionKind::Dense };
    load_config(backend, kv_dtype, |config| config.choose_attention(Some(kind), None).unwrap())
}

fn load_config<B: Backend>(backend: B, kv_dtype: KvDtype, choose: impl Fn(&mut ModelConfig)) -> KeyeModel<B> {
    let dir = fixture(FIXTURE).join("model");
    let mut config = ModelConfig::load(&dir).unwrap();
    assert!(config.text.experts.is_some() && config.text.indexer.is_some());
    choose(&mut config);
    let media = config.facts().media;
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let options = LoadOptions { cache_tokens: 512, kv_dtype };
    KeyeModel::load(backend, &config, &media.processor, &checkpoint, options).unwrap()
}

struct Golden(Checkpoint);

impl Golden {
    fn open(name: &str) -> Self {
        Self(Checkpoint::open_file(&fixture(FIXTURE).join(format!("golden_{name}.safetensors"))).unwrap())
    }

    fn ids(&self) -> Vec<u32> {
        i64s(&self.0.get("input_ids").unwrap()).into_iter().map(|id| id as u32).collect()
    }

    fn grids(&self, name: &str) -> Vec<[u32; 3]> {
        let values = self.0.get(name).map(|t| i64s(&t)).unwrap_or_default();
        values.chunks_exact(3).map(|r| [r[0] as u32, r[1] as u32, r[2] as u32]).collect()
    }

    /// Whole numbers have to be equal, others within 1e-4 absolute and relative.
    fn compare(&self, name: &str, found: &[f32]) {
        let golden = self.0.get(name).unwrap_or_else(|| panic!("no {name}"));
        let cols: usize = golden.shape[1..].iter().product();
        if golden.dtype == keye_processor::Dtype::I32 {
            let whole = golden.bytes.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()) as f32);
            assert!(whole.eq(found.iter().copied()), "{name}");
            return;
        }
        let rows = match self.0.get(&format!("{name}.rows")) {
            Some(rows) => i64s(&rows),
            None => {
                assert_eq!(found.len(), golden.shape[0] * cols, "{name}");
                (0..golden.shape[0] as i64).collect()
            }
        };
        for (row, values) in rows.into_iter().zip(f32s(&golden).chunks_exact(cols)) {
            for (a, b) in found[row as usize * cols..].iter().zip(values) {
                assert!((a - b).abs() <= 1e-4 + 1e-4 * b.abs(), "{name} row {row}: {a} for {b}");
            }
        }
    }
}

/// A prompt that grows chunk by chunk.
struct Sequence {
    tokens: Vec<u32>,
    positions: Vec<[u32; 3]>,
    features: Vec<FeatureRows>,
}

impl Sequence {
    /// Logits of the tokens `range`.
    fn step(&self, model: &mut dyn Runner, range: std::ops::Range<usize>, tap: &mut dyn Tap) -> Vec<f32> {
        let inside = |rows: &&FeatureRows| range.contains(&rows.at);
        let chunk = Chunk {
            tokens: self.tokens[range.clone()].to_vec(),
            start: range.start,
            positions: self.positions[range.clone()].to_vec(),
            features: self
                .features
                .iter()
                .filter(inside)
                .map(|rows| FeatureRows { at: rows.at - range.start, ..*rows })
                .collect(),
            block_table: vec![3, 1],
            logits: LogitRows::Range(0..range.len()),
        };
        // Beside it another sequence, which must not be seen.
        let other = Chunk {
            tokens: vec![7; 20 + range.start % 3],
            start: 0,
            positions: (0..20 + range.start as u32 % 3).map(|i| [i; 3]).collect(),
            features: vec![],
            block_table: vec![0],
            logits: LogitRows::Last,
        };
        let chunks = if range.len() == self.tokens.len() { vec![chunk] } else { vec![chunk, other] };
        model.step(&Batch { chunks }, tap).unwrap().logits.remove(0)
    }
}

fn text(golden: &Golden) -> Sequence {
    let tokens = golden.ids();
    let positions = (0..tokens.len() as u32).map(|i| [i; 3]).collect();
    Sequence { tokens, positions, features: vec![] }
}

fn check_recorded(golden: &Golden, tap: &Recorder) {
    let mut compared = 0;
    for (name, values) in tap.0.iter().filter(|(name, _)| name.contains('.')) {
        golden.compare(name, values);
        compared += 1;
    }
    assert_eq!(compared, 4 + 3 * 8, "tensors of three layers");
}

/// Greedy tokens after the prompt, all of them fed back.
fn continue_greedily(model: &mut dyn Runner, golden: &Golden, sequence: &mut Sequence, delta: i64, tap: &mut dyn Tap) {
    let n = sequence.tokens.len();
    let expected = i64s(&golden.0.get("generated").unwrap());
    let mut logits = sequence.step(model, 0..n, tap);
    let mut steps = Vec::new();
    for expected in expected {
        let last = &logits[logits.len() - VOCAB..];
        steps.extend_from_slice(last);
        let token = argmax(last);
        assert_eq!(i64::from(token), expected);
        let index = sequence.tokens.len();
        sequence.tokens.push(token);
        sequence.positions.push([(index as i64 + delta) as u32; 3]);
        logits = sequence.step(model, index..index + 1, &mut Only(tap));
    }
    golden.compare("step_logits", &steps);
}

/// Lets selections through: with another sequence beside it the first one's rows come first.
struct Only<'a>(&'a mut dyn Tap);

impl Tap for Only<'_> {
    fn wants(&self, name: &str) -> bool {
        name.starts_with("selected.")
    }
    fn record(&mut self, name: &str, cols: usize, rows: &[f32]) {
        self.0.record(name, cols, &rows[..cols]);
    }
}

pub fn check<B: Backend>(make: impl Fn() -> B) {
    check_loaded(|sparse| Box::new(load(make(), sparse)));
}

/// Text and pictures on models that `load` makes, with sparse attention or without.
pub fn check_loaded(load: impl Fn(bool) -> Box<dyn Runner>) {
    let mut model = load(true);
    for name in ["text", "short"] {
        let golden = Golden::open(name);
        let sequence = text(&golden);
        let mut tap = Recorder::default();
        let logits = sequence.step(&mut *model, 0..sequence.tokens.len(), &mut tap);
        golden.compare("logits", &logits);
        golden.compare("final_hidden", &tap.0["lm_final_norm"]);
        check_recorded(&golden, &tap);
    }

    let golden = Golden::open("text_dense");
    let sequence = text(&golden);
    let logits = sequence.step(&mut *load(false), 0..sequence.tokens.len(), &mut NoTap);
    golden.compare("logits", &logits);

    let golden = Golden::open("decode");
    let mut tap = Recorder::default();
    continue_greedily(&mut *model, &golden, &mut text(&golden), 0, &mut tap);
    for layer in 0..3 {
        golden.compare(&format!("selected.{layer}"), &tap.0[&format!("selected.{layer}")]);
    }
    pictures(&mut *model);
}

/// An image and three frames between text.
fn pictures(model: &mut dyn Runner) {
    let golden = Golden::open("multimodal");
    let (images, frames) = (golden.grids("image_grid_thw"), golden.grids("video_grid_thw"));
    let config = ModelConfig::load(&fixture(FIXTURE).join("model")).unwrap();
    let pads = [config.image_token_id, config.video_token_id];
    let tokens = golden.ids();
    let (positions, delta) = prompt_positions(&tokens, (pads[0], &images), (pads[1], &frames), 2).unwrap();
    let axes: Vec<i64> = (0..3).flat_map(|axis| positions.iter().map(move |p| i64::from(p[axis]))).collect();
    assert_eq!(axes, i64s(&golden.0.get("position_ids").unwrap()));
    assert_eq!(delta, i64s(&golden.0.get("rope_delta").unwrap())[0]);
    // Frames said as one grid of several time steps stand at the same positions.
    let [_, h, w] = frames[0];
    let merged = prompt_positions(&tokens, (pads[0], &images), (pads[1], &[[3, h, w]]), 2).unwrap();
    assert_eq!(merged.0, positions);

    let mut features = Vec::new();
    for (kind, pixels, grid_thw, pad, embeds) in [
        (MediaKind::Image, "pixel_values", images, pads[0], "image_embeds"),
        (MediaKind::Video, "pixel_values_videos", frames, pads[1], "video_embeds"),
    ] {
        let pixels = Pixels::F32(f32s(&golden.0.get(pixels).unwrap()));
        let mut tap = Recorder::default();
        let patches = Patches { pixels, grid_thw, hash: [0; 32] };
        let feature = model.encode(kind, &patches, &mut tap, &mut |_, _| true).unwrap();
        golden.compare(embeds, &tap.0[&format!("{}_projector", &embeds[..5])]);
        let places = tokens.iter().enumerate().filter(|(_, token)| **token == pad);
        features.extend(places.enumerate().map(|(row, (at, _))| FeatureRows { at, feature, row, len: 1 }));
    }
    let mut sequence = Sequence { tokens, positions, features };
    let mut tap = Recorder::default();
    let logits = sequence.step(model, 0..sequence.tokens.len(), &mut tap);
    golden.compare("logits", &logits);
    check_recorded(&golden, &tap);
    continue_greedily(model, &golden, &mut sequence, delta, &mut NoTap);
}

#[test]
fn second_generation_on_the_reference() {
    check(|| Reference);
}

#[test]
fn second_generation_on_every_instruction_set() {
    for isa in Isa::available() {
        check(|| Cpu::new(CpuOptions { threads: Some(2), isa: Some(isa) }).unwrap());
    }
}

/// What a config asks for is what the checkpoint has, but for the table that no inference uses.
#[test]
fn layout_is_that_of_the_checkpoint() {
    let dir = fixture(FIXTURE).join("model");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let layout = keye_model::weight_layout(&ModelConfig::load(&dir).unwrap());
    for tensor in &layout {
        assert_eq!(checkpoint.get(&tensor.name).map(|t| t.shape).as_ref(), Some(&tensor.shape), "{}", tensor.name);
    }
    let unused: Vec<&str> = checkpoint.names().filter(|name| layout.iter().all(|t| t.name != *name)).collect();
    assert_eq!(unused, ["visual.vision_model.embeddings.packing_position_embedding.weight"]);
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// A model with a prompt in chunks beside another sequence, token by token, and at once; returns its logits.
pub fn check_chunks(model: &mut dyn Runner) -> Vec<f32> {
    let sequence = text(&Golden::open("text"));
    let n = sequence.tokens.len();
    let whole = sequence.step(model, 0..n, &mut NoTap);
    for cuts in [vec![n - 1], vec![3, 15, 16, 17, 40], (1..n).collect()] {
        let (mut logits, mut start) = (Vec::new(), 0);
        for end in cuts.into_iter().chain([n]) {
            logits.extend(sequence.step(model, start..end, &mut NoTap));
            start = end;
        }
        assert_eq!(bits(&logits), bits(&whole));
    }
    whole
}

/// Bit for bit.
#[test]
fn sparse_prompts_in_chunks_equal_the_whole_prompt() {
    let golden = Golden::open("text");
    let sequence = text(&golden);
    let n = sequence.tokens.len();
    fn all<B: Backend>(sequence: &Sequence, n: usize, make: impl Fn() -> B) {
        let whole = check_chunks(&mut load(make(), true));
        // As many tokens as are selected: dense attention, to the bit.
        let dense = sequence.step(&mut load(make(), false), 0..n, &mut NoTap);
        assert_eq!(bits(&dense[..16 * VOCAB]), bits(&whole[..16 * VOCAB]));
        assert_ne!(bits(&dense[16 * VOCAB..]), bits(&whole[16 * VOCAB..]));
    }
    all(&sequence, n, || Reference);
    for isa in Isa::available() {
        for threads in [1, 3] {
            all(&sequence, n, || Cpu::new(CpuOptions { threads: Some(threads), isa: Some(isa) }).unwrap());
        }
    }
}

/// FNV-1a, 64 bits.
fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// The constants are of `golden_fp8.safetensors` of the independent oracle: bytes and scales of the queries and keys that
/// this fixture has (rows 0, 11, .. 55; the file's hashed the same way), of which one row stands here.
#[test]
fn eight_bit_index_queries_and_keys_are_the_oracles() {
    let golden = Golden::open("text");
    let expected = [
        (0x10df_8303_73ec_7022, 0xfdd5_5ebb_a316_69e5),
        (0x9d8c_ec67_3db2_2b71, 0xbdda_2b64_406a_cfb5),
        (0x8862_831a_3833_a129, 0xfdd5_5ebb_a316_69e5),
    ];
    for (layer, expected) in expected.into_iter().enumerate() {
        let rows = ["idx_q", "idx_k"].map(|name| f32s(&golden.0.get(&format!("{name}.{layer}")).unwrap()));
        let (bytes, scales): (Vec<_>, Vec<_>) = rows.concat().chunks_exact(32).map(fp8_rows::quantize).unzip();
        if layer == 0 {
            let last = [
                108, 200, 99, 242, 241, 112, 220, 107, 93, 244, 121, 113, 233, 105, 97, 241, 225, 102, 119, 218, 234,
                111, 227, 234, 221, 249, 104, 245, 102, 219, 235, 116,
            ];
            assert_eq!((&bytes[5 * 4][..], scales[5 * 4]), (&last[..], 1.0 / 128.0));
        }
        let scales = scales.into_iter().flat_map(f32::to_le_bytes);
        assert_eq!((hash(bytes.concat()), hash(scales)), expected, "layer {layer}");
    }
}

/// The first layer's queries and keys are the golden ones, so its choices are those that the oracle's scores of 8-bit floats
/// give (all 56 rows, -1 behind; hashed). A cache in bf16 holds such keys exactly.
#[test]
fn the_fp8_scorer_chooses_as_the_oracle() {
    fn check<B: Backend>(make: impl Fn() -> B) {
        let sequence = text(&Golden::open("text"));
        let n = sequence.tokens.len();
        let mut logits = Vec::new();
        for kv_dtype in [KvDtype::F32, KvDtype::Bf16] {
            let mut model = load_config(make(), kv_dtype, |config| {
                config.choose_attention(None, Some(IndexScorer::Fp8)).unwrap();
            });
            let mut tap = Recorder::default();
            let whole = sequence.step(&mut model, 0..n, &mut tap);
            let selected = tap.0["selected.0"].iter().flat_map(|position| (*position as i32).to_le_bytes());
            assert_eq!(hash(selected), 0xbfbb_e694_717a_9864, "{}", model.describe());
            let mut chunks = Vec::new();
            for (start, end) in [(0, 3), (3, 16), (16, 17), (17, n)] {
                chunks.extend(sequence.step(&mut model, start..end, &mut NoTap));
            }
            assert_eq!(bits(&chunks), bits(&whole));
            logits.push(whole);
        }
        // Some other keys are chosen than by f32, and the answer follows.
        let exact = sequence.step(&mut load(make(), true), 0..n, &mut NoTap);
        assert_eq!(bits(&exact[..16 * VOCAB]), bits(&logits[0][..16 * VOCAB]));
        assert_ne!(bits(&exact[16 * VOCAB..]), bits(&logits[0][16 * VOCAB..]));
    }
    check(|| Reference);
    for isa in Isa::available() {
        check(|| Cpu::new(CpuOptions { threads: Some(2), isa: Some(isa) }).unwrap());
    }
}

#[test]
fn a_choice_of_attention_that_the_model_does_not_leave_is_an_error() {
    let mut config = ModelConfig::load(&fixture(FIXTURE).join("model")).unwrap();
    let refused =
        |config: &mut ModelConfig, kind, scorer| config.choose_attention(kind, scorer).unwrap_err().to_string();
    assert!(refused(&mut config, Some(AttentionKind::Dense), Some(IndexScorer::Fp8)).contains("dense was asked for"));
    assert_eq!(config.text.indexer.unwrap().scorer, IndexScorer::F32);
    config.choose_attention(Some(AttentionKind::Dense), None).unwrap();
    assert!(refused(&mut config, Some(AttentionKind::Sparse), None).contains("no indexer"));
    assert!(refused(&mut config, None, Some(IndexScorer::Fp8)).contains("no indexer"));
    config.choose_attention(Some(AttentionKind::Dense), None).unwrap();
}

/// Of the golden logits, root mean square: what rounding keys and values loses. Selections may change with index keys.
#[test]
fn a_smaller_cache_loses_little() {
    let golden = Golden::open("text_dense");
    let sequence = text(&Golden::open("text"));
    let expected = f32s(&golden.0.get("logits").unwrap());
    for (kv_dtype, bound) in [(KvDtype::Bf16, 0.004), (KvDtype::Int8, 0.02)] {
        let mut model = load_with(Cpu::new(CpuOptions::default()).unwrap(), false, kv_dtype);
        let found = sequence.step(&mut model, 0..sequence.tokens.len(), &mut NoTap);
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
        let rows = |values: &[f32]| match golden.0.get("logits.rows") {
            Some(rows) => i64s(&rows).iter().flat_map(|r| values[*r as usize * VOCAB..][..VOCAB].to_vec()).collect(),
            None => values.to_vec(),
        };
        let found = rows(&found);
        let error = square(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
        let error = (error / square(&mut expected.iter().copied())).sqrt();
        println!("{kv_dtype:?}: {error:.5}");
        assert!(error > 0.0 && error < bound, "{kv_dtype:?}: {error}");
    }
}
