//! The page at `/`, and the progress that it asks for.

use std::process::Command;

use serde_json::{Value, json};

use crate::client::request;
use crate::support::{TestServer, config, data_url, fixture, question, shared};
use keye_server::ServerConfig;

/// `KEYE_TEST_CHROMIUM=/path/to/chromium` and `KEYE_TEST_PYTHON=/path/to/python`, with `playwright`, run
/// `tests/page/page_test.py`; `KEYE_TEST_SHOTS` names a directory for its screenshots.
#[test]
fn in_a_browser() {
    let (Some(python), Some(_)) = (std::env::var_os("KEYE_TEST_PYTHON"), std::env::var_os("KEYE_TEST_CHROMIUM")) else {
        eprintln!("KEYE_TEST_PYTHON and KEYE_TEST_CHROMIUM name no interpreter and browser: not run");
        return;
    };
    let server = TestServer::start(config());
    let mut command = Command::new(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/page/page_test.py"));
    command.arg(format!("http://{}", server.address));
    command.args([fixture("inputs/clip.mp4"), fixture("inputs/one.png")]);
    command.args(std::env::var_os("KEYE_TEST_SHOTS"));
    assert!(command.status().expect("the interpreter runs").success());
    server.stop();
}

#[test]
fn the_page_is_one_version_and_loads_nothing_from_elsewhere() {
    let server = shared();
    let page = server.get("/");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'none'; script-src 'self';") && !policy.contains("unsafe"), "{policy}");
    let tag = page.header("etag").unwrap().to_owned();
    for (path, kind) in
        [("/page/page.js", "text/javascript; charset=utf-8"), ("/page/page.css", "text/css; charset=utf-8")]
    {
        let file = server.get(path);
        assert_eq!((file.status, file.header("content-type"), file.header("etag")), (200, Some(kind), Some(&*tag)));
        for known in [tag.clone(), format!("W/{tag}"), format!("\"other\", {tag}")] {
            let again = request(server.address, "GET", path, &[("If-None-Match", &known)], "");
            assert_eq!((again.status, again.body.as_str()), (304, ""));
        }
        assert_eq!(request(server.address, "GET", path, &[("If-None-Match", "\"other\"")], "").status, 200);
    }
    assert_eq!(server.get("/page/other.js").status, 404);
}

#[test]
fn the_page_needs_no_key_and_what_it_asks_does() {
    let server = TestServer::start(ServerConfig { api_keys: vec!["key".into()], ..config() });
    assert_eq!((server.get("/").status, server.get("/page/page.js").status), (200, 200));
    assert_eq!((server.get("/v1/models").status, server.get("/page/other.js").status), (401, 401));
}

/// The events of a streamed answer.
fn chunks(server: &TestServer, body: &Value) -> Vec<Value> {
    let response = server.chat(body);
    assert_eq!(response.status, 200, "{}", response.body);
    response.events()
}

#[test]
fn progress_is_told_when_asked_for_with_the_frames_that_the_model_sees() {
    let server = TestServer::start(config());
    let clip = json!([{"type": "video_url", "video_url": {"url": data_url("video/mp4", "inputs/clip.mp4")}}]);
    let mut body = question(clip, "What happens?");
    body["stream"] = json!(true);
    body["n"] = json!(2);
    body["stream_options"] = json!({"include_progress": true});
    let told = chunks(&server, &body);
    let reports: Vec<&Value> = told.iter().map(|chunk| &chunk["keye"]).filter(|report| !report.is_null()).collect();
    for chunk in told.iter().filter(|chunk| !chunk["keye"].is_null()) {
        assert_eq!((&chunk["choices"], &chunk["object"]), (&json!([]), &json!("chat.completion.chunk")));
    }
    let of = |stage: &str| reports.iter().filter(|report| report["stage"] == stage).collect::<Vec<_>>();
    let ready = of("ready");
    assert_eq!(ready.len(), 1, "choices share their media");
    let frames = ready[0]["frames"].as_array().unwrap();
    let kinds: Vec<&str> = frames.iter().map(|frame| frame["kind"].as_str().unwrap()).collect();
    assert!(kinds.contains(&"slow") && kinds.contains(&"fast"), "{kinds:?}");
    let times: Vec<f64> = frames.iter().map(|frame| frame["time"].as_f64().unwrap()).collect();
    assert!(times[0] == 0.0 && times.is_sorted() && *times.last().unwrap() < 4.0, "{times:?}");
    assert!(frames.iter().all(|frame| frame["width"].as_u64() > Some(27) && frame["height"].as_u64() > Some(27)));
    assert_eq!((&ready[0]["media"], ready[0]["tokens"].as_u64() > Some(0)), (&json!(0), true));
    assert!(!of("prefill").is_empty());

    // The same request without the option has the same answer and no word of it.
    body["stream_options"] = json!({});
    let plain = chunks(&server, &body);
    assert!(plain.iter().all(|chunk| chunk["keye"].is_null()));
    let text = |chunks: &[Value], index: usize| -> String {
        let of_choice = chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index);
        of_choice.filter_map(|choice| choice["delta"]["content"].as_str()).collect()
    };
    assert_eq!([text(&told, 0), text(&told, 1)], [text(&plain, 0), text(&plain, 1)]);
    body["stream_options"] = json!({"include_progress": 3});
    assert_eq!(server.chat(&body).error(), (400, "include_progress".into()));
}
