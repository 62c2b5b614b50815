//! Fetching `http(s)://` sources.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::time::Instant;

use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

use crate::remote_policy::RemotePolicy;
use crate::source::within_limit;
use crate::{MediaError, Progress};

const REDIRECTS: u32 = 3;

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

/// Streams the body into an unlinked temporary file. At most three redirects, `limit` bytes, and all before `deadline`. With a
/// policy, every host on the way has to pass it and proxies of the environment are not used.
pub(crate) fn fetch(
    url: &str,
    policy: Option<&RemotePolicy>,
    limit: u64,
    deadline: Instant,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<File, MediaError> {
    let failed = |source: std::io::Error| MediaError::Read { input: url.to_owned(), source };
    let left = deadline.saturating_duration_since(Instant::now());
    let builder = ureq::Agent::config_builder()
        .max_redirects(REDIRECTS)
        .timeout_global(Some(left))
        .user_agent(concat!("keye/", env!("CARGO_PKG_VERSION")));
    let agent = match policy {
        None => builder.build().into(),
        Some(policy) => {
            let resolver = PolicyResolver { policy: policy.clone(), inner: DefaultResolver::default() };
            ureq::Agent::with_parts(builder.proxy(None).build(), DefaultConnector::new(), resolver)
        }
    };
    let mut response = agent.get(url).call().map_err(|error| match error {
        ureq::Error::Other(other) if other.is::<Refused>() => {
            MediaError::Denied { input: url.to_owned(), reason: other.to_string() }
        }
        error => failed(std::io::Error::other(error)),
    })?;
    let total = response.body().content_length();
    within_limit(url, total.unwrap_or(0), limit)?;
    let mut body = response.body_mut().as_reader();
    let mut file = tempfile::tempfile().map_err(failed)?;
    let mut buffer = vec![0; 64 << 10];
    let mut done = 0;
    loop {
        if !progress(Progress::Fetching { done, total }) {
            return Err(MediaError::Cancelled);
        }
        let n = body.read(&mut buffer).map_err(failed)?;
        if n == 0 {
            break;
        }
        done += n as u64;
        within_limit(url, done, limit)?;
        file.write_all(&buffer[..n]).map_err(failed)?;
    }
    file.rewind().map_err(failed)?;
    Ok(file)
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
