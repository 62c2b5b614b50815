//! Every tensor of every case, on every backend of this machine.

use keye_backend::{Backend, Cpu, CpuOptions, Isa, Reference};
use keye_model::{NoTap, Runner};

use crate::support::{Case, FIXTURES, Recorder, encode, generate, load, load_dir, pads, prefill, write_bf16};

/// Cases whose patches are whole in the files.
const CASES: [&str; 8] =
    ["image_big", "image_one", "image_options", "image_two", "text_only", "text_system", "video_file", "video_frames"];

/// Largest absolute differences of an f32 implementation (fixtures/README.md), and how many tensors there are of each in all
/// the cases.
const TOLERANCES: [(&str, f32, usize); 8] = [
    ("vit_embeddings", 1e-5, 10),
    ("vit_layer0", 1e-4, 10),
    ("vit_out", 1e-5, 10),
    ("projector", 1e-5, 10),
    ("inputs_embeds", 1e-5, 14),
    ("lm_layer0", 1e-4, 14),
    ("lm_final_norm", 1e-4, 14),
    ("logits_last8", 2e-4, 14),
];

pub fn check<B: Backend>(make: impl Fn() -> B) {
    check_loaded(&make().describe(), |fixture| Box::new(load(fixture, make())));
}

/// Every case of every fixture on a model that `load` makes.
pub fn check_loaded(name: &str, load: impl Fn(&str) -> Box<dyn Runner>) {
    let mut worst = TOLERANCES.map(|(name, ..)| (name, 0.0f32));
    let mut compared = TOLERANCES.map(|(name, ..)| (name, 0));
    let mut cases = 0;
    for fixture in FIXTURES {
        let mut model = load(fixture);
        let pads = pads(fixture);
        for case in CASES.into_iter().filter_map(|name| Case::open(fixture, name)) {
            cases += 1;
            let mut tap = Recorder::default();
            let ids = encode(&mut *model, &case, &mut tap);
            let logits = prefill(&mut *model, &case, &ids, pads, &mut tap);
            tap.0.insert("logits_last8".into(), logits.clone());
            for (i, (stage, tolerance, _)) in TOLERANCES.into_iter().enumerate() {
                for prefix in ["image_", "video_", ""] {
                    let name = format!("{prefix}{stage}");
                    if !case.has(&name) {
                        continue;
                    }
                    let difference = case.difference(&name, &tap.0[&name]);
                    assert!(difference <= tolerance, "{fixture}/{} {name}: {difference} > {tolerance}", case.name);
                    worst[i].1 = worst[i].1.max(difference);
                    compared[i].1 += 1;
                }
            }
            assert_eq!(generate(&mut *model, &case, &logits, 16), case.generated, "{fixture}/{}", case.name);
            for id in ids {
                model.release(id);
            }
        }
    }
    assert_eq!(cases, 14, "cases with whole patches");
    assert_eq!(compared, TOLERANCES.map(|(name, _, count)| (name, count)), "tensors that were compared");
    println!("{name}: largest differences {worst:?}");
}

#[test]
fn reference_reproduces_every_case() {
    check(|| Reference);
}

#[test]
fn every_instruction_set_reproduces_every_case() {
    for isa in Isa::available() {
        check(|| Cpu::new(CpuOptions { threads: Some(2), isa: Some(isa) }).unwrap());
    }
}

/// Weights stored as bf16 are used where they lie; the arithmetic stays f32.
#[test]
fn bf16_weights_give_the_golden_logits() {
    for fixture in FIXTURES {
        let dir = tempfile::tempdir().unwrap();
        write_bf16(fixture, dir.path());
        assert!(dir.path().join("model-00003-of-00003.safetensors").is_file(), "three shards");
        for isa in Isa::available() {
            let mut model = load_dir(dir.path(), Cpu::new(CpuOptions { threads: Some(2), isa: Some(isa) }).unwrap());
            let mut worst = 0.0f32;
            for case in CASES.into_iter().filter_map(|name| Case::open(fixture, name)) {
                let ids = encode(&mut model, &case, &mut NoTap);
                let logits = prefill(&mut model, &case, &ids, pads(fixture), &mut NoTap);
                let difference = case.difference("bf16_weights_f32_math_logits_last8", &logits);
                assert!(difference <= 2e-4, "{fixture}/{}: {difference}", case.name);
                worst = worst.max(difference);
            }
            println!("{fixture}, {}: largest difference {worst}", isa.name());
        }
    }
}
