//! `keye trace` of every golden case: names, types, shapes, values.

use std::path::Path;

use keye_processor::{Checkpoint, Dtype, NewTensor, StoredTensor, write_file};

use crate::support::{FIXTURES, Run, ask, cases, fixture, input, keye};

/// Largest absolute differences of an f32 implementation (fixtures/README.md). What is not here is exact.
const TOLERANCES: [(&str, f64); 9] = [
    ("vit_embeddings", 1e-5),
    ("vit_layer0", 1e-4),
    ("vit_out", 1e-5),
    ("projector", 1e-5),
    ("inputs_embeds", 1e-5),
    ("lm_layer0", 1e-4),
    ("lm_final_norm", 1e-4),
    ("logits_last8", 2e-4),
    ("pixel_values", 1e-6),
];

fn trace(name: &str, case: &str, out: &Path, more: &[&str]) -> Run {
    let dir = fixture(name);
    let path = |part: &str| dir.join(part).display().to_string();
    let (model, request) = (path("model"), path(&format!("cases/{case}.json")));
    let (root, out) = (dir.display().to_string(), out.display().to_string());
    let fixed = ["trace", "-m", &model, "--request", &request, "--media-root", &root, "--out", &out];
    keye(&[&fixed[..], more].concat())
}

fn integers(tensor: &StoredTensor) -> Vec<i64> {
    assert_eq!(tensor.dtype, Dtype::I64, "{}", tensor.name);
    tensor.bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
}

fn values(tensor: &StoredTensor) -> Vec<f64> {
    match tensor.dtype {
        Dtype::U8 => tensor.bytes.iter().map(|b| f64::from(*b)).collect(),
        Dtype::I64 => integers(tensor).into_iter().map(|v| v as f64).collect(),
        _ => tensor.bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
    }
}

/// Largest difference of the rows that the golden tensor has.
fn difference(golden: &Checkpoint, want: &StoredTensor, found: &StoredTensor, at: &str) -> f64 {
    assert_eq!(want.dtype, found.dtype, "{at}");
    assert_eq!(want.shape[1..], found.shape[1..], "{at}");
    let width: usize = want.shape[1..].iter().product();
    let rows = match golden.get(&format!("{}.rows", want.name)) {
        Some(rows) => integers(&rows).into_iter().map(|row| row as usize).collect(),
        None => {
            assert_eq!(want.shape, found.shape, "{at}");
            (0..want.shape[0]).collect::<Vec<_>>()
        }
    };
    let (want, found) = (values(want), values(found));
    let pairs = rows
        .iter()
        .zip(want.chunks_exact(width))
        .flat_map(|(row, want)| want.iter().zip(&found[row * width..(row + 1) * width]).map(|(a, b)| (a - b).abs()));
    pairs.fold(0.0, |worst, d| if d.is_nan() { f64::INFINITY } else { worst.max(d) })
}

/// Compares all tensors of a case.
fn check(name: &str, case: &str, out: &Path) {
    let golden = Checkpoint::open_file(&fixture(name).join(format!("cases/{case}.safetensors"))).unwrap();
    let found = Checkpoint::open_file(out).unwrap();
    let mut compared = 0;
    for tensor in golden.names().filter(|name| !name.ends_with(".rows") && !name.starts_with("bf16_")) {
        let at = format!("{name}/{case}/{tensor}");
        let want = golden.get(tensor).unwrap();
        let have = found.get(tensor).unwrap_or_else(|| panic!("{at} is missing"));
        let worst = difference(&golden, &want, &have, &at);
        let stage = tensor.trim_start_matches("image_").trim_start_matches("video_");
        let limit = TOLERANCES.iter().find(|(name, _)| stage == *name).map_or(0.0, |(_, limit)| *limit);
        assert!(worst <= limit, "{at}: differs by {worst:e}, allowed are {limit:e}");
        compared += 1;
    }
    assert!(compared >= 8, "{name}/{case}: {compared}");
}

/// Whether all patches of a case are in its file.
fn has_all_pixels(name: &str, case: &str) -> bool {
    let golden = Checkpoint::open_file(&fixture(name).join(format!("cases/{case}.safetensors"))).unwrap();
    let recorded = |tensor: &str| golden.get(tensor).is_some() && golden.get(&format!("{tensor}.rows")).is_none();
    let images = golden.get("image_grid_thw").is_none() || recorded("pixel_values_u8");
    images && (golden.get("video_grid_thw").is_none() || recorded("pixel_values_videos_u8"))
}

#[test]
fn recorded_pixels_give_the_golden_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("trace.safetensors");
    let mut traced = 0;
    for name in FIXTURES {
        for case in cases(name).into_iter().filter(|case| has_all_pixels(name, case)) {
            let golden = fixture(name).join(format!("cases/{case}.safetensors")).display().to_string();
            for backend in ["reference", "cpu"] {
                let more = ["--pixels", &golden, "--compare", &golden, "--backend", backend];
                let run = trace(name, &case, &out, &more).ok();
                let line = run.stdout.lines().find(|line| line.starts_with("input_ids")).unwrap();
                assert!(line.ends_with("equal"), "{line}");
                check(name, &case, &out);
                traced += 1;
            }
        }
    }
    assert!(traced >= 2 * 14, "{traced}");
}

#[test]
fn media_files_give_the_golden_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("trace.safetensors");
    for name in FIXTURES {
        for case in cases(name) {
            trace(name, &case, &out, &[]).ok();
            check(name, &case, &out);
        }
    }
}

#[test]
fn two_ranks_give_the_golden_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("trace.safetensors");
    for backend in ["reference", "cpu"] {
        trace("keye-1_5-tiny", "image_two", &out, &["--tp", "2", "--backend", backend]).ok();
        check("keye-1_5-tiny", "image_two", &out);
    }
    let run = trace("keye-1_5-tiny", "image_two", &folder.path().join("none"), &["--tp", "8"]);
    assert_eq!(run.code, Some(2), "{run:#?}");
    let words = "4 query heads do not divide among 8 ranks (--tp); this model takes 1, 2, 4";
    assert!(run.stderr.contains(words), "{run:#?}");
    let ask = |ranks| ask(&["--tp", ranks, "--json", &input("one.png"), "What is this?"]).ok().json()["answer"].clone();
    assert_eq!(ask("2"), ask("1"));
}

#[test]
fn patches_of_another_grid_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("trace.safetensors");
    let other = fixture("keye-1_5-tiny").join("cases/image_big.safetensors").display().to_string();
    let run = trace("keye-1_5-tiny", "image_one", &out, &["--pixels", &other]);
    assert_eq!(run.code, Some(1), "{run:#?}");
    assert!(run.stderr.contains("image_grid_thw is [[") && run.stderr.contains("decoded media have [["), "{run:#?}");
    assert!(!out.exists());
    let run = trace("keye-1_5-tiny", "image_one", &out, &["--compare", &other]);
    assert_eq!(run.code, Some(1), "{run:#?}");
    assert!(run.stderr.contains("input_ids") && out.exists(), "{run:#?}");
}

/// `keye trace --inputs` of the tiny 2.0 model.
fn trace_inputs(inputs: &Path, out: &Path, more: &[&str]) -> Run {
    let model = fixture("keye-2-tiny").join("model").display().to_string();
    let (inputs, out) = (inputs.display().to_string(), out.display().to_string());
    keye(&[&["trace", "-m", &model, "--inputs", &inputs, "--out", &out][..], more].concat())
}

/// Whole numbers equal, values within 1e-4 absolute and relative of the largest (fixtures/README.md).
#[test]
fn given_ids_and_pixels_give_the_golden_tensors_of_2() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("trace.safetensors");
    for (case, more) in [
        ("text", &["--attention", "dsa"][..]),
        ("short", &[]),
        ("text_dense", &["--attention", "dense"]),
        ("decode", &["--generate", "8"]),
        ("multimodal", &["--generate", "3"]),
    ] {
        let path = fixture("keye-2-tiny").join(format!("golden_{case}.safetensors"));
        let golden = Checkpoint::open_file(&path).unwrap();
        for backend in ["reference", "cpu"] {
            trace_inputs(&path, &out, &[&["--backend", backend][..], more].concat()).ok();
            let found = Checkpoint::open_file(&out).unwrap();
            for tensor in golden.names().filter(|name| !name.ends_with(".rows")) {
                let at = format!("{case}/{tensor}");
                let (want, have) = (golden.get(tensor).unwrap(), found.get(tensor).unwrap_or_else(|| panic!("{at}")));
                if want.dtype == Dtype::F32 && !tensor.starts_with("pixel_values") {
                    let worst = difference(&golden, &want, &have, &at);
                    assert!(worst <= 1e-4, "{at}: differs by {worst:e}");
                } else {
                    // The golden selections of the pictures stop at the prompt, ours go on with what was generated.
                    let bytes = have.bytes.get(..want.bytes.len()).unwrap_or(&have.bytes);
                    assert_eq!((want.dtype, &want.shape[1..]), (have.dtype, &have.shape[1..]), "{at}");
                    assert!(want.bytes == bytes, "{at}: other values");
                    assert!(have.shape == want.shape || tensor.starts_with("selected."), "{at}: {:?}", have.shape);
                }
            }
            assert_eq!(found.get("selected.0").is_none(), case == "text_dense");
        }
    }
}

/// Bytes, scales and scores of the FP8 scorer; the scores are golden_fp8's of the last token (README of the golden data: 1e-4).
#[test]
fn the_fp8_scorer_is_an_option() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("trace.safetensors");
    let golden = fixture("keye-2-tiny").join("golden_text.safetensors");
    trace_inputs(&golden, &out, &["--scorer", "fp8"]).ok();
    let found = Checkpoint::open_file(&out).unwrap();
    let of = |name: &str| found.get(name).unwrap_or_else(|| panic!("no {name}"));
    assert_eq!((of("fp8_q.0").shape, of("fp8_q.0").dtype), (vec![56, 4, 32], Dtype::U8));
    assert_eq!(
        (of("fp8_k.2").shape, of("fp8_q_scale.2").shape, of("fp8_k_scale.0").shape),
        (vec![56, 32], vec![56, 4], vec![56])
    );
    let scores = of("index_scores.0");
    assert_eq!((&scores.shape[..], scores.dtype), (&[56, 56][..], Dtype::F32));
    let scores = scores.bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).skip(55 * 56);
    let expected =
        [1.183_559, 0.0, -0.085_875_72, -0.571_646_75, 0.112_860_5, -0.286_181_84, 0.708_820_4, -1.099_260_3];
    for (found, expected) in scores.zip(expected) {
        assert!((found - expected).abs() <= 1e-4 * f32::abs(expected) + 1e-6, "{found} for {expected}");
    }
    let run = trace_inputs(&golden, &out, &["--scorer", "fp8", "--attention", "dense"]);
    assert_eq!(run.code, Some(2), "{run:#?}");
    assert!(run.stderr.contains("dense was asked for"), "{run:#?}");
}

#[test]
fn wrong_inputs_of_2_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (inputs, out) = (folder.path().join("inputs.safetensors"), folder.path().join("trace.safetensors"));
    let tensor = |name: &str, dtype, shape: &[usize]| NewTensor { name: name.into(), dtype, shape: shape.to_vec() };
    let i64s = |values: &[i64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let ids = |values: &[i64]| (tensor("input_ids", Dtype::I64, &[values.len()]), i64s(values));
    let grid = |row: [i64; 3]| (tensor("image_grid_thw", Dtype::I64, &[1, 3]), i64s(&row));
    let pixels = |n: usize| (tensor("pixel_values", Dtype::F32, &[n, 3, 14, 14]), vec![0; n * 588 * 4]);
    for (tensors, words) in [
        (vec![grid([1, 2, 2])], "no tensor input_ids"),
        (vec![ids(&[])], "expected I64 [n], one token or more, found I64 [0]"),
        (vec![ids(&[1, 320])], "320 is no id below 320"),
        (vec![(tensor("input_ids", Dtype::F32, &[1]), vec![0; 4])], "found F32 [1]"),
        (vec![ids(&[1]), grid([1, 2, 2])], "image_grid_thw without pixel_values"),
        (vec![ids(&[1]), pixels(4)], "pixel_values without image_grid_thw"),
        (vec![ids(&[1]), pixels(4), grid([1, 3, 2])], "multiples of 2"),
        (vec![ids(&[1]), pixels(4), grid([1, 4, 2])], "expected 8 patches of 588 values"),
        (vec![ids(&[1]), pixels(4), grid([1, 2, 2])], "more grids than runs of pads"),
    ] {
        let tensors: Vec<_> = tensors.iter().map(|(tensor, bytes)| (tensor.clone(), &bytes[..])).collect();
        write_file(&inputs, &tensors).unwrap();
        let run = trace_inputs(&inputs, &out, &[]);
        // Grids and pads are told apart by what reads requests, whose faults are wrong usage.
        let code = if words.contains("runs of pads") { 2 } else { 1 };
        assert_eq!(run.code, Some(code), "{run:#?}");
        assert!(run.stderr.contains(words) && !out.exists(), "{words}: {run:#?}");
    }
    let golden = fixture("keye-2-tiny").join("golden_short.safetensors");
    let run = trace_inputs(&golden, &out, &["--generate", "4096"]);
    assert_eq!(run.code, Some(1), "{run:#?}");
    assert!(run.stderr.contains("the model's longest is 4096"), "{run:#?}");
    let run = trace_inputs(&golden, &out, &["--request", "r.json"]);
    assert_eq!(run.code, Some(2), "{run:#?}");
}
