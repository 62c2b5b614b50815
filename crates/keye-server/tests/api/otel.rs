//! Traces as a collector gets them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use keye_server::ServerConfig;
use serde_json::{Value, json};

use crate::client::request;
use crate::support::{TestServer, config, wait_for};

/// Takes one request and answers it; returns its path and body.
fn collect(listener: &TcpListener) -> (String, Value) {
    let mut socket = None;
    listener.set_nonblocking(true).expect("a socket option");
    wait_for("a connection", || {
        socket = listener.accept().ok();
        socket.is_some()
    });
    let (socket, _) = socket.expect("a connection");
    socket.set_nonblocking(false).expect("a socket option");
    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket option");
    let mut reader = BufReader::new(socket);
    let mut line = || {
        let mut text = String::new();
        reader.read_line(&mut text).expect("a line");
        text.trim_end().to_ascii_lowercase()
    };
    let first = line();
    let head: Vec<String> = std::iter::from_fn(|| Some(line()).filter(|line| !line.is_empty())).collect();
    assert!(head.iter().any(|line| line == "content-type: application/json"), "{head:?}");
    let length = head.iter().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
    let mut body = vec![0; length.parse().expect("a number")];
    reader.read_exact(&mut body).expect("a body");
    let answer =
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
    reader.get_mut().write_all(answer).expect("sent");
    (first, serde_json::from_slice(&body).expect("json"))
}

#[test]
fn an_answer_is_a_span_with_its_stages() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("http://{}/", listener.local_addr().expect("an address"));
    let collector = std::thread::spawn(move || collect(&listener));
    let server = TestServer::start(ServerConfig { otlp_endpoint: Some(endpoint), ..config() });
    let content = json!([{"type": "image", "image": "one.png"}, {"type": "text", "text": "What?"}]);
    let body = json!({"messages": [{"role": "user", "content": content}], "max_tokens": 5, "ignore_eos": true});
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let parent = [("traceparent", &*format!("00-{trace}-b7ad6b7169203331-01")), ("x-request-id", "mine")];
    let answer = request(server.address, "POST", "/v1/chat/completions", &parent, &body.to_string());
    assert_eq!(answer.status, 200, "{}", answer.body);
    server.stop();

    let (first, sent) = collector.join().expect("a request came");
    assert_eq!(first, "post /v1/traces http/1.1");
    let spans = sent["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().expect("spans");
    let own = &spans[0];
    assert_eq!((&own["name"], &own["kind"]), (&json!("/v1/chat/completions"), &json!(2)));
    assert_eq!((&own["traceId"], &own["parentSpanId"]), (&json!(trace), &json!("b7ad6b7169203331")));
    let attributes = own["attributes"].as_array().expect("attributes");
    for (key, value) in [
        ("keye.request_id", json!({"stringValue": "mine"})),
        ("keye.outcome", json!({"stringValue": "length"})),
        ("gen_ai.usage.output_tokens", json!({"intValue": "5"})),
    ] {
        assert!(attributes.contains(&json!({"key": key, "value": value})), "{key}: {attributes:?}");
    }
    let time = |span: &Value, name: &str| span[name].as_str().and_then(|text| text.parse::<u128>().ok()).expect("ns");
    let (start, end) = (time(own, "startTimeUnixNano"), time(own, "endTimeUnixNano"));
    let mut at = start;
    let stages: Vec<&str> = spans[1..]
        .iter()
        .map(|span| {
            assert_eq!((&span["parentSpanId"], &span["traceId"]), (&own["spanId"], &own["traceId"]));
            assert!(time(span, "startTimeUnixNano") >= at && time(span, "endTimeUnixNano") <= end + 1_000_000);
            at = time(span, "endTimeUnixNano");
            span["name"].as_str().expect("a name")
        })
        .collect();
    assert_eq!(stages, ["queued", "media", "vision", "prefill", "decode"]);
}
