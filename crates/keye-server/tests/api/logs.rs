//! What the logs hold, and what they do not.

use std::fmt::{Debug, Write};
use std::sync::{Mutex, OnceLock, PoisonError};

use serde_json::{Value, json};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::client::request;
use crate::support::{content, question, shared};

/// Stands in everything of a request that is nobody's business.
const CANARY: &str = "zyzzyva";

/// Keeps every event that is logged at any level.
struct Capture;

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = write!(self.0, " {}={value:?}", field.name());
    }
}

impl Subscriber for Capture {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn new_span(&self, attributes: &Attributes) -> Id {
        let mut line = Line(attributes.metadata().name().to_owned());
        attributes.record(&mut line);
        keep(line);
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, values: &Record) {
        let mut line = Line(String::new());
        values.record(&mut line);
        keep(line);
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event) {
        let mut line = Line(event.metadata().target().to_owned());
        event.record(&mut line);
        keep(line);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn keep(line: Line) {
    LINES.lock().unwrap_or_else(PoisonError::into_inner).push(line.0);
}

/// Lines with `word`, of all tests in this process.
fn lines_with(word: &str) -> Vec<String> {
    let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    lines.iter().filter(|line| line.contains(word)).cloned().collect()
}

#[test]
fn logs_have_ids_and_counts_and_never_prompts_media_or_answers() {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    INSTALLED.get_or_init(|| tracing::subscriber::set_global_default(Capture).expect("no other test logs"));
    let image = |url: &str| json!([{"type": "image_url", "image_url": {"url": url}}]);
    let said = json!({"guided_choice": [CANARY], "chat_template_kwargs": {"enable_thinking": false}});
    let with = |mut body: Value, more: &Value| {
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        body
    };
    let plain = question(json!([]), CANARY);
    let asked = [
        ("said", "/v1/chat/completions", with(plain.clone(), &said), 200),
        ("streamed", "/v1/chat/completions", with(with(plain.clone(), &said), &json!({"stream": true})), 200),
        ("missing", "/v1/chat/completions", question(image(&format!("{CANARY}.png")), CANARY), 400),
        ("denied", "/v1/chat/completions", question(image(&format!("/etc/{CANARY}")), CANARY), 400),
        ("remote", "/v1/chat/completions", question(image(&format!("http://{CANARY}.org/a.png")), CANARY), 400),
        ("damaged", "/v1/chat/completions", question(image(&format!("data:image/png;base64,{CANARY}=")), CANARY), 400),
        ("form", "/v1/chat/completions", with(plain.clone(), &json!({"regex": format!("{CANARY}(")})), 400),
        ("field", "/v1/chat/completions", with(plain, &json!({"temperature": CANARY})), 400),
        ("text", "/v1/completions", json!({"prompt": CANARY, "max_tokens": 2}), 200),
        ("response", "/v1/responses", json!({"input": CANARY, "max_output_tokens": 2}), 200),
        ("vector", "/v1/embeddings", json!({"input": CANARY}), 200),
        ("tokens", "/tokenize", json!({"prompt": CANARY}), 200),
    ];
    for (name, path, body, status) in asked {
        let id = format!("logs-test-{name}");
        let answer = request(shared().address, "POST", path, &[("x-request-id", &id)], &body.to_string());
        assert_eq!(answer.status, status, "{name}: {}", answer.body);
        let lines = lines_with(&id);
        assert!(lines.iter().any(|line| line.contains(&format!("status={status}"))), "{name}: {lines:?}");
        if name == "said" {
            assert!(content(&answer).contains(CANARY));
            assert!(lines.iter().any(|line| line.contains("completion_tokens=")), "{lines:?}");
        }
    }
    assert_eq!(lines_with(CANARY), Vec::<String>::new());
}
