//! Answers of a form that was asked for: json, expressions, choices, calls of tools, thinking that ends; and how likely
//! their tokens were.

use serde_json::{Value, json};

use crate::client::Response;
use crate::support::{content, shared};

/// A tiny model says anything; hot, so that only the grammar gives it a form.
fn ask(more: &Value) -> Value {
    let mut body = json!({
        "messages": [{"role": "user", "content": "Tell."}], "max_tokens": 400, "temperature": 1.5, "top_k": 0, "seed": 11,
        "chat_template_kwargs": {"enable_thinking": false},
    });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

fn chat(more: &Value) -> Response {
    let response = shared().chat(&ask(more));
    assert_eq!(response.status, 200, "{more}: {}", response.body);
    response
}

fn text(more: &Value) -> String {
    let response = chat(more);
    assert_eq!(response.json()["choices"][0]["finish_reason"], "stop", "{more}: {}", response.body);
    response.json()["choices"][0]["message"]["content"].as_str().expect("text").to_owned()
}

fn schema() -> Value {
    json!({"type": "object", "additionalProperties": false, "required": ["kind", "score"], "properties": {
        "kind": {"enum": ["clip", "photo"]}, "score": {"type": "integer", "minimum": 0, "maximum": 99}}})
}

fn assert_fits(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert!(value["kind"] == "clip" || value["kind"] == "photo", "{text}");
    assert!(value["score"].as_u64().is_some_and(|score| score < 100), "{text}");
}

#[test]
fn answers_have_the_form_that_was_asked_for() {
    let schema = schema();
    for named in [
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}}}),
        json!({"guided_json": schema}),
        json!({"guided_json": schema.to_string()}),
        json!({"json_schema": schema.to_string()}),
        json!({"structured_outputs": {"json": schema}}),
    ] {
        assert_fits(&text(&named));
    }
    for named in [
        json!({"regex": "[0-9]{3}-[0-9]{2}"}),
        json!({"guided_regex": "[0-9]{3}-[0-9]{2}"}),
        json!({"guided_grammar": "start: /[0-9]{3}/ \"-\" /[0-9]{2}/"}),
        json!({"ebnf": "start: /[0-9]{3}-[0-9]{2}/"}),
        json!({"ebnf": "root ::= d d d \"-\" Two-Digits\nTwo-Digits ::= d{2} # GBNF\nd ::= [0-9]"}),
    ] {
        let text = text(&named);
        let shape: String = text.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        assert_eq!(shape, "000-00", "{named}");
    }
    for named in [json!({"guided_choice": ["yes", "no"]}), json!({"structured_outputs": {"choice": ["yes", "no"]}})] {
        assert!(["yes", "no"].contains(&text(&named).as_str()), "{named}");
    }
    // Any object; a model without sense need not come to its end.
    let object = chat(&json!({"response_format": {"type": "json_object"}, "ignore_eos": true}));
    let said = content(&object);
    assert!(said.starts_with("|{"), "no thinking, whatever tags the json has: {said}");
    if object.json()["choices"][0]["finish_reason"] == "stop" {
        assert!(serde_json::from_str::<Value>(&said[1..]).is_ok_and(|value| value.is_object()), "{said}");
    }
    // The plain completion too.
    let body = json!({"prompt": "Once", "regex": "[ab]{5}", "max_tokens": 50, "temperature": 1.5, "seed": 1});
    let completed = shared().post("/v1/completions", &body).json()["choices"][0]["text"].clone();
    assert!(completed.as_str().is_some_and(|t| t.len() == 5 && t.bytes().all(|b| b"ab".contains(&b))), "{completed}");
}

#[test]
fn forms_hold_for_every_choice_and_in_streams() {
    let asked = json!({"guided_json": schema(), "n": 4});
    let whole = chat(&asked).json();
    let texts: Vec<&str> = (0..4).map(|i| whole["choices"][i]["message"]["content"].as_str().expect("text")).collect();
    texts.iter().for_each(|text| assert_fits(text));
    let mut streamed = asked;
    streamed["stream"] = json!(true);
    let events = chat(&streamed).events();
    for (index, text) in texts.iter().enumerate() {
        let of_choice = events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == index);
        let joined: String = of_choice.filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_eq!(joined, *text);
    }
}

#[test]
fn thinking_comes_before_the_form_and_ends_in_time() {
    for seed in 0..8 {
        let asked = json!({"guided_json": schema(), "seed": seed, "max_reasoning_tokens": 12, "ignore_eos": true,
                           "chat_template_kwargs": {"enable_thinking": true}});
        assert_fits(&text(&asked));
    }
    // The budget alone: thinking that was opened is closed after that many tokens, under both names.
    for name in ["max_reasoning_tokens", "thinking_token_budget"] {
        let body = json!({"prompt": "<|im_start|>assistant\n<think>\n", "temperature": 0, "max_tokens": 200,
                          "ignore_eos": true, name: 9, "logprobs": 0});
        let answer = shared().post("/v1/completions", &body).json()["choices"][0].clone();
        let text = answer["text"].as_str().expect("text");
        let end = text.find("</think>").unwrap_or_else(|| panic!("{name}: {text}"));
        let offsets = answer["logprobs"]["text_offset"].as_array().expect("offsets").iter();
        let characters = text[..end].chars().count() as u64;
        let thought = offsets.take_while(|offset| offset.as_u64().is_some_and(|at| at < characters)).count();
        assert!(thought <= 9, "{name}: {thought} tokens in {text}");
    }
}

#[test]
fn calls_that_are_demanded_come() {
    let tool = |name: &str, properties: Value| {
        let required: Vec<&String> = properties.as_object().expect("properties").keys().collect();
        let parameters = json!({"type": "object", "properties": properties, "required": required,
                                "additionalProperties": false});
        json!({"type": "function", "function": {"name": name, "parameters": parameters}})
    };
    let tools = json!([
        tool("seek", json!({"second": {"type": "integer", "minimum": 0, "maximum": 99}})),
        tool("paint", json!({"colour": {"enum": ["red", "blue"]}})),
    ]);
    let calls = |more: Value| -> Vec<(String, Value)> {
        let mut body = json!({"tools": tools, "parallel_tool_calls": false});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let choice = chat(&body).json()["choices"][0].clone();
        assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("tool_calls"), &Value::Null));
        let calls = choice["message"]["tool_calls"].as_array().expect("calls").iter().map(|call| &call["function"]);
        calls
            .map(|f| {
                let arguments = f["arguments"].as_str().expect("json");
                (f["name"].as_str().expect("a name").to_owned(), serde_json::from_str(arguments).expect("json"))
            })
            .collect()
    };
    let named = calls(json!({"tool_choice": {"type": "function", "function": {"name": "paint"}}}));
    assert!(matches!(&named[..], [(name, a)] if name == "paint" && (a["colour"] == "red" || a["colour"] == "blue")));
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..64 {
        let [(name, arguments)] = &calls(json!({"tool_choice": "required", "seed": seed}))[..] else {
            panic!("one call");
        };
        match name.as_str() {
            "seek" => assert!(arguments["second"].as_u64().is_some_and(|second| second < 100), "{arguments}"),
            _ => assert!(["red", "blue"].contains(&arguments["colour"].as_str().expect("a colour")), "{arguments}"),
        }
        seen.insert(name.clone());
        if seen.len() == 2 && seed >= 5 {
            break;
        }
    }
    assert_eq!(seen.len(), 2, "both can be called");

    // The same as items of a response, whole and streamed; its tools have the name one level higher.
    let flat: Vec<Value> = tools
        .as_array()
        .expect("a list")
        .iter()
        .map(|tool| {
            let mut flat = tool["function"].clone();
            flat["type"] = json!("function");
            flat
        })
        .collect();
    let mut body = json!({"input": "Go.", "tools": flat, "tool_choice": {"type": "function", "name": "seek"},
                          "temperature": 1.5, "seed": 2, "reasoning": {"effort": "none"}});
    let item = shared().post("/v1/responses", &body).json()["output"][0].clone();
    assert_eq!((&item["type"], &item["name"]), (&json!("function_call"), &json!("seek")), "{item}");
    body["stream"] = json!(true);
    let streamed = shared().post("/v1/responses", &body).body;
    let data = streamed.lines().filter_map(|line| line.strip_prefix("data: "));
    let events: Vec<Value> = data.map(|data| serde_json::from_str(data).expect("json")).collect();
    let done = events.iter().find(|event| event["type"] == "response.function_call_arguments.done").expect("a call");
    assert_eq!(done["arguments"], item["arguments"]);
    assert_eq!(events.last().expect("events")["type"], "response.completed");
}

#[test]
fn responses_have_forms_too() {
    let format = json!({"type": "json_schema", "name": "x", "strict": true, "schema": schema()});
    let body = json!({"input": "Go.", "text": {"format": format}, "temperature": 1.5, "seed": 4, "max_output_tokens": 200,
                      "reasoning": {"effort": "none"}, "include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let answer = shared().post("/v1/responses", &body).json();
    let part = &answer["output"][0]["content"][0];
    assert_fits(part["text"].as_str().expect("text"));
    assert_eq!(answer["text"]["format"], format);
    let joined: Vec<u8> = bytes(&part["logprobs"]);
    assert_eq!(String::from_utf8_lossy(&joined), part["text"].as_str().expect("text"));
    assert_eq!(part["logprobs"][0]["top_logprobs"].as_array().map(Vec::len), Some(2));
}

/// The bytes of a list of tokens, one after the other.
fn bytes(tokens: &Value) -> Vec<u8> {
    let tokens = tokens.as_array().expect("tokens").iter();
    tokens
        .flat_map(|token| token["bytes"].as_array().expect("bytes"))
        .map(|byte| byte.as_u64().expect("a byte") as u8)
        .collect()
}

#[test]
fn tokens_with_their_probabilities() {
    let asked = json!({"logprobs": true, "top_logprobs": 3, "max_tokens": 20, "ignore_eos": true});
    let choice = chat(&asked).json()["choices"][0].clone();
    let tokens = &choice["logprobs"]["content"];
    assert_eq!(tokens.as_array().map(Vec::len), Some(20));
    for token in tokens.as_array().expect("tokens") {
        let top: Vec<f64> =
            token["top_logprobs"].as_array().expect("a list").iter().filter_map(|t| t["logprob"].as_f64()).collect();
        assert!(top.len() == 3 && top.is_sorted_by(|a, b| a >= b) && top[0] <= 0.0, "{token}");
        assert!(token["logprob"].as_f64().is_some_and(|logprob| logprob <= top[0]), "{token}");
    }
    let mut streamed = asked;
    streamed["stream"] = json!(true);
    let events = chat(&streamed).events();
    let chunks = events.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(Value::Array(chunks.flatten().cloned().collect()), *tokens, "streamed as whole");
    assert!(chat(&json!({"max_tokens": 3})).json()["choices"][0]["logprobs"].is_null());

    let body = json!({"prompt": "Once", "logprobs": 2, "max_tokens": 10, "ignore_eos": true, "temperature": 0});
    let choice = shared().post("/v1/completions", &body).json()["choices"][0].clone();
    let logprobs = &choice["logprobs"];
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().map(Vec::len), Some(10), "{list}");
    }
    // Greedy: what was chosen is the likeliest.
    for i in 0..10 {
        let top = logprobs["top_logprobs"][i].as_object().expect("a map").values().filter_map(Value::as_f64);
        assert_eq!(logprobs["token_logprobs"][i].as_f64(), top.reduce(f64::max), "{i}");
    }
}

#[test]
fn grammars_that_cannot_be_are_the_clients_errors() {
    let server = shared();
    for (more, param) in [
        (json!({"regex": "("}), "regex"),
        (json!({"regex": "(", "n": 5}), "regex"),
        (json!({"guided_grammar": "start: nowhere"}), "guided_grammar"),
        (json!({"guided_json": {"type": "nothing"}}), "guided_json"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}}),
            "response_format",
        ),
        (json!({"structured_outputs": {"regex": "["}}), "structured_outputs"),
        (json!({"response_format": {"type": "json_object"}, "regex": "a"}), "regex"),
    ] {
        assert_eq!(server.chat(&ask(&more)).error(), (400, param.into()), "{more}");
    }
}
