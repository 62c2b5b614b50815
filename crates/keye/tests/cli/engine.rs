//! Every golden case through the library: files to tokens by the engine, on the vectorised backend.

use std::time::Duration;

use keye::{
    Access, Conversation, EngineError, EngineOptions, Event, Keye, LoadOptions, NothingYet, Request, SamplingParams,
    TimestampRule,
};
use keye_processor::Checkpoint;

use crate::support::{FIXTURES, cases, fixture, model};

#[test]
fn the_engine_generates_the_golden_tokens() {
    for name in FIXTURES {
        let dir = fixture(name);
        let options = LoadOptions {
            max_model_len: Some(2048),
            timestamps: TimestampRule::Reference,
            access: Access { root: Some(dir.clone()), ..Access::default() },
            ..LoadOptions::default()
        };
        let keye = Keye::load(dir.join("model").to_str().unwrap(), options).unwrap();
        for case in cases(name) {
            let file = dir.join("cases").join(&case);
            let json = std::fs::read(file.with_extension("json")).unwrap();
            let conversation = Conversation::from_json(&serde_json::from_slice(&json).unwrap()).unwrap();
            let sampling = SamplingParams { max_tokens: 16, ignore_eos: true, ..SamplingParams::default() };
            let request = Request { conversation, sampling, ..Request::default() };
            let mut tokens = Vec::new();
            for event in keye.submit(request).unwrap() {
                match event {
                    Event::Token { id, .. } => tokens.push(i64::from(id)),
                    Event::Failed(error) => panic!("{name}/{case}: {error}"),
                    _ => {}
                }
            }
            let golden = Checkpoint::open_file(&file.with_extension("safetensors")).unwrap();
            let golden = golden.get("generated").unwrap().bytes;
            let golden: Vec<i64> = golden.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
            assert_eq!(tokens, golden, "{name}/{case}");
        }
    }
}

#[test]
fn a_question_is_waited_for_and_cancelled() {
    let engine = EngineOptions { max_running: 1, ..EngineOptions::default() };
    let options = LoadOptions { max_model_len: Some(32_000), engine, ..LoadOptions::default() };
    let keye = Keye::load(model(), options).unwrap();
    // The question has to wait behind this.
    let sampling = SamplingParams { max_tokens: 30_000, ignore_eos: true, ..SamplingParams::default() };
    let mut conversation = Conversation::new();
    conversation.push_user(Vec::new(), "Tell a long story.");
    let mut long = keye.submit(Request { conversation, sampling, ..Request::default() }).unwrap();
    assert!(long.any(|event| matches!(event, Event::Token { .. })));

    let mut events = keye.ask::<&str>(&[], "And what is this?").unwrap();
    let canceller = events.canceller();
    assert!(matches!(events.next_timeout(Duration::from_secs(60)), Ok(Some(Ok(Event::Stage(_))))));
    while !matches!(events.next_timeout(Duration::ZERO), Err(NothingYet)) {}
    canceller.cancel();
    let end = std::iter::from_fn(|| events.next_timeout(Duration::from_secs(60)).unwrap()).last();
    assert!(matches!(end, Some(Err(EngineError::Cancelled))), "{end:?}");
}

/// The five lines of the documentation, as a program.
#[test]
fn the_example_streams_an_answer() {
    let root = std::path::Path::new(env!("CARGO_BIN_EXE_keye")).parent().unwrap();
    let program = root.join("examples/ask");
    assert!(program.exists(), "cargo test -p keye builds it; with --test cli alone, cargo build --example ask does");
    let mut command = std::process::Command::new(program);
    let inputs = fixture("keye-1_5-tiny");
    command.arg(inputs.join("model")).arg(inputs.join("inputs/one.png")).arg("What is this?");
    // Sampling ends this model's answers somewhere; what counts is that text comes.
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!output.stdout.is_empty());
}
