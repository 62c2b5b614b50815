//! Answers: whole and streamed, alone and among others.

use keye_engine::{Event, Request, SamplingParams};
use keye_processor::Conversation;
use serde_json::{Value, json};

use crate::client::Open;
use crate::support::{TestServer, config, content, data_url, defaults, question, shared};

/// The pieces of a stream, joined as the whole answer has them.
fn joined(events: &[Value], index: usize) -> String {
    let of = |part: &str| -> String {
        let choices = events.iter().filter_map(|event| event["choices"].get(0)).filter(|c| c["index"] == index);
        choices.filter_map(|choice| choice["delta"][part].as_str()).collect()
    };
    format!("{}|{}", of("reasoning_content"), of("content"))
}

#[test]
fn an_answer_is_the_engines() {
    let server = shared();
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]);
    let body = json!({"messages": messages, "max_tokens": 40, "seed": 3, "temperature": 0.9, "top_k": 5});
    let got = server.chat(&body);
    let sampling = SamplingParams { max_tokens: 40, seed: 3, temperature: 0.9, top_k: 5, ..defaults() };
    let conversation = Conversation::from_json(&messages).expect("messages");
    let stream = server.engine.submit(Request { conversation, sampling, ..Request::default() }).expect("room");
    let end = stream.last().expect("an end");
    let Event::Finished { answer, usage, .. } = end else { panic!("{end:?}") };
    assert_eq!(content(&got), format!("{}|{}", answer.thinking.unwrap_or_default(), answer.answer));
    let got = got.json();
    assert_eq!((&got["object"], &got["model"]), (&json!("chat.completion"), &json!(crate::support::MODEL)));
    assert_eq!(got["usage"]["prompt_tokens"], usage.prompt_tokens);
    assert_eq!(got["usage"]["completion_tokens"], usage.completion_tokens);
    assert_eq!(got["usage"]["total_tokens"], usage.prompt_tokens + usage.completion_tokens);
}

/// The payloads of the vendor's README, with other URLs.
#[test]
fn the_vendors_snippets() {
    let server = shared();
    for (kind, url) in [
        ("image_url", data_url("image/png", "inputs/one.png")),
        ("video_url", data_url("video/mp4", "inputs/clip.mp4")),
    ] {
        for top in [("top_k", json!(1)), ("top_p", json!(0.8))] {
            let mut body = json!({
                "model": "",
                "messages": [{"role": "user", "content": [
                    {"type": kind, kind: {"url": url}},
                    {"type": "text", "text": "Describe it./no_think"},
                ]}],
                "n": 1, "temperature": 0.6, "max_tokens": 16, "ignore_eos": false, "skip_special_tokens": true,
            });
            body[top.0] = top.1;
            let answer = server.chat(&body);
            assert_eq!(answer.status, 200, "{}", answer.body);
            let answer = answer.json();
            assert!(answer["usage"]["prompt_tokens_details"]["media_tokens"].as_u64().unwrap() > 0, "{answer}");
            assert_eq!(answer["choices"].as_array().unwrap().len(), 1);
        }
    }
}

#[test]
fn streamed_and_whole_are_the_same() {
    let server = shared();
    let image = json!([{"type": "image_url", "image_url": {"url": data_url("image/png", "inputs/tall.png")}}]);
    for (more, n) in [
        (json!({}), 1),
        (json!({"n": 3, "temperature": 1.2}), 3),
        (json!({"ignore_eos": true, "skip_special_tokens": false, "temperature": 1.5}), 1),
        (json!({"stop": ["e", "\n"], "temperature": 1.0}), 1),
        (json!({"chat_template_kwargs": {"enable_thinking": true}}), 1),
        (json!({"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "min_p": 0.05}), 1),
    ] {
        let mut body = question(image.clone(), "What is shown?");
        body["max_tokens"] = json!(48);
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let whole = server.chat(&body).json();
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let streamed = server.chat(&body);
        assert_eq!(streamed.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let events = streamed.events();
        assert_eq!(whole["choices"].as_array().map(Vec::len), Some(n), "{whole}");
        for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
            let message = &choice["message"];
            let reasoning = message["reasoning_content"].as_str().unwrap_or_default();
            assert_eq!(
                joined(&events, index),
                format!("{reasoning}|{}", message["content"].as_str().unwrap()),
                "{more}"
            );
            let ends = events.iter().filter_map(|e| e["choices"].get(0)).filter(|c| c["index"] == index);
            let ends: Vec<&Value> = ends.map(|c| &c["finish_reason"]).filter(|reason| !reason.is_null()).collect();
            assert_eq!(ends, [&choice["finish_reason"]]);
        }
        let (last, before) = events.split_last().unwrap();
        for field in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(last["usage"][field], whole["usage"][field], "{more}");
        }
        assert!(before.iter().all(|event| event["usage"].is_null() && event["id"] == last["id"]));
        assert_eq!(before[0]["choices"][0]["delta"]["role"], "assistant");
    }
}

#[test]
fn choices_have_seeds_of_their_own() {
    let server = shared();
    let body = |seed: u64, n: u64| {
        json!({"messages": [{"role": "user", "content": "Tell."}], "max_tokens": 30, "temperature": 2.0, "top_k": -1,
               "seed": seed, "n": n, "ignore_eos": true})
    };
    let many = server.chat(&body(40, 3)).json();
    let text = |answer: &Value, index: usize| answer["choices"][index]["message"]["content"].clone();
    for index in 0..3 {
        assert_eq!(text(&many, index), text(&server.chat(&body(40 + index as u64, 1)).json(), 0));
    }
    assert_ne!(text(&many, 0), text(&many, 1));
    let prompt = server.chat(&body(40, 1)).json()["usage"]["prompt_tokens"].clone();
    assert_eq!(many["usage"]["prompt_tokens"], prompt, "one prompt, however many choices");
    assert_eq!(many["usage"]["completion_tokens"], 90);
}

#[test]
fn ten_at_once_answer_as_alone() {
    let server = TestServer::start(config());
    let mut questions: Vec<Value> = vec![
        question(json!([{"type": "image", "image": "frames/0.png"}]), "What?"),
        question(json!([{"type": "image", "image": "frames/2.png"}]), "What?"),
        question(json!([]), "Short?"),
        question(json!([]), &"A long text. ".repeat(150)),
        question(json!([{"type": "image", "image": "one.png"}]), "What?"),
        question(json!([{"type": "image", "image": "wide.png"}, {"type": "image", "image": "one.png"}]), "What?"),
        question(json!([{"type": "video", "video": "clip.mp4", "fps": 1}]), "What?"),
        question(json!([{"type": "video", "video": "clip.mp4", "fps": 2}]), "What?"),
        question(json!([{"type": "video", "video": ["frames/0.png", "frames/1.png", "frames/2.png"]}]), "What?"),
        question(json!([{"type": "video", "video": ["frames/2.png", "frames/1.png", "frames/0.png"]}]), "What?"),
    ];
    // Hot, so that whatever differs in the numbers shows in the text.
    let hot = json!({"temperature": 3.0, "top_k": 0, "top_p": 1.0, "max_tokens": 24, "ignore_eos": true});
    for body in &mut questions {
        body.as_object_mut().unwrap().extend(hot.as_object().unwrap().clone());
    }
    let alone: Vec<String> = questions.iter().map(|body| content(&server.chat(body))).collect();
    let fresh = TestServer::start(config());
    for server in [&server, &fresh] {
        let together: Vec<String> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                questions.iter().map(|body| scope.spawn(move || content(&server.chat(body)))).collect();
            threads.into_iter().map(|thread| thread.join().expect("an answer")).collect()
        });
        assert_eq!(together, alone);
        server.wait_until_idle();
    }
    // Pictures of one size, so the same tokens: what was cached for one is not taken for the other.
    assert_ne!(alone[0], alone[1]);
}

#[test]
fn a_client_that_goes_away_frees_its_blocks() {
    let server = TestServer::start(config());
    let mut stream = server.long_stream();
    stream.wait_for_text();
    let stats = server.engine.stats();
    assert!(stats.running == 1 && stats.free_blocks < stats.num_blocks, "{stats:?}");
    drop(stream);
    server.wait_until_idle();

    // Not streamed: the head of the response never comes.
    let body = json!({"messages": [{"role": "user", "content": "x"}], "ignore_eos": true, "max_tokens": 20_000});
    let text = body.to_string();
    let address = server.address;
    let mut socket = std::net::TcpStream::connect(address).expect("a connection");
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{text}",
        text.len()
    );
    std::io::Write::write_all(&mut socket, head.as_bytes()).expect("sent");
    crate::support::wait_for("a running request", || server.engine.stats().running == 1);
    drop(socket);
    server.wait_until_idle();
    let cancelled = "keye_answers_cancelled_total 2";
    crate::support::wait_for(cancelled, || server.get("/metrics").body.contains(cancelled));
    assert!(server.get("/metrics").body.contains("keye_open_streams 0"));
}

#[test]
fn completions_take_prompts_as_they_are() {
    let server = shared();
    let ask = |more: Value| {
        let mut body = json!({"model": "x", "prompt": "Once upon", "max_tokens": 10, "seed": 1, "ignore_eos": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/completions", &body)
    };
    let one = ask(json!({})).json();
    assert_eq!(one["object"], "text_completion");
    let tokens = server.post("/tokenize", &json!({"prompt": "Once upon"})).json()["count"].clone();
    assert_eq!(one["usage"]["prompt_tokens"], tokens, "no template");
    let many = ask(json!({"prompt": ["Once upon", "The end"], "n": 2})).json();
    assert_eq!(many["choices"].as_array().unwrap().len(), 4);
    assert_eq!(many["choices"][0]["text"], one["choices"][0]["text"]);
    assert_eq!(many["choices"][2]["text"], ask(json!({"prompt": "The end"})).json()["choices"][0]["text"]);
    assert_eq!(many["usage"]["completion_tokens"], 40);
    let events = ask(json!({"stream": true})).events();
    let text: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(json!(text), one["choices"][0]["text"]);
    let ids = server.post("/tokenize", &json!({"prompt": "Once upon"})).json()["tokens"].clone();
    // Clients of Python send `1.0` where 1 is meant.
    let floats: Vec<f64> = ids.as_array().expect("a list").iter().filter_map(Value::as_f64).collect();
    for prompt in [ids, json!(floats)] {
        assert_eq!(ask(json!({"prompt": prompt})).json()["choices"][0]["text"], one["choices"][0]["text"]);
    }
    for (prompt, status) in
        [(json!(null), 400), (json!([]), 400), (json!(""), 400), (json!([1, 9_999_999]), 400), (json!(7), 400)]
    {
        assert_eq!(ask(json!({"prompt": prompt})).error(), (status, "prompt".into()), "{prompt}");
    }
}

#[test]
fn errors_of_streams_have_their_status() {
    let server = shared();
    let mut body = question(json!([{"type": "image", "image": "missing.png"}]), "What?");
    body["stream"] = json!(true);
    let response = Open::send(server.address, "POST", "/v1/chat/completions", &[], &body.to_string()).finish();
    assert_eq!(response.error(), (400, "messages".into()));
}
