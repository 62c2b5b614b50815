//! What is trained is what the engine runs.

use std::path::Path;

use keye_backend::{BLOCK_TOKENS, Cpu, CpuOptions, KvDtype, Reference};
use keye_media::{MediaKind, Patches, Pixels};
use keye_model::{Batch, Chunk, FeatureRows, KeyeModel, LoadOptions, LogitRows, NoTap, Runner};
use keye_processor::{Checkpoint, ModelConfig};
use keye_train::{ExportDtype, Model, Pack, Params, average, export, load_params};

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
        export(&model, &params, &[fixture()], &dir, dtype).unwrap();
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
        assert!(export(&model, &params, &[fixture()], &dir, dtype).is_err(), "nothing is overwritten");
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
        export(&model, params, &[fixture()], &dir, ExportDtype::F32).unwrap();
        dir
    };
    let (a, b) = (write("a", &params), write("b", &other));
    let start = model.init(1);
    assert_eq!(average(&model, &[a.clone(), a.clone(), a.clone()], &start).unwrap(), params);
    let mean = average(&model, &[a, b], &start).unwrap();
    let difference: Vec<f32> = mean.values.iter().zip(&params.values).map(|(m, p)| m - p).collect();
    assert!(difference.iter().all(|d| (d - 0.25).abs() < 1e-5));
    assert!(average(&model, &[], &start).is_err());
}
