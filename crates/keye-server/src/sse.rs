//! Answers over the wire: server-sent events, or one json object.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use keye_engine::{FinishReason, Usage};
use keye_processor::ThinkTag;
use serde_json::Value;

use crate::error::{ApiError, json_response};
use crate::generation::{Generation, Update};
use crate::logprobs::Logprob;

/// An answer in the making, in the shape of one of OpenAI's routes. Chunks are what a stream sends.
pub(crate) trait Answering: Send + Unpin + 'static {
    /// Whether events have names, their `type`; then no `[DONE]` follows the last.
    const NAMED: bool;

    /// Chunks before the first token.
    fn begin(&mut self) -> Vec<Value>;
    /// Work before the first token, for those who asked to hear of it.
    fn progress(&mut self, report: Value) -> Value;
    /// What the client should hear of one of its media, for the end of the answer.
    fn warning(&mut self, warning: Value);
    /// The text of a choice begins inside this tag.
    fn thinking(&mut self, choice: usize, tag: ThinkTag);
    /// A token of a choice.
    fn token(&mut self, choice: usize, text: &str, logprob: Option<Logprob>) -> Vec<Value>;
    /// The end of a choice.
    fn finished(&mut self, choice: usize, reason: FinishReason, usage: &Usage) -> Vec<Value>;
    /// The answer failed after its status had been sent.
    fn failed(&mut self, error: &ApiError) -> Value;
    /// Whether every choice has ended.
    fn is_done(&self) -> bool;
    /// The whole answer.
    fn whole(&mut self) -> Value;
}

/// Waits for the whole answer, or streams it.
pub(crate) async fn respond<A: Answering>(
    generation: Generation,
    answer: A,
    stream: bool,
) -> Result<Response, ApiError> {
    if stream { streamed(generation, answer).await } else { whole(generation, answer).await }
}

/// Waits for the whole answer.
async fn whole(mut generation: Generation, mut answer: impl Answering) -> Result<Response, ApiError> {
    while !answer.is_done() {
        match generation.next().await {
            Some(Update::Warning(warning)) => answer.warning(warning),
            Some(Update::Thinking { choice, tag }) => answer.thinking(choice, tag),
            Some(Update::Token { choice, text, logprob }) => drop(answer.token(choice, &text, logprob)),
            Some(Update::Finished { choice, reason, usage }) => drop(answer.finished(choice, reason, &usage)),
            Some(Update::Failed(error)) => return Err(error),
            Some(Update::Accepted | Update::Progress(_) | Update::Waiting) => {}
            None => return Err(ApiError::internal()),
        }
    }
    Ok(json_response(StatusCode::OK, &answer.whole()))
}

/// Streams the answer. The response begins when it is sure that the request can be answered, so that its errors have their
/// status, or when that takes so long that the client should hear something.
async fn streamed(mut generation: Generation, answer: impl Answering) -> Result<Response, ApiError> {
    let first = match generation.next().await {
        Some(Update::Failed(error)) => return Err(error),
        Some(update) => update,
        None => return Err(ApiError::internal()),
    };
    let mut events = Events { generation: Some(generation), ready: VecDeque::new(), answer };
    let begin = events.answer.begin();
    events.push(begin);
    events.take(Some(first));
    let headers: [(HeaderName, &str); 3] = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // Proxies that hold back what they pass on, such as nginx, let this through.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::from_stream(events)).into_response())
}

/// The events of a response. Dropping it cancels what generates them.
struct Events<A> {
    /// Gone when the answer is over.
    generation: Option<Generation>,
    ready: VecDeque<Bytes>,
    answer: A,
}

impl<A: Answering> Events<A> {
    fn push(&mut self, chunks: Vec<Value>) {
        let name = |chunk: &Value| match chunk["type"].as_str() {
            Some(name) if A::NAMED => format!("event: {name}\n"),
            _ => String::new(),
        };
        self.ready.extend(chunks.into_iter().map(|chunk| Bytes::from(format!("{}data: {chunk}\n\n", name(&chunk)))));
    }

    fn take(&mut self, update: Option<Update>) {
        match update {
            Some(Update::Accepted) => {}
            Some(Update::Progress(report)) => {
                let chunk = self.answer.progress(report);
                self.push(vec![chunk]);
            }
            Some(Update::Warning(warning)) => self.answer.warning(warning),
            Some(Update::Waiting) => self.ready.push_back(Bytes::from_static(b": waiting\n\n")),
            Some(Update::Thinking { choice, tag }) => self.answer.thinking(choice, tag),
            Some(Update::Token { choice, text, logprob }) => {
                let chunks = self.answer.token(choice, &text, logprob);
                self.push(chunks);
            }
            Some(Update::Finished { choice, reason, usage }) => {
                let chunks = self.answer.finished(choice, reason, &usage);
                self.push(chunks);
                if self.answer.is_done() {
                    if !A::NAMED {
                        self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
                    }
                    self.generation = None;
                }
            }
            Some(Update::Failed(error)) => self.fail(&error),
            None => self.fail(&ApiError::internal()),
        }
    }

    /// The status has been sent, so the error comes as an event, as OpenAI's clients know it.
    fn fail(&mut self, error: &ApiError) {
        let event = self.answer.failed(error);
        self.push(vec![event]);
        self.generation = None;
    }
}

impl<A: Answering> futures_core::Stream for Events<A> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(bytes)));
            }
            let Some(generation) = &mut self.generation else { return Poll::Ready(None) };
            match generation.poll_next(context) {
                Poll::Ready(update) => self.take(update),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}
