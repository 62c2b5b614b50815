//! `POST /v1/responses`: OpenAI's newer shape of the same answers. Nothing is stored.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request as HttpRequest, State};
use axum::response::Response;
use keye_engine::Request;
use keye_processor::ThinkMode;
use serde_json::{Map, Value, json};

use crate::admission::Lease;
use crate::app::App;
use crate::chat::{blocking, conversation, prepare_for, template};
use crate::error::ApiError;
use crate::fields::{self, Fields};
use crate::generation::Generation;
use crate::guard::RequestId;
use crate::response_items::ResponseAnswer;
use crate::sampling_fields::{self, Common};
use crate::{sse, structured, tools};

pub(crate) async fn responses(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    request: HttpRequest,
) -> Result<Response, ApiError> {
    respond(app, id, request).await.map_err(|error| match &error.param {
        // What is wrong in a message is wrong in the input.
        Some(param) if param.starts_with("messages") => ApiError { param: Some("input".into()), ..error },
        _ => error,
    })
}

async fn respond(app: Arc<App>, id: RequestId, request: HttpRequest) -> Result<Response, ApiError> {
    let mut lease = Lease::default();
    lease.take_streams(&app, 1)?;
    let body = lease.read_body(&app, request).await?;
    let (common, request, answer) = blocking({
        let app = Arc::clone(&app);
        move || read(&body, &app)
    })
    .await?;
    let generation = Generation::start(&app, &id, vec![request], 1, lease, common.include_progress)?;
    sse::respond(generation, answer, common.stream).await.map_err(|error| common.blame(error))
}

fn read(body: &[u8], app: &App) -> Result<(Common, Request, ResponseAnswer), ApiError> {
    let body = fields::parse(body)?;
    let fields = Fields::of(&body)?;
    refuse_state(&fields)?;
    let mut common = sampling_fields::read(&fields, app)?;
    if common.choices != 1 {
        return Err(ApiError::unsupported("n"));
    }
    if let Some(format) = fields.object("text")?.and_then(|text| text.get("format")).filter(|format| !format.is_null())
    {
        let format = format.as_object().ok_or_else(|| ApiError::invalid("text", "text.format: expected an object"))?;
        if let Some(grammar) = structured::format_grammar(format, "text.format")? {
            (common.grammar, common.grammar_field) = (Some(grammar), "text.format");
        }
    }
    let tools = tools::read(&fields)?;
    prepare_for(&tools, &mut common)?;
    let mut messages = messages(&fields)?;
    if let Some(instructions) = fields.string("instructions")? {
        messages.insert(0, json!({"role": "system", "content": instructions}));
    }
    let conversation = conversation(&Value::Array(messages), &tools, app)?;
    let (mut think, template) = template(&fields, &tools)?;
    if let Some(effort) = fields.object("reasoning")?.and_then(|reasoning| reasoning.get("effort")) {
        think = match effort.as_str() {
            None => think,
            Some("none" | "minimal") => ThinkMode::NoThink,
            Some(_) => ThinkMode::Think,
        };
    }
    let wanted =
        |list: &Value| list.as_array().is_some_and(|list| list.iter().any(|i| i == "message.output_text.logprobs"));
    let top = sampling_fields::logprobs_in_range(&fields, "top_logprobs")?;
    let logprobs = if fields.get("include").is_some_and(wanted) { Some(top.unwrap_or(0)) } else { top };
    let request = Request { conversation, think, template, logprobs, ..common.request() };
    let (form, echo) = (common.grammar.is_some(), echo(&fields, &common));
    let answer = ResponseAnswer::new(&app.config.model, common.stream, &tools.names, form, echo);
    Ok((common, request, answer))
}

/// Fields that need a store, and others that cannot be done.
fn refuse_state(fields: &Fields) -> Result<(), ApiError> {
    if let Some(name) = ["previous_response_id", "conversation"].into_iter().find(|name| fields.get(name).is_some()) {
        let message = format!("{name}: this server stores no responses; send the whole conversation as input");
        return Err(ApiError { code: Some("unsupported_parameter"), ..ApiError::invalid(name, message) });
    }
    for name in ["store", "background"] {
        if fields.bool(name)? == Some(true) {
            let message = format!("{name}: this server stores no responses; leave it out or send false");
            return Err(ApiError { code: Some("unsupported_parameter"), ..ApiError::invalid(name, message) });
        }
    }
    match (fields.get("prompt"), fields.string("truncation")?) {
        (Some(_), _) => Err(ApiError::unsupported("prompt")),
        (_, Some("auto")) => Err(ApiError::unsupported("truncation")),
        _ => Ok(()),
    }
}

/// What the answer repeats of the request.
fn echo(fields: &Fields, common: &Common) -> Map<String, Value> {
    let of = |name: &str, otherwise: Value| fields.get(name).cloned().unwrap_or(otherwise);
    let text = json!({"format": {"type": "text"}});
    let mut echo = Map::new();
    for (name, value) in [
        ("instructions", of("instructions", Value::Null)),
        ("max_output_tokens", of("max_output_tokens", Value::Null)),
        ("metadata", of("metadata", json!({}))),
        ("parallel_tool_calls", of("parallel_tool_calls", true.into())),
        ("previous_response_id", Value::Null),
        ("reasoning", of("reasoning", json!({"effort": null, "summary": null}))),
        ("store", false.into()),
        ("temperature", common.sampling.temperature.into()),
        ("text", fields.get("text").filter(|text| text["format"].is_object()).cloned().unwrap_or(text)),
        ("tool_choice", of("tool_choice", "auto".into())),
        ("tools", of("tools", json!([]))),
        ("top_p", common.sampling.top_p.into()),
        ("truncation", "disabled".into()),
        ("user", of("user", Value::Null)),
    ] {
        echo.insert(name.into(), value);
    }
    echo
}

/// `input` as messages of a chat.
fn messages(fields: &Fields) -> Result<Vec<Value>, ApiError> {
    let wrong = |message: String| ApiError::invalid("input", message);
    let items = match fields.get("input") {
        Some(Value::String(text)) => return Ok(vec![json!({"role": "user", "content": text})]),
        Some(Value::Array(items)) if !items.is_empty() => items,
        _ => return Err(wrong("input: expected a text, or a list with at least one item".into())),
    };
    let mut messages: Vec<Value> = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let at = format!("input[{i}]");
        let Some(map) = item.as_object() else { return Err(wrong(format!("{at}: expected an object"))) };
        let kind = map.get("type").and_then(Value::as_str);
        match kind {
            None | Some("message") => {
                let role = map.get("role").cloned().ok_or_else(|| wrong(format!("{at}.role: missing")))?;
                messages.push(json!({"role": role, "content": content(&at, map.get("content"))?}));
            }
            Some("function_call") => {
                let call = json!({"id": map.get("call_id"), "type": "function", "function": {
                    "name": map.get("name"), "arguments": map.get("arguments")}});
                if !call["function"]["name"].is_string() || !call["function"]["arguments"].is_string() {
                    return Err(wrong(format!("{at}: expected name and arguments, texts")));
                }
                // The calls of one turn belong to its text.
                match messages.last_mut().filter(|last| last["role"] == "assistant") {
                    Some(last) => match last["tool_calls"].as_array_mut() {
                        Some(calls) => calls.push(call),
                        None => last["tool_calls"] = json!([call]),
                    },
                    None => messages.push(json!({"role": "assistant", "content": null, "tool_calls": [call]})),
                }
            }
            Some("function_call_output") => {
                let output = content(&at, map.get("output"))?;
                messages.push(json!({"role": "tool", "tool_call_id": map.get("call_id"), "content": output}));
            }
            // Earlier thinking is not part of later prompts.
            Some("reasoning") => {}
            Some(_) => {
                let known = "message, function_call, function_call_output or reasoning";
                return Err(wrong(format!("{at}.type: expected {known}")));
            }
        }
    }
    if messages.is_empty() {
        return Err(wrong("input: expected at least one message".into()));
    }
    Ok(messages)
}

/// Parts under the names of chats; what is no part of this API is left to the reader of messages.
fn content(at: &str, content: Option<&Value>) -> Result<Value, ApiError> {
    let parts = match content {
        None | Some(Value::Null) => {
            return Err(ApiError::invalid("input", format!("{at}: content or output is missing")));
        }
        Some(Value::Array(parts)) => parts,
        Some(other) => return Ok(other.clone()),
    };
    let part = |part: &Value| {
        let Some(map) = part.as_object() else { return Ok(part.clone()) };
        let (kind, name) = match map.get("type").and_then(Value::as_str) {
            Some("input_text" | "output_text" | "refusal") => {
                let text = map.get("text").or_else(|| map.get("refusal"));
                return Ok(json!({"type": "text", "text": text}));
            }
            Some("input_image") => ("image_url", "image_url"),
            Some("input_video") => ("video_url", "video_url"),
            _ => return Ok(part.clone()),
        };
        let mut map = map.clone();
        if map.remove("file_id").is_some_and(|id| !id.is_null()) {
            return Err(ApiError::invalid("input", format!("{at}: files are not stored by this server; send {name}")));
        }
        map.insert("type".into(), kind.into());
        Ok(Value::Object(map))
    };
    parts.iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(input: Value) -> Result<Vec<Value>, String> {
        let body = json!({"input": input});
        messages(&Fields::of(&body).unwrap()).map_err(|error| error.message)
    }

    #[test]
    fn items_are_messages() {
        let call = json!({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"});
        let found = of(json!([
            {"role": "user", "content": [{"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": "a"}]},
            {"type": "reasoning", "summary": []},
            call, call,
            {"type": "function_call_output", "call_id": "c", "output": "y"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "z"}]},
        ]))
        .unwrap();
        assert_eq!(found[0]["content"][0], json!({"type": "text", "text": "x"}));
        assert_eq!(found[0]["content"][1], json!({"type": "image_url", "image_url": "a"}));
        assert_eq!(found[1]["tool_calls"].as_array().map(Vec::len), Some(2));
        assert_eq!((&found[2]["role"], &found[2]["content"]), (&json!("tool"), &json!("y")));
        assert_eq!(found[3]["content"][0]["text"], "z");
        assert_eq!(of(json!("hi")).unwrap(), [json!({"role": "user", "content": "hi"})]);
        for wrong in
            [json!([]), json!(3), json!([3]), json!([{"type": "item_reference", "id": "x"}]), json!([{"role": "user"}])]
        {
            assert!(of(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
