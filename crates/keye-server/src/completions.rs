//! `POST /v1/completions`: prompts as they are, without the chat template.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request as HttpRequest, State};
use axum::response::Response;
use keye_engine::Request;
use keye_processor::ThinkMode;
use serde_json::Value;

use crate::admission::Lease;
use crate::answer::{Answer, Format, Shape};
use crate::app::App;
use crate::chat::blocking;
use crate::error::ApiError;
use crate::fields::{self, Fields};
use crate::generation::Generation;
use crate::guard::RequestId;
use crate::sampling_fields::{self, Common};
use crate::sse;

pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    request: HttpRequest,
) -> Result<Response, ApiError> {
    let mut lease = Lease::default();
    lease.take_streams(&app, 1)?;
    let body = lease.read_body(&app, request).await?;
    let (common, requests) = blocking({
        let app = Arc::clone(&app);
        move || read(&body, &app)
    })
    .await?;
    lease.take_streams(&app, requests.len() * common.choices - 1)?;
    let format = Format { shape: Shape::Text, streamed: common.stream, include_usage: common.include_usage };
    let answer = Answer::new(&app.config.model, format, requests.len(), common.choices, &[], false);
    let generation = Generation::start(&app, &id, requests, common.choices, lease, common.include_progress)?;
    sse::respond(generation, answer, common.stream).await.map_err(|error| match error.param.as_deref() {
        // There are no messages here.
        Some("messages") => ApiError { param: Some("prompt".into()), ..error },
        _ => common.blame(error),
    })
}

fn read(body: &[u8], app: &App) -> Result<(Common, Vec<Request>), ApiError> {
    let body = fields::parse(body)?;
    let fields = Fields::of(&body)?;
    let common = sampling_fields::read(&fields, app)?;
    let prompts = prompts(&fields, "prompt", app)?;
    let most = app.config.max_streams;
    if prompts.is_empty() || prompts.len().saturating_mul(common.choices) > most {
        let message = format!("prompt: expected 1 to {most} answers, prompts times n");
        return Err(ApiError::invalid("prompt", message));
    }
    // A number here, a switch for chats; some clients send the switch.
    let logprobs = match fields.get("logprobs") {
        Some(Value::Bool(false)) => None,
        _ => sampling_fields::logprobs_in_range(&fields, "logprobs")?,
    };
    // The text is all that there is: with a grammar it begins with it, unless the prompt itself has opened a tag.
    let think = ThinkMode::NoThink;
    let request = |prompt| Request { raw_prompt: Some(prompt), think, logprobs, ..common.request() };
    let requests: Vec<Request> = prompts.into_iter().map(request).collect();
    Ok((common, requests))
}

/// A text, a list of texts, the token ids of a text or a list of those.
pub(crate) fn prompts(fields: &Fields, name: &str, app: &App) -> Result<Vec<String>, ApiError> {
    let value = fields.get(name).ok_or_else(|| ApiError::invalid(name, format!("{name}: missing")))?;
    let is_ids = |value: &Value| value.as_array().is_some_and(|list| list.first().is_some_and(Value::is_number));
    let prompts = match value {
        ids if is_ids(ids) => vec![text_of_tokens(ids, name, app)?],
        Value::Array(list) if list.first().is_some_and(Value::is_array) => {
            list.iter().map(|ids| text_of_tokens(ids, name, app)).collect::<Result<_, _>>()?
        }
        _ => fields.strings(name)?.unwrap_or_default(),
    };
    if prompts.iter().any(String::is_empty) {
        return Err(ApiError::invalid(name, format!("{name}: expected text, found an empty string")));
    }
    Ok(prompts)
}

/// Prompts are text here, so token ids are taken that are those of a text.
fn text_of_tokens(ids: &Value, name: &str, app: &App) -> Result<String, ApiError> {
    let wrong = |message: &str| ApiError::invalid(name, format!("{name}: {message}"));
    let ids = fields::token_ids(ids).ok_or_else(|| wrong("expected token ids, or lists of them"))?;
    let text = app.processor.tokenizer.decode(&ids, false).map_err(|error| wrong(&error.to_string()))?;
    if app.processor.tokenizer.encode(&text)? != ids {
        return Err(wrong("these token ids are not what this model's tokenizer makes of a text; send the text"));
    }
    Ok(text)
}
