//! Ending in order.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use keye_server::ServerConfig;
use serde_json::json;

use crate::client::Open;
use crate::support::{TestServer, config, wait_for};

#[test]
fn streams_finish_and_nothing_new_is_taken() {
    let mut server = TestServer::start(config());
    let body = json!({"messages": [{"role": "user", "content": "Go on."}], "stream": true, "ignore_eos": true,
                      "max_tokens": 600});
    let mut stream = Open::send(server.address, "POST", "/v1/chat/completions", &[], &body.to_string());
    stream.wait_for_text();
    // A body that was on its way when the word came.
    let mut late = TcpStream::connect(server.address).expect("a connection");
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n";
    std::io::Write::write_all(&mut late, head.as_bytes()).expect("sent");
    server.shutdown.stop();
    wait_for("a closed port", || TcpStream::connect(server.address).is_err());
    let rest = stream.raw_rest();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"), "the stream was cut off");
    drop(late);
    server.join();
    server.wait_until_idle();
}

#[test]
fn the_deadline_ends_what_does_not_end() {
    let mut server = TestServer::start(ServerConfig { shutdown_timeout: Duration::from_millis(300), ..config() });
    let mut stream = server.long_stream();
    stream.wait_for_text();
    let start = Instant::now();
    server.shutdown.stop();
    server.join();
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    server.wait_until_idle();
}
