//! What is too much, wrong or not there yet.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

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
        ("stop", json!(vec!["no such words"; 64])),
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
        ("stop", json!(vec!["x"; 65])),
        ("stop", json!("x".repeat(1025))),
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
    let zipped = [("content-encoding", "gzip")];
    let refused = request(server.address, "POST", "/tokenize", &zipped, "{\"prompt\": \"x\"}");
    assert!(refused.error().0 == 415 && refused.body.contains("uncompressed"), "{}", refused.body);
    let plain = [("content-encoding", "identity")];
    assert_eq!(request(server.address, "POST", "/tokenize", &plain, "{\"prompt\": \"x\"}").status, 200);
    // A page can send bytes without a type to any server.
    let untyped = "POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 15\r\nconnection: close\r\n\r\n{\"prompt\": \"x\"}";
    let mut socket = TcpStream::connect(server.address).expect("a connection");
    socket.write_all(untyped.as_bytes()).expect("sent");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("an answer");
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
fn begin_body(server: &TestServer, sent: usize) -> TcpStream {
    let mut socket = TcpStream::connect(server.address).expect("a connection");
    let head =
        "POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 4096\r\n\r\n";
    socket.write_all(format!("{head}{}", " ".repeat(sent)).as_bytes()).expect("sent");
    socket
}

#[test]
fn bodies_hold_what_came_and_not_what_they_claim() {
    let server = TestServer::start(ServerConfig { body_bytes: 4096, total_body_bytes: 8192, ..config() });
    let waiting: Vec<TcpStream> = (0..7).map(|_| begin_body(&server, 1)).collect();
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
fn pictures_stay_below_the_ceilings_without_options() {
    let big = question(json!([{"type": "image", "image": "big.png"}]), "x");
    let tokens = |ceilings: Ceilings| {
        let answer = TestServer::start(ServerConfig { ceilings, ..config() }).chat(&big);
        answer.json()["usage"]["prompt_tokens"].as_u64().expect("an answer")
    };
    // 784 pixels a token.
    let [free, lowered] = [u64::MAX, 10_000].map(|pixels| tokens(Ceilings { pixels, ..Ceilings::default() }));
    let text = tokens(Ceilings { pixels: 784, ..Ceilings::default() }) - 1;
    assert!(free - text > 30 && lowered - text <= 10_000 / 784, "{free} {lowered} {text}");

    let ceilings = Ceilings { source_pixels: 180_000, ..Ceilings::default() };
    let refused = TestServer::start(ServerConfig { ceilings, ..config() }).chat(&big);
    assert_eq!((refused.error().0, &refused.json()["error"]["code"]), (400, &json!("media_too_large")));
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
fn several_choices_fail_as_one_does() {
    let server = shared();
    let media = |parts: Value| question(parts, "x");
    let image = |url: &str| json!({"type": "image_url", "image_url": {"url": url}});
    let damaged = image("data:image/png;base64,AAAA");
    let long = hello_with("messages", json!([{"role": "user", "content": "word ".repeat(40_000)}]));
    for (mut body, code) in [
        (media(json!([damaged])), json!("media_unreadable")),
        (media(json!([image("one.png"), damaged])), json!("media_unreadable")),
        (media(json!([image("file:///etc/passwd")])), json!("media_not_allowed")),
        (media(json!([image("gone.png")])), json!("media_unreadable")),
        (media(json!([{"type": "image", "image": "one.png", "fps": 1}])), json!("media_unreadable")),
        (media(json!([{"type": "text", "text": "<|image_pad|>"}])), Value::Null),
        (hello_with("regex", json!("(")), json!("invalid_grammar")),
        (long, json!("context_length_exceeded")),
    ] {
        let one = server.chat(&body);
        assert_eq!((one.error().0, &one.json()["error"]["code"]), (400, &code), "{}", one.body);
        body["n"] = json!(4);
        for _ in 0..3 {
            let four = server.chat(&body);
            assert_eq!((four.status, four.body), (one.status, one.body.clone()));
        }
    }
}

#[test]
fn an_error_says_which_of_several_media_it_is_about() {
    let image = |url: &str| json!({"type": "image_url", "image_url": {"url": url}});
    for wrong in ["data:image/png;base64,AAAA", "gone.png", "/etc/passwd", "https://example.org/a.png"] {
        let refused = shared().chat(&question(json!([image("one.png"), image(wrong), image("one.png")]), "x"));
        let message = refused.json()["error"]["message"].as_str().expect("text").to_owned();
        assert!(refused.status == 400 && message.starts_with("medium 2 of 3: "), "{message}");
    }
}

#[test]
fn a_body_that_takes_too_long_is_given_up() {
    let server = TestServer::start(ServerConfig { body_timeout: Duration::from_millis(50), ..config() });
    let mut answer = String::new();
    let mut late = begin_body(&server, 1);
    late.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket option");
    late.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
}

#[test]
fn more_connections_than_there_may_be_wait() {
    let server = TestServer::start(ServerConfig { max_connections: 1, ..config() });
    let first = begin_body(&server, 1);
    let mut second = TcpStream::connect(server.address).expect("a connection");
    let request = "GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    second.write_all(request.as_bytes()).expect("sent");
    second.set_read_timeout(Some(Duration::from_millis(200))).expect("a socket option");
    let early = second.read(&mut [0]);
    assert!(early.is_err(), "answered beside the only connection that there may be: {early:?}");
    drop(first);
    second.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket option");
    let mut answer = String::new();
    second.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn a_client_that_takes_nothing_is_cut_off() {
    let server = TestServer::start(ServerConfig { reader_timeout: Duration::from_millis(100), ..config() });
    // More than the sockets hold.
    let mut body = hello_with("max_tokens", json!(20_000));
    for (field, value) in [("stream", json!(true)), ("ignore_eos", json!(true)), ("logprobs", json!(true))] {
        body[field] = value;
    }
    body["top_logprobs"] = json!(20);
    let stream = Open::send(server.address, "POST", "/v1/chat/completions", &[], &body.to_string());
    crate::support::wait_for("an answer that was given up", || {
        let metrics = server.get("/metrics").body;
        assert!(metrics.contains("keye_answers_finished_total 0"), "all of it was taken");
        metrics.contains("keye_answers_cancelled_total 1")
    });
    server.wait_until_idle();
    assert!(!stream.lossy_rest().contains("[DONE]"), "the connection went on");
}

#[test]
fn who_has_an_answer_finds_the_place_free() {
    let server = TestServer::start(ServerConfig { max_streams: 1, ..config() });
    for turn in 0..50 {
        assert_eq!(server.chat(&hello()).status, 200, "{turn}");
    }
}
