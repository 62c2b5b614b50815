//! `POST /v1/completions`: prompts as they are, without the chat template.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request as HttpRequest, State};
use axum::response::Response;
use keye_engine::Request;
use serde_json::Value;

use crate::admission::Lease;
use crate::answer::{Answer, Shape};
use crate::app::App;
use crate::chat::{blocking, choices};
use crate::error::ApiError;
use crate::fields::{self, Fields};
use crate::generation::Generation;
use crate::guard::RequestId;
use crate::sampling_fields::{self, Common};
use crate::sse;

pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    Extension(RequestId(id)): Extension<RequestId>,
    request: HttpRequest,
) -> Result<Response, ApiError> {
    let mut lease = Lease::default();
    lease.take_streams(&app, 1)?;
    let body = lease.read_body(&app, request).await?;
    let (common, prompts) = blocking({
        let app = Arc::clone(&app);
        move || read(&body, &app)
    })
    .await?;
    let requests: Vec<Request> = prompts.iter().flat_map(|prompt| choices(prompt, &common)).collect();
    lease.take_streams(&app, requests.len() - 1)?;
    let answer =
        Answer::new(&app.config.model, Shape::Text, prompts.len(), common.choices, common.stream, common.include_usage);
    let generation = Generation::start(&app, &id, requests, lease, common.include_progress)?;
    if common.stream { sse::streamed(generation, answer).await } else { sse::whole(generation, answer).await }
}

fn read(body: &[u8], app: &App) -> Result<(Common, Vec<Request>), ApiError> {
    let body = fields::parse(body)?;
    let fields = Fields::of(&body)?;
    let common = sampling_fields::read(&fields, app)?;
    if matches!(fields.get("prompt"), Some(Value::Array(list)) if list.first().is_some_and(|item| !item.is_string())) {
        return Err(ApiError::invalid("prompt", "prompt: lists of token ids are not supported, send text"));
    }
    let prompts = fields.strings("prompt")?.ok_or_else(|| ApiError::invalid("prompt", "prompt: missing"))?;
    let most = app.config.max_streams;
    if prompts.is_empty() || prompts.len().saturating_mul(common.choices) > most {
        let message = format!("prompt: expected 1 to {most} answers, prompts times n");
        return Err(ApiError::invalid("prompt", message));
    }
    if prompts.iter().any(String::is_empty) {
        return Err(ApiError::invalid("prompt", "prompt: expected text, found an empty string"));
    }
    let request =
        |prompt| Request { raw_prompt: Some(prompt), sampling: common.sampling.clone(), ..Request::default() };
    let requests = prompts.into_iter().map(request).collect();
    Ok((common, requests))
}
