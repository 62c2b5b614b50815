//! `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use std::sync::Arc;

use axum::extract::{Request as HttpRequest, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::json;

use crate::admission::Lease;
use crate::app::App;
use crate::chat::{blocking, conversation, template};
use crate::error::{ApiError, json_response};
use crate::fields::{self, Fields};
use crate::tools;

/// Token ids of `prompt`, or of `messages` rendered by the chat template.
pub(crate) async fn tokenize(State(app): State<Arc<App>>, request: HttpRequest) -> Result<Response, ApiError> {
    let body = Lease::default().read_body(&app, request).await?;
    blocking(move || {
        let body = fields::parse(&body)?;
        let fields = Fields::of(&body)?;
        fields.string("model")?;
        let tools = tools::read(&fields)?;
        let (think, options) = template(&fields, &tools)?;
        let text = match fields.string("prompt")? {
            Some(_) if fields.get("messages").is_some() => {
                return Err(ApiError::invalid("messages", "messages: a prompt is there too; send one of them"));
            }
            Some(prompt) => prompt.to_owned(),
            None => {
                let messages = fields
                    .get("messages")
                    .ok_or_else(|| ApiError::invalid("messages", "prompt or messages: missing"))?;
                let conversation = conversation(messages, &tools, &app)?;
                if !conversation.media().is_empty() {
                    let message = "messages: media become tokens only when they are decoded; send text";
                    return Err(ApiError::invalid("messages", message));
                }
                app.processor.template.render(conversation.with_think(think).messages(), &options)?
            }
        };
        let tokens = app.processor.tokenizer.encode(&text)?;
        let mut answer = json!({"count": tokens.len(), "max_model_len": app.engine.max_model_len(), "tokens": tokens});
        if fields.bool("return_token_strs")?.unwrap_or(false) {
            let strings = tokens.iter().map(|id| app.processor.tokenizer.id_to_token(*id));
            answer["token_strs"] = strings.collect();
        }
        Ok(json_response(StatusCode::OK, &answer))
    })
    .await
}

/// Text of `tokens`.
pub(crate) async fn detokenize(State(app): State<Arc<App>>, request: HttpRequest) -> Result<Response, ApiError> {
    let body = Lease::default().read_body(&app, request).await?;
    blocking(move || {
        let body = fields::parse(&body)?;
        let fields = Fields::of(&body)?;
        let tokens = fields.token_ids("tokens")?.ok_or_else(|| ApiError::invalid("tokens", "tokens: missing"))?;
        let skip = fields.bool("skip_special_tokens")?.unwrap_or(false);
        let text = app.processor.tokenizer.decode(&tokens, skip);
        let text = text.map_err(|error| ApiError::invalid("tokens", error.to_string()))?;
        Ok(json_response(StatusCode::OK, &json!({"prompt": text})))
    })
    .await
}
