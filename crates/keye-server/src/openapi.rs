//! `/openapi.json`: routes, fields, answers, statuses. A test holds it against the router.

use serde_json::{Map, Value, json};

use crate::openapi_schemas::schemas;

/// The document.
pub(crate) fn document() -> Value {
    let stream = |kind: &str, summary: &str, request: &str, answer: &str| {
        let mut operation = post(summary, request, answer);
        operation["description"] = format!("With `stream` the answer comes as server-sent events, each {kind}.").into();
        operation["responses"]["200"]["content"]["text/event-stream"] = json!({"schema": {"type": "string"}});
        operation
    };
    let mut model = get("The model of that name", "application/json", reference("Model"), &[401, 404]);
    model["parameters"] =
        json!([{"name": "model", "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}]);
    let status = json!({"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}});
    let text = json!({"type": "string"});
    let mut ready = get("Ready for requests", "application/json", status.clone(), &[503]);
    let mut health = get("Alive", "application/json", status, &[]);
    for open in [&mut ready, &mut health] {
        open["security"] = json!([]);
    }
    let models = json!({
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": reference("Model")}},
    });
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Keye", "version": env!("CARGO_PKG_VERSION")},
        "paths": {
            "/health": {"get": health},
            "/ready": {"get": ready},
            "/metrics": {"get": get("Prometheus metrics", "text/plain", text, &[401])},
            "/openapi.json": {"get": get("This document", "application/json", json!({"type": "object"}), &[401])},
            "/v1/models": {"get": get("The model", "application/json", models, &[401])},
            "/v1/models/{model}": {"get": model},
            "/v1/chat/completions": {"post": stream("a chunk", "Answer a conversation", "ChatRequest", "Chat")},
            "/v1/completions": {"post": stream("a chunk", "Continue a text", "TextRequest", "Text")},
            "/v1/responses": {"post": stream("named by its `type`", "Answer a conversation", "ResponseRequest", "Response")},
            "/v1/embeddings": {"post": post("Texts or a conversation to vectors of length 1", "EmbeddingRequest", "Embeddings")},
            "/tokenize": {"post": post("Text or messages to token ids", "TokenizeRequest", "Tokens")},
            "/detokenize": {"post": post("Token ids to text", "DetokenizeRequest", "Detokenized")},
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}, "schemas": schemas()},
        "security": [{"key": []}, {}],
    })
}

/// A schema of the components.
fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn get(summary: &str, kind: &str, schema: Value, errors: &[u16]) -> Value {
    json!({"summary": summary, "responses": responses(kind, schema, errors)})
}

fn post(summary: &str, request: &str, answer: &str) -> Value {
    json!({
        "summary": summary,
        "requestBody": {"required": true, "content": {"application/json": {"schema": reference(request)}}},
        "responses": responses("application/json", reference(answer), &[400, 401, 408, 413, 415, 429, 503]),
    })
}

fn responses(kind: &str, schema: Value, errors: &[u16]) -> Value {
    let mut responses = Map::new();
    responses.insert("200".into(), json!({"description": "Done", "content": {kind: {"schema": schema}}}));
    for status in errors.iter().chain(&[405, 500]) {
        let description = match status {
            400 => "A field that is wrong or not supported, or media that cannot be read",
            401 => "The key is missing or wrong",
            404 => "There is no such model",
            405 => "This route does not take that method",
            408 => "The body took too long to arrive",
            413 => "The body is too large",
            415 => "The body is not json",
            429 => "No room; try again after `Retry-After` seconds",
            503 => "The server is stopping",
            _ => "A defect, or a broken decoder or disk",
        };
        let content = json!({"application/json": {"schema": reference("Error")}});
        responses.insert(status.to_string(), json!({"description": description, "content": content}));
    }
    Value::Object(responses)
}
