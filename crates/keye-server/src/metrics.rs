//! Counters, gauges and histograms in Prometheus' text form.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use keye_engine::{Timings, Usage};

use crate::app::App;

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the buckets in seconds.
const BOUNDS: [f64; 14] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0];

/// Durations, counted by size.
#[derive(Debug, Default)]
struct Histogram {
    /// One for each bound and one for what is above.
    buckets: [Counter; BOUNDS.len() + 1],
    micros: Counter,
}

impl Histogram {
    fn observe(&self, value: Duration) {
        self.observe_many(value, 1);
    }

    /// The same duration `count` times.
    fn observe_many(&self, value: Duration, count: u32) {
        let seconds = value.as_secs_f64();
        let bucket = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        self.buckets[bucket].add(u64::from(count));
        self.micros.add(u64::try_from(value.as_micros()).unwrap_or(u64::MAX).saturating_mul(u64::from(count)));
    }
}

pub(crate) struct Metrics {
    started: Instant,
    /// By route and status.
    responses: Mutex<BTreeMap<(String, u16), u64>>,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    media_tokens: Counter,
    generation_tokens: Counter,
    finished: Counter,
    pub cancelled: Counter,
    pub failed: Counter,
    pub panics: Counter,
    first_token: Histogram,
    /// Between tokens after the first, mean of an answer: once for each answer, and once for each token.
    per_token: Histogram,
    inter_token: Histogram,
    total: Histogram,
    media: Histogram,
    vision: Histogram,
}

impl Metrics {
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            responses: Mutex::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            media_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            finished: Counter::default(),
            cancelled: Counter::default(),
            failed: Counter::default(),
            panics: Counter::default(),
            first_token: Histogram::default(),
            per_token: Histogram::default(),
            inter_token: Histogram::default(),
            total: Histogram::default(),
            media: Histogram::default(),
            vision: Histogram::default(),
        }
    }

    /// A response; `route` is a route of the server, never a path that a client made up.
    pub fn responded(&self, route: &str, status: u16) {
        let mut responses = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        *responses.entry((route.to_owned(), status)).or_insert(0) += 1;
    }

    /// An answer that came to its end.
    pub fn finished(&self, usage: &Usage, timings: &Timings) {
        self.finished.add(1);
        self.prompt_tokens.add(usage.prompt_tokens as u64);
        self.cached_tokens.add(usage.cached_tokens as u64);
        self.media_tokens.add(usage.media_tokens as u64);
        self.generation_tokens.add(usage.completion_tokens as u64);
        self.first_token.observe(timings.first_token);
        self.total.observe(timings.total);
        self.media.observe(timings.media);
        self.vision.observe(timings.vision);
        if let Some(steps @ 1..) = u32::try_from(usage.completion_tokens).ok().and_then(|n| n.checked_sub(1)) {
            self.per_token.observe(timings.decode / steps);
            self.inter_token.observe_many(timings.decode / steps, steps);
        }
    }

    /// A prompt that became a vector.
    pub fn embedded(&self, usage: &Usage) {
        self.prompt_tokens.add(usage.prompt_tokens as u64);
        self.cached_tokens.add(usage.cached_tokens as u64);
        self.media_tokens.add(usage.media_tokens as u64);
    }

    /// All of them, with what the engine tells of itself.
    pub fn text(&self, app: &App) -> String {
        let mut out = Text(String::new());
        let stats = app.engine.stats();
        let used = stats.num_blocks.saturating_sub(stats.free_blocks) as f64 / stats.num_blocks.max(1) as f64;
        out.head("keye_http_responses_total", "counter", "Responses by route and status.");
        for ((route, status), n) in self.responses.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            out.line(format_args!("keye_http_responses_total{{route=\"{route}\",status=\"{status}\"}} {n}"));
        }
        for (name, help, counter) in [
            ("prompt_tokens", "Tokens of prompts, cached ones included.", &self.prompt_tokens),
            ("cached_tokens", "Tokens of prompts that were in the cache.", &self.cached_tokens),
            ("media_tokens", "Tokens of prompts that stand for media.", &self.media_tokens),
            ("generation_tokens", "Generated tokens of finished answers.", &self.generation_tokens),
            ("answers_finished", "Answers that came to their end.", &self.finished),
            ("answers_cancelled", "Answers whose client went away.", &self.cancelled),
            ("answers_failed", "Answers that failed.", &self.failed),
            ("panics", "Requests that hit a defect of the server.", &self.panics),
        ] {
            out.one(&format!("keye_{name}_total"), "", "counter", help, counter.get() as f64);
        }
        let uptime = self.started.elapsed().as_secs_f64();
        for (name, help, value) in [
            ("requests_running", "Sequences that share steps.", stats.running as f64),
            ("requests_waiting", "Requests that wait or whose media are being decoded.", stats.waiting as f64),
            ("open_streams", "Answers that clients wait for or read.", app.open_streams() as f64),
            ("kv_blocks", "Blocks of the KV cache.", stats.num_blocks as f64),
            ("kv_blocks_free", "Blocks that no sequence uses.", stats.free_blocks as f64),
            ("feature_cache_bytes", "Bytes of media features held.", stats.feature_bytes as f64),
            ("uptime_seconds", "Seconds since the start.", uptime),
        ] {
            out.one(&format!("keye_{name}"), "", "gauge", help, value);
        }
        for (name, help, histogram) in [
            ("time_to_first_token", "From submission to the first token.", &self.first_token),
            ("time_per_output_token", "Between tokens after the first, mean of an answer.", &self.per_token),
            ("answer", "From submission to the end.", &self.total),
            ("media", "Fetching, decoding and resizing media.", &self.media),
            ("vision", "Vision tower and projector.", &self.vision),
        ] {
            out.histogram(&format!("keye_{name}_seconds"), "", help, histogram);
        }
        // The names and labels that dashboards made for vLLM look for.
        let model = &format!("model_name=\"{}\"", escaped(&app.config.model));
        out.one("vllm:num_requests_running", model, "gauge", "As keye_requests_running.", stats.running as f64);
        out.one("vllm:num_requests_waiting", model, "gauge", "As keye_requests_waiting.", stats.waiting as f64);
        out.one("vllm:kv_cache_usage_perc", model, "gauge", "Part of the KV cache in use, 0 to 1.", used);
        let prompt = self.prompt_tokens.get() as f64;
        out.one("vllm:prompt_tokens_total", model, "counter", "As keye_prompt_tokens_total.", prompt);
        let generated = self.generation_tokens.get() as f64;
        out.one("vllm:generation_tokens_total", model, "counter", "As keye_generation_tokens_total.", generated);
        for (name, help, histogram) in [
            ("time_to_first_token", "As keye_time_to_first_token_seconds.", &self.first_token),
            ("inter_token_latency", "As keye_time_per_output_token_seconds, for each token.", &self.inter_token),
            ("e2e_request_latency", "As keye_answer_seconds.", &self.total),
        ] {
            out.histogram(&format!("vllm:{name}_seconds"), model, help, histogram);
        }
        out.0
    }
}

/// Text that is being written; writing to a string does not fail.
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
    }

    fn line(&mut self, line: std::fmt::Arguments) {
        let _ = writeln!(self.0, "{line}");
    }

    /// `labels` are as in the braces, or nothing.
    fn one(&mut self, name: &str, labels: &str, kind: &str, help: &str, value: f64) {
        self.head(name, kind, help);
        self.line(format_args!("{name}{} {value}", braced(labels)));
    }

    fn histogram(&mut self, name: &str, labels: &str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        let mut below = 0;
        for (bound, bucket) in BOUNDS.iter().map(f64::to_string).chain(["+Inf".into()]).zip(&histogram.buckets) {
            below += bucket.get();
            let comma = if labels.is_empty() { "" } else { "," };
            self.line(format_args!("{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {below}"));
        }
        let labels = braced(labels);
        self.line(format_args!("{name}_sum{labels} {}", histogram.micros.get() as f64 / 1e6));
        self.line(format_args!("{name}_count{labels} {below}"));
    }
}

fn braced(labels: &str) -> String {
    if labels.is_empty() { String::new() } else { format!("{{{labels}}}") }
}

/// The value of a label.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
