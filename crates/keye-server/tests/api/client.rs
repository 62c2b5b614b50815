//! A client that shows everything: HTTP/1.1 over a socket, one connection for each request.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

pub struct Response {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The body's events; the last has to be `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        let mut data: Vec<&str> = self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.body);
        data.into_iter().map(|data| serde_json::from_str(data).expect("json")).collect()
    }

    /// `(status, error.param)`; checks the shape.
    pub fn error(&self) -> (u16, String) {
        let error = self.json()["error"].clone();
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
        assert!(error["type"].is_string() && error.get("code").is_some(), "{error}");
        (self.status, error["param"].as_str().unwrap_or_default().to_owned())
    }
}

/// A connection whose response has not been read to its end.
pub struct Open {
    pub status: u16,
    headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
}

impl Open {
    /// Sends a request and reads the head of its response.
    pub fn send(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Self {
        let mut stream = TcpStream::connect(address).expect("the server accepts");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket option");
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n");
        let named = |name: &str| headers.iter().any(|(key, _)| key.eq_ignore_ascii_case(name));
        if method == "POST" && !named("content-length") && !named("transfer-encoding") {
            head += &format!("content-length: {}\r\n", body.len());
        }
        if method == "POST" && !named("content-type") {
            head += "content-type: application/json\r\n";
        }
        headers.iter().for_each(|(key, value)| head += &format!("{key}: {value}\r\n"));
        stream.write_all(format!("{head}\r\n").as_bytes()).expect("the head goes out");
        // The server may have answered and closed already.
        let _ = stream.write_all(body.as_bytes());
        let mut reader = BufReader::new(stream);
        let mut line = || {
            let mut text = String::new();
            reader.read_line(&mut text).expect("a line");
            text.trim_end().to_owned()
        };
        let status = line().split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        let headers = std::iter::from_fn(|| Some(line()).filter(|line| !line.is_empty()))
            .filter_map(|line| line.split_once(": ").map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned())))
            .collect();
        Self { status, headers, reader }
    }

    /// The next line of the body, chunk sizes and all.
    pub fn line(&mut self) -> String {
        let mut text = String::new();
        self.reader.read_line(&mut text).expect("a line");
        text
    }

    /// Waits for an event with generated text.
    pub fn wait_for_text(&mut self) {
        loop {
            let line = self.line();
            assert!(!line.is_empty(), "the stream ended");
            if line.contains("\"content\":\"") && !line.contains("\"content\":\"\"") {
                return;
            }
        }
    }

    /// Reads the rest as it is, after lines have been taken.
    pub fn raw_rest(mut self) -> String {
        let mut rest = String::new();
        self.reader.read_to_string(&mut rest).expect("the rest");
        rest
    }

    /// Reads what comes until the connection ends, in order or not.
    pub fn lossy_rest(mut self) -> String {
        let mut rest = Vec::new();
        // A connection that is cut may end in an error.
        let _ = self.reader.read_to_end(&mut rest);
        String::from_utf8_lossy(&rest).into_owned()
    }

    /// Reads the body.
    pub fn finish(mut self) -> Response {
        let mut raw = Vec::new();
        self.reader.read_to_end(&mut raw).expect("the rest");
        let chunked = self.headers.iter().any(|(key, value)| key == "transfer-encoding" && value == "chunked");
        let body = if chunked { unchunked(&raw) } else { raw };
        Response { status: self.status, headers: self.headers, body: String::from_utf8(body).expect("text") }
    }
}

fn unchunked(mut raw: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(at) = raw.windows(2).position(|pair| pair == b"\r\n") {
        let size = std::str::from_utf8(&raw[..at]).ok().and_then(|text| usize::from_str_radix(text, 16).ok());
        let size = size.expect("a chunk's size");
        body.extend_from_slice(&raw[at + 2..at + 2 + size]);
        raw = &raw[at + 4 + size..];
    }
    body
}

pub fn request(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Response {
    Open::send(address, method, path, headers, body).finish()
}
