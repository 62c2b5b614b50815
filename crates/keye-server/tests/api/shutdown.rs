//! Ending in order.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use keye_server::ServerConfig;
use serde_json::json;

use crate::client::{Open, request};
use crate::support::{TestServer, config, wait_for};

#[test]
fn streams_finish_and_nothing_new_is_taken() {
    let mut server = TestServer::start(config());
    let body = json!({"messages": [{"role": "user", "content": "Go on."}], "stream": true, "ignore_eos": true,
                      "max_tokens": 600});
    let mut stream = Open::send(server.address, "POST", "/v1/chat/completions", &[], &body.to_string());
    stream.wait_for_text();
    // A body that is on its way when the word comes; the server reads it when it says so.
    let mut late = TcpStream::connect(server.address).expect("a connection");
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
                content-length: 77\r\nexpect: 100-continue\r\n\r\n";
    late.write_all(head.as_bytes()).expect("sent");
    let mut go_on = [0; 25];
    late.read_exact(&mut go_on).expect("a word");
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    server.shutdown.stop();
    wait_for("a closed port", || TcpStream::connect(server.address).is_err());
    let rest = stream.raw_rest();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"), "the stream was cut off");
    let body = format!("{:77}", json!({"messages": [{"role": "user", "content": "Too late."}]}).to_string());
    late.write_all(body.as_bytes()).expect("sent");
    let mut answer = String::new();
    late.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("\"shutting_down\""), "{answer}");
    assert!(answer.contains("retry-after: "), "{answer}");
    server.join();
    server.wait_until_idle();
}

/// A request whose head had begun to arrive when the word came is answered. Whether the server has read that beginning
/// cannot be seen from outside, so it gets some time, and more than one try.
#[test]
fn a_server_that_stops_is_not_ready() {
    let answers = (0..5).map(|_| {
        let server = TestServer::start(config());
        assert_eq!(server.get("/ready").status, 200);
        let mut late = TcpStream::connect(server.address).expect("a connection");
        late.write_all(b"GET /ready HTTP/1.1\r\nhost: localhost\r\n").expect("sent");
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(server.get("/health").status, 200, "accepted after the other");
        server.shutdown.stop();
        let mut answer = String::new();
        let _ = late.write_all(b"\r\n").and_then(|()| late.read_to_string(&mut answer));
        answer
    });
    let answer = answers.into_iter().find(|answer| !answer.is_empty()).expect("one of five is answered");
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("\"shutting_down\""), "{answer}");
}

#[test]
fn the_deadline_ends_what_does_not_end() {
    let mut server = TestServer::start(ServerConfig { shutdown_timeout: Duration::from_millis(300), ..config() });
    let mut stream = server.long_stream();
    stream.wait_for_text();
    // Two that have not begun to answer: one that waits for its whole answer, and one whose body never comes.
    let body = json!({"messages": [{"role": "user", "content": "Go on."}], "ignore_eos": true, "max_tokens": 20_000});
    let address = server.address;
    let whole = std::thread::spawn(move || request(address, "POST", "/v1/chat/completions", &[], &body.to_string()));
    let mut silent = TcpStream::connect(server.address).expect("a connection");
    silent.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n").expect("sent");
    wait_for("both answers", || server.engine.stats().running == 2);
    let start = Instant::now();
    server.shutdown.stop();
    server.join();
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    let rest = stream.lossy_rest();
    let last = rest.lines().rev().find_map(|line| line.strip_prefix("data: ")).expect("an event");
    let last: serde_json::Value = serde_json::from_str(last).expect("the event is whole");
    assert_eq!((&last["error"]["code"], &last["error"]["type"]), (&json!("shutting_down"), &json!("server_error")));
    assert!(!rest.contains("[DONE]") && rest.ends_with("0\r\n\r\n"), "the stream was ended in order");
    let whole = whole.join().expect("no panic");
    assert_eq!((whole.status, &whole.json()["error"]["code"]), (503, &json!("shutting_down")));
    server.wait_until_idle();
}
