//! Random checkpoints have the layout of the golden ones, and never half of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use keye::presets::Preset;
use keye::random_checkpoint::write;
use keye_processor::{Checkpoint, Dtype, Overrides, Processor};
use serde_json::Value;

fn fixture(model: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(model).join("model")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn layout(dir: &Path) -> BTreeMap<String, Vec<usize>> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    checkpoint.names().map(|name| (name.to_owned(), checkpoint.get(name).unwrap().shape)).collect()
}

/// Everything by which config.json and tokenizer.json steer the models.
#[test]
fn tiny_presets_have_the_layout_of_the_golden_models() {
    for (preset, golden) in [(Preset::KeyeTiny, "keye-preview-tiny"), (Preset::Keye1_5Tiny, "keye-1_5-tiny")] {
        let root = tempfile::tempdir().unwrap();
        let (dir, golden) = (root.path().join("model"), fixture(golden));
        let mut last = (0, 0);
        write(&dir, preset, Dtype::F32, 1, &mut |done, total| {
            last = (done, total);
            true
        })
        .unwrap();
        assert_eq!(layout(&dir), layout(&golden));
        assert_eq!(last, (Checkpoint::open(&dir).unwrap().total_bytes(), last.0));
        let (config, expected) = (json(&dir.join("config.json")), json(&golden.join("config.json")));
        for (key, value) in expected.as_object().unwrap() {
            if !["max_position_embeddings", "transformers_version", "vision_config"].contains(&key.as_str()) {
                assert_eq!(&config[key], value, "{key}");
            }
        }
        for (key, value) in expected["vision_config"].as_object().unwrap() {
            assert_eq!(&config["vision_config"][key], value, "{key}");
        }
        for file in ["chat_template.json", "generation_config.json"] {
            let (mut ours, mut theirs) = (json(&dir.join(file)), json(&golden.join(file)));
            for value in [&mut ours, &mut theirs] {
                value.as_object_mut().unwrap().remove("transformers_version");
            }
            assert_eq!(ours, theirs, "{file}");
        }
        let (ours, theirs) = (json(&dir.join("tokenizer.json")), json(&golden.join("tokenizer.json")));
        for part in ["added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"] {
            assert_eq!(ours[part], theirs[part], "{part}");
        }
        for byte in 0..256 {
            let (symbol, id) = ours["model"]["vocab"].as_object().unwrap().iter().nth(byte).unwrap();
            assert_eq!(&theirs["model"]["vocab"][symbol], id);
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "nothing is left beside the directory");
    }
}

#[test]
fn published_sizes() {
    for (preset, frame) in [(Preset::KeyeVl8b, None), (Preset::KeyeVl1_5_8b, Some(151_677))] {
        let tensors = preset.tensors(Dtype::Bf16).unwrap();
        let shape = |name: &str| tensors.iter().find(|t| t.name == name).unwrap().shape.clone();
        assert_eq!(shape("lm_head.weight"), [151_936, 4096]);
        assert_eq!(shape("model.layers.35.self_attn.k_proj.weight"), [1024, 4096]);
        assert_eq!(shape("visual.vision_model.encoder.layers.26.mlp.fc1.weight"), [4304, 1152]);
        assert_eq!(shape("mlp_AR.pre_norm.weight"), [if frame.is_some() { 4608 } else { 1152 }]);
        let files: BTreeMap<_, _> = preset.files(Dtype::Bf16).into_iter().collect();
        let added = files["tokenizer.json"]["added_tokens"].as_array().unwrap();
        let id = |token: &str| added.iter().find(|t| t["content"] == token).map(|t| t["id"].as_u64().unwrap());
        assert_eq!(id("<|image_pad|>"), Some(151_655));
        assert_eq!(id("<|clip_time_end|>"), Some(151_674));
        assert_eq!(id("<|frame|>"), frame);
        assert_eq!(files["config.json"]["eos_token_id"], 151_645);
        assert_eq!(files["config.json"]["torch_dtype"], "bfloat16");
        assert_eq!(Preset::from_name(preset.name()), Some(preset));
    }
}

#[test]
fn weights_follow_the_seed() {
    let root = tempfile::tempdir().unwrap();
    let written = |name: &str, seed: u64| {
        let dir = root.path().join(name);
        write(&dir, Preset::KeyeTiny, Dtype::Bf16, seed, &mut |_, _| true).unwrap();
        Checkpoint::open(&dir).unwrap()
    };
    let (a, b, c) = (written("a", 1), written("b", 1), written("c", 2));
    let values = |checkpoint: &Checkpoint, name: &str| -> Vec<f32> {
        let bytes = checkpoint.get(name).unwrap().bytes;
        bytes.chunks_exact(2).map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)).collect()
    };
    let name = "model.embed_tokens.weight";
    assert_eq!(values(&a, name), values(&b, name));
    assert_ne!(values(&a, name), values(&c, name));
    assert_ne!(values(&a, name), values(&a, "lm_head.weight"));
    let weights = values(&a, name);
    let std = (weights.iter().map(|x| x * x).sum::<f32>() / weights.len() as f32).sqrt();
    assert!((std - 0.02).abs() < 0.0005, "{std}");
    assert!(values(&a, "model.layers.3.self_attn.q_norm.weight").iter().all(|&x| x == 1.0));
    assert!(values(&a, "mlp_AR.linear_1.bias").iter().all(|&x| x.abs() < 0.01));
}

#[test]
fn what_is_there_is_not_overwritten_and_what_was_left_is_taken_away() {
    let root = tempfile::tempdir().unwrap();
    let (dir, partial) = (root.path().join("m"), root.path().join("m.partial"));
    let tiny = |dir: &Path| write(dir, Preset::KeyeTiny, Dtype::Bf16, 0, &mut |_, _| true).map_err(|e| e.to_string());
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("mine"), "x").unwrap();
    assert!(tiny(&dir).unwrap_err().contains("is there already"));
    fs::remove_file(dir.join("mine")).unwrap();

    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("model-00001-of-00004.safetensors"), "half").unwrap();
    fs::write(partial.join("mine"), "x").unwrap();
    assert!(tiny(&dir).unwrap_err().contains("did not write"));
    assert!(partial.join("mine").exists());
    fs::remove_file(partial.join("mine")).unwrap();
    fs::write(partial.join("model-00001-of-00004.safetensors"), "half").unwrap();
    tiny(&dir).unwrap();
    assert!(!partial.exists() && dir.join("config.json").exists());
    let given_up = dir.join("given-up");
    assert!(write(&given_up, Preset::KeyeTiny, Dtype::Bf16, 0, &mut |_, _| false).is_err());
    assert!(!given_up.exists() && !dir.join("given-up.partial").exists());
    assert!(write(&dir.join("x"), Preset::KeyeTiny, Dtype::U8, 0, &mut |_, _| true).is_err());
}

/// The files of every preset are such that the processor takes them.
#[test]
fn the_processor_reads_every_preset() {
    for preset in Preset::ALL {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in preset.files(Dtype::Bf16) {
            fs::write(dir.path().join(name), content.to_string()).unwrap();
        }
        let processor = Processor::load(dir.path(), &Overrides::default()).unwrap();
        let tokenizer = &processor.tokenizer;
        let text = "<|im_start|>user\nGrüß dich, 世界 42<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n";
        let ids = tokenizer.encode(text).unwrap();
        assert!(ids.contains(&processor.config.image_token_id), "{}: {ids:?}", preset.name());
        assert!(ids.contains(&processor.config.vision_end_token_id));
        assert!(ids.iter().all(|&id| (id as usize) < processor.config.text.vocab_size));
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "user\nGrüß dich, 世界 42\n");
    }
}
