//! `/openapi.json`: what the routes take, in short. A test holds it against the router.

use serde_json::{Value, json};

/// The document.
pub(crate) fn document() -> Value {
    let number = |low: f64, high: f64| json!({"type": ["number", "null"], "minimum": low, "maximum": high});
    let whole = |low: i64| json!({"type": ["integer", "null"], "minimum": low});
    let flag = json!({"type": ["boolean", "null"]});
    let sampling = json!({
        "model": {"type": ["string", "null"], "description": "Any name, also the empty one: there is one model."},
        "n": whole(1),
        "stream": flag,
        "stream_options": {"type": ["object", "null"], "properties": {"include_usage": flag, "include_progress": flag}},
        "max_tokens": whole(1),
        "temperature": number(0.0, 100.0),
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
        "top_k": whole(-1),
        "min_p": number(0.0, 1.0),
        "repetition_penalty": number(0.01, 100.0),
        "presence_penalty": number(-2.0, 2.0),
        "frequency_penalty": number(-2.0, 2.0),
        "seed": {"type": ["integer", "null"]},
        "stop": {"type": ["string", "array", "null"], "items": {"type": "string"}},
        "stop_token_ids": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}},
        "ignore_eos": flag,
        "skip_special_tokens": flag,
    });
    let with = |more: Value| {
        let mut all = sampling.clone();
        if let (Some(all), Value::Object(more)) = (all.as_object_mut(), more) {
            all.extend(more);
        }
        all
    };
    let messages = json!({
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "required": ["role", "content"],
            "properties": {
                "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
                "content": {
                    "type": ["string", "array", "null"],
                    "items": {"type": "object", "description": "text, image_url, video_url, image or video"},
                },
            },
        },
    });
    let kwargs = json!({"type": ["object", "null"], "properties": {"enable_thinking": flag}});
    let chat = with(json!({
        "messages": messages, "max_completion_tokens": whole(1), "chat_template_kwargs": kwargs,
        "tools": {"type": ["array", "null"]}, "tool_choice": {"enum": ["auto", "none", null]},
    }));
    let text = with(json!({
        "prompt": {"type": ["string", "array"], "items": {"type": "string", "minLength": 1}, "minLength": 1, "minItems": 1},
    }));
    let tokenize = json!({
        "prompt": {"type": "string"}, "messages": messages, "chat_template_kwargs": kwargs, "return_token_strs": flag,
    });
    let detokenize = json!({"tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}}});
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Keye", "version": env!("CARGO_PKG_VERSION")},
        "paths": {
            "/health": {"get": get("Alive", "application/json")},
            "/ready": {"get": get("Ready for requests", "application/json")},
            "/metrics": {"get": get("Prometheus metrics", "text/plain")},
            "/openapi.json": {"get": get("This document", "application/json")},
            "/v1/models": {"get": get("The model", "application/json")},
            "/v1/models/{model}": {"get": model()},
            "/v1/chat/completions": {"post": post("Answer a conversation", chat, &["messages"])},
            "/v1/completions": {"post": post("Continue a text", text, &["prompt"])},
            "/tokenize": {"post": post("Text or messages to token ids", tokenize, &[])},
            "/detokenize": {"post": post("Token ids to text", detokenize, &["tokens"])},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {"error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"}, "type": {"type": "string"},
                            "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
                        },
                    }},
                },
            },
        },
        "security": [{}, {"key": []}],
    })
}

fn get(summary: &str, kind: &str) -> Value {
    json!({"summary": summary, "responses": responses(kind)})
}

fn model() -> Value {
    let mut operation = get("The model of that name", "application/json");
    operation["parameters"] = json!([{"name": "model", "in": "path", "required": true, "schema": {"type": "string"}}]);
    operation
}

fn post(summary: &str, properties: Value, required: &[&str]) -> Value {
    let schema = json!({"type": "object", "required": required, "properties": properties});
    let mut operation = json!({
        "summary": summary,
        "requestBody": {"required": true, "content": {"application/json": {"schema": schema}}},
        "responses": responses("application/json"),
    });
    if properties_stream(&operation) {
        operation["responses"]["200"]["content"]["text/event-stream"] = json!({"schema": {"type": "string"}});
    }
    operation
}

fn properties_stream(operation: &Value) -> bool {
    !operation["requestBody"]["content"]["application/json"]["schema"]["properties"]["stream"].is_null()
}

fn responses(kind: &str) -> Value {
    let schema = if kind == "text/plain" { json!({"type": "string"}) } else { json!({"type": "object"}) };
    let error = json!({"schema": {"$ref": "#/components/schemas/Error"}});
    json!({
        "200": {"description": "Done", "content": {kind: {"schema": schema}}},
        "default": {"description": "Refused or failed", "content": {"application/json": error}},
    })
}
