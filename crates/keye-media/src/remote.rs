//! Fetching `http(s)://` sources.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

use crate::remote_policy::RemotePolicy;
use crate::source::within_limit;
use crate::spill::temporary;
use crate::{MediaError, Progress};

const REDIRECTS: u32 = 3;
/// Between two looks at whether the caller gave up, while nothing arrives.
const PATIENCE: Duration = Duration::from_millis(100);
/// Longest time to look a name up, and to connect: what cannot be interrupted.
const CONNECTING: Duration = Duration::from_secs(20);
/// Longest time from there to the head of the response, and between two parts of the body.
const SILENCE: Duration = Duration::from_secs(60);
/// Of all fetches, those included that were given up while they connect.
static SLOTS: Slots = Slots { used: AtomicUsize::new(0), most: 64 };

/// Resolves names and asks the policy about what they resolve to. Redirects come by here too, and connections are made to
/// the addresses returned, so there is no second look-up that could answer differently.
#[derive(Debug)]
struct PolicyResolver {
    policy: RemotePolicy,
    inner: DefaultResolver,
}

/// The policy said no; carried through `ureq`'s errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

impl Resolver for PolicyResolver {
    fn resolve(
        &self,
        uri: &ureq::http::Uri,
        config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let addresses = self.inner.resolve(uri, config, timeout)?;
        let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
        let host = uri.host().unwrap_or_default();
        match self.policy.check(host, port, addresses.iter().map(std::net::SocketAddr::ip)) {
            Ok(()) => Ok(addresses),
            Err(reason) => Err(ureq::Error::Other(Box::new(Refused(reason)))),
        }
    }
}

/// What arrives.
enum Part {
    /// Bytes of the body, if the server says so.
    Total(Option<u64>),
    Bytes(Vec<u8>),
}

/// A fetch on a thread of its own: a server that says nothing holds that thread, not the one that waits for it.
struct Fetch {
    url: String,
    agent: ureq::Agent,
    limit: u64,
}

/// Ends the connections of a fetch when nobody waits for it any more, so that its thread ends too.
struct HangUp(ureq::Agent);

impl Drop for HangUp {
    fn drop(&mut self) {
        self.0.clone().shutdown();
    }
}

/// Streams the body into an unlinked temporary file. At most three redirects, `limit` bytes, and all before `deadline`; ends soon
/// after `progress` returns false. With a policy, every host on the way has to pass it and proxies of the environment are not
/// used.
///
/// # Errors
/// [`MediaError::Busy`] when as many are fetched already as may be; what the policy or the server said; limits; cancelling.
pub(crate) fn fetch(
    url: &str,
    policy: Option<&RemotePolicy>,
    limit: u64,
    deadline: Instant,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<File, MediaError> {
    fetch_in(&SLOTS, url, agent(policy, deadline), limit, progress)
}

fn fetch_in(
    slots: &'static Slots,
    url: &str,
    agent: ureq::Agent,
    limit: u64,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<File, MediaError> {
    let busy = |reason: String| MediaError::Busy { input: url.to_owned(), reason };
    let running = slots.take().ok_or_else(|| busy(format!("{} sources are being fetched already", slots.most)))?;
    let mut file = tempfile::tempfile().map_err(temporary)?;
    let (sender, receiver) = sync_channel(4);
    let _hang_up = HangUp(agent.clone());
    let fetch = Fetch { url: url.to_owned(), agent, limit };
    let work = move || {
        let _running = running;
        if let Err(error) = fetch.run(&sender) {
            // Nobody is there when the caller gave up.
            let _ = sender.send(Err(error));
        }
    };
    let thread = std::thread::Builder::new().name("keye-fetch".into()).spawn(work);
    thread.map_err(|error| busy(format!("no thread can be started for it: {error}")))?;
    let (mut done, mut total) = (0, None);
    loop {
        let part = receiver.recv_timeout(PATIENCE);
        if !progress(Progress::Fetching { done, total }) {
            return Err(MediaError::Cancelled);
        }
        match part {
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
            Ok(Err(error)) => return Err(error),
            Ok(Ok(Part::Total(claimed))) => total = claimed,
            Ok(Ok(Part::Bytes(bytes))) => {
                done += bytes.len() as u64;
                file.write_all(&bytes).map_err(temporary)?;
            }
        }
    }
    file.rewind().map_err(temporary)?;
    Ok(file)
}

/// How many fetches run and may run at the same time.
struct Slots {
    used: AtomicUsize,
    most: usize,
}

/// One of the fetches that run.
struct Running(&'static Slots);

impl Slots {
    fn take(&'static self) -> Option<Running> {
        let more = |n: usize| (n < self.most).then_some(n + 1);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Running(self))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Fetch {
    fn run(&self, sender: &SyncSender<Result<Part, MediaError>>) -> Result<(), MediaError> {
        let url = &self.url;
        let failed = |source: std::io::Error| MediaError::Read { input: url.clone(), source };
        let mut response = self.agent.get(url).call().map_err(|error| match error {
            ureq::Error::Other(other) if other.is::<Refused>() => {
                MediaError::Denied { input: url.clone(), reason: other.to_string() }
            }
            // Without the word `io` in front.
            ureq::Error::Io(error) => failed(error),
            error => failed(std::io::Error::other(error)),
        })?;
        let total = response.body().content_length();
        within_limit(url, total.unwrap_or(0), self.limit)?;
        let given_up = |_| MediaError::Cancelled;
        sender.send(Ok(Part::Total(total))).map_err(given_up)?;
        let mut body = response.body_mut().as_reader();
        let mut done = 0;
        loop {
            let mut buffer = vec![0; 64 << 10];
            let n = body.read(&mut buffer).map_err(failed)?;
            if n == 0 {
                return Ok(());
            }
            done += n as u64;
            within_limit(url, done, self.limit)?;
            buffer.truncate(n);
            sender.send(Ok(Part::Bytes(buffer))).map_err(given_up)?;
        }
    }
}

fn agent(policy: Option<&RemotePolicy>, deadline: Instant) -> ureq::Agent {
    let left = deadline.saturating_duration_since(Instant::now());
    let builder = ureq::Agent::config_builder()
        .max_redirects(REDIRECTS)
        .timeout_global(Some(left))
        .timeout_resolve(Some(CONNECTING.min(left)))
        .timeout_connect(Some(CONNECTING.min(left)))
        .timeout_recv_response(Some(SILENCE.min(left)))
        .timeout_per_read(Some(SILENCE.min(left)))
        .user_agent(concat!("keye/", env!("CARGO_PKG_VERSION")));
    match policy {
        None => builder.build().into(),
        Some(policy) => {
            let resolver = PolicyResolver { policy: policy.clone(), inner: DefaultResolver::default() };
            ureq::Agent::with_parts(builder.proxy(None).build(), DefaultConnector::new(), resolver)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufRead;
    use std::net::TcpListener;
    use std::time::Duration;

    use super::*;

    /// Answers each request by its path and gives the address.
    fn serve(answer: fn(&str) -> String) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = std::io::BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let request = lines.next().unwrap_or_default();
                while lines.next().is_some_and(|line| !line.is_empty()) {}
                let path = request.split(' ').nth(1).unwrap_or("/");
                let _ = stream.write_all(answer(path).as_bytes());
            }
        });
        format!("http://{address}")
    }

    fn get(url: &str, limit: u64) -> Result<String, MediaError> {
        get_by(url, None, limit)
    }

    fn get_by(url: &str, policy: Option<&RemotePolicy>, limit: u64) -> Result<String, MediaError> {
        let mut file = fetch(url, policy, limit, Instant::now() + Duration::from_secs(5), &mut |_| true)?;
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        Ok(text)
    }

    #[test]
    fn bodies_redirects_and_limits() {
        let server = serve(|path| match path {
            "/ok" => "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello".into(),
            "/endless" => format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}", "x".repeat(500)),
            "/claims" => "HTTP/1.1 200 OK\r\ncontent-length: 999999\r\nconnection: close\r\n\r\nx".into(),
            "/loop" => "HTTP/1.1 302 Found\r\nlocation: /loop\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".into(),
            "/there" => "HTTP/1.1 302 Found\r\nlocation: /ok\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".into(),
            "/file" => {
                "HTTP/1.1 302 Found\r\nlocation: file:///etc/passwd\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                    .into()
            }
            _ => "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".into(),
        });
        assert_eq!(get(&format!("{server}/ok"), 100).unwrap(), "hello");
        assert_eq!(get(&format!("{server}/there"), 100).unwrap(), "hello");
        for path in ["/endless", "/claims"] {
            assert!(
                matches!(get(&format!("{server}{path}"), 100), Err(MediaError::Limit { limit: 100, .. })),
                "{path}"
            );
        }
        for path in ["/loop", "/file", "/missing"] {
            assert!(matches!(get(&format!("{server}{path}"), 100), Err(MediaError::Read { .. })), "{path}");
        }
        let cancelled =
            fetch(&format!("{server}/ok"), None, 100, Instant::now() + Duration::from_secs(5), &mut |_| false);
        assert!(matches!(cancelled, Err(MediaError::Cancelled)));
    }

    #[test]
    fn a_refused_connection_says_just_that() {
        // Closed again, so that nobody listens there.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = get(&format!("http://{address}/"), 100).unwrap_err().to_string();
        assert!(error.starts_with(&format!("http://{address}/: cannot read: Connection refused")), "{error}");
    }

    #[test]
    fn a_server_that_says_nothing_can_be_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let begin = Instant::now();
        let mut looks = 0;
        let result = fetch(&url, None, 100, begin + Duration::from_secs(600), &mut |_| {
            looks += 1;
            looks < 3
        });
        assert!(matches!(result, Err(MediaError::Cancelled)));
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    }

    /// Says that there is a body, and never sends it.
    fn stalled() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let mut open = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n");
                open.push(stream);
            }
        });
        url
    }

    #[test]
    fn a_fetch_that_was_given_up_leaves_its_slot() {
        static FEW: Slots = Slots { used: AtomicUsize::new(0), most: 3 };
        let get = |url: &str, progress: &mut dyn FnMut(Progress) -> bool| {
            let agent = agent(None, Instant::now() + Duration::from_secs(600));
            fetch_in(&FEW, url, agent, 100, progress)
        };
        let stalled = stalled();
        let begin = Instant::now();
        let waiting = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..FEW.most {
                scope.spawn(|| {
                    let mut told = false;
                    let result = get(&stalled, &mut |progress| {
                        if !told && matches!(progress, Progress::Fetching { total: Some(_), .. }) {
                            told = true;
                            waiting.fetch_add(1, Ordering::Relaxed);
                        }
                        waiting.load(Ordering::Relaxed) <= FEW.most
                    });
                    assert!(matches!(result, Err(MediaError::Cancelled)), "{result:?}");
                });
            }
            while waiting.load(Ordering::Relaxed) < FEW.most && begin.elapsed() < Duration::from_secs(20) {
                std::thread::sleep(Duration::from_millis(5));
            }
            let error = get(&stalled, &mut |_| true).unwrap_err();
            waiting.fetch_add(FEW.most, Ordering::Relaxed);
            assert!(matches!(error, MediaError::Busy { .. }) && error.to_string().contains("3 sources"), "{error}");
        });
        let server = serve(|_| "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello".into());
        loop {
            match get(&server, &mut |_| true) {
                Err(MediaError::Busy { .. }) if begin.elapsed() < Duration::from_secs(30) => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                result => break assert!(result.is_ok(), "{result:?}"),
            }
        }
    }

    /// The folder belongs to a process, so one of its own looks.
    #[test]
    fn a_missing_folder_for_temporary_files_is_not_the_sources_fault() {
        const MISSING: &str = "/nonexistent/keye";
        if std::env::temp_dir() == std::path::Path::new(MISSING) {
            let server = serve(|_| "HTTP/1.1 200 OK\r\ncontent-length: 1\r\nconnection: close\r\n\r\nx".into());
            let error = get(&server, 100).unwrap_err();
            assert!(matches!(error, MediaError::Temporary { .. }) && error.to_string().contains(MISSING), "{error}");
            return;
        }
        let name = "remote::tests::a_missing_folder_for_temporary_files_is_not_the_sources_fault";
        let mut again = std::process::Command::new(std::env::current_exe().unwrap());
        let again = again.args([name, "--exact"]).env("TMPDIR", MISSING).output().unwrap();
        let said = String::from_utf8_lossy(&again.stdout);
        assert!(again.status.success() && said.contains("1 passed"), "{said}");
    }

    #[test]
    fn a_policy_holds_for_the_first_host_and_for_every_redirect() {
        let inner = serve(|_| "HTTP/1.1 200 OK\r\ncontent-length: 6\r\nconnection: close\r\n\r\nsecret".into());
        let open = RemotePolicy::default();
        let port = |server: &str| server.rsplit_once(':').unwrap().1.parse::<u16>().unwrap();
        let denied = |got: Result<String, MediaError>| matches!(got, Err(MediaError::Denied { .. }));
        assert!(denied(get_by(&inner, Some(&open), 100)));
        assert!(denied(get_by(&format!("http://localhost:{}/", port(&inner)), Some(&open), 100)));
        assert!(denied(get_by(&format!("http://[::ffff:127.0.0.1]:{}/", port(&inner)), Some(&open), 100)));
        let named = RemotePolicy { hosts: vec![("127.0.0.1".into(), port(&inner))], ..RemotePolicy::default() };
        assert_eq!(get_by(&inner, Some(&named), 100).unwrap(), "secret");

        // The redirecting server is named, where it leads is not.
        static TARGET: std::sync::OnceLock<String> = std::sync::OnceLock::new();
        TARGET.get_or_init(|| inner.clone());
        let outer = serve(|_| {
            let target = TARGET.get().map_or("", String::as_str);
            format!("HTTP/1.1 302 Found\r\nlocation: {target}/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        });
        let named = RemotePolicy { hosts: vec![("127.0.0.1".into(), port(&outer))], ..RemotePolicy::default() };
        assert!(denied(get_by(&outer, Some(&named), 100)));
        assert_eq!(get(&outer, 100).unwrap(), "secret", "without a policy");
    }
}
