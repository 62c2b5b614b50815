//! Requests to the hub. Redirects are followed here and not by `ureq`: the token stays with the endpoint, and what a file is
//! called is the endpoint's word alone.

use std::io::Read;
use std::time::Duration;

use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body};

use super::Hub;

const REDIRECTS: usize = 8;
/// What a listing may be long.
const LISTING_LIMIT: u64 = 16 << 20;
/// What of a redirect's text is read so that its connection can be used again.
const TEXT_LIMIT: u64 = 16 << 10;
/// Longest that a server may ask to be left alone.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Why something could not be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// A status: `at` says whose, if it is not the endpoint's, `wait` how long to wait before the next request.
    #[error("{} answered {code}", at.as_deref().unwrap_or("the endpoint"))]
    Refused { code: u16, at: Option<String>, wait: Duration },
    /// There is no connection, or it ended or fell silent.
    #[error("{0}")]
    Broken(String),
    /// The answer is not one of a hub.
    #[error("{0}")]
    Answer(String),
    /// What came is not the file.
    #[error("{0}")]
    Damaged(String),
    /// Another process holds the lock of the file.
    #[error("{0}")]
    Held(String),
    /// The reason is on this machine.
    #[error("{0}")]
    Here(String),
}

impl Failure {
    /// Whether the same request may go well in a moment.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Refused { code, .. } => matches!(code, 408 | 425 | 429 | 500..=599),
            Self::Broken(_) | Self::Held(_) => true,
            Self::Answer(_) | Self::Damaged(_) | Self::Here(_) => false,
        }
    }

    /// How long the server asks to wait.
    pub(super) fn wait(&self) -> Duration {
        if let Self::Refused { wait, .. } = self { *wait } else { Duration::ZERO }
    }
}

/// A response that is not a redirect, with success.
pub(super) struct Answer {
    pub(super) response: Response<Body>,
    pub(super) about: About,
    /// Who answered, if it was not the endpoint.
    at: Option<String>,
}

/// What the endpoint's own responses say about a file.
#[derive(Debug, Default)]
pub(super) struct About {
    etag: Option<String>,
    linked_etag: Option<String>,
    pub(super) size: Option<u64>,
    pub(super) commit: Option<String>,
}

impl About {
    /// The tag of the file, and not of the text that leads to it.
    pub(super) fn tag(&self) -> Option<&str> {
        self.linked_etag.as_deref().or(self.etag.as_deref())
    }

    fn read(&mut self, headers: &HeaderMap) {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        self.etag = text("etag").or(self.etag.take());
        self.linked_etag = self.linked_etag.take().or_else(|| text("x-linked-etag"));
        self.size = self.size.or_else(|| text("x-linked-size")?.parse().ok());
        self.commit = self.commit.take().or_else(|| text("x-repo-commit"));
    }
}

/// The endpoint of a hub.
pub(super) struct Client<'a> {
    hub: &'a Hub,
    agent: Agent,
}

impl<'a> Client<'a> {
    pub(super) fn new(hub: &'a Hub) -> Self {
        let silence = Some(hub.patience.silence);
        let config = Agent::config_builder()
            .max_redirects(0)
            .http_status_as_error(false)
            .timeout_connect(silence)
            .timeout_recv_response(silence)
            .timeout_per_read(silence)
            .timeout_per_write(silence)
            .user_agent(concat!("keye/", env!("CARGO_PKG_VERSION")));
        Self { hub, agent: config.build().into() }
    }

    /// The answer to `path` of the endpoint, from byte `start` of the file on.
    pub(super) fn get(&self, path: &str, start: u64) -> Result<Answer, Failure> {
        let text = format!("{}{path}", self.hub.endpoint.trim_end_matches('/'));
        let mut url = text.parse::<Uri>().ok().filter(is_web).ok_or_else(|| {
            Failure::Here(format!(
                "HF_ENDPOINT: expected the address of a hub like https://huggingface.co, found {text:?}"
            ))
        })?;
        let endpoint = origin(&url);
        let (mut about, mut at) = (About::default(), None);
        for _ in 0..=REDIRECTS {
            let mut request = self.agent.get(url.clone()).header("accept-encoding", "identity");
            if start > 0 {
                request = request.header("range", format!("bytes={start}-"));
            }
            if let Some(token) = self.hub.token.as_ref().filter(|_| at.is_none()) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let mut response = request.call().map_err(|error| self.broken(error, at.as_deref()))?;
            if at.is_none() {
                about.read(response.headers());
            }
            match response.status().as_u16() {
                200..=299 => return Ok(Answer { response, about, at }),
                301 | 302 | 303 | 307 | 308 => {}
                code => return Err(Failure::Refused { code, at, wait: retry_after(response.headers()) }),
            }
            let next = target(&url, response.headers())?;
            // What has left the endpoint has no part in its secrets any more, wherever it leads.
            if at.is_some() || origin(&next) != endpoint {
                at = Some(origin(&next));
            }
            // A text that cannot be read costs the connection and nothing else.
            let _ = response.body_mut().with_config().limit(TEXT_LIMIT).read_to_vec();
            url = next;
        }
        Err(Failure::Answer(format!("more than {REDIRECTS} redirects, the last of them to {}", origin(&url))))
    }

    /// The JSON at `path`.
    pub(super) fn json<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let mut answer = self.get(path, 0)?;
        let body = answer.response.body_mut().with_config().limit(LISTING_LIMIT).read_to_vec();
        let body = body.map_err(|error| self.broken(error, answer.at.as_deref()))?;
        serde_json::from_slice(&body).map_err(|error| Failure::Answer(format!("expected a listing: {error}")))
    }

    /// What reads more of the body into a buffer, and gives 0 at its end.
    pub(super) fn body(&self, answer: Answer) -> impl FnMut(&mut [u8]) -> Result<usize, Failure> {
        let (mut body, at) = (answer.response.into_body().into_reader(), answer.at);
        move |buffer| body.read(buffer).map_err(|error| self.broken(error.into(), at.as_deref()))
    }

    fn broken(&self, error: ureq::Error, at: Option<&str>) -> Failure {
        let reason = match error {
            ureq::Error::Timeout(_) => format!("nothing came for {:?}", self.hub.patience.silence),
            error => error.to_string(),
        };
        Failure::Broken(match at {
            Some(at) => format!("{at}: {reason}"),
            None => reason,
        })
    }
}

fn retry_after(headers: &HeaderMap) -> Duration {
    let seconds = headers.get("retry-after").and_then(|value| value.to_str().ok()?.trim().parse().ok());
    seconds.map_or(Duration::ZERO, Duration::from_secs).min(LONGEST_WAIT)
}

fn is_web(url: &Uri) -> bool {
    matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some_and(|host| !host.is_empty())
}

/// Scheme, host and port: without paths and queries, which may be signed, nothing of it is secret.
fn origin(url: &Uri) -> String {
    let scheme = url.scheme_str().unwrap_or_default();
    let host = url.host().unwrap_or_default().to_ascii_lowercase();
    match (scheme, url.port_u16()) {
        (_, None) | ("http", Some(80)) | ("https", Some(443)) => format!("{scheme}://{host}"),
        (_, Some(port)) => format!("{scheme}://{host}:{port}"),
    }
}

/// Where a redirect of `from` leads.
fn target(from: &Uri, headers: &HeaderMap) -> Result<Uri, Failure> {
    let bad = |found: &str| Failure::Answer(format!("{} redirects to {found}", origin(from)));
    let location = headers.get("location").ok_or_else(|| bad("nowhere: it names no Location"))?;
    let location = location.to_str().map_err(|_| bad("a Location that is no address"))?;
    let scheme = from.scheme_str().unwrap_or_default();
    let authority = from.authority().map_or("", |authority| authority.as_str());
    let is_absolute = location.split(['/', '?', '#']).next().is_some_and(|start| start.contains(':'));
    let next = if is_absolute {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let dir = from.path().rsplit_once('/').map_or("", |(dir, _)| dir);
        format!("{scheme}://{authority}{dir}/{location}")
    };
    let next: Uri = next.parse().map_err(|_| bad("a Location that is no address"))?;
    if !is_web(&next) {
        return Err(bad("a Location that is neither http nor https"));
    }
    if scheme == "https" && next.scheme_str() != Some("https") {
        return Err(bad(&format!("{}, which is not encrypted", origin(&next))));
    }
    Ok(next)
}

/// A name as one segment of a path.
pub(super) fn segment(name: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    name.bytes().map(|b| if is_plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_where_they_say_and_never_out_of_encryption() {
        let from: Uri = "https://hub.co/org/name/resolve/1/a.json?x=1".parse().unwrap();
        let to = |location: &str| {
            let headers = HeaderMap::from_iter([(ureq::http::header::LOCATION, location.parse().unwrap())]);
            target(&from, &headers).map(|url| url.to_string()).map_err(|e| e.to_string())
        };
        for (location, expected) in [
            ("https://cdn.co/b?q=1", "https://cdn.co/b?q=1"),
            ("HTTPS://cdn.co/b", "https://cdn.co/b"),
            ("//cdn.co:8443/b", "https://cdn.co:8443/b"),
            ("/b?to=http://x", "https://hub.co/b?to=http://x"),
            ("b.json?q=1", "https://hub.co/org/name/resolve/1/b.json?q=1"),
        ] {
            assert_eq!(to(location).as_deref(), Ok(expected), "{location}");
        }
        for location in ["http://hub.co/b?secret", "file:///etc/passwd", "ftp://x/?secret", "https://", "https:b", ""] {
            let found = to(location);
            let is_refused = found.as_ref().is_err_and(|found| found.starts_with("https://hub.co redirects to "));
            assert!(is_refused || location.is_empty(), "{location}: {found:?}");
            assert!(!format!("{found:?}").contains("secret"), "{found:?}");
        }
        assert!(target(&from, &HeaderMap::new()).is_err());
    }

    #[test]
    fn origins_are_compared_without_what_goes_without_saying() {
        let origin = |url: &str| origin(&url.parse().unwrap());
        assert_eq!(origin("https://Hub.co:443/a?b"), origin("https://hub.co"));
        assert_eq!(origin("https://user:word@hub.co/"), "https://hub.co");
        for other in ["http://hub.co", "https://hub.co:444", "https://cdn.hub.co", "https://hub.co.evil"] {
            assert_ne!(origin(other), origin("https://hub.co"));
        }
        assert_eq!(segment("a b?#%2F/ü.json"), "a%20b%3F%23%252F%2F%C3%BC.json");
    }
}
