//! `/v1/responses` and tools over the socket.

use serde_json::{Value, json};

use crate::support::{content, data_url, shared};

#[test]
fn a_response_is_the_chats_answer() {
    let server = shared();
    let image = data_url("image/png", "inputs/one.png");
    let settings = json!({"seed": 3, "temperature": 1.3, "top_k": 0, "ignore_eos": true});
    let with = |more: Value| {
        let mut body = settings.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let chat = server.chat(&with(json!({"max_tokens": 30, "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image_url", "image_url": image}, {"type": "text", "text": "What?"}]},
    ]})));
    let mut body = with(json!({"max_output_tokens": 30, "instructions": "Be brief.", "input": [
        {"role": "user", "content": [{"type": "input_image", "image_url": image}, {"type": "input_text", "text": "What?"}]},
    ]}));
    let whole = server.post("/v1/responses", &body);
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    let text = |kind: &str| -> String {
        let items = whole["output"].as_array().unwrap().iter().filter(|item| item["type"] == kind);
        items.filter_map(|item| item["content"][0]["text"].as_str()).collect()
    };
    assert_eq!(format!("{}|{}", text("reasoning"), text("message")), content(&chat));
    assert_eq!(
        (&whole["status"], &whole["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    assert_eq!(whole["usage"]["input_tokens"], chat.json()["usage"]["prompt_tokens"]);

    body["stream"] = json!(true);
    let streamed = server.post("/v1/responses", &body);
    let data = streamed.body.lines().filter_map(|line| line.strip_prefix("data: "));
    let events: Vec<Value> = data.map(|data| serde_json::from_str(data).expect("json")).collect();
    let named = streamed.body.lines().filter_map(|line| line.strip_prefix("event: "));
    assert!(named.eq(events.iter().filter_map(|event| event["type"].as_str())));
    assert_eq!(events.last().unwrap()["type"], "response.incomplete");
    let delta = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    assert_eq!(delta.filter_map(|event| event["delta"].as_str()).collect::<String>(), text("message"));
}

#[test]
fn what_responses_refuse() {
    let server = shared();
    for (body, param) in [
        (json!({}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": [{"role": "king", "content": "x"}]}), "input"),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "/etc/passwd"}]}]}),
            "input",
        ),
        (json!({"input": "x", "previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"input": "x", "store": true}), "store"),
        (json!({"input": "x", "max_output_tokens": 0}), "max_output_tokens"),
        (json!({"input": "x", "tools": [{"type": "web_search"}]}), "tools"),
        (json!({"input": "x", "text": {"format": {"type": "yaml"}}}), "text.format"),
        (json!({"input": "x", "text": {"format": {"type": "json_schema", "name": "x"}}}), "text.format"),
        (json!({"input": "x", "tool_choice": "required"}), "tool_choice"),
    ] {
        assert_eq!(server.post("/v1/responses", &body).error(), (400, param.into()), "{body}");
    }
}

#[test]
fn tools_are_in_the_prompt() {
    let server = shared();
    let tools = json!([{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]);
    let count = |more: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "Look."}], "max_tokens": 1});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = server.chat(&body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        let tokens = server.post("/tokenize", &body).json()["count"].clone();
        assert_eq!(answer.json()["usage"]["prompt_tokens"], tokens);
        tokens.as_u64().unwrap()
    };
    let plain = count(json!({}));
    assert!(count(json!({"tools": tools})) > plain + 50);
    assert_eq!(count(json!({"tools": tools, "tool_choice": "none"})), plain);
    for body in
        [json!({"messages": [{"role": "user", "content": "x"}], "tools": 3}), json!({"prompt": "x", "tools": 3})]
    {
        assert_eq!(server.post("/tokenize", &body).error(), (400, "tools".into()), "{body}");
    }
}
