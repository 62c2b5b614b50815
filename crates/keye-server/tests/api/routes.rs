//! Every route, and what is no route.

use serde_json::json;

use crate::client::request;
use crate::support::{MODEL, TestServer, config, shared};
use keye_server::ServerConfig;

#[test]
fn small_routes() {
    let server = shared();
    assert_eq!(server.get("/health").json(), json!({"status": "ok"}));
    assert_eq!(server.get("/ready").json(), json!({"status": "ready"}));
    let models = server.get("/v1/models").json();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["object"]), (&json!(MODEL), &json!("model")));
    assert_eq!(server.get(&format!("/v1/models/{MODEL}")).json(), models["data"][0]);
    assert_eq!(server.get("/v1/models/other").error(), (404, "model".into()));
    assert_eq!(server.get("/nothing").error().0, 404);
    assert_eq!(server.get("/v1/chat/completions").error().0, 405);
    assert_eq!(server.post("/health", &json!({})).error().0, 405);
}

#[test]
fn documented_routes_exist() {
    let server = shared();
    let document = server.get("/openapi.json").json();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys() {
            let path = path.replace("{model}", MODEL);
            let response = request(server.address, &method.to_uppercase(), &path, &[], "[]");
            assert!(![404, 405].contains(&response.status) && response.status < 500, "{method} {path}");
        }
    }
}

#[test]
fn tokens_and_back() {
    let server = shared();
    let text = "A cat, <|im_end|> größer 猫";
    let tokens = server.post("/tokenize", &json!({"prompt": text, "return_token_strs": true})).json();
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    assert_eq!(tokens["count"], tokens["token_strs"].as_array().unwrap().len());
    let back = server.post("/detokenize", &json!({"tokens": tokens["tokens"]})).json();
    assert_eq!(back["prompt"], text);

    // Messages are rendered as a chat request's are.
    let messages = json!([{"role": "user", "content": "Hello"}]);
    let count = server.post("/tokenize", &json!({"messages": messages})).json()["count"].clone();
    let usage = server.chat(&json!({"messages": messages, "max_tokens": 1})).json()["usage"]["prompt_tokens"].clone();
    assert_eq!(count, usage);
    let thinking = json!({"messages": messages, "chat_template_kwargs": {"enable_thinking": false}, "max_tokens": 1});
    assert!(server.post("/tokenize", &thinking).json()["count"].as_u64() > count.as_u64());
    let usage = server.chat(&thinking).json()["usage"]["prompt_tokens"].clone();
    assert_eq!(server.post("/tokenize", &thinking).json()["count"], usage);
    assert_eq!(server.post("/detokenize", &json!({"tokens": [4_000_000]})).error(), (400, "tokens".into()));
    assert_eq!(server.post("/detokenize", &json!({})).error(), (400, "tokens".into()));
    assert_eq!(server.post("/tokenize", &json!({})).error(), (400, "messages".into()));
}

#[test]
fn metrics_count_and_have_prometheus_form() {
    let server = TestServer::start(config());
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "ignore_eos": true});
    assert_eq!(server.chat(&body).status, 200);
    server.get("/made/up/path");
    let text = server.get("/metrics").body;
    for line in [
        "keye_http_responses_total{route=\"/v1/chat/completions\",status=\"200\"} 1",
        "keye_http_responses_total{route=\"other\",status=\"404\"} 1",
        "keye_generation_tokens_total 5",
        "keye_time_to_first_token_seconds_count 1",
        "keye_time_to_first_token_seconds_bucket{le=\"+Inf\"} 1",
        "vllm:num_requests_running{model_name=\"org/keye-tiny\"} 0",
        "vllm:num_requests_waiting{model_name=\"org/keye-tiny\"} 0",
        "vllm:kv_cache_usage_perc{model_name=\"org/keye-tiny\"} 0",
        "vllm:time_to_first_token_seconds_count{model_name=\"org/keye-tiny\"} 1",
        "vllm:inter_token_latency_seconds_bucket{model_name=\"org/keye-tiny\",le=\"+Inf\"} 4",
        "vllm:e2e_request_latency_seconds_count{model_name=\"org/keye-tiny\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
    }
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').expect("a name and a value");
        assert!(value.parse::<f64>().is_ok(), "{line}");
        let family = name.split('{').next().unwrap();
        let family = ["_bucket", "_sum", "_count"].iter().fold(family, |f, end| f.strip_suffix(end).unwrap_or(f));
        assert!(text.contains(&format!("# TYPE {family} ")), "{line}");
    }
}

#[test]
fn keys() {
    let keys = vec!["first".to_owned(), "second".to_owned()];
    let server = TestServer::start(ServerConfig { api_keys: keys, ..config() });
    let with = |path: &str, value: &str| request(server.address, "GET", path, &[("Authorization", value)], "");
    for key in ["Bearer first", "bearer second", "Bearer  first "] {
        assert_eq!(with("/v1/models", key).status, 200, "{key}");
    }
    for key in ["Bearer third", "Bearer", "Bearer firs", "Basic first", "first", "Bearer first second", ""] {
        let refused = with("/v1/models", key);
        assert_eq!(refused.error().0, 401, "{key}");
        assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    }
    for path in ["/metrics", "/openapi.json", "/nothing"] {
        assert_eq!(server.get(path).status, 401, "{path}");
    }
    for path in ["/health", "/ready"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
}

#[test]
fn a_server_without_a_key_answers_to_its_own_names_only() {
    let by = |server: &TestServer, name: &str| {
        let mut socket = std::net::TcpStream::connect(server.address).expect("a connection");
        let text = format!("GET /health HTTP/1.1\r\nhost: {name}\r\nconnection: close\r\n\r\n");
        std::io::Write::write_all(&mut socket, text.as_bytes()).expect("sent");
        let mut answer = String::new();
        std::io::Read::read_to_string(&mut socket, &mut answer).expect("an answer");
        answer.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok()).expect("a status")
    };
    let open = TestServer::start(ServerConfig { cors_origins: vec!["http://keye.lan:8000".into()], ..config() });
    for name in
        ["localhost", "LocalHost:8000", "127.0.0.1:1", "[::1]:8000", "a.localhost", "192.168.0.7", "keye.lan:8000"]
    {
        assert_eq!(by(&open, name), 200, "{name}");
    }
    for name in
        ["evil.example", "evil.example:8000", "localhost.evil.example", "keye.lan", "127.0.0.1.evil.example", "a b"]
    {
        assert!([400, 403].contains(&by(&open, name)), "{name}");
    }
    let keyed = TestServer::start(ServerConfig { api_keys: vec!["k".into()], ..config() });
    assert_eq!(by(&keyed, "keye.example"), 200);
}

#[test]
fn origins_and_request_ids() {
    let server = TestServer::start(ServerConfig { cors_origins: vec!["https://a.example".into()], ..config() });
    let from =
        |origin: &str| request(server.address, "GET", "/health", &[("Origin", origin), ("X-Request-Id", "my-1")], "");
    let known = from("https://a.example");
    assert_eq!(known.header("access-control-allow-origin"), Some("https://a.example"));
    assert_eq!(known.header("x-request-id"), Some("my-1"));
    for other in ["https://b.example", "https://a.example.evil", "null"] {
        assert_eq!(from(other).header("access-control-allow-origin"), None, "{other}");
    }
    let headers = [("Origin", "https://a.example"), ("Access-Control-Request-Method", "POST")];
    let preflight = request(server.address, "OPTIONS", "/v1/chat/completions", &headers, "");
    assert_eq!(preflight.status, 204);
    assert!(preflight.header("access-control-allow-headers").unwrap().contains("authorization"));
    assert!(server.get("/health").header("x-request-id").unwrap().starts_with("req-"));
}
