//! Hub ids against a small server that speaks as much of the hub's protocol as downloads need.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use keye::hub::Hub;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const SECRET: &str = "hf_secret";

#[derive(Default)]
struct State {
    files: BTreeMap<&'static str, Vec<u8>>,
    needs_token: bool,
    /// Closes the connection once after so many bytes of a file.
    drop_after: AtomicUsize,
    /// Request lines with their ranges.
    log: Mutex<Vec<String>>,
    stopped: AtomicBool,
}

struct Server {
    address: std::net::SocketAddr,
    state: Arc<State>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    fn start(state: State) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, state) = (listener.local_addr().unwrap(), Arc::new(state));
        let shared = Arc::clone(&state);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if shared.stopped.load(Ordering::SeqCst) {
                    return;
                }
                // A client that goes away is the client's affair.
                let _ = answer(&shared, stream);
            }
        });
        Self { address, state, thread: Some(thread) }
    }

    fn hub(&self, cache: &Path) -> Hub {
        let endpoint = format!("http://{}/", self.address);
        Hub { endpoint, cache: cache.join("hub"), token: None, offline: false }
    }

    fn stop(&mut self) {
        self.state.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn answer(state: &State, mut stream: TcpStream) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let (mut range, mut token) = (None, None);
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match name.to_lowercase().as_str() {
            "range" => range = Some(value.trim_start_matches("bytes=").to_owned()),
            "authorization" => token = Some(value.to_owned()),
            _ => {}
        }
    }
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    state.log.lock().unwrap().push(format!("{path} {}", range.as_deref().unwrap_or("-")));
    let status = |stream: &mut TcpStream, status: &str| {
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    };
    if state.needs_token && token != Some(format!("Bearer {SECRET}")) {
        return status(&mut stream, "401 Unauthorized");
    }
    if path == "/api/models/org/name/revision/main?blobs=true" {
        let siblings: Vec<_> = state
            .files
            .iter()
            .map(|(name, bytes)| serde_json::json!({"rfilename": name, "size": bytes.len()}))
            .collect();
        let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
        let length = body.len();
        return write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
    }
    let file =
        path.strip_prefix(&format!("/org/name/resolve/{COMMIT}/")).and_then(|name| state.files.get_key_value(name));
    let Some((name, bytes)) = file else { return status(&mut stream, "404 Not Found") };
    let range = range.unwrap_or_else(|| "0-".into());
    let (start, end) = range.split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(bytes.len(), |last: usize| last + 1);
    if start >= bytes.len() {
        return status(&mut stream, "416 Range Not Satisfiable");
    }
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\nETag: \"{name}-tag\"\r\n\
         x-repo-commit: {COMMIT}\r\nConnection: close\r\n\r\n",
        end - start,
        end - 1,
        bytes.len()
    )?;
    let limit = state.drop_after.load(Ordering::SeqCst);
    if limit > 0 && end - start > limit {
        state.drop_after.store(0, Ordering::SeqCst);
        return stream.write_all(&bytes[start..start + limit]);
    }
    stream.write_all(&bytes[start..end])
}

/// A checkpoint of two shards, and files that nobody needs.
fn checkpoint() -> State {
    let index =
        r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let shard = |seed: usize| (0..300_000usize).map(|i| ((i * seed) >> 3) as u8).collect::<Vec<u8>>();
    let text = |text: &str| text.as_bytes().to_vec();
    let files = [
        ("config.json", text("{}")),
        ("chat_template.jinja", text("{{ x }}")),
        ("merges.txt", text("a b")),
        ("model.safetensors.index.json", text(index)),
        ("model-1.safetensors", shard(7)),
        ("model-2.safetensors", shard(11)),
        ("other.safetensors", shard(13)),
        ("modeling_keye.py", text("import os")),
        ("pytorch_model.bin", text("x")),
        ("../escape.json", text("{}")),
        (".hidden.json", text("{}")),
    ];
    State { files: files.into_iter().collect(), ..State::default() }
}

fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn get(hub: &Hub) -> Result<std::path::PathBuf, String> {
    hub.resolve("org/name", &mut |_| {}).map_err(|e| format!("{e:#}"))
}

#[test]
fn downloads_what_is_needed_and_then_does_without_the_server() {
    let cache = tempfile::tempdir().unwrap();
    let mut server = Server::start(checkpoint());
    let hub = server.hub(cache.path());
    let mut seen = Vec::new();
    let dir = hub.resolve("org/name", &mut |d| seen.push((d.done, d.total))).unwrap();
    assert_eq!(
        listing(&dir),
        [
            "chat_template.jinja",
            "config.json",
            "merges.txt",
            "model-1.safetensors",
            "model-2.safetensors",
            "model.safetensors.index.json"
        ]
    );
    for name in listing(&dir) {
        assert_eq!(fs::read(dir.join(&name)).unwrap(), server.state.files[name.as_str()], "{name}");
    }
    let total: usize = listing(&dir).iter().map(|name| server.state.files[name.as_str()].len()).sum();
    assert_eq!(*seen.last().unwrap(), (total as u64, total as u64));
    assert!(seen.windows(2).all(|pair| pair[0].0 <= pair[1].0), "progress never goes back");
    assert_eq!(dir.file_name().unwrap(), COMMIT);

    let asked = server.state.log.lock().unwrap().len();
    assert_eq!(get(&hub).unwrap(), dir);
    assert_eq!(server.state.log.lock().unwrap().len(), asked + 1, "only whether there is a newer commit");
    server.stop();
    assert_eq!(get(&hub).unwrap(), dir);
    assert_eq!(hub.snapshot("org/name", COMMIT, &mut |_| {}).unwrap(), dir);
    let offline = Hub { offline: true, ..server.hub(cache.path()) };
    assert_eq!(get(&offline).unwrap(), dir);
    fs::remove_file(dir.join("model-2.safetensors")).unwrap();
    let incomplete = get(&offline).unwrap_err();
    assert!(incomplete.contains("--offline or HF_HUB_OFFLINE") && incomplete.contains("org/name@main"), "{incomplete}");
    assert!(get(&hub).unwrap_err().contains("cannot read org/name@main from http://127.0.0.1"));
}

#[test]
fn a_broken_connection_is_taken_up_where_it_broke() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(State { drop_after: AtomicUsize::new(100_000), ..checkpoint() });
    let dir = get(&server.hub(cache.path())).unwrap();
    for name in ["model-1.safetensors", "model-2.safetensors"] {
        assert_eq!(fs::read(dir.join(name)).unwrap(), server.state.files[name]);
    }
    let log = server.state.log.lock().unwrap();
    assert!(log.iter().any(|line| line.ends_with("/model-1.safetensors 100000-")), "{log:?}");
}

#[test]
fn what_a_killed_run_left_is_taken_up_or_thrown_away() {
    for left in [1000, 300_000, 400_000] {
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(checkpoint());
        let blobs = cache.path().join("hub/models--org--name/blobs");
        fs::create_dir_all(&blobs).unwrap();
        let whole = &server.state.files["model-1.safetensors"];
        let mut part = whole.clone();
        part.resize(left, 0);
        // hf-hub puts "part" where the tag has its extension.
        fs::write(blobs.join("model-1.part"), &part).unwrap();
        let dir = get(&server.hub(cache.path())).unwrap();
        assert_eq!(&fs::read(dir.join("model-1.safetensors")).unwrap(), whole, "{left} bytes were left");
        let log = server.state.log.lock().unwrap();
        assert_eq!(log.iter().any(|line| line.ends_with("/model-1.safetensors 1000-")), left == 1000);
    }
}

#[test]
fn refusals_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(State { needs_token: true, ..checkpoint() });
    let refused = get(&server.hub(cache.path())).unwrap_err();
    assert!(refused.contains("401") && refused.contains("set HF_TOKEN"), "{refused}");
    let wrong = get(&Hub { token: Some("hf_wrong".into()), ..server.hub(cache.path()) }).unwrap_err();
    assert!(wrong.contains("the token of HF_TOKEN") && !wrong.contains("hf_wrong"), "{wrong}");
    let hub = Hub { token: Some(SECRET.into()), ..server.hub(cache.path()) };
    let missing = hub.resolve("org/name@v2", &mut |_| {}).map_err(|e| format!("{e:#}")).unwrap_err();
    assert!(missing.contains("has no org/name@v2 (404)") && missing.contains("there is no directory"), "{missing}");
    assert!(get(&hub).is_ok());
}

#[test]
fn weights_that_are_not_there_are_named() {
    for (remove, expected) in [
        (&["model-2.safetensors"][..], "no file model-2.safetensors"),
        (&["model.safetensors.index.json"], "no file model.safetensors: no safetensors weights"),
    ] {
        let cache = tempfile::tempdir().unwrap();
        let mut state = checkpoint();
        remove.iter().for_each(|name| drop(state.files.remove(name)));
        let server = Server::start(state);
        let found = get(&server.hub(cache.path())).unwrap_err();
        assert!(found.contains(expected), "{found}");
    }
}

#[test]
fn directories_win_and_other_names_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    let hub = Hub { endpoint: "http://127.0.0.1:9".into(), cache: dir.path().join("hub"), token: None, offline: false };
    let path = dir.path().to_str().unwrap();
    assert_eq!(hub.resolve(path, &mut |_| {}).unwrap(), dir.path());
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(hub.resolve(file.to_str().unwrap(), &mut |_| {}).unwrap_err().to_string().contains("is a file"));
    for name in ["", "nothing", "a/b/c", "../x/y", "org/na me", "org/name@", "/no/where", "org/..", "org/name@../x"] {
        let found = hub.resolve(name, &mut |_| {}).unwrap_err().to_string();
        assert!(found.contains("expected a checkpoint directory, or a hub id"), "{name}: {found}");
    }
}

#[test]
fn the_environment_is_read_as_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("token"), "hf_file\n").unwrap();
    let home = dir.path().to_str().unwrap().to_owned();
    let hub = |variables: &[(&str, &str)]| {
        Hub::from_lookup(&|name| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    };
    let plain = hub(&[("HOME", "/h")]).unwrap();
    assert_eq!((plain.endpoint.as_str(), plain.offline), ("https://huggingface.co", false));
    assert_eq!(plain.cache, Path::new("/h/.cache/huggingface/hub"));
    let set = hub(&[("HOME", "/h"), ("HF_HOME", &home), ("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://m")]).unwrap();
    assert_eq!((set.token.as_deref(), set.cache, set.offline), (Some("hf_file"), dir.path().join("hub"), true));
    assert_eq!(set.endpoint, "http://m");
    let other = hub(&[("HF_HOME", &home), ("HF_HUB_CACHE", "/c"), ("HF_TOKEN", "hf_variable")]).unwrap();
    assert_eq!((other.token.as_deref(), other.cache.to_str()), (Some("hf_variable"), Some("/c")));
    assert!(hub(&[]).is_err());
}
