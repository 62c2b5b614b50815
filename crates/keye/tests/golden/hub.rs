//! Hub ids against a small server that speaks as much of the hub's protocol as downloads need.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use keye::hub::{Hub, Patience};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const SECRET: &str = "hf_secret";
const SHARD: &str = "model-1.safetensors";
/// Of a redirect, as a storage's signature.
const SIGNATURE: &str = "signature=s3cret";

#[derive(Default)]
struct State {
    files: BTreeMap<&'static str, Vec<u8>>,
    needs_token: bool,
    /// Closes the connection once after so many bytes of a file.
    drop_after: AtomicUsize,
    /// Closes every connection after so many bytes of a file.
    always_drop_after: usize,
    /// So many next requests for the listing are refused.
    busy: AtomicUsize,
    /// What the next requests for [`SHARD`] get instead of it.
    faults: Mutex<Vec<Fault>>,
    /// The first shard is under this prefix, to which it is redirected.
    moved: Option<String>,
    /// Headers of [`SHARD`] in place of those that it would have.
    headers: Option<String>,
    ignores_ranges: bool,
    /// Request lines with their ranges.
    log: Mutex<Vec<String>>,
    /// The tokens of the same requests.
    tokens: Mutex<Vec<Option<String>>>,
    /// Connections on which nothing is said any more.
    silent: Mutex<Vec<TcpStream>>,
    stopped: AtomicBool,
}

#[derive(Clone, Copy)]
enum Fault {
    Status(&'static str),
    /// Says nothing at all, or nothing after some bytes.
    Silent,
    SilentAfter(usize),
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
        let patience = Patience { silence: Duration::from_secs(30), retry: Duration::from_millis(1) };
        Hub { endpoint, cache: cache.join("hub"), token: None, offline: false, patience }
    }

    fn log_of(&self, name: &str) -> Vec<String> {
        let log = self.state.log.lock().unwrap();
        let ends = |line: &String| line.split(' ').next().is_some_and(|path| path.ends_with(name));
        log.iter().filter(|line| ends(line)).map(|line| line.split(' ').next_back().unwrap().to_owned()).collect()
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
    state.tokens.lock().unwrap().push(token.clone());
    let status = |stream: &mut TcpStream, status: &str| {
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    };
    if state.needs_token && token != Some(format!("Bearer {SECRET}")) {
        return status(&mut stream, "401 Unauthorized");
    }
    if path == "/api/models/org/name/revision/main?blobs=true" {
        if state.busy.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
            return status(&mut stream, "429 Too Many Requests\r\nRetry-After: 0");
        }
        let siblings: Vec<_> = state
            .files
            .iter()
            .map(|(name, bytes)| serde_json::json!({"rfilename": name, "size": bytes.len()}))
            .collect();
        let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
        let length = body.len();
        return write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
    }
    let (kept, stored) = (format!("/org/name/resolve/{COMMIT}/"), "/storage/");
    let is_stored = path.starts_with(stored);
    let name = path.strip_prefix(&kept).or_else(|| path.strip_prefix(stored)?.strip_suffix(&format!("?{SIGNATURE}")));
    let file = name.and_then(|name| state.files.get_key_value(name));
    let Some((name, bytes)) = file else { return status(&mut stream, "404 Not Found") };
    let mut headers = format!("ETag: \"{name}-tag\"\r\nx-repo-commit: {COMMIT}\r\n");
    if *name == SHARD {
        headers = state.headers.clone().unwrap_or(headers);
    }
    if let Some(prefix) = state.moved.as_ref().filter(|_| *name == SHARD && !is_stored) {
        let size = bytes.len();
        let location = format!("Location: {prefix}{stored}{name}?{SIGNATURE}\r\nx-linked-size: {size}\r\n");
        let headers = headers.replace("ETag", "x-linked-etag");
        return status(&mut stream, &format!("302 Found\r\n{location}{headers}ETag: W/\"of the redirect\""));
    }
    let mut limit = state.always_drop_after;
    let fault = if *name == SHARD { state.faults.lock().unwrap().pop() } else { None };
    match fault {
        Some(Fault::Status(code)) => return status(&mut stream, code),
        Some(Fault::Silent) => {
            state.silent.lock().unwrap().push(stream);
            return Ok(());
        }
        Some(Fault::SilentAfter(bytes)) => limit = bytes,
        None => {}
    }
    let range = range.filter(|_| !state.ignores_ranges);
    let code = if state.ignores_ranges { "200 OK" } else { "206 Partial Content" };
    let range = range.unwrap_or_else(|| "0-".into());
    let (start, end) = range.split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(bytes.len(), |last: usize| last + 1);
    if start >= bytes.len() {
        return status(&mut stream, "416 Range Not Satisfiable");
    }
    if !state.ignores_ranges {
        headers += &format!("Content-Range: bytes {start}-{}/{}\r\n", end - 1, bytes.len());
    }
    write!(stream, "HTTP/1.1 {code}\r\nContent-Length: {}\r\n{headers}Connection: close\r\n\r\n", end - start)?;
    let once = state.drop_after.load(Ordering::SeqCst);
    if once > 0 && end - start > once {
        state.drop_after.store(0, Ordering::SeqCst);
        limit = once;
    }
    let sent = if limit > 0 { limit.min(end - start) } else { end - start };
    stream.write_all(&bytes[start..start + sent])?;
    if matches!(fault, Some(Fault::SilentAfter(_))) {
        state.silent.lock().unwrap().push(stream);
    }
    Ok(())
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
        fs::write(blobs.join("model-1.safetensors-tag.part"), &part).unwrap();
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
    let (endpoint, cache) = ("http://127.0.0.1:9".into(), dir.path().join("hub"));
    let hub = Hub { endpoint, cache, token: None, offline: false, patience: Patience::default() };
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

/// Asserts that the first shard has arrived as it is on the server.
fn assert_whole(dir: &Path, state: &State) {
    assert_eq!(fs::read(dir.join(SHARD)).unwrap(), state.files[SHARD]);
}

#[test]
fn the_cache_is_that_of_hugging_faces_tools() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(checkpoint());
    let hub = server.hub(cache.path());
    let dir = get(&hub).unwrap();
    let root = cache.path().join("hub/models--org--name");
    assert_eq!(listing(&root), ["blobs", "refs", "snapshots"]);
    assert_eq!(dir, root.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(listing(&root.join("refs")), ["main"]);
    let blobs: Vec<_> = listing(&dir).iter().map(|name| format!("{name}-tag")).collect();
    assert_eq!(listing(&root.join("blobs")), blobs);
    for name in listing(&dir) {
        assert_eq!(fs::read_link(dir.join(&name)).unwrap(), Path::new(&format!("../../blobs/{name}-tag")));
    }

    // A blob that is there is linked, and a link to one that is gone is replaced.
    fs::remove_file(dir.join(SHARD)).unwrap();
    fs::remove_file(root.join("blobs/config.json-tag")).unwrap();
    assert_eq!(get(&hub).unwrap(), dir);
    assert_whole(&dir, &server.state);
    assert_eq!(fs::read(dir.join("config.json")).unwrap(), b"{}");
}

#[test]
fn the_token_goes_to_the_endpoint_and_nowhere_else() {
    let cache = tempfile::tempdir().unwrap();
    let storage = Server::start(checkpoint());
    let moved = Some(format!("http://{}", storage.address));
    let server = Server::start(State { needs_token: true, moved, ..checkpoint() });
    let dir = get(&Hub { token: Some(SECRET.into()), ..server.hub(cache.path()) }).unwrap();
    assert_whole(&dir, &server.state);
    assert_eq!(fs::read_link(dir.join(SHARD)).unwrap(), Path::new("../../blobs/model-1.safetensors-tag"));
    let token = Some(format!("Bearer {SECRET}"));
    assert!(server.state.tokens.lock().unwrap().iter().all(|found| *found == token));
    assert_eq!(*storage.state.tokens.lock().unwrap(), [None]);
}

#[test]
fn what_a_redirect_leads_to_is_resumed_and_its_refusal_named_without_its_signature() {
    let cache = tempfile::tempdir().unwrap();
    let storage = Server::start(State { drop_after: AtomicUsize::new(100_000), ..checkpoint() });
    let at = format!("http://{}", storage.address);
    let server = Server::start(State { moved: Some(at.clone()), ..checkpoint() });
    let dir = get(&server.hub(cache.path())).unwrap();
    assert_whole(&dir, &server.state);
    assert_eq!(storage.state.log.lock().unwrap().len(), 2);
    assert!(storage.state.log.lock().unwrap()[1].ends_with(" 100000-"));

    storage.state.faults.lock().unwrap().push(Fault::Status("403 Forbidden"));
    let other = tempfile::tempdir().unwrap();
    let refused = get(&server.hub(other.path())).unwrap_err();
    assert!(refused.contains(&at) && refused.contains("403") && !refused.contains(SIGNATURE), "{refused}");
}

#[test]
fn a_relative_redirect_stays_at_the_endpoint() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(State { needs_token: true, moved: Some(String::new()), ..checkpoint() });
    let dir = get(&Hub { token: Some(SECRET.into()), ..server.hub(cache.path()) }).unwrap();
    assert_whole(&dir, &server.state);
}

#[test]
fn headers_do_not_name_places_outside_of_the_cache() {
    let place = tempfile::tempdir().unwrap();
    let outside = place.path().join("outside");
    let commit = format!("x-repo-commit: {COMMIT}\r\n");
    for (headers, expected) in [
        (format!("ETag: \"{}\"\r\n{commit}", outside.display()), "ETag: expected letters"),
        (format!("ETag: \"../../../../outside\"\r\n{commit}"), "ETag: expected letters"),
        (format!("ETag: \"..\"\r\n{commit}"), "ETag: expected letters"),
        (commit.clone(), "expected an ETag"),
        ("ETag: tag\r\nx-repo-commit: ../../../../outside\r\n".into(), "x-repo-commit: expected 0123456789abcdef"),
        ("ETag: tag\r\nx-linked-size: 7\r\n".into(), "x-linked-size: expected 300000 as listed, found 7"),
    ] {
        let server = Server::start(State { headers: Some(headers.clone()), ..checkpoint() });
        let found = get(&server.hub(&place.path().join("cache"))).unwrap_err();
        assert!(found.contains(expected), "{headers}: {found}");
        assert_eq!(server.log_of(SHARD).len(), 1, "a server that means it is not asked again");
        assert_eq!(listing(place.path()), ["cache"], "{headers}");
        assert_eq!(listing(&place.path().join("cache/hub")), [".locks", "models--org--name"]);
        assert_eq!(listing(&place.path().join("cache/hub/models--org--name")), ["blobs", "snapshots"]);
        assert!(
            listing(&place.path().join("cache/hub/models--org--name/blobs"))
                .iter()
                .all(|n| n.ends_with(".json-tag") || n.ends_with(".txt-tag") || n.ends_with(".jinja-tag"))
        );
    }
    for (fault, expected) in [("302 Found", "names no Location"), ("302 Found\r\nLocation: ftp://x", "neither http")] {
        let server = Server::start(checkpoint());
        server.state.faults.lock().unwrap().push(Fault::Status(fault));
        let found = get(&server.hub(&place.path().join("cache"))).unwrap_err();
        assert!(found.contains(expected), "{found}");
    }
}

#[test]
fn a_silent_server_is_given_up_and_asked_again() {
    let cache = tempfile::tempdir().unwrap();
    let faults = Mutex::new(vec![Fault::SilentAfter(100_000), Fault::Silent]);
    let server = Server::start(State { faults, ..checkpoint() });
    let mut hub = server.hub(cache.path());
    hub.patience.silence = Duration::from_millis(200);
    assert_whole(&get(&hub).unwrap(), &server.state);
    let log = server.log_of(SHARD);
    assert_eq!(log[..2], ["-", "-"]);
    assert!(log.len() > 2 && log[2] != "-", "{log:?}");
}

#[test]
fn a_busy_server_is_asked_again_and_one_that_stays_busy_is_not() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(checkpoint());
    let busy = ["429 Too Many Requests\r\nRetry-After: 0", "503 Service Unavailable", "408 Request Timeout"];
    server.state.faults.lock().unwrap().extend(busy.map(Fault::Status));
    server.state.busy.store(2, Ordering::SeqCst);
    assert_whole(&get(&server.hub(cache.path())).unwrap(), &server.state);
    assert_eq!(server.log_of(SHARD).len(), 4);
    server.state.busy.store(1, Ordering::SeqCst);
    let asked = server.state.log.lock().unwrap().len();
    assert_whole(&get(&server.hub(cache.path())).unwrap(), &server.state);
    assert_eq!(server.state.log.lock().unwrap().len(), asked + 1, "the cache has it");

    let other = tempfile::tempdir().unwrap();
    server.state.faults.lock().unwrap().extend([Fault::Status(busy[0]); 10]);
    let refused = get(&server.hub(other.path())).unwrap_err();
    assert!(refused.contains("answered 429 for model-1.safetensors of org/name@main"), "{refused}");
    assert_eq!(server.log_of(SHARD).len(), 4 + 6);
}

#[test]
fn attempts_count_only_while_nothing_comes() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(State { always_drop_after: 30_000, ..checkpoint() });
    assert_whole(&get(&server.hub(cache.path())).unwrap(), &server.state);
    assert_eq!(server.log_of(SHARD).len(), 10);

    // Without ranges every attempt begins anew and comes no further.
    let other = tempfile::tempdir().unwrap();
    let server = Server::start(State { always_drop_after: 30_000, ignores_ranges: true, ..checkpoint() });
    let found = get(&server.hub(other.path())).unwrap_err();
    assert!(found.contains("cannot read model-1.safetensors of org/name@main"), "{found}");
    assert_eq!(server.log_of(SHARD).len(), 6);
}

#[test]
fn a_server_without_ranges_sends_all_again() {
    let cache = tempfile::tempdir().unwrap();
    let drop_after = AtomicUsize::new(100_000);
    let server = Server::start(State { drop_after, ignores_ranges: true, ..checkpoint() });
    assert_whole(&get(&server.hub(cache.path())).unwrap(), &server.state);
    assert_eq!(server.log_of(SHARD), ["-", "100000-"]);
}

#[test]
fn content_has_the_digest_that_its_tag_says() {
    let with_tag = |tag: &str| State { headers: Some(format!("x-linked-etag: \"{tag}\"\r\n")), ..checkpoint() };
    let right = "a438bcb648cd0caeb653a5406396c67c68c83b5a79660f03dc8dc7cf67b1ce1b";
    let wrong = "0".repeat(64);
    for (tag, requests) in [(right, vec!["-", "1000-", "-"]), (wrong.as_str(), vec!["-", "1000-", "-"])] {
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(with_tag(tag));
        let blobs = cache.path().join("hub/models--org--name/blobs");
        fs::create_dir_all(&blobs).unwrap();
        // Bytes that are not those of the file.
        fs::write(blobs.join(format!("{tag}.part")), [1; 1000]).unwrap();
        let found = get(&server.hub(cache.path()));
        assert_eq!(server.log_of(SHARD), requests, "damage of an earlier run costs one more try, and only one");
        if tag == right {
            assert_whole(&found.unwrap(), &server.state);
        } else {
            let found = found.unwrap_err();
            assert!(found.contains(&format!("expected content with the SHA-256 {wrong}, found {right}")), "{found}");
            assert!(!blobs.join(tag).exists());
        }
    }
}

#[test]
fn a_file_that_another_process_downloads_is_left_to_it() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(checkpoint());
    let locks = cache.path().join("hub/.locks/models--org--name");
    fs::create_dir_all(&locks).unwrap();
    let path = locks.join("model-1.safetensors-tag.lock");
    let lock = fs::File::create(&path).unwrap();
    lock.lock().unwrap();
    let found = get(&server.hub(cache.path())).unwrap_err();
    assert!(found.contains("another process") && found.contains(path.to_str().unwrap()), "{found}");
    drop(lock);
    assert_whole(&get(&server.hub(cache.path())).unwrap(), &server.state);
}
