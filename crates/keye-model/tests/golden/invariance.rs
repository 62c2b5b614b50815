//! Row invariance of whole models, bit for bit: however a prompt is cut and whatever runs beside it.

use keye_backend::{Backend, Cpu, CpuOptions, Isa, Reference};
use keye_media::{MediaKind, Patches, Pixels};
use keye_model::{Batch, Chunk, LogitRows, NoTap, Runner};

use crate::support::{Case, encode, load, pads, prefill};

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Of 1.5.
const CHUNKED: &str = "keye-1_5-tiny";

pub fn chunked<B: Backend>(backend: B) {
    check_chunks(&mut load(CHUNKED, backend));
}

/// A model of [`CHUNKED`], with a prompt in all kinds of chunks; returns its logits in one chunk.
pub fn check_chunks(model: &mut dyn Runner) -> Vec<u32> {
    let fixture = CHUNKED;
    let case = Case::open(fixture, "image_two").unwrap();
    let pads = pads(fixture);
    let ids = encode(model, &case, &mut NoTap);
    let whole = bits(&prefill(model, &case, &ids, pads, &mut NoTap));
    let n = case.input_ids.len();
    for cuts in [vec![n - 1], vec![1, 2, 40, 64, 65], (1..n).collect::<Vec<_>>(), vec![63, 64]] {
        let mut logits = Vec::new();
        let mut start = 0;
        for end in cuts.into_iter().chain([n]) {
            let chunk = Chunk {
                tokens: case.input_ids[start..end].to_vec(),
                start,
                positions: case.positions[start..end].to_vec(),
                features: case.features(start..end, &ids, pads),
                block_table: vec![9, 4],
                logits: LogitRows::Range(0..end - start),
            };
            // Beside it a prompt of another sequence, different in every step.
            let other = Chunk {
                tokens: (0..=start as u32 % 5).map(|i| i + 40).collect(),
                start: 0,
                positions: (0..=start as u32 % 5).map(|i| [i; 3]).collect(),
                features: vec![],
                block_table: vec![2],
                logits: LogitRows::Last,
            };
            let chunks = if start % 2 == 0 { vec![other, chunk] } else { vec![chunk, other] };
            let mut outputs = model.step(&Batch { chunks }, &mut NoTap).unwrap().logits;
            logits.extend(outputs.swap_remove(usize::from(start % 2 == 0)));
            start = end;
        }
        let vocab = model.info().vocab_size;
        assert_eq!(bits(&logits[logits.len() - 8 * vocab..]), whole);
    }
    whole
}

#[test]
fn prompt_in_chunks_beside_others_equals_prompt_at_once() {
    chunked(Reference);
    for isa in Isa::available() {
        for threads in [1, 3] {
            chunked(Cpu::new(CpuOptions { threads: Some(threads), isa: Some(isa) }).unwrap());
        }
    }
}

/// Where only the highest logits are asked for, these are there bit for bit, and whatever else is there is right; `cuts` says
/// whether the backend leaves others out.
pub fn highest<B: Backend>(backend: B, cuts: bool) {
    let mut model = load("keye-1_5-tiny", backend);
    let mut step = |logits: [LogitRows; 2]| {
        let chunks = [(7u32, 0), (9, 1)].into_iter().zip(logits).map(|((token, block), logits)| Chunk {
            tokens: vec![token; 3],
            start: 0,
            positions: (0..3).map(|i| [i; 3]).collect(),
            features: vec![],
            block_table: vec![block],
            logits,
        });
        model.step(&Batch { chunks: chunks.collect() }, &mut NoTap).unwrap().logits
    };
    let whole = step([LogitRows::Last, LogitRows::Last]);
    for counts in [[Some(1), Some(20)], [Some(3), None]] {
        let mut cut = 0;
        let rows = counts.map(|count| count.map_or(LogitRows::Last, LogitRows::Highest));
        for ((whole, found), count) in whole.iter().zip(step(rows)).zip(counts) {
            let mut sorted = whole.clone();
            sorted.sort_unstable_by(|a, b| b.total_cmp(a));
            let least = count.map_or(f32::NEG_INFINITY, |count| sorted[count - 1]);
            for (whole, found) in whole.iter().zip(&found) {
                let left_out = *found == f32::NEG_INFINITY && *whole < least;
                assert!(left_out || whole.to_bits() == found.to_bits(), "{whole} {found} {count:?}");
                cut += usize::from(left_out);
            }
        }
        // Who wants a whole row gets it, and so does who shares the step.
        assert_eq!(cut > 0, cuts && counts[1].is_some(), "{cut} left out of rows for {counts:?}");
    }
}

#[test]
fn the_highest_logits_are_those_of_whole_rows() {
    highest(Reference, true);
    highest(Cpu::new(CpuOptions::default()).unwrap(), false);
}

/// A clip's features are those of its frames, whichever frames share a call (1.5), bit for bit.
#[test]
fn clip_features_equal_those_of_its_frames() {
    let mut model = load("keye-1_5-tiny", Cpu::new(CpuOptions::default()).unwrap());
    let grid_thw = vec![[2, 4, 6], [3, 2, 4], [1, 4, 6]];
    let mut patches = Patches { pixels: Pixels::U8(vec![]), grid_thw, hash: [0; 32] };
    let bytes: Vec<u8> = (0..patches.len() * 588).map(|i| (i * i % 251) as u8).collect();
    patches.pixels = Pixels::U8(bytes.clone());
    let prompt = |model: &mut keye_model::KeyeModel<Cpu>, parts: Vec<Patches>| {
        let mut features = Vec::new();
        let mut at = 0;
        for part in parts {
            let rows = part.len() / 4;
            let feature = model.encode(MediaKind::Video, &part, &mut NoTap, &mut |_, _| true).unwrap();
            features.push(keye_model::FeatureRows { at, feature, row: 0, len: rows });
            at += rows;
        }
        let chunk = Chunk {
            tokens: vec![1; at],
            start: 0,
            positions: (0..at as u32).map(|i| [i; 3]).collect(),
            features,
            block_table: vec![0],
            logits: LogitRows::Range(0..at),
        };
        bits(&model.step(&Batch { chunks: vec![chunk] }, &mut NoTap).unwrap().logits[0])
    };
    let mut parts = Vec::new();
    let mut at = 0;
    for [t, h, w] in patches.grid_thw.clone() {
        for _ in 0..t {
            let len = (h * w) as usize * 588;
            let pixels = Pixels::U8(bytes[at..at + len].to_vec());
            parts.push(Patches { pixels, grid_thw: vec![[1, h, w]], hash: [0; 32] });
            at += len;
        }
    }
    assert_eq!(prompt(&mut model, vec![patches]), prompt(&mut model, parts));
}

#[test]
fn a_batch_that_breaks_the_contract_is_refused() {
    let mut model = load("keye-preview-tiny", Cpu::new(CpuOptions::default()).unwrap());
    let good = Chunk {
        tokens: vec![1, 2],
        start: 0,
        positions: vec![[0; 3], [1; 3]],
        features: vec![],
        block_table: vec![0],
        logits: LogitRows::Last,
    };
    let bad = [
        Chunk { tokens: vec![1, 960], ..good.clone() },
        Chunk { positions: vec![[0; 3]], ..good.clone() },
        Chunk { block_table: vec![], ..good.clone() },
        Chunk { block_table: vec![1 << 20], ..good.clone() },
        Chunk { start: 63, ..good.clone() },
        Chunk { logits: LogitRows::Range(1..3), ..good.clone() },
    ];
    for chunk in bad {
        let error = model.step(&Batch { chunks: vec![chunk] }, &mut NoTap).unwrap_err();
        assert!(error.to_string().starts_with("batch: "), "{error}");
    }
    assert!(model.step(&Batch { chunks: vec![good] }, &mut NoTap).is_ok());
}
