//! What every request passes: id, origin, key, panics, logs, counts.

use std::any::Any;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use keye_engine::panic_text;

use crate::app::{App, random};
use crate::error::ApiError;
use crate::page;

/// What a request is known by, in its extensions.
#[derive(Debug, Clone)]
pub(crate) struct RequestId {
    /// Also the response's `x-request-id`.
    pub id: String,
    #[cfg(feature = "otel")]
    pub route: String,
    /// The header of that name: a trace that this request is part of.
    #[cfg(feature = "otel")]
    pub traceparent: Option<String>,
}

#[cfg(feature = "otel")]
impl RequestId {
    /// Ids of the trace and of the span that this request belongs to, as W3C's Trace Context has them.
    pub fn trace_parent(&self) -> (Option<&str>, Option<&str>) {
        let hex = |text: &&str, len: usize| {
            text.len() == len
                && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
                && text.bytes().any(|b| b != b'0')
        };
        let mut parts = self.traceparent.as_deref().unwrap_or_default().split('-').skip(1);
        match (parts.next().filter(|trace| hex(trace, 32)), parts.next().filter(|span| hex(span, 16))) {
            (Some(trace), Some(span)) => (Some(trace), Some(span)),
            _ => (None, None),
        }
    }
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Answered without a key, for whatever watches the server.
const OPEN_ROUTES: [&str; 2] = ["/health", "/ready"];
const LONGEST_ID: usize = 128;

pub(crate) async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = request_id(request.headers());
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let origin = allowed_origin(&app, request.headers());
    let known_by = RequestId {
        id: id.clone(),
        #[cfg(feature = "otel")]
        route: route.clone(),
        #[cfg(feature = "otel")]
        traceparent: request.headers().get("traceparent").and_then(|value| value.to_str().ok()).map(str::to_owned),
    };
    request.extensions_mut().insert(known_by);

    let preflight = method == Method::OPTIONS && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if preflight {
        StatusCode::NO_CONTENT.into_response()
    } else if !is_ours(&app, &request) {
        let message = "this name is not the server's: a page of another name could reach it here, since it asks for no key; \
                       call it localhost or by its address, start it with --api-key, or allow the name with --cors-origin";
        ApiError { code: Some("unknown_host"), ..ApiError::new(StatusCode::FORBIDDEN, message) }.into_response()
    } else if !is_open(&route) && !has_key(&app, request.headers()) {
        let message = "the API key is missing or wrong; send it as: Authorization: Bearer KEY";
        let error = ApiError::new(StatusCode::UNAUTHORIZED, message);
        ApiError { code: Some("invalid_api_key"), ..error }.into_response()
    } else {
        caught(next.run(request)).await.unwrap_or_else(|panic| {
            app.metrics.panics.add(1);
            tracing::error!(request_id = id, route, panic = panic_text(&*panic), "panic");
            ApiError::internal().into_response()
        })
    };

    let status = response.status().as_u16();
    app.metrics.responded(&route, status);
    tracing::info!(request_id = id, %method, route, status, ms = start.elapsed().as_millis() as u64, "request");
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert(REQUEST_ID, id);
    }
    if !app.config.cors_origins.is_empty() {
        headers.append(header::VARY, HeaderValue::from_static("origin"));
    }
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("x-request-id, retry-after"));
        if preflight {
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
            // A list, since the star does not cover authorization.
            let allowed = "authorization, content-type, x-request-id, user-agent, x-stainless-arch, x-stainless-lang, \
                           x-stainless-os, x-stainless-package-version, x-stainless-retry-count, x-stainless-runtime, \
                           x-stainless-runtime-version, x-stainless-timeout";
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(allowed));
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
        }
    }
    response
}

fn is_open(route: &str) -> bool {
    OPEN_ROUTES.contains(&route) || page::is_page(route)
}

/// The client's own id when it is short and plain, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let plain = |id: &&str| {
        (1..=LONGEST_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b))
    };
    let own = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(plain);
    own.map_or_else(|| format!("req-{:016x}", random()), str::to_owned)
}

fn allowed_origin(app: &App, headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    let known = |allowed: &String| allowed == "*" || allowed.as_bytes() == origin.as_bytes();
    app.config.cors_origins.iter().any(known).then(|| origin.clone())
}

/// Whether a request calls the server by a name of its own. A page whose name was made to lead to 127.0.0.1 is of the same
/// origin as a server there, so one that asks for no key looks at the name.
fn is_ours(app: &App, request: &Request) -> bool {
    if app.needs_key() || !app.config.host.is_loopback() {
        return true;
    }
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let Some(authority) = host.or(request.uri().authority().map(|authority| authority.as_str())) else { return true };
    let Ok(authority) = authority.parse::<axum::http::uri::Authority>() else { return false };
    let name = authority.host();
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    let origin =
        |allowed: &String| allowed == "*" || allowed.split_once("://").is_some_and(|(_, at)| at == authority.as_str());
    let local = name.eq_ignore_ascii_case("localhost") || name.to_ascii_lowercase().ends_with(".localhost");
    local || address.is_ok() || app.config.cors_origins.iter().any(origin)
}

fn has_key(app: &App, headers: &HeaderMap) -> bool {
    if !app.needs_key() {
        return true;
    }
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match value.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => app.knows_key(key.trim()),
        _ => false,
    }
}

/// Runs a handler; a panic is an error instead of a lost connection. The handler is dropped with what it left half done.
async fn caught(future: impl Future<Output = Response>) -> Result<Response, Box<dyn Any + Send>> {
    let mut future = std::pin::pin!(future);
    poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
        Ok(poll) => poll.map(Ok),
        Err(panic) => Poll::Ready(Err(panic)),
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_clients_are_taken_when_plain() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_str(text).unwrap());
            request_id(&headers)
        };
        assert_eq!(of("abc-1.2:3_x"), "abc-1.2:3_x");
        for odd in ["", "a b", "a\"b", &"x".repeat(200)] {
            assert!(of(odd).starts_with("req-"), "{odd}");
        }
    }

    #[test]
    fn a_panic_is_an_error() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let result = runtime.block_on(caught(async { panic!("boom {}", 1) }));
        assert_eq!(panic_text(&*result.unwrap_err()), "boom 1");
        assert!(runtime.block_on(caught(async { StatusCode::OK.into_response() })).is_ok());
    }
}
