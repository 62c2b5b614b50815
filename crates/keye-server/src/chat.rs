//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request as HttpRequest, State};
use axum::response::Response;
use keye_engine::{MediumError, Request};
use keye_media::{MediaItem, Source};
use keye_processor::{Conversation, TemplateOptions, ThinkMode};
use serde_json::Value;

use crate::admission::Lease;
use crate::answer::{Answer, Format, Shape};
use crate::app::App;
use crate::error::ApiError;
use crate::fields::{self, Fields};
use crate::generation::Generation;
use crate::guard::RequestId;
use crate::sampling_fields::{self, Common};
use crate::sse;
use crate::tools::{self, Tools};

/// Ends a call.
const CALL_END: &str = "</tool_call>";

pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    request: HttpRequest,
) -> Result<Response, ApiError> {
    let mut lease = Lease::default();
    lease.take_streams(&app, 1)?;
    let body = lease.read_body(&app, request).await?;
    let (common, tools, asked) = blocking({
        let app = Arc::clone(&app);
        move || read(&body, &app)
    })
    .await?;
    lease.take_streams(&app, common.choices - 1)?;
    let format = Format { shape: Shape::Chat, streamed: common.stream, include_usage: common.include_usage };
    let answer = Answer::new(&app.config.model, format, 1, common.choices, &tools.names, common.grammar.is_some());
    let generation = Generation::start(&app, &id, vec![asked], common.choices, lease, common.include_progress)?;
    sse::respond(generation, answer, common.stream).await.map_err(|error| common.blame(error))
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

fn read(body: &[u8], app: &App) -> Result<(Common, Tools, Request), ApiError> {
    let body = fields::parse(body)?;
    let fields = Fields::of(&body)?;
    let mut common = sampling_fields::read(&fields, app)?;
    let tools = tools::read(&fields)?;
    prepare_for(&tools, &mut common)?;
    let messages = fields.get("messages").ok_or_else(|| ApiError::invalid("messages", "messages: missing"))?;
    let conversation = conversation(messages, &tools, app)?;
    let (think, template) = template(&fields, &tools)?;
    let logprobs = sampling_fields::chat_logprobs(&fields)?;
    let request = Request { conversation, think, template, logprobs, ..common.request() };
    Ok((common, tools, request))
}

/// Settings of generation that follow from the tools.
pub(crate) fn prepare_for(tools: &Tools, common: &mut Common) -> Result<(), ApiError> {
    let form = common.grammar.take();
    if form.is_none() {
        common.grammar_field = "tools";
    }
    common.grammar = tools.grammar(form)?;
    // A call counts without its closing tag, so the answer may end there.
    if tools.single && !tools.names.is_empty() && common.grammar.is_none() {
        common.sampling.stop.push(CALL_END.to_owned());
    }
    Ok(())
}

/// The messages, with media that may be opened and options below the ceilings.
pub(crate) fn conversation(messages: &Value, tools: &Tools, app: &App) -> Result<Conversation, ApiError> {
    if messages.as_array().is_none_or(Vec::is_empty) {
        return Err(ApiError::invalid("messages", "messages: expected a list with at least one message"));
    }
    for (i, message) in messages.as_array().into_iter().flatten().enumerate() {
        // Nothing reads it, but a client that sends something else has made a mistake.
        if message.get("tool_call_id").is_some_and(|id| !id.is_string() && !id.is_null()) {
            let at = format!("messages[{i}].tool_call_id");
            return Err(ApiError::invalid(&at, format!("{at}: expected a string")));
        }
    }
    let conversation = Conversation::from_json(messages)?;
    let ceilings = &app.config.ceilings;
    let found = conversation.media().len();
    if found > ceilings.media {
        let message = format!("messages: {found} images and videos, this server allows up to {}", ceilings.media);
        return Err(ApiError::invalid("messages", message));
    }
    for (index, item) in conversation.media().iter().enumerate() {
        check(item, app).map_err(|error| {
            let message = MediumError::place(index, found) + &error.message;
            ApiError { message, ..error }
        })?;
    }
    Ok(conversation.with_tools(&app.processor.template, tools.definitions.as_ref()))
}

/// A medium has to be one that may be opened, with options below the ceilings.
fn check(item: &MediaItem, app: &App) -> Result<(), ApiError> {
    let ceilings = &app.config.ceilings;
    app.config.media.check(item)?;
    ceilings.check(&item.options)?;
    let Source::Frames(frames) = &item.source else { return Ok(()) };
    if frames.len() > ceilings.frames as usize {
        let message = format!("a list of {} frames, this server allows up to {}", frames.len(), ceilings.frames);
        return Err(ApiError::invalid("messages", message));
    }
    frames.iter().filter_map(|frame| frame.options.as_ref()).try_for_each(|options| ceilings.check(options))
}

/// Thinking mode and variables of the template.
pub(crate) fn template(fields: &Fields, tools: &Tools) -> Result<(ThinkMode, TemplateOptions), ApiError> {
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
    options.tools.clone_from(&tools.definitions);
    Ok((think, options))
}
