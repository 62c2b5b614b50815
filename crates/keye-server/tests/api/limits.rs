//! What is too much, wrong or not there yet.

use keye_server::{Ceilings, ServerConfig};
use serde_json::{Value, json};

use crate::client::{Open, request};
use crate::support::{TestServer, config, question, shared};

fn hello() -> Value {
    json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4})
}

fn hello_with(field: &str, value: Value) -> Value {
    let mut body = hello();
    body[field] = value;
    body
}

#[test]
fn fields_that_would_change_the_answer_are_refused_by_name() {
    let server = shared();
    let tool = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    for (field, value) in [
        ("logit_bias", json!({"5": 1})),
        ("best_of", json!(2)),
        ("suffix", json!("x")),
        ("echo", json!(true)),
        ("modalities", json!(["text", "audio"])),
        ("audio", json!({"voice": "x"})),
        ("functions", json!([{"name": "f"}])),
        ("min_tokens", json!(3)),
        ("continue_final_message", json!(true)),
        ("separate_reasoning", json!(false)),
        ("mm_processor_kwargs", json!({"fps": 1})),
        ("media_io_kwargs", json!({"video": {"num_frames": 4}})),
    ] {
        let refused = server.chat(&hello_with(field, value.clone()));
        assert_eq!(refused.error(), (400, field.into()), "{field} {value}");
        assert!(refused.json()["error"]["code"] == "unsupported_parameter", "{field}");
    }
    for (field, value) in [
        ("response_format", json!({"type": "text"})),
        ("logprobs", json!(false)),
        ("logit_bias", json!({})),
        ("best_of", json!(1)),
        ("suffix", json!(null)),
        ("modalities", json!(["text"])),
        ("tools", json!([])),
        ("tools", tool),
        ("tool_choice", json!("auto")),
        ("user", json!("me")),
        ("reasoning_effort", json!("low")),
        ("something_new", json!({"a": [1]})),
        ("model", json!("any/name")),
        ("top_k", json!(-1)),
        ("stop", json!([])),
        ("n", json!(1.0)),
        ("max_completion_tokens", json!(3)),
        ("stream_options", json!(null)),
    ] {
        assert_eq!(server.chat(&hello_with(field, value.clone())).status, 200, "{field} {value}");
    }
}

#[test]
fn wrong_values_are_refused_by_name() {
    let server = shared();
    for (field, value) in [
        ("messages", json!(null)),
        ("messages", json!([])),
        ("messages", json!("x")),
        ("temperature", json!(-1)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("presence_penalty", json!(3)),
        ("n", json!(0)),
        ("n", json!(1_000_000)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-5)),
        ("max_completion_tokens", json!("many")),
        ("stop", json!(5)),
        ("stop", json!([""])),
        ("stop_token_ids", json!([-1])),
        ("stream", json!("yes")),
        ("stream_options", json!(5)),
        ("model", json!(5)),
        ("seed", json!("x")),
        ("ignore_eos", json!(1)),
        ("tools", json!("x")),
        ("tools", json!([{"type": "web_search"}])),
        ("tool_choice", json!("required")),
        ("response_format", json!({"type": "json_schema", "json_schema": {}})),
        ("guided_json", json!(3)),
        ("top_logprobs", json!(3)),
        ("max_reasoning_tokens", json!(-1)),
        ("regex", json!(3)),
        ("ebnf", json!("root ::= <x>")),
        ("top_logprobs", json!(21)),
        ("structured_outputs", json!({"magic": "x"})),
        ("chat_template_kwargs", json!([])),
    ] {
        assert_eq!(server.chat(&hello_with(field, value.clone())).error(), (400, field.into()), "{field} {value}");
    }
    let nested = [
        (json!([{"role": "wizard", "content": "x"}]), "messages[0].role"),
        (json!([{"role": "user"}]), "messages[0].content"),
        (json!([{"role": "tool", "content": "x", "tool_call_id": {}}]), "messages[0].tool_call_id"),
        (json!([{"role": "user", "content": [{"type": "input_audio"}]}]), "messages[0].content[0].type"),
        (
            json!([{"role": "user", "content": [{"type": "video", "video": "a", "fpss": 1}]}]),
            "messages[0].content[0].fpss",
        ),
    ];
    for (messages, param) in nested {
        assert_eq!(server.chat(&hello_with("messages", messages)).error(), (400, param.into()));
    }
    let raw = |body: &str| request(server.address, "POST", "/v1/chat/completions", &[], body).error();
    for body in ["", "{", "[]", "7", "\u{0}", "{\"messages\": [}", &"[".repeat(5000)] {
        assert_eq!(raw(body), (400, "body".into()), "{body:.20}");
    }
    let form = [("content-type", "text/plain")];
    let refused = request(server.address, "POST", "/v1/chat/completions", &form, &hello().to_string());
    assert_eq!(refused.error().0, 415);
    // A page can send bytes without a type to any server.
    let untyped = "POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 15\r\nconnection: close\r\n\r\n{\"prompt\": \"x\"}";
    let mut socket = std::net::TcpStream::connect(server.address).expect("a connection");
    std::io::Write::write_all(&mut socket, untyped.as_bytes()).expect("sent");
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut socket, &mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 415"), "{answer}");
    let charset = [("content-type", "Application/JSON; charset=utf-8")];
    assert_eq!(request(server.address, "POST", "/tokenize", &charset, "{\"prompt\": \"x\"}").status, 200);
}

#[test]
fn bodies_have_limits() {
    let server = TestServer::start(ServerConfig { body_bytes: 4096, total_body_bytes: 8192, ..config() });
    let text = hello_with("messages", json!([{"role": "user", "content": "x".repeat(5000)}])).to_string();
    assert_eq!(request(server.address, "POST", "/v1/chat/completions", &[], &text).error().0, 413);
    // Claimed and never sent; chunked and never ending.
    let claimed = [("content-length", "99999999999")];
    assert_eq!(request(server.address, "POST", "/tokenize", &claimed, "").error().0, 413);
    let chunked = [("transfer-encoding", "chunked")];
    let endless = format!("1388\r\n{}\r\n", "x".repeat(5000));
    assert_eq!(request(server.address, "POST", "/tokenize", &chunked, &endless).error().0, 413);
    // Two bodies that are on their way hold all the bytes that there are.
    let mut waiting = Vec::new();
    crate::support::wait_for("a full house", || {
        // One that comes beside the question below may be refused itself.
        waiting.push(begin_body(&server, 4095));
        server.post("/tokenize", &json!({"prompt": "x"})).status == 429
    });
    drop(waiting);
    crate::support::wait_for("room again", || server.post("/tokenize", &json!({"prompt": "x"})).status == 200);
}

/// A connection whose body of 4096 bytes has come as far as this.
fn begin_body(server: &TestServer, sent: usize) -> std::net::TcpStream {
    let mut socket = std::net::TcpStream::connect(server.address).expect("a connection");
    let head =
        "POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 4096\r\n\r\n";
    std::io::Write::write_all(&mut socket, format!("{head}{}", " ".repeat(sent)).as_bytes()).expect("sent");
    socket
}

#[test]
fn bodies_hold_what_came_and_not_what_they_claim() {
    let server = TestServer::start(ServerConfig { body_bytes: 4096, total_body_bytes: 8192, ..config() });
    let waiting: Vec<std::net::TcpStream> = (0..7).map(|_| begin_body(&server, 1)).collect();
    for _ in 0..20 {
        assert_eq!(server.post("/tokenize", &json!({"prompt": "x"})).status, 200);
    }
    drop(waiting);
}

#[test]
fn streams_have_places_and_others_come_again() {
    let server = TestServer::start(ServerConfig { max_streams: 2, ..config() });
    assert_eq!(server.chat(&hello_with("n", json!(3))).error(), (400, "n".into()), "never, however often it is tried");
    let mut first = server.long_stream();
    first.wait_for_text();
    assert_eq!(server.chat(&hello()).status, 200);
    assert_eq!(server.chat(&hello_with("n", json!(2))).status, 429);
    let second: Open = server.long_stream();
    assert_eq!(second.status, 200);
    let refused = server.chat(&hello());
    assert_eq!(refused.error().0, 429);
    assert!(refused.header("retry-after").is_some_and(|seconds| seconds.parse::<u32>().is_ok()));
    assert_eq!(server.get("/health").status, 200);
    drop(second);
    crate::support::wait_for("a free place", || server.chat(&hello()).status == 200);
    drop(first);
    server.wait_until_idle();
}

#[test]
fn ceilings_hold_whatever_a_request_says() {
    let ceilings = Ceilings {
        fps: 2.0,
        frames: 4,
        pixels: 100_000,
        media: 2,
        max_tokens: Some(3),
        choices: 2,
        ..Ceilings::default()
    };
    let server = TestServer::start(ServerConfig { ceilings, ..config() });
    let video = |more: Value| {
        let mut part = json!({"type": "video", "video": "clip.mp4"});
        part.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.chat(&question(json!([part]), "x"))
    };
    for (field, value) in [("fps", json!(2.5)), ("max_frames", json!(5)), ("max_pixels", json!(100_001))] {
        assert_eq!(video(json!({field: value})).error(), (400, field.into()));
        let inside = json!({"preprocess_kwargs": {field: value}});
        assert_eq!(video(inside).error(), (400, field.into()), "inside preprocess_kwargs");
    }
    // A pictures' list of five frames is above the ceiling without any option.
    let five = json!([{"type": "video", "video": vec!["frames/0.png"; 5]}]);
    assert_eq!(server.chat(&question(five, "x")).error().0, 400);
    let three = vec![json!({"type": "image", "image": "one.png"}); 3];
    assert_eq!(server.chat(&question(json!(three), "x")).error(), (400, "messages".into()));
    assert_eq!(server.chat(&hello_with("n", json!(3))).error(), (400, "n".into()));
    let mut body = hello_with("max_tokens", json!(1000));
    body["ignore_eos"] = json!(true);
    let answer = server.chat(&body).json();
    assert_eq!(
        (&answer["usage"]["completion_tokens"], &answer["choices"][0]["finish_reason"]),
        (&json!(3), &json!("length"))
    );
}

#[test]
fn prompts_that_are_too_long_and_damaged_media_are_the_clients_errors() {
    let server = shared();
    let long = hello_with("messages", json!([{"role": "user", "content": "word ".repeat(60_000)}]));
    assert_eq!(server.chat(&long).error().0, 400);
    for (kind, url) in [
        ("image_url", "data:image/png;base64,AAAA"),
        ("image_url", "data:image/png;base64,?"),
        ("image_url", "data:image/png,AAAA"),
        ("video_url", "data:video/mp4;base64,AAAA"),
    ] {
        let refused = server.chat(&question(json!([{"type": kind, kind: {"url": url}}]), "x"));
        assert_eq!(refused.error().0, 400, "{url}");
    }
    assert_eq!(server.chat(&hello()).status, 200);
}

#[test]
fn who_has_an_answer_finds_the_place_free() {
    let server = TestServer::start(ServerConfig { max_streams: 1, ..config() });
    for turn in 0..50 {
        assert_eq!(server.chat(&hello()).status, 200, "{turn}");
    }
}
