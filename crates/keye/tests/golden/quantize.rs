//! Quantised checkpoints: what is written, what is refused, and what the models lose by it.

use std::fs;
use std::path::{Path, PathBuf};

use keye::presets::Preset;
use keye::quantize::{Report, Role, quantize};
use keye::random_checkpoint::write_packed;
use keye::{ModelFiles, load_cpu};
use keye_backend::{Backend, Cpu, CpuOptions, KvDtype, Reference};
use keye_media::{MediaKind, Patches, Pixels};
use keye_model::{Batch, Chunk, FeatureRows, KeyeModel, LoadOptions, LogitRows, Runner, Tap};
use keye_processor::{Checkpoint, Overrides, PackedFormat, Processor, StoredTensor};
use serde_json::{Value, json};

/// Features, logits, KL, same first choice: of the packed weights alone, then with integer arithmetic too.
const BOUNDS: [(PackedFormat, [[f64; 4]; 2]); 2] = [
    (PackedFormat::Int8, [[0.003, 0.05, 0.004, 0.90], [0.003, 0.05, 0.004, 0.90]]),
    (PackedFormat::Int4, [[0.010, 0.36, 0.26, 0.40], [0.010, 0.36, 0.26, 0.40]]),
];

const MODELS: [&str; 2] = ["keye-preview-tiny", "keye-1_5-tiny"];

fn fixture(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(model)
}

fn quantized(model: &str, to: PackedFormat, dir: &Path) -> Report {
    quantize(&fixture(model).join("model"), to, dir, &mut |_, _| true).unwrap()
}

#[test]
fn a_quantised_directory_has_all_files_and_says_what_it_is() {
    for (model, to) in MODELS.into_iter().zip([PackedFormat::Int4, PackedFormat::Int8]) {
        let root = tempfile::tempdir().unwrap();
        let (from, dir) = (fixture(model).join("model"), root.path().join("q"));
        let report = quantized(model, to, &dir);
        let read = |dir: &Path, name: &str| fs::read(dir.join(name)).unwrap();
        for entry in fs::read_dir(&from).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if !name.ends_with(".safetensors") && name != "config.json" {
                assert_eq!(read(&from, &name), read(&dir, &name), "{name}");
            }
        }
        let mut expected: Value = serde_json::from_slice(&read(&from, "config.json")).unwrap();
        expected["quantization_config"] = json!({"quant_method": "keye", "version": 2, "format": to.name()});
        assert_eq!(serde_json::from_slice::<Value>(&read(&dir, "config.json")).unwrap(), expected);

        let (original, packed) = (Checkpoint::open(&from).unwrap(), Checkpoint::open(&dir).unwrap());
        assert_eq!(report.left_out, original.names().count() - packed.names().count());
        assert_eq!(report.bytes, packed.total_bytes());
        for name in packed.names() {
            let (old, new) = (original.get(name).unwrap(), packed.get(name).unwrap());
            assert_eq!(old.shape, new.shape, "{name}");
            assert_eq!(new.packed, Role::of(name, &old.shape).stored_as(to), "{name}");
            if new.packed.is_none() {
                assert_eq!(old.bytes, new.bytes, "{name}");
            }
        }
        for role in &report.roles {
            let bound = match role.format.as_str() {
                "int4" => 0.076,
                "int8" => 0.006,
                "int10" => 0.002,
                "int12" => 0.0005,
                _ => 0.0,
            };
            assert!(role.relative_rms_error <= bound, "{role:?}");
        }
    }
}

#[test]
fn what_cannot_be_quantised_is_refused_and_nothing_is_left() {
    let root = tempfile::tempdir().unwrap();
    let (from, dir) = (fixture(MODELS[1]).join("model"), root.path().join("q"));
    let given_up = quantize(&from, PackedFormat::Int4, &dir, &mut |_, _| false).unwrap_err();
    assert!(given_up.to_string().contains("given up"), "{given_up:#}");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    quantized(MODELS[1], PackedFormat::Int4, &dir);
    let again = quantize(&dir, PackedFormat::Int8, &root.path().join("r"), &mut |_, _| true).unwrap_err();
    assert!(again.to_string().contains("is quantised already"), "{again:#}");
    let there = quantize(&from, PackedFormat::Int8, &dir, &mut |_, _| true).unwrap_err();
    assert!(there.to_string().contains("is there already"), "{there:#}");

    // A weight that is no number.
    let broken = root.path().join("broken");
    fs::create_dir(&broken).unwrap();
    for entry in fs::read_dir(&from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, broken.join(path.file_name().unwrap())).unwrap();
    }
    let name = "model.layers.1.mlp.up_proj.weight";
    let weight = Checkpoint::open(&broken).unwrap().get(name).unwrap().bytes.to_vec();
    let path = broken.join("model.safetensors");
    let mut file = fs::read(&path).unwrap();
    let at = file.windows(64).position(|window| window == &weight[..64]).unwrap();
    file[at + 64 * 4 * 3 + 4 * 5..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, file).unwrap();
    let nan = quantize(&broken, PackedFormat::Int4, &root.path().join("n"), &mut |_, _| true).unwrap_err().to_string();
    assert!(nan.contains(name) && nan.contains("row 3, column 5 is NaN"), "{nan}");
    assert!(!root.path().join("n").exists() && !root.path().join("n.partial").exists());
}

/// Of the 8 B models all tensors together, computed from their layout.
#[test]
fn bits_per_weight_of_the_published_sizes() {
    for (to, most) in [(PackedFormat::Int4, 4.75), (PackedFormat::Int8, 9.0)] {
        let preset = Preset::KeyeVl1_5_8b;
        let weights: usize = preset
            .used_tensors(keye_processor::Dtype::Bf16)
            .unwrap()
            .iter()
            .map(|tensor| tensor.shape.iter().product::<usize>())
            .sum();
        let bytes = keye::random_checkpoint::total_bytes(preset, Some(to)).unwrap();
        let bits = 8.0 * bytes as f64 / weights as f64;
        assert!(bits <= most, "{to}: {bits}");
    }
}

#[test]
fn random_packed_weights_load_and_have_their_deviation() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("m");
    write_packed(&dir, Preset::Keye1_5Tiny, PackedFormat::Int4, 3, &mut |_, _| true).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let embedding = checkpoint.tensor("model.embed_tokens.weight", &[960, 64]).unwrap();
    assert_eq!(embedding.packed, Some(PackedFormat::Int4));
    let values = keye_backend::packed::unpack(keye_backend::Dtype::Int4, 960, 64, &embedding.bytes).unwrap();
    let std = (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt();
    assert!((std - 0.02).abs() < 0.001, "{std}");
    load(&dir, cpu());
}

fn cpu() -> Cpu {
    Cpu::new(CpuOptions::default()).unwrap()
}

fn load<B: Backend>(dir: &Path, backend: B) -> KeyeModel<B> {
    let processor = Processor::load(dir, &Overrides::default()).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let options = LoadOptions { cache_tokens: 1024, kv_dtype: KvDtype::F32 };
    KeyeModel::load(backend, &processor.config, &processor.media.processor, &checkpoint, options).unwrap()
}

fn integers(tensor: Option<StoredTensor>) -> Vec<i64> {
    let tensor = tensor.map(|tensor| tensor.bytes).unwrap_or_default();
    tensor.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
}

/// Features of the projector, over all calls.
#[derive(Default)]
struct Features(Vec<f32>);

impl Tap for Features {
    fn wants(&self, name: &str) -> bool {
        name == "image_projector"
    }

    fn record(&mut self, _name: &str, _cols: usize, values: &[f32]) {
        self.0.extend_from_slice(values);
    }
}

/// Features of a golden case's pictures and logits of every row of its prompt.
fn run(model: &mut dyn Runner, case: &Checkpoint, image_pad: u32) -> (Vec<f32>, Vec<f32>) {
    let tokens: Vec<u32> = integers(case.get("input_ids")).into_iter().map(|id| id as u32).collect();
    let (n, axes) = (tokens.len(), integers(case.get("position_ids")));
    let (mut tap, mut features) = (Features::default(), Vec::new());
    if let Some(pixels) = case.get("pixel_values_u8") {
        let rows = integers(case.get("image_grid_thw"));
        let grid_thw: Vec<[u32; 3]> =
            rows.as_chunks().0.iter().map(|row: &[i64; 3]| row.map(|side| side as u32)).collect();
        let patches = Patches { pixels: Pixels::U8(pixels.bytes.to_vec()), grid_thw, hash: [0; 32] };
        let feature = model.encode(MediaKind::Image, &patches, &mut tap, &mut |_, _| true).unwrap();
        let mut row = 0;
        for (at, _) in tokens.iter().enumerate().filter(|(_, token)| **token == image_pad) {
            features.push(FeatureRows { at, feature, row, len: 1 });
            row += 1;
        }
        assert_eq!(row, model.feature_rows(feature));
    }
    let chunk = Chunk {
        tokens,
        start: 0,
        positions: (0..n).map(|i| [0, 1, 2].map(|axis| axes[axis * n + i] as u32)).collect(),
        features,
        block_table: (0..n.div_ceil(64) as u32).collect(),
        logits: LogitRows::Range(0..n),
    };
    let logits = model.step(&Batch { chunks: vec![chunk] }, &mut tap).unwrap().logits.remove(0);
    (tap.0, logits)
}

fn relative_error(expected: &[f32], found: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x).powi(2);
    let error: f64 = expected.iter().zip(found).map(|(a, b)| square(a - b)).sum();
    (error / expected.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let most = row.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let sum: f64 = row.iter().map(|x| f64::from(x - most).exp()).sum();
    row.iter().map(|x| f64::from(x - most) - sum.ln()).collect()
}

fn top(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

/// Relative errors of pictures' features and of logits, KL of the next token, part of rows with the same first choice.
fn accuracy<B: Backend>(model: &str, packed: &Path, backend: B) -> [f64; 4] {
    let source = fixture(model).join("model");
    let pad = Processor::load(&source, &Overrides::default()).unwrap().config.image_token_id;
    let (mut original, mut packed) = (load(&source, cpu()), load(packed, backend));
    // Of the original and of the packed model.
    let (mut features, mut logits) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for case in ["text_only", "text_system", "image_one", "image_two", "image_big", "image_options"] {
        let case = Checkpoint::open_file(&fixture(model).join("cases").join(format!("{case}.safetensors"))).unwrap();
        let ((f, l), (qf, ql)) = (run(&mut original, &case, pad), run(&mut packed, &case, pad));
        features[0].extend(f);
        features[1].extend(qf);
        logits[0].extend(l);
        logits[1].extend(ql);
    }
    let vocab = original.info().vocab_size;
    let (mut kl, mut same, mut rows) = (0.0, 0.0, 0.0);
    for (a, b) in logits[0].chunks_exact(vocab).zip(logits[1].chunks_exact(vocab)) {
        let (p, q) = (log_softmax(a), log_softmax(b));
        kl += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        same += f64::from(u8::from(top(a) == top(b)));
        rows += 1.0;
    }
    [relative_error(&features[0], &features[1]), relative_error(&logits[0], &logits[1]), kl / rows, same / rows]
}

/// Groups of packed weights and of activations are the same on two ranks; their sums are rounded in another order.
#[test]
fn two_ranks_of_a_packed_model_are_near_one() {
    for (to, model) in [(PackedFormat::Int8, MODELS[0]), (PackedFormat::Int4, MODELS[1])] {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("q");
        quantized(model, to, &dir);
        let processor = Processor::load(&dir, &Overrides::default()).unwrap();
        let files = ModelFiles {
            config: &processor.config,
            processor: &processor.media.processor,
            checkpoint: &Checkpoint::open(&dir).unwrap(),
        };
        let case = Checkpoint::open_file(&fixture(model).join("cases/image_two.safetensors")).unwrap();
        let [one, two] = [1, 2].map(|ranks| {
            let options = LoadOptions { cache_tokens: 1024, kv_dtype: KvDtype::F32 };
            let (mut runner, device) = load_cpu(ranks, Some(2), files, options).unwrap();
            assert_eq!(device.starts_with("2 ranks of cpu ("), ranks == 2, "{device}");
            run(&mut *runner, &case, processor.config.image_token_id)
        });
        // The tower is not divided.
        assert!(one.0 == two.0, "{model}: features");
        let error = relative_error(&one.1, &two.1);
        println!("{model} {to}: {error:.1e}");
        assert!(error > 0.0 && error < 0.01, "{model} {to}: {error}");
    }
}

/// Bounds of accuracy against f32 on the golden prompts, with the reference's exact arithmetic on the packed weights and with the
/// CPU's integer arithmetic. `cargo test --release -p keye --test golden -- quantised_models --nocapture` prints the figures.
#[test]
fn quantised_models_stay_near_the_originals() {
    for (to, bounds) in BOUNDS {
        for model in MODELS {
            let root = tempfile::tempdir().unwrap();
            let dir = root.path().join("q");
            quantized(model, to, &dir);
            let found = [accuracy(model, &dir, Reference), accuracy(model, &dir, cpu())];
            for (backend, found, bound) in
                [("weights alone", found[0], bounds[0]), ("integer arithmetic", found[1], bounds[1])]
            {
                let [features, logits, kl, same] = found;
                println!(
                    "{model} {to}, {backend}: features {features:.4}, logits {logits:.4}, KL {kl:.6}, same first choice {same:.3}"
                );
                let within = features <= bound[0] && logits <= bound[1] && kl <= bound[2] && same >= bound[3];
                assert!(within, "{model} {to}, {backend}: {found:?}, expected {bound:?}");
            }
        }
    }
}
