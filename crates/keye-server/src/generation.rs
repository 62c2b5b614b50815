//! From submitted requests to updates that a response can wait for.
//!
//! The engine's streams block, so each has a thread, which ends with it. The channel between is bounded: a client that reads
//! slowly holds back its own thread and nothing else, and is cut off when it takes nothing for too long.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use keye_engine::{
    Canceller, EngineError, Event, EventStream, FinishReason, NothingYet, Request, Stage, Timings, Usage,
};
use keye_processor::ThinkTag;
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::admission::Lease;
use crate::app::App;
use crate::error::ApiError;
use crate::guard::RequestId;
use crate::logprobs::Logprob;
use crate::progress;

/// Something that happened to one of the choices.
#[derive(Debug)]
pub(crate) enum Update {
    /// Its media are decoded and its prompt fits; what may still fail is the model.
    Accepted,
    /// Work before the first token, for those who asked to hear of it.
    Progress(Value),
    /// What the client should hear of one of its media, as the answer has it.
    Warning(Value),
    /// Nothing to tell for a while.
    Waiting,
    /// Its text begins inside thinking.
    Thinking { choice: usize, tag: ThinkTag },
    /// A token; the text may be empty.
    Token { choice: usize, text: String, logprob: Option<Logprob> },
    /// Its end.
    Finished { choice: usize, reason: FinishReason, usage: Usage },
    /// It failed, and with it the request.
    Failed(ApiError),
}

/// Updates that wait for a slow reader, for each choice.
const CHANNEL: usize = 16;

/// A warning about one of the media of a request, for its answer; and into the log.
pub(crate) fn warned(id: &RequestId, medium: usize, warning: &str) -> Value {
    tracing::warn!(request_id = id.id, medium, warning, "medium");
    json!({"media": medium, "message": warning})
}

/// The choices of a request on their way. Dropping it cancels them.
pub(crate) struct Generation {
    updates: mpsc::Receiver<Update>,
    cancellers: Vec<Canceller>,
    /// Ready when the server's time to finish is over; gone then.
    cut: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Generation {
    /// Submits requests, each for `n` choices that differ by their seeds, all or none. With `progress` the first tells of the
    /// work before its tokens; the others do the same work.
    pub fn start(
        app: &Arc<App>,
        id: &RequestId,
        requests: Vec<Request>,
        n: usize,
        lease: Lease,
        progress: bool,
    ) -> Result<Self, ApiError> {
        let mut streams = Vec::with_capacity(requests.len() * n);
        for request in requests {
            let first = request.sampling.seed;
            let seeds: Vec<u64> = (0..n as u64).map(|choice| first.wrapping_add(choice)).collect();
            streams.extend(app.engine.submit_many(request, &seeds)?);
        }
        let lease = Arc::new(lease);
        let cancellers = streams.iter().map(EventStream::canceller).collect();
        let (sender, updates) = mpsc::channel(CHANNEL * streams.len().max(1));
        for (choice, stream) in streams.into_iter().enumerate() {
            let carrier = Carrier {
                app: Arc::clone(app),
                id: id.clone(),
                choice,
                progress: progress && choice == 0,
                updates: sender.clone(),
                runtime: Handle::current(),
                lease: Some(Arc::clone(&lease)),
            };
            let thread = std::thread::Builder::new().name("keye-answer".into());
            thread.spawn(move || carrier.run(stream)).map_err(|error| {
                tracing::error!(request_id = id.id, %error, "cannot start a thread");
                ApiError::internal()
            })?;
        }
        let app = Arc::clone(app);
        let cut: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move { app.cut().await });
        Ok(Self { updates, cancellers, cut: Some(cut) })
    }

    /// The next update; `None` after the last.
    pub async fn next(&mut self) -> Option<Update> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// As [`Generation::next`], for streams.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Update>> {
        if self.cut.as_mut().is_some_and(|cut| cut.as_mut().poll(context).is_ready()) {
            self.cut = None;
            return Poll::Ready(Some(Update::Failed(ApiError::stopping())));
        }
        self.updates.poll_recv(context)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.cancellers.iter().for_each(Canceller::cancel);
    }
}

/// Carries the events of one choice.
struct Carrier {
    app: Arc<App>,
    id: RequestId,
    choice: usize,
    progress: bool,
    updates: mpsc::Sender<Update>,
    runtime: Handle,
    /// Held by those who work, not by the response: a reader that has stopped reading keeps nothing. Given back before the
    /// last update goes out, so that a client which has its answer finds its place free.
    lease: Option<Arc<Lease>>,
}

/// Nobody reads any more.
struct Gone;

/// How an answer ended that somebody read.
enum End {
    /// In order.
    #[cfg_attr(not(feature = "otel"), expect(dead_code, reason = "read by the exporter of traces"))]
    Finished {
        reason: FinishReason,
        usage: Usage,
        timings: Timings,
    },
    Failed,
}

impl Carrier {
    fn run(mut self, stream: EventStream) {
        #[cfg(feature = "otel")]
        let begun = Instant::now();
        let end = self.carry(stream);
        self.lease = None;
        #[cfg(feature = "otel")]
        self.trace(&end, begun.elapsed());
        if let Err(Gone) = end {
            self.app.metrics.cancelled.add(1);
            tracing::info!(request_id = self.id.id, choice = self.choice, outcome = "cancelled", "answer");
        }
    }

    fn carry(&mut self, mut stream: EventStream) -> Result<End, Gone> {
        let keep_alive = self.app.config.keep_alive;
        let (mut accepted, mut told, mut end) = (false, Instant::now(), End::Failed);
        loop {
            let next = stream.next_timeout(keep_alive);
            if let Ok(Some(Event::Stage(Stage::MediaReady { index, warnings, .. }))) = &next
                && self.choice == 0
            {
                // The other choices have the same media.
                for warning in warnings.iter() {
                    self.send(Update::Warning(warned(&self.id, *index, warning)))?;
                }
            }
            let update = match next {
                Err(NothingYet) => None,
                Ok(None) => Some(Update::Failed(ApiError::stopping())),
                Ok(Some(Event::Stage(stage))) if self.progress => Some(Update::Progress(progress::report(&stage))),
                Ok(Some(Event::Stage(Stage::Queued | Stage::Media { .. }))) => None,
                Ok(Some(Event::Stage(_))) if accepted => None,
                Ok(Some(Event::Stage(_))) => {
                    accepted = true;
                    Some(Update::Accepted)
                }
                Ok(Some(Event::Thinking(tag))) => Some(Update::Thinking { choice: self.choice, tag }),
                Ok(Some(Event::Token { id, text, logprob })) => {
                    let tokenizer = &self.app.processor.tokenizer;
                    let logprob = logprob.map(|logprob| Logprob::new(tokenizer, id, &logprob));
                    Some(Update::Token { choice: self.choice, text, logprob })
                }
                Ok(Some(Event::Finished { reason, usage, timings, .. })) => {
                    self.app.metrics.finished(&usage, &timings);
                    tracing::info!(
                        request_id = self.id.id,
                        choice = self.choice,
                        outcome = if reason == FinishReason::Stop { "stop" } else { "length" },
                        prompt_tokens = usage.prompt_tokens,
                        cached_tokens = usage.cached_tokens,
                        media_tokens = usage.media_tokens,
                        completion_tokens = usage.completion_tokens,
                        queued_ms = timings.queued.as_millis() as u64,
                        media_ms = timings.media.as_millis() as u64,
                        vision_ms = timings.vision.as_millis() as u64,
                        first_token_ms = timings.first_token.as_millis() as u64,
                        total_ms = timings.total.as_millis() as u64,
                        "answer"
                    );
                    end = End::Finished { reason: reason.clone(), usage, timings };
                    Some(Update::Finished { choice: self.choice, reason, usage })
                }
                Ok(Some(Event::Failed(error))) => Some(Update::Failed(self.failed(error)?)),
            };
            let update = match update {
                Some(update) => update,
                None if told.elapsed() >= keep_alive => Update::Waiting,
                None if self.updates.is_closed() => return Err(Gone),
                None => continue,
            };
            let last = matches!(update, Update::Finished { .. } | Update::Failed(_));
            if last {
                self.lease = None;
            }
            self.send(update)?;
            told = Instant::now();
            if last {
                return Ok(end);
            }
        }
    }

    /// Tells the collector of traces.
    #[cfg(feature = "otel")]
    fn trace(&self, end: &Result<End, Gone>, total: std::time::Duration) {
        let Some(exporter) = &self.app.exporter else { return };
        let (outcome, total, counts) = match end {
            Ok(End::Finished { reason: FinishReason::Stop, usage, timings }) => {
                ("stop", timings.total, Some((usage, timings)))
            }
            Ok(End::Finished { usage, timings, .. }) => ("length", timings.total, Some((usage, timings))),
            Ok(End::Failed) => ("failed", total, None),
            Err(Gone) => ("cancelled", total, None),
        };
        exporter.ended(&crate::otel::Ended { request: &self.id, choice: self.choice, outcome, total, counts });
    }

    /// Logs and counts a failure.
    fn failed(&self, error: EngineError) -> Result<ApiError, Gone> {
        if matches!(error, EngineError::Cancelled) && self.updates.is_closed() {
            return Err(Gone);
        }
        self.app.metrics.failed.add(1);
        let said = error.to_string();
        let error = ApiError::from(error);
        let (request_id, choice, status) = (&self.id.id, self.choice, error.status.as_u16());
        // What is wrong with a request may quote it, and is told to its client; the log gets the server's own failures.
        if error.status.is_server_error() {
            tracing::error!(request_id, choice, outcome = "failed", status, error = said, "answer");
        } else {
            tracing::info!(request_id, choice, outcome = "failed", status, "answer");
        }
        Ok(error)
    }

    fn send(&self, update: Update) -> Result<(), Gone> {
        match self.updates.try_send(update) {
            Ok(()) => Ok(()),
            Err(TrySendError::Closed(_)) => Err(Gone),
            Err(TrySendError::Full(update)) => {
                let timeout = self.app.config.reader_timeout;
                let sent =
                    self.runtime.block_on(async { tokio::time::timeout(timeout, self.updates.send(update)).await });
                match sent {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(_)) | Err(_) => Err(Gone),
                }
            }
        }
    }
}
