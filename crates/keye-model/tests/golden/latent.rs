//! Keye-VL-671B's decoder on tiny random checkpoints, plain and in 8-bit blocks, against the plain reference beside it.

use std::path::Path;

use keye_backend::{Backend, Cpu, CpuOptions, Isa, KvDtype, Reference};
use keye_media::{MediaKind, Patches, Pixels};
use keye_model::{
    Batch, Chunk, FeatureRows, KeyeModel, LoadOptions, LogitRows, ModelError, NoTap, Runner, Tap, weight_layout,
};
use keye_processor::{Checkpoint, Dtype, ModelConfig, NewTensor, write_file};

use crate::latent_reference::*;
use crate::parallel;
use crate::support::Recorder;

/// Rows and columns of a block: no dimension is a multiple of them.
const BLOCK: [usize; 2] = [16, 20];
const TOKENS: usize = 150;

fn write_config(dir: &Path) {
    let text = format!(
        r#"{{
            "architectures": ["KeyeVLMoeForConditionalGeneration"], "hidden_size": {HIDDEN},
            "num_hidden_layers": {LAYERS}, "num_attention_heads": {HEADS}, "q_lora_rank": {Q_RANK},
            "kv_lora_rank": {RANK}, "qk_nope_head_dim": {NOPE}, "qk_rope_head_dim": {ROPE}, "v_head_dim": {V},
            "intermediate_size": {DENSE}, "moe_intermediate_size": {EXPERT}, "first_k_dense_replace": {FIRST_MOE},
            "n_routed_experts": {EXPERTS}, "n_shared_experts": 1, "num_experts_per_tok": {TOP}, "n_group": {GROUPS},
            "topk_group": {TOP_GROUPS}, "routed_scaling_factor": {SCALING}, "rms_norm_eps": {EPS},
            "vocab_size": {VOCAB}, "rope_theta": {THETA}, "max_position_embeddings": 2560,
            "rope_scaling": {{
                "type": "yarn", "factor": {FACTOR}, "original_max_position_embeddings": {ORIGINAL},
                "beta_fast": {BETA_FAST}, "beta_slow": {BETA_SLOW}, "mscale": {MSCALE}, "mscale_all_dim": {MSCALE_ALL}
            }},
            "image_token_id": 65, "video_token_id": 66, "fast_video_token_id": 67, "vision_start_token_id": 68,
            "vision_end_token_id": 69, "eos_token_id": 1, "torch_dtype": "float32",
            "vision_config": {{
                "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
                "patch_size": 14, "image_size": 28, "spatial_merge_size": 2
            }},
            "quantization_config": {{
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [{}, {}]
            }}
        }}"#,
        BLOCK[0], BLOCK[1]
    );
    std::fs::write(dir.join("config.json"), text).unwrap();
}

/// Uniform in -1..1, from a name.
fn noise(name: &str, n: usize) -> Vec<f64> {
    let mut state = name.bytes().fold(7u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / f64::from(1 << 23) - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// An e4m3 byte's value, by the definition of the format.
fn e4m3(bits: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f64::from(bits & 7) / 8.0);
    let magnitude = if exponent == 0 { mantissa * 2f64.powi(-6) } else { (1.0 + mantissa) * 2f64.powi(exponent - 7) };
    if bits >> 7 == 1 { -magnitude } else { magnitude }
}

/// What is stored in 8 bits where anything is (spec §6), and the projector, of which each file may decide.
fn is_fp8(name: &str) -> bool {
    let decoder = name.starts_with("model.layers.") && name.contains("_proj") && name.ends_with(".weight");
    decoder || name == "mlp_AR.linear_1.weight"
}

/// Writes the checkpoint to `fp8` in 8-bit blocks and to `plain` as the same values in f32, and returns these.
fn write(fp8: &Path, plain: &Path) -> Tensors {
    let (mut tensors, mut stored, mut dequantised) = (Tensors::new(), Vec::new(), Vec::new());
    write_config(fp8);
    write_config(plain);
    let f32s = |values: &[f64]| values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect::<Vec<u8>>();
    let new = |name: &str, dtype: Dtype, shape: &[usize]| NewTensor { name: name.into(), dtype, shape: shape.into() };
    for tensor in weight_layout(&ModelConfig::load(fp8).unwrap()) {
        let (name, shape) = (tensor.name.as_str(), tensor.shape.as_slice());
        let random = noise(name, shape.iter().product());
        let values: Vec<f64> = if is_fp8(name) {
            let [rows, cols] = [shape[0], shape[1]];
            let (down, across) = (rows.div_ceil(BLOCK[0]), cols.div_ceil(BLOCK[1]));
            let scale = |v: &f64| f64::from((0.002 * (1.5 + v) * (cols as f64 / 32.0).powf(-0.5)) as f32);
            let scales: Vec<f64> = noise(&format!("{name}.s"), down * across).iter().map(scale).collect();
            // Above 64 in magnitude half of the time, some subnormal, no NaN.
            let byte = |v: &f64| ((v.abs() * 126.99) as u8) | if *v < 0.0 { 0x80 } else { 0 };
            let bytes: Vec<u8> = random.iter().map(byte).collect();
            let values = bytes.iter().enumerate().map(|(i, bits)| {
                let (row, col) = (i / cols, i % cols);
                f64::from((e4m3(*bits) * scales[row / BLOCK[0] * across + col / BLOCK[1]]) as f32)
            });
            let values = values.collect();
            stored.push((new(&format!("{name}_scale_inv"), Dtype::F32, &[down, across]), f32s(&scales)));
            stored.push((new(name, Dtype::F8E4M3, shape), bytes));
            values
        } else {
            let fan_in = shape[1..].iter().product::<usize>().max(1) as f64;
            let value = |v: &f64| match name {
                _ if name.contains("norm") && name.ends_with("weight") => 1.0 + 0.3 * v,
                _ if name.ends_with("bias") => 0.1 * v,
                "model.embed_tokens.weight" => *v,
                _ => v * (3.0 / fan_in).sqrt(),
            };
            random.iter().map(|v| f64::from(value(v) as f32)).collect()
        };
        let plain = (new(name, Dtype::F32, shape), f32s(&values));
        if !is_fp8(name) {
            stored.push(plain.clone());
        }
        dequantised.push(plain);
        tensors.insert(name.into(), (shape.to_vec(), values));
    }
    // A multi-token prediction layer is left alone.
    stored.push((new(&format!("model.layers.{LAYERS}.eh_proj.weight"), Dtype::U8, &[3]), vec![0; 3]));
    for (dir, tensors) in [(fp8, stored), (plain, dequantised)] {
        let list: Vec<(NewTensor, &[u8])> = tensors.iter().map(|(t, bytes)| (t.clone(), bytes.as_slice())).collect();
        write_file(&dir.join("model.safetensors"), &list).unwrap();
    }
    tensors
}

struct Checkpoints {
    fp8: tempfile::TempDir,
    plain: tempfile::TempDir,
    tensors: Tensors,
}

fn checkpoints() -> Checkpoints {
    let (fp8, plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let tensors = write(fp8.path(), plain.path());
    Checkpoints { fp8, plain, tensors }
}

fn load<B: Backend>(dir: &Path, backend: B, kv_dtype: KvDtype) -> Result<KeyeModel<B>, ModelError> {
    let config = ModelConfig::load(dir).unwrap();
    let processor = config.facts().media.processor;
    let options = LoadOptions { cache_tokens: 512, kv_dtype };
    KeyeModel::load(backend, &config, &processor, &Checkpoint::open(dir).unwrap(), options)
}

fn cpu(isa: Option<Isa>, threads: usize) -> Cpu {
    Cpu::new(CpuOptions { threads: Some(threads), isa }).unwrap()
}

fn prompt() -> Vec<u32> {
    (0..TOKENS as u32).map(|i| (i * i * 7 + 3 * i) % 64).collect()
}

fn chunk(tokens: &[u32], range: std::ops::Range<usize>, block_table: Vec<u32>) -> Chunk {
    Chunk {
        tokens: tokens[range.clone()].to_vec(),
        start: range.start,
        positions: range.clone().map(|i| [i as u32; 3]).collect(),
        features: vec![],
        block_table,
        logits: LogitRows::Range(0..range.len()),
    }
}

/// Logits of all tokens, run in pieces that end at `cuts`, each beside another sequence.
fn run(model: &mut dyn Runner, tokens: &[u32], cuts: &[usize], tap: &mut dyn Tap) -> Vec<f32> {
    let (mut logits, mut start) = (Vec::new(), 0);
    for end in cuts.iter().copied().chain([tokens.len()]) {
        let mut chunks = vec![chunk(tokens, start..end, vec![5, 0, 3])];
        if !cuts.is_empty() {
            chunks.insert(0, chunk(&[9, 8, 7, 6, 5], 0..1 + start % 5, vec![2]));
        }
        logits.extend(model.step(&Batch { chunks }, tap).unwrap().logits.pop().unwrap());
        start = end;
    }
    logits
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Largest difference, relative to the root mean square of what is expected.
fn error(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let rms = (expected.iter().map(|v| v * v).sum::<f64>() / expected.len() as f64).sqrt();
    found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).abs() / rms).fold(0.0, f64::max)
}

fn check<B: Backend>(backend: B, checkpoints: &Checkpoints, expected: &Expected) {
    let name = backend.describe();
    check_loaded(&name, &mut load(checkpoints.fp8.path(), backend, KvDtype::F32).unwrap(), expected);
}

fn check_loaded(name: &str, model: &mut dyn Runner, expected: &Expected) {
    let mut recorder = Recorder::default();
    let logits = run(model, &prompt(), &[], &mut recorder);
    let worst = error(&logits, &expected.logits.concat());
    println!("{name}: largest difference {worst:.2e} of the root mean square");
    assert!(worst < 3e-5, "{name}: {worst}");
    assert_eq!(expected.routed.len(), LAYERS - FIRST_MOE);
    for (layer, rows) in &expected.routed {
        let experts: Vec<f32> = rows.iter().flatten().map(|(expert, _)| *expert as f32).collect();
        assert_eq!(recorder.0[&format!("router_index.{layer}")], experts, "{name}: layer {layer}");
        let weights: Vec<f64> = rows.iter().flatten().map(|(_, weight)| *weight).collect();
        assert!(error(&recorder.0[&format!("router_weight.{layer}")], &weights) < 1e-4);
    }
}

#[test]
fn every_backend_follows_the_formulas() {
    let checkpoints = checkpoints();
    let expected = forward(&checkpoints.tensors, &prompt());
    // Otherwise the routing proves little.
    let used: std::collections::BTreeSet<usize> = expected.routed[&1].iter().flatten().map(|(e, _)| *e).collect();
    assert!(used.len() > EXPERTS / 2, "{used:?}");
    check(Reference, &checkpoints, &expected);
    for isa in Isa::available() {
        check(cpu(Some(isa), 2), &checkpoints, &expected);
    }
}

/// Three ranks, a head and four experts each, with the latent cache on all of them: as the formulas, and bit for bit
/// however the prompt is cut. Blocks of 8-bit weights that would be cut are refused.
#[test]
fn three_ranks_follow_the_formulas() {
    let checkpoints = checkpoints();
    let expected = forward(&checkpoints.tensors, &prompt());
    let config = ModelConfig::load(checkpoints.plain.path()).unwrap();
    let mut model = parallel::load(checkpoints.plain.path(), &config, 3, || cpu(None, 1)).unwrap();
    check_loaded("three ranks", &mut model, &expected);
    let whole = run(&mut model, &prompt(), &[], &mut NoTap);
    for cuts in [vec![1, 2, 40, 64, 65, 128], vec![63, 64, 149]] {
        assert_eq!(bits(&run(&mut model, &prompt(), &cuts, &mut NoTap)), bits(&whole), "{cuts:?}");
    }
    let error = parallel::load(checkpoints.fp8.path(), &config, 3, || Reference).err().unwrap().to_string();
    assert!(error.contains("o_proj") && error.contains("multiples of 20"), "{error}");
}

#[test]
fn chunks_and_single_tokens_equal_the_whole_bit_for_bit() {
    let checkpoints = checkpoints();
    let tokens = prompt();
    fn whole_and_cut<B: Backend>(backend: impl Fn() -> B, dir: &Path, tokens: &[u32]) {
        for kv_dtype in [KvDtype::F32, KvDtype::Bf16] {
            let mut model = load(dir, backend(), kv_dtype).unwrap();
            let whole = run(&mut model, tokens, &[], &mut NoTap);
            for cuts in [vec![1, 2, 40, 64, 65, 128], (1..TOKENS).collect(), vec![63, 64, 149]] {
                let found = run(&mut model, tokens, &cuts, &mut NoTap);
                assert!(bits(&found) == bits(&whole), "{} {kv_dtype:?} {cuts:?}", model.describe());
            }
        }
    }
    whole_and_cut(|| Reference, checkpoints.fp8.path(), &tokens);
    for isa in Isa::available() {
        whole_and_cut(|| cpu(Some(isa), 3), checkpoints.fp8.path(), &tokens);
    }
}

#[test]
fn eight_bit_weights_equal_the_dequantised_bit_for_bit() {
    let checkpoints = checkpoints();
    let logits = |dir: &Path, backend: Cpu| {
        let mut model = load(dir, backend, KvDtype::F32).unwrap();
        let pixels = (0..4 * 6 * 588).map(|i| (i * i % 251) as u8).collect();
        let patches = Patches { pixels: Pixels::U8(pixels), grid_thw: vec![[1, 4, 6]], hash: [0; 32] };
        let feature = model.encode(MediaKind::Image, &patches, &mut NoTap, &mut |_, _| true).unwrap();
        let features = vec![FeatureRows { at: 3, feature, row: 0, len: 6 }];
        let chunk = Chunk { features, ..chunk(&prompt(), 0..40, vec![0]) };
        model.step(&Batch { chunks: vec![chunk] }, &mut NoTap).unwrap().logits.remove(0)
    };
    for isa in Isa::available() {
        let [found, expected] = [&checkpoints.fp8, &checkpoints.plain].map(|dir| logits(dir.path(), cpu(Some(isa), 2)));
        assert!(bits(&found) == bits(&expected), "{isa:?}");
    }
}

#[test]
fn scales_that_are_missing_or_wrong_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = checkpoints();
    std::fs::copy(checkpoints.fp8.path().join("config.json"), dir.path().join("config.json")).unwrap();
    let stored = Checkpoint::open(checkpoints.fp8.path()).unwrap();
    let name = "model.layers.0.self_attn.o_proj.weight_scale_inv";
    let error = |change: &dyn Fn(&mut NewTensor)| {
        let mut list = Vec::new();
        for stored in stored.names().map(|name| stored.get(name).unwrap()) {
            let mut new = NewTensor { name: stored.name.clone(), dtype: stored.dtype, shape: stored.shape };
            if new.name == name {
                change(&mut new);
            }
            list.push((new, stored.bytes));
        }
        let list: Vec<(NewTensor, &[u8])> = list.iter().map(|(new, bytes)| (new.clone(), &bytes[..])).collect();
        write_file(&dir.path().join("model.safetensors"), &list).unwrap();
        load(dir.path(), Reference, KvDtype::F32).map(|_| ()).unwrap_err().to_string()
    };
    let missing = error(&|tensor| tensor.name = "unknown".into());
    assert!(missing.contains(name) && missing.contains("missing"), "{missing}");
    let shape = error(&|tensor| tensor.shape.reverse());
    assert!(shape.contains(name) && shape.contains("expected shape [3, 2], found [2, 3]"), "{shape}");
    let dtype = error(&|tensor| tensor.dtype = Dtype::I32);
    assert!(dtype.contains(name) && dtype.contains("expected F32 scales, found I32"), "{dtype}");
}
