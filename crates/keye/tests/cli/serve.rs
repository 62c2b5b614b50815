//! `keye serve`: flags, one socket, and its end. What requests may say is tested in `keye-server`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Child;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{command, fixture, keye, model};

/// A server that ends with its test.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The status and the body of an answer.
fn post(address: &str, body: &Value) -> (u16, Value) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let body = body.to_string();
    let head =
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close";
    write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}")))
}

#[test]
fn flags_reach_the_server_and_a_signal_ends_it() {
    // A way to the folder that is not its name.
    let media = fixture("keye-1_5-tiny").join("inputs/frames/..").display().to_string();
    let mut command = command();
    command.args(["serve", "-m", &model(), "--host", "localhost", "--port", "0", "--media-path", &media]);
    command.args(["--max-frames", "4", "--max-model-len", "2048", "--served-model-name", "tiny", "--log", "off"]);
    let mut served = Served(command.spawn().unwrap());
    let mut stderr = BufReader::new(served.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut told = Vec::new();
    let address = loop {
        told.push(stderr.next().unwrap_or_else(|| panic!("it ended: {told:?}")));
        let line = told.last().unwrap().split_once("listening on http://");
        if let Some((address, _)) = line.and_then(|(_, rest)| rest.split_once(',')) {
            break address.to_owned();
        }
    };
    let (ip, port) = address.rsplit_once(':').unwrap();
    assert!(["127.0.0.1", "[::1]"].contains(&ip) && port != "0", "{told:?}");

    let ask = |options: Value| {
        let clip = fixture("keye-1_5-tiny").join("inputs/clip.mp4").canonicalize().unwrap();
        let url = format!("file://{}", clip.display());
        let video = json!({"type": "video_url", "video_url": {"url": url, "preprocess_kwargs": options}});
        let content = json!([video, {"type": "text", "text": "What?"}]);
        let message = json!({"role": "user", "content": content});
        post(&address, &json!({"messages": [message], "max_tokens": 4, "temperature": 0, "ignore_eos": true}))
    };
    let (status, answer) = ask(json!({"max_pixels": 50176}));
    assert_eq!((status, &answer["model"]), (200, &json!("tiny")), "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], 4, "{answer}");
    let (status, answer) = ask(json!({"max_frames": 5}));
    assert_eq!(status, 400, "{answer}");
    let reason = answer["error"]["message"].as_str().unwrap();
    assert!(reason.contains("max_frames is 5, this server allows up to 4"), "{reason}");

    // SAFETY: sends a signal to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(served.0.id() as libc::pid_t, libc::SIGTERM) }, 0);
    let rest: Vec<String> = stderr.collect();
    assert_eq!(served.0.wait().unwrap().code(), Some(0), "{rest:?}");
    assert!(rest.iter().any(|line| line.starts_with("stopping")), "{rest:?}");
}

#[test]
fn wrong_flags_are_told_before_the_model_is_loaded() {
    for (flags, words) in [
        (["--host", "no.such.name.invalid"], "--host no.such.name.invalid: expected an address of this machine"),
        (["--host", "127.0.0.1:80"], "--host 127.0.0.1:80: expected an address"),
        (["--allow-media-host", "nas.local"], "expected HOST:PORT"),
        (["--media-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")], "expected a directory"),
        (["--media-path", "/no/such/folder"], "--media-path /no/such/folder: expected a directory, found none"),
        #[cfg(not(feature = "otel"))]
        (["--otlp-endpoint", "http://localhost:4318"], "build with --features otel"),
        (["--max-fps", "0"], "--max-fps has to be above 0"),
    ] {
        let run = keye(&[&["serve", "-m", "./no/such/model"][..], &flags].concat());
        assert_eq!(run.code, Some(2), "{run:#?}");
        assert!(run.stderr.contains(words), "{words}: {run:#?}");
    }
    let run = keye(&["serve", "-m", "./no/such/model", "--tls-cert", "/no/such.pem", "--tls-key", "/no/such.key"]);
    assert!(run.code == Some(2) && run.stderr.contains("cannot use /no/such.pem for TLS"), "{run:#?}");
}
