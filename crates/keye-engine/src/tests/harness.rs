//! A worker to ask, over a runner that makes up its tokens.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use keye_media::Media;
use keye_model::{NoTap, Runner};

use crate::engine::Shared;
use crate::event::event_channel;
use crate::fake::{FakeRunner, Log, prompt};
use crate::sequence::{Clock, PreparedRequest};
use crate::worker::Worker;
use crate::{
    EngineError, EngineOptions, EngineStats, Event, EventStream, FinishReason, SamplingParams, Stage, Timings, Usage,
    trace,
};

/// A worker without the part that decodes media.
pub(super) struct Harness {
    pub shared: Arc<Shared>,
    pub log: Arc<Log>,
    thread: Option<JoinHandle<()>>,
}

/// A request as the worker gets it.
#[derive(Clone, Default)]
pub(super) struct Ask {
    pub text: Vec<u32>,
    pub media: Vec<Arc<Media>>,
    pub sampling: SamplingParams,
    pub end_tokens: Vec<u32>,
    pub logprobs: Option<usize>,
}

/// The end of a stream, and what came before it.
#[derive(Debug)]
pub(super) struct Outcome {
    pub stages: Vec<Stage>,
    pub tokens: Vec<u32>,
    pub streamed: String,
    pub reason: FinishReason,
    pub text: String,
    pub usage: Usage,
    pub timings: Timings,
}

pub(super) fn options(max_batch_tokens: usize, max_running: usize) -> EngineOptions {
    EngineOptions { max_batch_tokens, max_running, ..EngineOptions::default() }
}

pub(super) fn ask(text: &[u32], media: &[Arc<Media>], max_tokens: usize) -> Ask {
    let sampling = SamplingParams { max_tokens, ..SamplingParams::default() };
    Ask { text: text.to_vec(), media: media.to_vec(), sampling, ..Ask::default() }
}

/// Token 7 is "h ", which makes stop strings that span tokens.
pub(super) fn spell(id: u32) -> String {
    format!("{} ", char::from_u32(97 + id % 26).unwrap_or('?'))
}

impl Harness {
    pub fn new(runner: FakeRunner, options: EngineOptions) -> Self {
        let log = Arc::clone(&runner.log);
        let shared = Arc::new(Shared::new(runner.info(), &options));
        let worker = Worker::new(Box::new(runner), Arc::clone(&shared), &options);
        Self { shared, log, thread: Some(std::thread::spawn(move || worker.run())) }
    }

    pub fn submit(&self, ask: &Ask) -> EventStream {
        self.submit_many(ask, &[ask.sampling.seed]).remove(0)
    }

    pub fn submit_many(&self, ask: &Ask, seeds: &[u64]) -> Vec<EventStream> {
        let prompt = Arc::new(prompt(&ask.text, &ask.media));
        let (mut requests, mut streams) = (Vec::new(), Vec::new());
        for seed in seeds {
            let (events, stream) = event_channel();
            streams.push(stream);
            requests.push(PreparedRequest {
                order: 0,
                prompt: Arc::clone(&prompt),
                media: ask.media.clone(),
                warnings: Vec::new(),
                sampling: SamplingParams { seed: *seed, ..ask.sampling.clone() },
                end_tokens: ask.end_tokens.clone().into(),
                detokenize: Box::new(|token| Ok(token.map_or(String::new(), spell))),
                events,
                clock: Clock::start(),
                place: None,
                logprobs: ask.logprobs,
                constraint: None,
                pool: None,
                siblings: Vec::new(),
            });
        }
        let mut first = requests.remove(0);
        first.siblings = requests;
        assert!(self.shared.prepared.push(first).is_ok());
        streams
    }

    pub fn run(&self, ask: &Ask) -> Outcome {
        outcome(self.submit(ask)).expect("no error")
    }

    pub fn stats(&self) -> EngineStats {
        *self.shared.stats()
    }

    /// Waits, for a while, until nobody holds anything.
    pub fn assert_all_free(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let stats = self.stats();
            if stats.running == 0 && stats.free_blocks == stats.num_blocks {
                return;
            }
            assert!(Instant::now() < deadline, "still held: {stats:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok() || std::thread::panicking());
        }
    }
}

pub(super) fn outcome(stream: EventStream) -> Result<Outcome, EngineError> {
    let (mut stages, mut tokens, mut streamed) = (Vec::new(), Vec::new(), String::new());
    for event in stream {
        match event {
            Event::Stage(stage) => stages.push(stage),
            Event::Token { id, text, .. } => {
                tokens.push(id);
                streamed += &text;
            }
            Event::Finished { reason, text, usage, timings, .. } => {
                return Ok(Outcome { stages, tokens, streamed, reason, text, usage, timings });
            }
            Event::Thinking(_) => panic!("no prompt here opens thinking"),
            Event::Failed(error) => return Err(error),
        }
    }
    panic!("a stream without an end");
}

/// The tokens of a request that nothing else shares a machine with, whole prompt in one step.
pub(super) fn alone(ask: &Ask) -> Vec<u32> {
    let media: Vec<Media> = ask.media.iter().map(|media| (**media).clone()).collect();
    let prompt = prompt(&ask.text, &ask.media);
    let mut runner = FakeRunner::new(1000, 64);
    let trace = trace(&mut runner, &media, &prompt, &mut NoTap, ask.sampling.max_tokens).expect("it fits");
    assert_eq!(runner.log.features.load(Ordering::SeqCst), 0);
    assert_eq!(trace.prompt_logits.len(), prompt.input_ids.len().min(8));
    trace.generated
}
