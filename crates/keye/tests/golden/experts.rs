//! 2.0's experts: every stored form is the same model, and packed ones lie apart.

use std::fs;
use std::path::{Path, PathBuf};

use keye::presets::Preset;
use keye::quantize::quantize;
use keye::random_checkpoint::{total_bytes, write_packed};
use keye::{ModelFiles, load_cpu};
use keye_backend::KvDtype;
use keye_backend::packed::unpack;
use keye_model::{Batch, Chunk, LoadOptions, LogitRows, NoTap, stored_layout};
use keye_processor::{Checkpoint, Dtype, ModelConfig, NewTensor, PackedFormat, StoredTensor, write_file};
use serde_json::{Value, json};

const EXPERTS: usize = 8;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/keye-2-tiny/model")
}

/// How a checkpoint may have its experts.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    OutputMajor,
    Apart,
}

/// `[rows, cols]` turned, of four-byte elements.
fn turned(bytes: &[u8], rows: usize, cols: usize) -> Vec<u8> {
    let at = |row: usize, col: usize| bytes[4 * (row * cols + col)..][..4].iter();
    (0..cols).flat_map(|col| (0..rows).flat_map(move |row| at(row, col))).copied().collect()
}

/// A copy of the golden model, whose experts are input-major, in another form.
fn rewritten(form: Form, dir: &Path) {
    let original = Checkpoint::open(&fixture()).unwrap();
    let mut tensors: Vec<(NewTensor, Vec<u8>)> = Vec::new();
    let mut add = |name: String, shape: &[usize], bytes: Vec<u8>| {
        tensors.push((NewTensor { name, dtype: Dtype::F32, shape: shape.to_vec() }, bytes));
    };
    for name in original.names() {
        let StoredTensor { shape, bytes, .. } = original.get(name).unwrap();
        let Some((mlp, last)) = name.rsplit_once(".experts.") else {
            add(name.into(), &shape, bytes.to_vec());
            continue;
        };
        let [count, inputs, outputs] = shape[..] else { panic!("{name}") };
        assert_eq!(count, EXPERTS);
        let experts = bytes.chunks_exact(4 * inputs * outputs).map(|expert| turned(expert, inputs, outputs));
        match (form, last) {
            (Form::OutputMajor, _) => add(name.into(), &[count, outputs, inputs], experts.flatten().collect()),
            (Form::Apart, "gate_up_proj") => {
                for (e, expert) in experts.enumerate() {
                    let (gate, up) = expert.split_at(expert.len() / 2);
                    let shape = [outputs / 2, inputs];
                    add(format!("{mlp}.experts.{e}.gate_proj.weight"), &shape, gate.to_vec());
                    add(format!("{mlp}.experts.{e}.up_proj.weight"), &shape, up.to_vec());
                }
            }
            (Form::Apart, _) => {
                for (e, expert) in experts.enumerate() {
                    add(format!("{mlp}.experts.{e}.down_proj.weight"), &[outputs, inputs], expert);
                }
            }
        }
    }
    fs::create_dir(dir).unwrap();
    fs::copy(fixture().join("config.json"), dir.join("config.json")).unwrap();
    let tensors: Vec<_> = tensors.iter().map(|(tensor, bytes)| (tensor.clone(), &bytes[..])).collect();
    write_file(&dir.join("model.safetensors"), &tensors).unwrap();
}

/// Logits of all rows of a prompt longer than top-k.
pub fn logits(dir: &Path) -> Vec<f32> {
    logits_of_ranks(dir, 1)
}

fn logits_of_ranks(dir: &Path, ranks: usize) -> Vec<f32> {
    let config = ModelConfig::load(dir).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let missing =
        stored_layout(&config, &checkpoint).into_iter().find(|t| checkpoint.tensor(&t.name, &t.shape).is_err());
    assert_eq!(missing, None);
    let options = LoadOptions { cache_tokens: 128, kv_dtype: KvDtype::F32 };
    let files = ModelFiles { config: &config, processor: &config.facts().media.processor, checkpoint: &checkpoint };
    let (mut model, _) = load_cpu(ranks, Some(2), files, options).unwrap();
    let chunk = Chunk {
        tokens: (0..40).map(|i| i * 37 % 320).collect(),
        start: 0,
        positions: (0..40).map(|i| [i; 3]).collect(),
        features: vec![],
        block_table: vec![0],
        logits: LogitRows::Range(0..40),
    };
    model.step(&Batch { chunks: vec![chunk] }, &mut NoTap).unwrap().logits.remove(0)
}

/// Within `bound` of the largest.
#[track_caller]
fn assert_near(found: &[f32], expected: &[f32], bound: f32) {
    let difference = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let largest = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    assert!(difference <= bound * largest, "{difference} of {largest}");
}

#[test]
fn all_forms_are_the_same_model_and_pack_alike() {
    let root = tempfile::tempdir().unwrap();
    let expected = logits(&fixture());
    let packed = |from: &Path, name: &str| {
        let dir = root.path().join(name);
        let report = quantize(from, PackedFormat::Int8, &dir, &mut |_, _| true).unwrap();
        (Checkpoint::open(&dir).unwrap(), report, dir)
    };
    let (golden, report, dir) = packed(&fixture(), "golden-int8");
    let original = Checkpoint::open(&fixture()).unwrap();
    // Experts lie apart, and what steers them is kept.
    let (f, h) = (40, 64);
    for e in 0..EXPERTS {
        let at = format!("model.layers.1.mlp.experts.{e}");
        let gate_up = original.get("model.layers.1.mlp.experts.gate_up_proj").unwrap().bytes;
        let gate_up = turned(&gate_up[4 * e * h * 2 * f..][..4 * h * 2 * f], h, 2 * f);
        let up = golden.get(&format!("{at}.up_proj.weight")).unwrap();
        assert_eq!((up.packed, &up.shape[..]), (Some(PackedFormat::Int8), &[f, h][..]));
        let found = unpack(keye_backend::Dtype::Int8, f, h, &up.bytes).unwrap();
        let values = gate_up[4 * f * h..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        for (found, value) in found.iter().zip(values) {
            assert!((found - value).abs() < 0.01, "expert {e}: {found} for {value}");
        }
    }
    for name in ["mlp.gate.weight", "self_attn.sa_indexer.q_proj.weight", "self_attn.sa_indexer.k_proj.weight"] {
        let name = format!("model.layers.0.{name}");
        assert_eq!(golden.get(&name).unwrap().bytes, original.get(&name).unwrap().bytes, "{name}");
    }
    assert_eq!(report.left_out, 1, "the table of packing positions");
    let difference = logits(&dir).iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let largest = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    assert!(difference < 0.3 * largest, "{difference} of {largest}");
    // Whole experts of a rank, packed and in place.
    assert_near(&logits_of_ranks(&dir, 2), &logits(&dir), 0.02);

    for (form, name) in [(Form::OutputMajor, "output-major"), (Form::Apart, "apart")] {
        let dir = root.path().join(name);
        rewritten(form, &dir);
        assert!(logits(&dir) == expected, "{name}");
        assert_near(&logits_of_ranks(&dir, 2), &expected, 1e-4);
        let (other, again, _) = packed(&dir, &format!("{name}-int8"));
        assert_eq!(again.roles, report.roles, "{name}");
        assert!(golden.names().eq(other.names()), "{name}");
        for tensor in golden.names() {
            assert_eq!(golden.get(tensor).unwrap().bytes, other.get(tensor).unwrap().bytes, "{name}: {tensor}");
        }
    }
}

/// The dense class has a feed-forward block in the place of experts, and the same indexers: a mixture of one expert, of which
/// all rows make all their answer, is the same model.
#[test]
fn the_dense_class_is_a_mixture_of_one() {
    let root = tempfile::tempdir().unwrap();
    let apart = root.path().join("apart");
    rewritten(Form::Apart, &apart);
    let original = Checkpoint::open(&apart).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(apart.join("config.json")).unwrap()).unwrap();
    let made = |class: &str, changes: Value| {
        let dense = class == "KeyeVL2ForConditionalGeneration";
        let mut tensors = Vec::new();
        for name in original.names() {
            let StoredTensor { mut shape, bytes, dtype, .. } = original.get(name).unwrap();
            let (mut name, mut bytes) = (name.to_owned(), &bytes[..]);
            if name.ends_with(".mlp.gate.weight") {
                if dense {
                    continue;
                }
                shape[0] = 1;
                bytes = &bytes[..4 * shape[1]];
            } else if let Some((mlp, rest)) = name.split_once(".experts.") {
                let Some(projection) = rest.strip_prefix("0.") else { continue };
                if dense {
                    name = format!("{mlp}.{projection}");
                }
            }
            tensors.push((NewTensor { name, dtype, shape }, bytes.to_vec()));
        }
        let mut config = config.clone();
        config["architectures"] = json!([class]);
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let dir = root.path().join(class);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
        let tensors: Vec<_> = tensors.iter().map(|(tensor, bytes)| (tensor.clone(), &bytes[..])).collect();
        write_file(&dir.join("model.safetensors"), &tensors).unwrap();
        logits(&dir)
    };
    let one = made("KeyeVL2MoeForConditionalGeneration", json!({"num_experts": 1, "num_experts_per_tok": 1}));
    let dense = made("KeyeVL2ForConditionalGeneration", json!({"intermediate_size": 40}));
    let config = ModelConfig::load(&root.path().join("KeyeVL2ForConditionalGeneration")).unwrap();
    assert!(config.text.experts.is_none() && config.text.indexer.is_some());
    let largest = one.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    assert!(one.iter().zip(&dense).all(|(a, b)| (a - b).abs() <= 1e-5 * largest));
}

#[test]
fn random_packed_experts_load_and_run() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    write_packed(&dir, Preset::Keye2Tiny, PackedFormat::Int4, 3, &mut |_, _| true).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!(checkpoint.total_bytes(), total_bytes(Preset::Keye2Tiny, Some(PackedFormat::Int4)).unwrap());
    let expert = checkpoint.get("model.layers.2.mlp.experts.7.down_proj.weight").unwrap();
    assert_eq!((expert.packed, &expert.shape[..]), (Some(PackedFormat::Int4), &[64, 40][..]));
    assert!(logits(&dir).iter().all(|logit| logit.is_finite()));
    // The real size.
    let bytes = total_bytes(Preset::KeyeVl2, Some(PackedFormat::Int4)).unwrap();
    assert!((17_000_000_000..18_500_000_000).contains(&bytes), "{bytes}");
    let parameters: u64 = keye::presets::Sizes::from(Preset::KeyeVl2)
        .tensors(Dtype::Bf16)
        .unwrap()
        .iter()
        .map(|tensor| tensor.shape.iter().map(|n| *n as u64).product::<u64>())
        .sum();
    assert_eq!(parameters, 31_122_082_160, "the published count");
}
