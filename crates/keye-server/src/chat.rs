//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request as HttpRequest, State};
use axum::response::Response;
use keye_engine::Request;
use keye_media::Source;
use keye_processor::{Conversation, TemplateOptions, ThinkMode};
use serde_json::Value;

use crate::admission::Lease;
use crate::answer::{Answer, Shape};
use crate::app::App;
use crate::error::ApiError;
use crate::fields::{self, Fields};
use crate::generation::Generation;
use crate::guard::RequestId;
use crate::sampling_fields::{self, Common};
use crate::sse;

pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    Extension(RequestId(id)): Extension<RequestId>,
    request: HttpRequest,
) -> Result<Response, ApiError> {
    let mut lease = Lease::default();
    lease.take_streams(&app, 1)?;
    let body = lease.read_body(&app, request).await?;
    let (common, asked) = blocking({
        let app = Arc::clone(&app);
        move || read(&body, &app)
    })
    .await?;
    let requests = choices(&asked, &common);
    lease.take_streams(&app, requests.len() - 1)?;
    let answer = Answer::new(&app.config.model, Shape::Chat, 1, requests.len(), common.stream, common.include_usage);
    let generation = Generation::start(&app, &id, requests, lease, common.include_progress)?;
    if common.stream { sse::streamed(generation, answer).await } else { sse::whole(generation, answer).await }
}

/// Runs work that takes a while, such as decoding base64, away from the threads that serve connections.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(ApiError::stopping()),
    }
}

/// One request for each choice: the same but for the seed.
pub(crate) fn choices(request: &Request, common: &Common) -> Vec<Request> {
    let with_seed = |choice: usize| {
        let mut request = request.clone();
        request.sampling.seed = request.sampling.seed.wrapping_add(choice as u64);
        request
    };
    (0..common.choices).map(with_seed).collect()
}

fn read(body: &[u8], app: &App) -> Result<(Common, Request), ApiError> {
    let body = fields::parse(body)?;
    let fields = Fields::of(&body)?;
    let common = sampling_fields::read(&fields, app)?;
    let conversation = conversation(&fields, app)?;
    let (think, template) = template(&fields)?;
    let sampling = common.sampling.clone();
    Ok((common, Request { conversation, sampling, think, template, ..Request::default() }))
}

/// The messages, with media that may be opened and options below the ceilings.
pub(crate) fn conversation(fields: &Fields, app: &App) -> Result<Conversation, ApiError> {
    let messages = fields.get("messages").ok_or_else(|| ApiError::invalid("messages", "messages: missing"))?;
    if messages.as_array().is_none_or(Vec::is_empty) {
        return Err(ApiError::invalid("messages", "messages: expected a list with at least one message"));
    }
    let conversation = Conversation::from_json(messages)?;
    let ceilings = &app.config.ceilings;
    let found = conversation.media().len();
    if found > ceilings.media {
        let message = format!("messages: {found} images and videos, this server allows up to {}", ceilings.media);
        return Err(ApiError::invalid("messages", message));
    }
    for item in conversation.media() {
        app.config.media.check(item)?;
        ceilings.check(&item.options)?;
        let Source::Frames(frames) = &item.source else { continue };
        if frames.len() > ceilings.frames as usize {
            let message = format!("a list of {} frames, this server allows up to {}", frames.len(), ceilings.frames);
            return Err(ApiError::invalid("messages", message));
        }
        frames.iter().filter_map(|frame| frame.options.as_ref()).try_for_each(|options| ceilings.check(options))?;
    }
    Ok(conversation)
}

/// Thinking mode and variables of the template.
pub(crate) fn template(fields: &Fields) -> Result<(ThinkMode, TemplateOptions), ApiError> {
    let mut options = TemplateOptions::default();
    if let Some(prompt) = fields.bool("add_generation_prompt")? {
        options.add_generation_prompt = prompt;
    }
    let mut think = ThinkMode::Auto;
    if let Some(extra) = fields.object("chat_template_kwargs")? {
        think = match Fields(extra).bool("enable_thinking")? {
            None => ThinkMode::Auto,
            Some(true) => ThinkMode::Think,
            Some(false) => ThinkMode::NoThink,
        };
        if let Some(id) = Fields(extra).bool("add_vision_id")? {
            options.add_vision_id = id;
        }
        options.extra.clone_from(extra);
    }
    // Without a choice, or left to the model, an answer in plain words is one that the client has to expect.
    let free = match fields.get("tool_choice") {
        None => true,
        Some(Value::String(choice)) => choice == "auto" || choice == "none",
        Some(_) => false,
    };
    if !free {
        return Err(ApiError::unsupported("tool_choice"));
    }
    match fields.get("tools") {
        None => {}
        Some(Value::Array(list)) if list.is_empty() => {}
        Some(Value::Array(_)) if fields.get("tool_choice").is_some_and(|choice| choice == "none") => {}
        Some(tools @ Value::Array(_)) => options.tools = Some(tools.clone()),
        Some(_) => return Err(ApiError::invalid("tools", "tools: expected a list")),
    }
    Ok((think, options))
}
