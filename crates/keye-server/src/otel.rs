//! Traces for OpenTelemetry: each answer is a span with its stages below it, sent as OTLP over HTTP in json.
//!
//! Spans are made when an answer ends, from the times that the engine took. They wait in a bounded queue for a thread that
//! sends them in groups; when the collector does not keep up they are dropped and counted, and no answer waits for it.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use keye_engine::{Timings, Usage};
use serde_json::{Value, json};

use crate::app::random;
use crate::guard::RequestId;

/// Answers that wait to be sent.
const QUEUE: usize = 1024;
/// Answers sent together.
const GROUP: usize = 128;
/// Longest wait for more of them.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest time for the collector to take them.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What is known of an answer at its end.
pub(crate) struct Ended<'a> {
    pub request: &'a RequestId,
    pub choice: usize,
    /// `stop`, `length`, `failed` or `cancelled`.
    pub outcome: &'static str,
    pub total: Duration,
    /// Of an answer that came to its end.
    pub counts: Option<(&'a Usage, &'a Timings)>,
}

enum Message {
    /// The spans of an answer.
    Spans(Vec<Value>),
    /// Tell when all before has been sent.
    Flush(SyncSender<()>),
}

/// Takes spans for the thread that sends them.
pub(crate) struct Exporter {
    sender: SyncSender<Message>,
}

impl Exporter {
    /// Sends to the collector at `endpoint`, like `http://localhost:4318`.
    pub fn start(endpoint: &str) -> std::io::Result<Self> {
        let (sender, receiver) = sync_channel(QUEUE);
        let url = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
        std::thread::Builder::new().name("keye-otlp".into()).spawn(move || send_all(&url, &receiver))?;
        Ok(Self { sender })
    }

    /// Takes an answer that is over; drops it when too many wait.
    pub fn ended(&self, ended: &Ended) {
        if self.sender.try_send(Message::Spans(spans(ended, SystemTime::now()))).is_err() {
            tracing::debug!(request_id = ended.request.id, "no room for another span");
        }
    }

    /// Waits until what was taken has been sent, up to the time that one group may take.
    pub fn flush(&self) {
        let (done, told) = sync_channel(1);
        if self.sender.try_send(Message::Flush(done)).is_ok() {
            let _ = told.recv_timeout(TIMEOUT);
        }
    }
}

fn send_all(url: &str, receiver: &Receiver<Message>) {
    let config = ureq::Agent::config_builder().timeout_global(Some(TIMEOUT)).build();
    let agent = ureq::Agent::new_with_config(config);
    let mut failing = false;
    let mut over = false;
    while !over {
        let (mut group, mut waiting) = (Vec::new(), Vec::new());
        let mut answers = 0;
        while answers < GROUP && waiting.is_empty() {
            let next = if group.is_empty() {
                receiver.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                receiver.recv_timeout(PAUSE)
            };
            match next {
                Ok(Message::Spans(spans)) => {
                    group.extend(spans);
                    answers += 1;
                }
                Ok(Message::Flush(done)) => waiting.push(done),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => {
                    over = true;
                    break;
                }
            }
        }
        if !group.is_empty() {
            let body = envelope(group).to_string();
            let sent = agent.post(url).header("content-type", "application/json").send(&body);
            // Once when it begins to fail: a collector that is down is not told of with every group.
            if let Err(error) = &sent
                && !failing
            {
                tracing::warn!(%error, url, "spans cannot be sent and are dropped");
            }
            failing = sent.is_err();
        }
        for done in waiting {
            let _ = done.try_send(());
        }
    }
}

/// A request of the OTLP protocol.
fn envelope(spans: Vec<Value>) -> Value {
    json!({"resourceSpans": [{
        "resource": {"attributes": [
            attribute("service.name", "keye".into()), attribute("service.version", env!("CARGO_PKG_VERSION").into()),
        ]},
        "scopeSpans": [{"scope": {"name": "keye-server"}, "spans": spans}],
    }]})
}

/// The span of an answer and those of its stages, which follow each other up to its end at `now`.
fn spans(ended: &Ended, now: SystemTime) -> Vec<Value> {
    const SERVER: u8 = 2;
    const INTERNAL: u8 = 1;
    const ERROR: u8 = 2;
    let (trace, parent) = ended.request.trace_parent();
    let trace = trace.map_or_else(|| format!("{:016x}{:016x}", random(), random()), str::to_owned);
    let id = || format!("{:016x}", random());
    let end = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let start = end.saturating_sub(ended.total);
    let span = |id: &str, parent: Option<&str>, name: &str, kind: u8, from: Duration, to: Duration| {
        let mut span = json!({
            "traceId": trace, "spanId": id, "name": name, "kind": kind,
            "startTimeUnixNano": from.as_nanos().to_string(), "endTimeUnixNano": to.as_nanos().to_string(),
        });
        if let Some(parent) = parent {
            span["parentSpanId"] = parent.into();
        }
        span
    };
    let own = id();
    let mut answer = span(&own, parent, &ended.request.route, SERVER, start, end);
    let mut attributes = vec![
        attribute("http.route", ended.request.route.as_str().into()),
        attribute("keye.request_id", ended.request.id.as_str().into()),
        attribute("keye.choice", ended.choice.into()),
        attribute("keye.outcome", ended.outcome.into()),
    ];
    if matches!(ended.outcome, "failed" | "cancelled") {
        answer["status"] = json!({"code": ERROR, "message": ended.outcome});
    }
    let mut spans = Vec::new();
    if let Some((usage, timings)) = ended.counts {
        for (name, count) in [
            ("gen_ai.usage.input_tokens", usage.prompt_tokens),
            ("gen_ai.usage.output_tokens", usage.completion_tokens),
            ("keye.cached_tokens", usage.cached_tokens),
            ("keye.media_tokens", usage.media_tokens),
        ] {
            attributes.push(attribute(name, count.into()));
        }
        let mut at = start;
        for (name, took) in [
            ("queued", timings.queued),
            ("media", timings.media),
            ("vision", timings.vision),
            ("prefill", timings.prefill),
            ("decode", timings.decode),
        ] {
            if took > Duration::ZERO {
                spans.push(span(&id(), Some(&own), name, INTERNAL, at, at + took));
            }
            at += took;
        }
    }
    answer["attributes"] = attributes.into();
    spans.insert(0, answer);
    spans
}

/// A key and its value; whole numbers are texts in OTLP's json.
fn attribute(key: &str, value: Value) -> Value {
    let value = match value {
        Value::Number(number) => json!({"intValue": number.to_string()}),
        other => json!({"stringValue": other}),
    };
    json!({"key": key, "value": value})
}
