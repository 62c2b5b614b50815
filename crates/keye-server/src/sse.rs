//! Answers over the wire: server-sent events, or one json object.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::Value;

use crate::answer::Answer;
use crate::error::{ApiError, json_response};
use crate::generation::{Generation, Update};

/// Waits for the whole answer.
pub(crate) async fn whole(mut generation: Generation, mut answer: Answer) -> Result<Response, ApiError> {
    while !answer.is_done() {
        match generation.next().await {
            Some(Update::Token { choice, text }) => drop(answer.token(choice, &text)),
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
pub(crate) async fn streamed(mut generation: Generation, answer: Answer) -> Result<Response, ApiError> {
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
struct Events {
    /// Gone when the answer is over.
    generation: Option<Generation>,
    ready: VecDeque<Bytes>,
    answer: Answer,
}

impl Events {
    fn push(&mut self, chunks: Vec<Value>) {
        self.ready.extend(chunks.into_iter().map(|chunk| Bytes::from(format!("data: {chunk}\n\n"))));
    }

    fn take(&mut self, update: Option<Update>) {
        match update {
            Some(Update::Accepted) => {}
            Some(Update::Progress(report)) => {
                let chunk = self.answer.progress(report);
                self.push(vec![chunk]);
            }
            Some(Update::Waiting) => self.ready.push_back(Bytes::from_static(b": waiting\n\n")),
            Some(Update::Token { choice, text }) => {
                let chunks = self.answer.token(choice, &text);
                self.push(chunks);
            }
            Some(Update::Finished { choice, reason, usage }) => {
                let chunks = self.answer.finished(choice, reason, &usage);
                self.push(chunks);
                if self.answer.is_done() {
                    self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
                    self.generation = None;
                }
            }
            Some(Update::Failed(error)) => self.fail(&error),
            None => self.fail(&ApiError::internal()),
        }
    }

    /// The status has been sent, so the error comes as an event, as OpenAI's clients know it.
    fn fail(&mut self, error: &ApiError) {
        self.push(vec![error.body()]);
        self.generation = None;
    }
}

impl futures_core::Stream for Events {
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
