//! `/v1/embeddings`: texts, token ids and conversations as vectors.

use base64::Engine as _;
use serde_json::{Value, json};

use crate::support::{data_url, shared};

fn embed(body: &Value) -> Value {
    let response = shared().post("/v1/embeddings", body);
    assert_eq!(response.status, 200, "{}", response.body);
    response.json()
}

fn vector(answer: &Value, index: usize) -> Vec<f64> {
    let values = answer["data"][index]["embedding"].as_array().expect("numbers");
    values.iter().map(|value| value.as_f64().expect("a number")).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn texts_become_vectors_of_length_one() {
    let both = embed(&json!({"model": "", "input": ["A cat sleeps.", "It rains."]}));
    assert_eq!((&both["object"], &both["data"][1]["index"]), (&json!("list"), &json!(1)));
    let (cat, rain) = (vector(&both, 0), vector(&both, 1));
    for (a, b, same) in [(&cat, &cat, true), (&rain, &rain, true), (&cat, &rain, false)] {
        assert_eq!((dot(a, b) - 1.0).abs() < 1e-5, same, "{}", dot(a, b));
    }
    // One at a time, and as token ids.
    let alone = embed(&json!({"input": "A cat sleeps."}));
    assert_eq!(vector(&alone, 0), cat);
    let ids = shared().post("/tokenize", &json!({"prompt": "A cat sleeps."})).json()["tokens"].clone();
    assert_eq!(vector(&embed(&json!({"input": ids})), 0), cat);
    assert_eq!(vector(&embed(&json!({"input": [ids]})), 0), cat);
    let tokens = ids.as_array().expect("ids").len();
    assert_eq!(alone["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));
    // The mean of all tokens is another vector.
    let mean = vector(&embed(&json!({"input": "A cat sleeps.", "pooling": "mean"})), 0);
    assert!((dot(&mean, &mean) - 1.0).abs() < 1e-5 && dot(&mean, &cat) < 0.999, "{}", dot(&mean, &cat));

    let packed = embed(&json!({"input": "A cat sleeps.", "encoding_format": "base64"}));
    let text = packed["data"][0]["embedding"].as_str().expect("base64");
    let bytes = base64::engine::general_purpose::STANDARD.decode(text).expect("base64");
    let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    assert_eq!(values, cat.iter().map(|value| *value as f32).collect::<Vec<_>>());
}

#[test]
fn pictures_and_clips_become_vectors() {
    let with = |part: Value| {
        let text = json!({"type": "text", "text": "What is it?"});
        embed(&json!({"messages": [{"role": "user", "content": [part, text]}]}))
    };
    let image = |name: &str| with(json!({"type": "image_url", "image_url": {"url": data_url("image/png", name)}}));
    let (first, second) = (vector(&image("inputs/frames/0.png"), 0), vector(&image("inputs/frames/2.png"), 0));
    assert_eq!(vector(&image("inputs/frames/0.png"), 0), first);
    assert_ne!(first, second, "pictures of one size, so the same tokens");
    let clip = with(json!({"type": "video", "video": "clip.mp4", "fps": 1}));
    assert!(clip["usage"]["prompt_tokens"].as_u64().is_some_and(|tokens| tokens > 20));
    assert_eq!(vector(&clip, 0).len(), first.len());
}

#[test]
fn what_embeddings_refuse() {
    for (body, param) in [
        (json!({}), "input"),
        (json!({"input": ""}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": [1, 9_999_999]}), "input"),
        (json!({"input": vec!["x"; 65]}), "input"),
        (json!({"input": "word ".repeat(60_000)}), "input"),
        (json!({"input": "x", "messages": [{"role": "user", "content": "x"}]}), "input"),
        (json!({"input": "x", "encoding_format": "int8"}), "encoding_format"),
        (json!({"input": "x", "pooling": "max"}), "pooling"),
        (json!({"input": "x", "dimensions": 8}), "dimensions"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image", "image": "missing.png"}]}]}), "messages"),
    ] {
        let refused = shared().post("/v1/embeddings", &body).error();
        assert_eq!(refused, (400, param.into()), "{:.200}", body.to_string());
    }
}
