//! What is trained is what the engine runs.

use std::path::Path;

use keye_backend::{BLOCK_TOKENS, Cpu, CpuOptions, KvDtype, Reference};
use keye_media::{MediaKind, Patches, Pixels};
use keye_model::{Batch, Chunk, FeatureRows, KeyeModel, LoadOptions, LogitRows, NoTap, Runner};
use keye_processor::{Checkpoint, ModelConfig};
use keye_train::{ExportDtype, Mean, Model, Pack, Params, Precision, average, export, load_params};

use crate::support::{fixture, largest_difference, model, packed, processor, sample, stored};

/// The logits of one sample as the engine's model computes them from a directory.
fn engine(dir: &Path, cpu: bool, sample: &Pack) -> Vec<f32> {
    let config = ModelConfig::load(dir).unwrap();
    let pixels = processor().media.processor;
    let options = LoadOptions { cache_tokens: sample.len(), kv_dtype: KvDtype::F32 };
    let checkpoint = Checkpoint::open(dir).unwrap();
    let mut runner: Box<dyn Runner> = match cpu {
        true => {
            let cpu = Cpu::new(CpuOptions::default()).unwrap();
            Box::new(KeyeModel::load(cpu, &config, &pixels, &checkpoint, options).unwrap())
        }
        false => Box::new(KeyeModel::load(Reference, &config, &pixels, &checkpoint, options).unwrap()),
    };
    let mut features = Vec::new();
    if !sample.grids.is_empty() {
        let patches = Patches {
            pixels: Pixels::U8(sample.patches.clone()),
            grid_thw: sample.grids.iter().map(|[h, w]| [1, *h, *w]).collect(),
            hash: [0; 32],
        };
        let feature = runner.encode(MediaKind::Video, &patches, &mut NoTap, &mut |_, _| true).unwrap();
        let pads = (0..sample.len()).filter(|at| sample.ids[*at] == config.video_token_id);
        features.extend(pads.enumerate().map(|(row, at)| FeatureRows { at, feature, row, len: 1 }));
    }
    let chunk = Chunk {
        tokens: sample.ids.clone(),
        start: 0,
        positions: sample.positions.clone(),
        features,
        block_table: (0..sample.len().div_ceil(BLOCK_TOKENS) as u32).collect(),
        logits: LogitRows::Range(0..sample.len()),
    };
    runner.step(&Batch { chunks: vec![chunk] }, &mut NoTap).unwrap().logits.remove(0)
}

fn samples(model: &Model) -> Vec<Pack> {
    vec![
        sample(model, 1, 30, &[[4, 6], [2, 2], [6, 4]]),
        sample(model, 2, 200, &[]),
        sample(model, 3, 5, &[[8, 8], [4, 4], [4, 4]]),
    ]
}

/// Acceptance test 2 (spec §9): what is packed beside a sample does not change it; and both equal the engine.
#[test]
fn packed_logits_equal_single_ones_and_the_engine() {
    let model = model();
    let params = stored(&model);
    let samples = samples(&model);
    let vocab = model.config.text.vocab_size;
    let together = model.logits(&params, &packed(&samples)).unwrap();
    let mut at = 0;
    for sample in &samples {
        let here = &together[at * vocab..(at + sample.len()) * vocab];
        at += sample.len();
        let alone = model.logits(&params, sample).unwrap();
        assert!(largest_difference(here, &alone) < 1e-4);
        for cpu in [false, true] {
            let engine = engine(&fixture(), cpu, sample);
            let difference = largest_difference(here, &engine);
            assert!(difference < 1e-4, "cpu {cpu}: {difference}");
            assert!(engine.iter().any(|v| v.abs() > 0.1), "the fixture's logits are not all alike");
        }
    }
}

#[test]
fn an_exported_directory_is_loaded_with_no_special_case() {
    let model = model();
    let params = model.init(7);
    let out = tempfile::tempdir().unwrap();
    let sample = sample(&model, 4, 20, &[[4, 4], [2, 6]]);
    for (name, dtype) in [("f32", ExportDtype::F32), ("bf16", ExportDtype::Bf16)] {
        let dir = out.path().join(name);
        export(&model, &params, &[fixture()], &dir, dtype, dtype == ExportDtype::F32).unwrap();
        let mut back = model.init(8);
        load_params(&model, &dir, &mut back).unwrap();
        let mine = model.logits(&back, &sample).unwrap();
        let difference = largest_difference(&mine, &engine(&dir, true, &sample));
        assert!(difference < 1e-4, "{name}: {difference}");
        if dtype == ExportDtype::F32 {
            assert_eq!(back, params);
        } else {
            assert!(largest_difference(&mine, &model.logits(&params, &sample).unwrap()) < 0.2);
            assert!(!Checkpoint::open(&dir).unwrap().names().any(|name| name.contains("head.probe")));
        }
        assert!(keye_processor::Processor::load(&dir, &keye_processor::Overrides::default()).is_ok());
        assert!(
            export(&model, &params, &[fixture()], &dir, dtype, dtype == ExportDtype::F32).is_err(),
            "nothing is overwritten"
        );
    }
}

/// Acceptance test 11 (spec §9).
#[test]
fn the_mean_of_equal_models_is_the_model() {
    let model = model();
    let params = model.init(3);
    let mut other = params.clone();
    other.values.iter_mut().for_each(|v| *v += 0.5);
    let out = tempfile::tempdir().unwrap();
    let write = |name: &str, params: &Params| {
        let dir = out.path().join(name);
        export(&model, params, &[fixture()], &dir, ExportDtype::F32, true).unwrap();
        dir
    };
    let (a, b) = (write("a", &params), write("b", &other));
    let start = model.init(1);
    assert_eq!(
        average(&model, &[a.clone(), a.clone(), a.clone()], &start).unwrap(),
        Mean { params: params.clone(), extras: true }
    );
    let mean = average(&model, &[a, b], &start).unwrap();
    let difference: Vec<f32> = mean.params.values.iter().zip(&params.values).map(|(m, p)| m - p).collect();
    assert!(difference.iter().all(|d| (d - 0.25).abs() < 1e-5));
    assert!(average(&model, &[], &start).is_err());
}

/// A shipped model has no tensors of stage 0: a mean with it has none either, rather than random ones in it.
#[test]
fn a_mean_has_only_what_all_models_have() {
    let model = model();
    let params = model.init(3);
    let out = tempfile::tempdir().unwrap();
    let [whole, shipped, new] = ["whole", "shipped", "new"].map(|name| out.path().join(name));
    export(&model, &params, &[fixture()], &whole, ExportDtype::F32, true).unwrap();
    export(&model, &params, &[fixture()], &shipped, ExportDtype::Bf16, false).unwrap();
    let start = model.init(1);
    for dirs in [[whole.clone(), shipped.clone()], [shipped.clone(), whole.clone()]] {
        let mean = average(&model, &dirs, &start).unwrap();
        assert!(!mean.extras);
        for tensor in model.layout().tensors() {
            let [mean, start, trained] = [&mean.params, &start, &params].map(|p| p.tensor(&tensor.name).unwrap());
            let extra = tensor.name.starts_with("siglip.") || tensor.name.contains(".head.");
            assert!(if extra { mean == start } else { largest_difference(mean, trained) < 0.01 }, "{}", tensor.name);
        }
    }
    let mean = average(&model, &[shipped.clone(), whole], &start).unwrap();
    export(&model, &mean.params, &[shipped], &new, ExportDtype::F32, mean.extras).unwrap();
    let names: Vec<String> = Checkpoint::open(&new).unwrap().names().map(str::to_owned).collect();
    assert!(names.len() > 20 && !names.iter().any(|name| name.starts_with("siglip.") || name.contains(".head.")));
}

/// Models that are not alike: another depth, and the same tensors with other small files.
#[test]
fn unlike_models_have_no_mean() {
    let model = model();
    let out = tempfile::tempdir().unwrap();
    let [one, deep, other] = ["one", "deep", "other"].map(|name| out.path().join(name));
    export(&model, &model.init(1), &[fixture()], &one, ExportDtype::F32, true).unwrap();
    export(&model, &model.init(2), &[fixture()], &other, ExportDtype::F32, true).unwrap();
    let mut processor = processor();
    processor.config.text.num_hidden_layers += 1;
    let deeper = Model::new(&processor.config, &processor.media.processor, *model.device(), Precision::F32).unwrap();
    // Under the config of the shallow ones.
    export(&deeper, &deeper.init(1), &[fixture()], &deep, ExportDtype::F32, true).unwrap();
    let refused = |dirs: [&Path; 2], named: &str| {
        let error = average(&model, &dirs.map(Path::to_owned), &model.init(1)).unwrap_err().to_string();
        let dirs = dirs.map(|dir| dir.to_str().unwrap());
        assert!(error.contains(named) && dirs.iter().all(|dir| error.contains(dir)), "{error}");
    };
    average(&model, &[one.clone(), other.clone()], &model.init(1)).unwrap();
    refused([&one, &deep], &format!("model.layers.{}.", processor.config.text.num_hidden_layers - 1));
    refused([&deep, &one], "model.layers.");
    let tokenizer = other.join("tokenizer_config.json");
    let text = std::fs::read_to_string(&tokenizer).unwrap();
    std::fs::write(&tokenizer, text.replacen('{', "{\"added\": 1,", 1)).unwrap();
    refused([&one, &other], "tokenizer_config.json");
}
