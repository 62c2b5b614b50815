//! Checkpoints in 8-bit floats, quantised: what is packed is what their values are packed to.

use std::fs;
use std::path::Path;

use keye::presets::Preset;
use keye::quantize::{Role, quantize, quantized_bytes};
use keye::random_checkpoint;
use keye_backend::fp8_rows;
use keye_processor::{Checkpoint, Dtype, ModelConfig, NewTensor, PackedFormat, write_file};
use serde_json::{Value, json};

use crate::experts::logits;

/// Rows and columns of a block: tiles of 16 rows begin inside of blocks, and blocks at the edges are partial.
const BLOCK: [usize; 2] = [24, 40];

type Tensors = Vec<(NewTensor, Vec<u8>)>;

fn write(dir: &Path, config: &Value, tensors: &Tensors) {
    fs::create_dir(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let tensors: Vec<_> = tensors.iter().map(|(tensor, bytes)| (tensor.clone(), &bytes[..])).collect();
    write_file(&dir.join("model.safetensors"), &tensors).unwrap();
}

/// A tiny 671B in 8-bit floats with scales that differ, and its values in f32.
fn models(root: &Path) {
    let random = root.join("random");
    random_checkpoint::write(&random, Preset::Keye671bTiny, Dtype::F8E4M3, 5, &mut |_, _| true).unwrap();
    let checkpoint = Checkpoint::open(&random).unwrap();
    let (mut blocks, mut plain) = (Tensors::new(), Tensors::new());
    for (number, name) in checkpoint.names().filter(|name| !name.ends_with("_scale_inv")).enumerate() {
        let stored = checkpoint.get(name).unwrap();
        let tensor = NewTensor { name: name.into(), dtype: stored.dtype, shape: stored.shape.clone() };
        if stored.dtype != Dtype::F8E4M3 {
            plain.push((tensor.clone(), stored.bytes.to_vec()));
            blocks.push((tensor, stored.bytes.to_vec()));
            continue;
        }
        let (rows, cols) = (stored.shape[0], stored.shape[1]);
        let [down, across] = [rows.div_ceil(BLOCK[0]), cols.div_ceil(BLOCK[1])];
        let scales: Vec<f32> = (0..down * across).map(|i| 2e-4 * (1.0 + ((number + 3 * i) % 7) as f32 / 4.0)).collect();
        let value = |(i, bits): (usize, &u8)| {
            fp8_rows::widen(*bits) * scales[i / cols / BLOCK[0] * across + i % cols / BLOCK[1]]
        };
        let values = stored.bytes.iter().enumerate().map(value).flat_map(f32::to_le_bytes).collect();
        plain.push((NewTensor { dtype: Dtype::F32, ..tensor.clone() }, values));
        let scales_name = format!("{name}_scale_inv");
        blocks.push((tensor, stored.bytes.to_vec()));
        blocks.push((
            NewTensor { name: scales_name, dtype: Dtype::F32, shape: vec![down, across] },
            scales.into_iter().flat_map(f32::to_le_bytes).collect(),
        ));
    }
    let mut config: Value = serde_json::from_slice(&fs::read(random.join("config.json")).unwrap()).unwrap();
    config["quantization_config"]["weight_block_size"] = json!(BLOCK);
    write(&root.join("fp8"), &config, &blocks);
    config.as_object_mut().unwrap().remove("quantization_config");
    write(&root.join("plain"), &config, &plain);
}

#[test]
fn eight_bit_floats_are_packed_as_their_values() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    models(root);
    for to in [PackedFormat::Int4, PackedFormat::Int8] {
        let [fp8, plain] = ["fp8", "plain"].map(|from| {
            let dir = root.join(format!("{from}-{to}"));
            let report = quantize(&root.join(from), to, &dir, &mut |_, _| true).unwrap();
            (dir, report)
        });
        let (original, expected) = (Checkpoint::open(&root.join("fp8")).unwrap(), Checkpoint::open(&plain.0).unwrap());
        let found = Checkpoint::open(&fp8.0).unwrap();
        let (mut packed, mut kept) = (0, 0);
        for name in found.names() {
            let tensor = found.get(name).unwrap();
            let same = match original.get(name).unwrap() {
                stored if Role::of(name, &stored.shape).stored_as(to).is_some() => {
                    packed += 1;
                    assert!(tensor.packed.is_some(), "{name}");
                    expected.get(name).unwrap().bytes
                }
                stored => {
                    kept += usize::from(stored.dtype == Dtype::F8E4M3);
                    stored.bytes
                }
            };
            assert!(tensor.bytes == same, "{name}");
        }
        assert!(packed > 100 && kept == 2 * 4, "{packed} packed, {kept} of kv_a and kv_b kept in 8 bits");
        assert_eq!(found.names().count(), expected.names().count() + kept, "no scales but of what is kept");
        assert_eq!(fp8.1.bytes, found.total_bytes());
        let config = ModelConfig::load(&root.join("fp8")).unwrap();
        assert_eq!(quantized_bytes(&config, &original, to).unwrap(), fp8.1.bytes);
        assert_eq!(logits(&fp8.0), logits(&plain.0));
        let again = quantize(&fp8.0, to, &root.join("again"), &mut |_, _| true).unwrap_err();
        assert!(again.to_string().contains("is quantised already"), "{again:#}");
    }
}

#[test]
fn scales_that_do_not_fit_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    models(root);
    let path = root.join("fp8/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["quantization_config"]["weight_block_size"] = json!([16, 40]);
    fs::write(&path, config.to_string()).unwrap();
    let error = quantize(&root.join("fp8"), PackedFormat::Int4, &root.join("q"), &mut |_, _| true).unwrap_err();
    assert!(error.to_string().contains("_scale_inv") && !root.join("q").exists(), "{error:#}");
}
