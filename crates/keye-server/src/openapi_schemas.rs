//! The schemas of `/openapi.json`.

use std::ops::RangeInclusive;

use keye_engine::{MAX_LOGPROBS, MAX_STOP_BYTES, MAX_STOPS, MIN_P, PENALTY, REPETITION_PENALTY, TEMPERATURE};
use serde_json::{Map, Value, json};

/// By name.
pub(crate) fn schemas() -> Value {
    let mut all = requests();
    all.extend(answers());
    Value::Object(all)
}

/// The same with null as good as absent.
fn or_null(kind: &str) -> Value {
    json!({"type": [kind, "null"]})
}

fn object(required: &[&str], properties: Value) -> Value {
    json!({"type": "object", "required": required, "properties": properties})
}

fn merged(parts: &[&Value]) -> Value {
    let mut all = Map::new();
    for part in parts {
        all.extend(part.as_object().cloned().unwrap_or_default());
    }
    Value::Object(all)
}

/// Fields of sampling, stopping and streaming that all generating routes have.
fn sampling() -> Value {
    let number =
        |of: RangeInclusive<f64>| json!({"type": ["number", "null"], "minimum": of.start(), "maximum": of.end()});
    let whole = |low: i64| json!({"type": ["integer", "null"], "minimum": low});
    let flag = or_null("boolean");
    json!({
        "model": {"type": ["string", "null"], "description": "Any name, also the empty one: there is one model."},
        "stream": flag,
        "temperature": number(TEMPERATURE),
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"type": ["integer", "null"], "minimum": -1, "maximum": u32::MAX},
        "min_p": number(MIN_P),
        "repetition_penalty": number(REPETITION_PENALTY),
        "presence_penalty": number(PENALTY),
        "frequency_penalty": number(PENALTY),
        "seed": {"type": ["integer", "null"], "minimum": i64::MIN, "maximum": i64::MAX},
        "stop": {
            "description": format!("Strings have at most {MAX_STOP_BYTES} bytes."),
            "type": ["string", "array", "null"], "minLength": 1, "maxLength": MAX_STOP_BYTES, "maxItems": MAX_STOPS,
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_BYTES},
        },
        "stop_token_ids": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0, "maximum": u32::MAX}},
        "ignore_eos": flag,
        "skip_special_tokens": flag,
        "max_reasoning_tokens": whole(0),
        "thinking_token_budget": whole(0),
        "guided_json": {"type": ["object", "string", "null"]},
        "guided_regex": or_null("string"),
        "guided_choice": {"type": ["array", "null"], "items": {"type": "string", "minLength": 1}},
        "guided_grammar": or_null("string"),
        "json_schema": {"type": ["object", "string", "null"]},
        "regex": or_null("string"),
        "ebnf": or_null("string"),
        "structured_outputs": or_null("object"),
        "stream_options": {"type": ["object", "null"], "properties": {"include_usage": flag, "include_progress": flag}},
    })
}

fn requests() -> Map<String, Value> {
    let flag = or_null("boolean");
    let whole = json!({"type": ["integer", "null"], "minimum": 1});
    let top = json!({"type": ["integer", "null"], "minimum": 0, "maximum": MAX_LOGPROBS});
    let role = json!({"enum": ["system", "developer", "user", "assistant", "tool"]});
    let link = json!({"anyOf": [{"type": "string"}, object(&["url"], json!({"url": {"type": "string"}}))]});
    let of_kind = |name: &str, value: &Value| {
        let mut part = object(&["type", name], json!({"type": {"const": name}}));
        part["properties"][name] = value.clone();
        part
    };
    let text = json!({"type": "string"});
    let frames = json!({"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "string"}}]});
    let part = json!({
        "description": "options of images and videos stand beside the url or with it",
        "anyOf": [
            text, of_kind("text", &text), of_kind("image_url", &link), of_kind("video_url", &link), of_kind("image", &text),
            of_kind("video", &frames),
        ],
    });
    let content = json!({"type": ["string", "array", "null"], "items": part});
    let message = object(
        &["role"],
        json!({
            "role": role, "content": content, "tool_calls": {"type": ["array", "null"]}, "tool_call_id": or_null("string"),
        }),
    );
    let messages = json!({"type": "array", "minItems": 1, "items": message});
    let kwargs = json!({"type": ["object", "null"], "properties": {"enable_thinking": flag, "add_vision_id": flag}});
    let name = json!({"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,64}$"});
    let function =
        object(&["name"], json!({"name": name, "description": or_null("string"), "parameters": or_null("object")}));
    let tools = |tool: Value| {
        json!({
            "tools": {"type": ["array", "null"], "items": tool},
            "tool_choice": {"anyOf": [{"enum": ["auto", "none", "required", null]}, {"type": "object"}]},
            "parallel_tool_calls": flag,
        })
    };
    let chat_tools = tools(object(&["function"], json!({"type": {"const": "function"}, "function": function})));
    let response_tools = tools(merged(&[&function, &json!({"required": ["type", "name"]})]));
    let format = json!({"type": ["object", "null"], "required": ["type"], "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": {"type": "object"},
    }});
    let input = json!({"anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}},
    ]});
    let item = json!({"type": "object", "properties": {
        "type": {"enum": ["message", "function_call", "function_call_output", "reasoning", null]}, "role": role,
    }});
    let request = |required: &[&str], parts: &[&Value]| object(required, merged(parts));
    let sampling = sampling();
    let mut all = Map::new();
    all.insert("ChatRequest".into(), request(&["messages"], &[&sampling, &chat_tools, &json!({
        "messages": messages, "n": whole, "max_tokens": whole, "max_completion_tokens": whole,
        "chat_template_kwargs": kwargs, "add_generation_prompt": flag, "logprobs": flag, "top_logprobs": top,
        "response_format": format,
    })]));
    all.insert(
        "TextRequest".into(),
        request(
            &["prompt"],
            &[
                &sampling,
                &json!({
                    "prompt": input, "n": whole, "max_tokens": whole, "logprobs": top, "response_format": format,
                }),
            ],
        ),
    );
    all.insert("ResponseRequest".into(), request(&["input"], &[&sampling, &response_tools, &json!({
        "input": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": item}]},
        "instructions": or_null("string"), "max_output_tokens": whole, "chat_template_kwargs": kwargs,
        "reasoning": {"type": ["object", "null"], "properties": {"effort": or_null("string")}},
        "text": {"type": ["object", "null"], "properties": {"format": format}}, "top_logprobs": top,
        "include": {"type": ["array", "null"], "items": {"type": "string"}},
        "store": {"enum": [false, null]}, "background": {"enum": [false, null]}, "previous_response_id": {"type": "null"},
    })]));
    all.insert(
        "EmbeddingRequest".into(),
        request(
            &[],
            &[&json!({
                "model": or_null("string"), "chat_template_kwargs": kwargs,
                "add_generation_prompt": flag, "encoding_format": {"enum": ["float", "base64", null]},
                "pooling": {"enum": ["last", "mean", null]}, "dimensions": {"type": "null"},
            })],
        ),
    );
    // Null is as good as absent.
    let either = |name: &str, value: &Value| {
        json!([
            {"required": [name], "properties": {name: value, "messages": {"type": "null"}}},
            {"required": ["messages"], "properties": {name: {"type": "null"}, "messages": messages}},
        ])
    };
    all["EmbeddingRequest"]["oneOf"] = either("input", &input);
    all.insert(
        "TokenizeRequest".into(),
        request(
            &[],
            &[&json!({
                "model": or_null("string"), "chat_template_kwargs": kwargs,
                "return_token_strs": flag, "add_generation_prompt": flag, "tools": chat_tools["tools"],
                "tool_choice": chat_tools["tool_choice"], "parallel_tool_calls": flag,
            })],
        ),
    );
    all["TokenizeRequest"]["oneOf"] = either("prompt", &json!({"type": "string"}));
    all.insert("DetokenizeRequest".into(), request(&["tokens"], &[&json!({
        "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": u32::MAX}}, "skip_special_tokens": flag,
    })]));
    all
}

fn answers() -> Map<String, Value> {
    let text = json!({"type": "string"});
    let text_or_null = or_null("string");
    let count = json!({"type": "integer", "minimum": 0});
    let details = json!({"type": "object", "properties": {"cached_tokens": count, "media_tokens": count}});
    let usage = object(
        &["prompt_tokens", "completion_tokens", "total_tokens"],
        json!({
            "prompt_tokens": count, "completion_tokens": count, "total_tokens": count, "prompt_tokens_details": details,
        }),
    );
    let reason = json!({"enum": ["stop", "length", "tool_calls"]});
    let call = object(
        &["id", "type", "function"],
        json!({
            "id": text, "type": {"const": "function"},
            "function": object(&["name", "arguments"], json!({"name": text, "arguments": text})),
        }),
    );
    let message = object(
        &["role", "content"],
        json!({
            "role": {"const": "assistant"}, "content": text_or_null, "reasoning_content": text_or_null,
            "tool_calls": {"type": "array", "items": call},
        }),
    );
    let warning = object(&["media", "message"], json!({"media": count, "message": text}));
    let warnings = json!({"type": "array", "items": warning, "description": "of media that are cut short or damaged"});
    let head = |object: &str| {
        json!({
            "id": text, "object": {"const": object}, "created": count, "model": text, "usage": usage,
            "warnings": warnings,
        })
    };
    let answer = |name: &str, choice: Value| {
        let choices = json!({"choices": {"type": "array", "items": choice}});
        object(&["id", "object", "created", "model", "choices", "usage"], merged(&[&head(name), &choices]))
    };
    let choice = |key: &str, value: Value| {
        let mut choice = object(
            &["index", key, "finish_reason"],
            json!({
                "index": count, "finish_reason": reason, "logprobs": {"type": ["object", "null"]},
            }),
        );
        choice["properties"][key] = value;
        choice
    };
    let item =
        object(&["type", "id"], json!({"type": {"enum": ["message", "reasoning", "function_call"]}, "id": text}));
    let error = object(
        &["message", "type", "param", "code"],
        json!({
            "message": text, "type": text, "param": text_or_null, "code": text_or_null,
        }),
    );
    let mut all = Map::new();
    for (name, schema) in [
        ("Error", object(&["error"], json!({"error": error}))),
        (
            "Model",
            object(
                &["id", "object", "created", "owned_by"],
                json!({
                    "id": text, "object": {"const": "model"}, "created": count, "owned_by": text, "max_model_len": count,
                }),
            ),
        ),
        ("Chat", answer("chat.completion", choice("message", message))),
        ("Text", answer("text_completion", choice("text", text.clone()))),
        (
            "Response",
            object(
                &["id", "object", "created_at", "status", "model", "output", "usage"],
                json!({
                    "id": text, "object": {"const": "response"}, "created_at": count, "model": text,
                    "status": {"enum": ["completed", "incomplete"]}, "output": {"type": "array", "items": item},
                    "warnings": warnings,
                    "usage": object(&["input_tokens", "output_tokens", "total_tokens"], json!({
                        "input_tokens": count, "output_tokens": count, "total_tokens": count,
                    })),
                }),
            ),
        ),
        (
            "Tokens",
            object(
                &["count", "max_model_len", "tokens"],
                json!({
                    "count": count, "max_model_len": count, "tokens": {"type": "array", "items": count},
                    "token_strs": {"type": "array", "items": text_or_null},
                }),
            ),
        ),
        (
            "Embeddings",
            object(
                &["object", "data", "model", "usage"],
                json!({
                    "object": {"const": "list"}, "model": text, "warnings": warnings,
                    "data": {"type": "array", "items": object(&["object", "index", "embedding"], json!({
                        "object": {"const": "embedding"}, "index": count,
                        "embedding": {"type": ["array", "string"], "items": {"type": "number"},
                                      "description": "numbers, or with base64 their f32 in little-endian order"},
                    }))},
                    "usage": object(&["prompt_tokens", "total_tokens"], json!({
                        "prompt_tokens": count, "total_tokens": count,
                    })),
                }),
            ),
        ),
        ("Detokenized", object(&["prompt"], json!({"prompt": text}))),
    ] {
        all.insert(name.into(), schema);
    }
    all
}
