//! `first_token_distribution_t0.6_k20_p0.95` of every case: transformers' own processors over the recorded logits.

use keye_engine::{SamplingParams, distribution, sample};
use safetensors::SafeTensors;
use serde_json::Value;

/// The recorded row 7 of `logits_last8`: the logits after the prompt.
fn last_logits(file: &[u8]) -> Option<Vec<f32>> {
    let tensors = SafeTensors::deserialize(file).ok()?;
    let logits = tensors.tensor("logits_last8").ok()?;
    let row = match tensors.tensor("logits_last8.rows") {
        Ok(rows) => rows.data().chunks_exact(8).position(|row| row == 7i64.to_le_bytes())?,
        Err(_) => 7,
    };
    let values: Vec<f32> =
        logits.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let width = logits.shape()[1];
    Some(values[row * width..(row + 1) * width].to_vec())
}

#[test]
fn the_first_tokens_distribution_is_that_of_transformers() {
    let mut cases = 0;
    for model in ["keye-preview-tiny", "keye-1_5-tiny"] {
        for entry in std::fs::read_dir(crate::fixtures().join(model).join("cases")).expect("fixtures are there") {
            let path = entry.expect("a directory entry").path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let case: Value = serde_json::from_slice(&std::fs::read(&path).expect("a case")).expect("json");
            let Some(expected) = case["first_token_distribution_t0.6_k20_p0.95"].as_array() else { continue };
            let logits =
                last_logits(&std::fs::read(path.with_extension("safetensors")).expect("tensors")).expect("row 7");
            let params = SamplingParams { temperature: 0.6, top_k: 20, top_p: 0.95, ..SamplingParams::default() };
            let got = distribution(&logits, &params);
            let ids = |pairs: &[Value]| pairs.iter().map(|pair| pair[0].as_u64().expect("an id")).collect::<Vec<_>>();
            assert_eq!(
                got.iter().map(|(id, _)| u64::from(*id)).collect::<Vec<_>>(),
                ids(expected),
                "{}",
                path.display()
            );
            for ((_, probability), pair) in got.iter().zip(expected) {
                let wanted = pair[1].as_f64().expect("a probability");
                assert!((f64::from(*probability) - wanted).abs() < 2e-6, "{}: {probability} {wanted}", path.display());
            }
            let greedy = sample(&mut logits.clone(), &SamplingParams::default(), &[], &[], 0);
            assert_eq!(u64::from(greedy), case["generated"][0].as_u64().expect("an id"));
            let drawn = sample(&mut logits.clone(), &params, &[], &[], 0);
            assert!(got.iter().any(|(id, _)| *id == drawn));
            cases += 1;
        }
    }
    assert_eq!(cases, 22);
}
