//! What may be opened, and what not.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use keye_media::RemotePolicy;
use keye_server::{MediaAccess, ServerConfig};
use serde_json::{Value, json};

use crate::client::Open;
use crate::support::{TestServer, config, content, data_url, fixture, question, shared};

fn image(url: &str) -> Value {
    question(json!([{"type": "image_url", "image_url": {"url": url}}]), "What?")
}

/// Serves a picture at `/one.png`, redirects `/to?URL`, and counts requests.
fn file_server() -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    let picture = std::fs::read(fixture("inputs/one.png")).expect("the fixture is whole");
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            counter.fetch_add(1, Ordering::SeqCst);
            let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
            let path = lines.next().unwrap_or_default().split(' ').nth(1).unwrap_or_default().to_owned();
            while lines.next().is_some_and(|line| !line.is_empty()) {}
            let mut stream = &stream;
            let _ = match path.split_once("/to?") {
                Some((_, url)) => write!(
                    stream,
                    "HTTP/1.1 302 Found\r\nlocation: {url}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                ),
                None => {
                    write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", picture.len())
                        .and_then(|()| stream.write_all(&picture))
                }
            };
        }
    });
    (port, count)
}

fn with_media(media: MediaAccess) -> TestServer {
    TestServer::start(ServerConfig { media, ..config() })
}

#[test]
fn every_form_of_a_picture_and_a_clip() {
    let server = shared();
    let path = fixture("inputs/one.png");
    let expected = content(&server.chat(&image(&data_url("image/png", "inputs/one.png"))));
    let url = format!("file://{}", path.canonicalize().expect("a path").display());
    for part in [
        json!({"type": "image_url", "image_url": {"url": url}}),
        json!({"type": "image_url", "image_url": url}),
        json!({"type": "image", "image": url}),
        json!({"type": "image", "image": "one.png"}),
        json!({"type": "image_url", "image_url": {"url": "one.png", "detail": "high"}}),
    ] {
        assert_eq!(content(&server.chat(&question(json!([part]), "What?"))), expected, "{part}");
    }
    let ask = |part: Value| {
        let answer = server.chat(&question(json!([part]), "What?"));
        (content(&answer), answer.json()["usage"]["prompt_tokens"].clone())
    };
    let clip = data_url("video/mp4", "inputs/clip.mp4");
    let expected = ask(json!({"type": "video", "video": "clip.mp4", "fps": 1}));
    assert_ne!(expected.1, ask(json!({"type": "video", "video": "clip.mp4"})).1, "the option counts");
    for part in [
        json!({"type": "video_url", "video_url": {"url": clip, "fps": 1}}),
        json!({"type": "video_url", "video_url": {"url": clip}, "fps": 1}),
        json!({"type": "video_url", "video_url": {"url": clip, "preprocess_kwargs": {"fps": 1}}}),
        json!({"type": "video_url", "video_url": {"url": clip}, "preprocess_kwargs": {"fps": 1}}),
        json!({"type": "video_url", "video_url": {"url": clip, "preprocess_kwargs": {"fps": 1}}, "preprocess_kwargs": {"fps": 2}}),
    ] {
        assert_eq!(ask(part), expected);
    }
}

/// The clip of the fixture, its second half lost on the way.
fn cut_clip() -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let whole = folder.path().join("whole.mkv");
    let ffmpeg = std::env::var_os("KEYE_FFMPEG").unwrap_or("ffmpeg".into());
    let mut copy = std::process::Command::new(ffmpeg);
    copy.args(["-nostdin", "-loglevel", "error", "-i"])
        .arg(fixture("inputs/clip.mp4"))
        .args(["-c", "copy"])
        .arg(&whole);
    assert!(copy.status().expect("ffmpeg runs").success());
    let bytes = std::fs::read(whole).expect("it was written");
    format!("data:video/x-matroska;base64,{}", STANDARD.encode(&bytes[..bytes.len() / 2]))
}

#[test]
fn a_clip_that_is_cut_short_is_answered_with_a_warning() {
    let server = shared();
    let part = json!({"type": "video_url", "video_url": {"url": cut_clip()}});
    let picture = json!({"type": "image_url", "image_url": {"url": "one.png"}});
    let mut body = question(json!([picture, part]), "What?");
    let assert_told = |warnings: &Value| {
        let [warning] = &warnings.as_array().expect("a list")[..] else { panic!("{warnings}") };
        let message = warning["message"].as_str().expect("a text");
        assert!(message.starts_with("frames end at ") && message.contains(": the file seems cut short"), "{message}");
        assert_eq!(warning["media"], 1);
    };
    body["n"] = json!(2);
    // The second time the clip is known already.
    for _ in 0..2 {
        let answer = server.chat(&body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert_told(&answer.json()["warnings"]);
    }
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_progress": true, "include_usage": true});
    let events = server.chat(&body).events();
    let told: Vec<&Value> = events.iter().filter(|event| !event["warnings"].is_null()).collect();
    assert_eq!(told.len(), 1, "once");
    assert_told(&told[0]["warnings"]);
    assert!(!told[0]["choices"][0]["finish_reason"].is_null(), "in a chunk that has a choice");
    let ready = events.iter().filter(|event| event["keye"]["stage"] == "ready");
    let told: Vec<usize> = ready.filter_map(|event| event["keye"]["warnings"].as_array().map(Vec::len)).collect();
    assert_eq!(told, [0, 1]);

    let asked = body["messages"].clone();
    let embedded = server.post("/v1/embeddings", &json!({"messages": asked}));
    assert_eq!(embedded.status, 200, "{}", embedded.body);
    assert_told(&embedded.json()["warnings"]);
    let response = server.post("/v1/responses", &json!({"input": asked, "max_output_tokens": 4}));
    assert_eq!(response.status, 200, "{}", response.body);
    assert_told(&response.json()["warnings"]);

    let whole = server.chat(&question(json!([{"type": "video", "video": "clip.mp4"}]), "What?"));
    assert_eq!((whole.status, whole.json().get("warnings")), (200, None));
}

#[test]
fn addresses_that_are_none_are_refused_with_what_is_allowed() {
    let refused = |url: &str| {
        let refused = shared().chat(&image(url));
        assert_eq!(refused.error().0, 400);
        refused.json()["error"]["message"].as_str().expect("a text").to_owned()
    };
    let said = refused("ftp://x/a.png");
    assert!(said.starts_with("ftp:// is no kind of address that is opened; send the bytes as"), "{said}");
    assert!(said.ends_with("or a file:// URL or a path inside of the server's media path"), "{said}");
    assert!(refused("").starts_with("the address of the medium is empty; send "), "{}", refused(""));
    let page = format!("data:text/html;base64,{}", STANDARD.encode("<!doctype html><title>x</title>"));
    assert!(
        refused(&page).contains("this is HTML, not a picture or clip: is the address a page's?"),
        "{}",
        refused(&page)
    );
}

#[test]
fn escapes_in_file_urls_are_read_inside_of_the_media_path_only() {
    let folder = tempfile::tempdir().expect("a folder");
    let inside = folder.path().join("in");
    std::fs::create_dir(&inside).expect("a folder");
    for target in [inside.join("a picture.png"), folder.path().join("a secret.png")] {
        std::fs::copy(fixture("inputs/one.png"), target).expect("a copy");
    }
    let server = with_media(MediaAccess { path: Some(inside.clone()), remote: None });
    let url = format!("file://{}/a%20picture.png", inside.display());
    let expected = content(&shared().chat(&image("one.png")));
    assert_eq!(content(&server.chat(&image(&url))), expected);
    for outside in [
        format!("file://{}/a%20secret.png", folder.path().display()),
        format!("file://{}/%2e%2e/a%20secret.png", inside.display()),
        "file://%2E%2E%2Fa%20secret.png".to_owned(),
    ] {
        assert_eq!(server.chat(&image(&outside)).error().0, 400, "{outside}");
    }
}

#[test]
fn files_only_under_the_media_path() {
    let server = shared();
    for outside in [
        "file:///etc/passwd",
        "/etc/passwd",
        "../model/config.json",
        "file://../model/config.json",
        "frames/../../model/config.json",
        "/nonexistent/file.png",
    ] {
        let refused = server.chat(&image(outside));
        assert_eq!(
            (refused.error().0, &refused.json()["error"]["code"]),
            (400, &json!("media_not_allowed")),
            "{outside}"
        );
    }
    let none = with_media(MediaAccess::default());
    for file in ["one.png", "file:///etc/passwd", "/etc/passwd"] {
        let refused = none.chat(&image(file));
        assert_eq!((refused.error().0, &refused.json()["error"]["code"]), (400, &json!("media_not_allowed")), "{file}");
    }
    let list = question(json!([{"type": "video", "video": ["frames/0.png", "/etc/passwd"]}]), "x");
    assert_eq!(none.chat(&list).json()["error"]["code"], "media_not_allowed");
    assert_eq!(none.chat(&image(&data_url("image/png", "inputs/one.png"))).status, 200);
}

#[test]
fn remote_media_are_off_then_public_then_named() {
    let (port, count) = file_server();
    let url = format!("http://127.0.0.1:{port}/one.png");
    let code = |server: &TestServer, url: &str| server.chat(&image(url)).json()["error"]["code"].clone();
    assert_eq!(code(shared(), &url), "media_not_allowed");

    let remote = |policy: RemotePolicy| with_media(MediaAccess { path: None, remote: Some(policy) });
    let open = remote(RemotePolicy::default());
    for url in [
        url.clone(),
        format!("http://localhost:{port}/one.png"),
        format!("http://[::ffff:127.0.0.1]:{port}/one.png"),
        format!("http://0.0.0.0:{port}/one.png"),
        format!("http://2130706433:{port}/one.png"),
        format!("http://0x7f.1:{port}/one.png"),
        format!("http://user:pass@127.0.0.1:{port}/one.png"),
        "http://169.254.169.254/latest/meta-data".into(),
        "http://10.0.0.1/".into(),
    ] {
        assert_eq!(code(&open, &url), "media_not_allowed", "{url}");
    }
    assert_eq!(count.load(Ordering::SeqCst), 0, "nothing was asked");

    let named = remote(RemotePolicy { hosts: vec![("127.0.0.1".into(), port)], ..RemotePolicy::default() });
    let expected = content(&shared().chat(&image("one.png")));
    assert_eq!(content(&named.chat(&image(&url))), expected);
    assert_eq!(content(&named.chat(&image(&format!("http://127.0.0.1:{port}/to?/one.png")))), expected, "a redirect");
    let (other, other_count) = file_server();
    let redirect = format!("http://127.0.0.1:{port}/to?http://127.0.0.1:{other}/one.png");
    assert_eq!(code(&named, &redirect), "media_not_allowed");
    assert_eq!(other_count.load(Ordering::SeqCst), 0);
    let (a, b) = (format!("http://127.0.0.1:{port}/to?"), "/to?".repeat(3));
    assert_eq!(code(&named, &format!("{a}{b}/one.png")), "media_unreadable", "more than three redirects");

    let listed = remote(RemotePolicy { domains: vec!["example.org".into()], ..RemotePolicy::default() });
    assert_eq!(code(&listed, &url), "media_not_allowed");
}

/// A source that never answers: the stream shows that it is alive, and ends at once when its reader goes.
#[test]
fn a_stream_that_has_nothing_to_tell_says_that_it_waits() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = silent.local_addr().expect("an address").port();
    let policy = RemotePolicy { hosts: vec![("127.0.0.1".into(), port)], ..RemotePolicy::default() };
    let media = MediaAccess { path: None, remote: Some(policy) };
    let server = TestServer::start(ServerConfig { keep_alive: Duration::from_millis(20), media, ..config() });
    let mut body = image(&format!("http://127.0.0.1:{port}/one.png"));
    body["stream"] = json!(true);
    let mut stream = Open::send(server.address, "POST", "/v1/chat/completions", &[], &body.to_string());
    assert_eq!(stream.status, 200);
    for _ in 0..2 {
        assert!((0..9).any(|_| stream.line() == ": waiting\n"), "nothing was told");
    }
    drop(stream);
    server.wait_until_idle();
}
