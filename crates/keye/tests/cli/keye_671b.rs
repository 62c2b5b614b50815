//! Keye-VL-671B: a tiny one in 8 bits through the binary, and the plan of the real one.

use std::path::Path;

use keye_processor::{Checkpoint, Dtype, NewTensor, write_file};

use crate::support::{input, keye};

fn write(dir: &Path, dtype: &str) {
    let dir = dir.to_str().unwrap();
    keye(&["bench", "--write-checkpoint", dir, "--preset", "keye-671b-tiny", "--dtype", dtype]).ok();
}

#[test]
fn a_tiny_one_in_8_bits_is_inspected_and_answers() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    write(&dir, "fp8");
    let model = dir.to_str().unwrap();
    let facts = keye(&["inspect", model, "--json"]).ok().json();
    assert_eq!(facts["variant"], "Keye-VL-671B-A37B");
    assert_eq!(facts["weights"]["complete"], true);
    assert!(facts["weights"]["types"]["F8_E4M3"]["tensors"].as_u64() > Some(100), "{facts:#}");
    // 4 layers of 32 + 8 values.
    assert_eq!(facts["kv_cache"]["bf16"]["bytes_per_token"], 4 * 40 * 2);
    assert_eq!(facts["plan"]["devices"][0]["fits"], true);
    keye(&["ask", "-m", model, "--max-tokens", "3", &input("one.png"), "What is this?"]).ok();
    let packed = folder.path().join("int4");
    let packed = packed.to_str().unwrap();
    let report = keye(&["quantize", model, "--to", "int4", "-o", packed, "--json"]).ok().json();
    assert_eq!(facts["plan"]["quantized_bytes"]["int4"], report["report"]["bytes"]);
    keye(&["ask", "-m", packed, "--max-tokens", "3", &input("one.png"), "What is this?"]).ok();
    let facts = keye(&["inspect", packed, "--json"]).ok().json();
    assert_eq!(facts["weights"]["types"]["F8_E4M3"]["tensors"], 8, "kv_a and kv_b stay: {facts:#}");

    // The same from bare ids, on both backends.
    let ids: Vec<u8> = (0..90i64).flat_map(|i| (i * 7 % 600).to_le_bytes()).collect();
    let inputs = folder.path().join("inputs.safetensors");
    let new = NewTensor { name: "input_ids".into(), dtype: Dtype::I64, shape: vec![90] };
    write_file(&inputs, &[(new, &ids[..])]).unwrap();
    let out = folder.path().join("out.safetensors");
    let [inputs, out] = [&inputs, &out].map(|path| path.to_str().unwrap());
    let trace = ["trace", "-m", model, "--inputs", inputs, "--generate", "4", "--out", out];
    keye(&trace).ok();
    let tensors = Checkpoint::open_file(out.as_ref()).unwrap();
    for (name, shape) in [
        ("logits", vec![90, 960]),
        ("hidden_states.4", vec![90, 64]),
        ("router_index.1", vec![90, 4]),
        ("generated", vec![4]),
        ("position_ids", vec![3, 90]),
    ] {
        assert_eq!(tensors.get(name).unwrap_or_else(|| panic!("{name}")).shape, shape, "{name}");
    }
    assert!(tensors.get("router_index.0").is_none(), "the first layer is dense");
    let golden = folder.path().join("golden.safetensors");
    std::fs::rename(out, &golden).unwrap();
    keye(&[&trace[..], &["--backend", "cpu", "--compare", golden.to_str().unwrap()]].concat()).ok();
}

#[test]
fn bf16_weights_are_read_and_quantised_too() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    write(&dir, "bf16");
    keye(&["ask", "-m", dir.to_str().unwrap(), "--max-tokens", "2", "Hello?"]).ok();
    let packed = folder.path().join("int4");
    let packed = packed.to_str().unwrap();
    keye(&["quantize", dir.to_str().unwrap(), "--to", "int4", "-o", packed]).ok();
    keye(&["ask", "-m", packed, "--max-tokens", "2", "Hello?"]).ok();
}

#[test]
fn the_real_size_is_planned_without_a_checkpoint() {
    let plan = keye(&["inspect", "--preset", "keye-vl-671b", "--json"]).ok().json();
    assert_eq!(plan["plan"]["cache_bytes_per_token"], 61 * 1152);
    assert!(plan["plan"]["weight_bytes"].as_u64() > Some(670_000_000_000));
    let text = keye(&["inspect", "--preset", "keye-vl-671b"]).ok().stdout;
    for part in
        ["Keye-VL-671B-A37B", "F8_E4M3", "quantised", "int4 3", "8 x 80 GB", "does not fit", "16 x 80 GB", "8 x 141 GB"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    let refused =
        keye(&["bench", "--write-checkpoint", dir.to_str().unwrap(), "--preset", "keye-vl-8b", "--dtype", "fp8"]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("fp8 where the model's are"), "{refused:#?}");
}
