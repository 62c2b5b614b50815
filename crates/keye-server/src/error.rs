//! Errors in OpenAI's shape, and the one place that gives every failure its status; whose fault it is, the engine says.

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use keye_engine::{EngineError, Fault};
use keye_media::MediaError;
use keye_processor::ProcessorError;
use serde_json::{Value, json};

/// `{"error": {"message", "type", "param", "code"}}` with a status.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    pub message: String,
    pub param: Option<String>,
    pub code: Option<&'static str>,
    /// Seconds after which to try again.
    pub retry_after: Option<u32>,
}

/// Code of a form of the answer that cannot be.
pub(crate) const INVALID_GRAMMAR: &str = "invalid_grammar";

const RETRY_SECONDS: u32 = 2;

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// A field with a value that cannot be.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// A field that would change the answer and that nothing here reads.
    pub fn unsupported(param: &str) -> Self {
        let message = format!("{param} is not supported by this server, and leaving it out would change the answer");
        Self { code: Some("unsupported_parameter"), ..Self::invalid(param, message) }
    }

    /// A medium that may not be opened.
    pub fn media(message: &str) -> Self {
        Self { code: Some("media_not_allowed"), ..Self::invalid("messages", message) }
    }

    /// No room now.
    pub fn busy(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, message);
        Self { code: Some("rate_limit_exceeded"), retry_after: Some(RETRY_SECONDS), ..error }
    }

    /// Shutting down.
    pub fn stopping() -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down");
        Self { code: Some("shutting_down"), retry_after: Some(RETRY_SECONDS), ..error }
    }

    /// A defect or a broken machine; what it was is for the log.
    pub fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal error; the server's log has more under this request's id",
        )
    }

    pub fn body(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = json_response(self.status, &self.body());
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A json body with its type.
pub(crate) fn json_response(status: StatusCode, value: &Value) -> Response {
    let kind: (HeaderName, &str) = (header::CONTENT_TYPE, "application/json");
    (status, [kind], value.to_string()).into_response()
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match error.fault() {
            Fault::Request | Fault::Media => {}
            Fault::Busy => return Self::busy(error.to_string()),
            // The server cancels on its own only when its time to shut down is over.
            Fault::Cancelled | Fault::Stopped => return Self::stopping(),
            Fault::Machine => return Self::internal(),
        }
        let (param, code) = match &error {
            EngineError::Media(medium) => match &*medium.error {
                MediaError::Denied { .. } => ("messages".into(), Some("media_not_allowed")),
                MediaError::Limit { .. } => ("messages".into(), Some("media_too_large")),
                _ => ("messages".into(), Some("media_unreadable")),
            },
            EngineError::Processor(error) => match &**error {
                ProcessorError::Messages { at, .. } => (format!("messages{at}"), None),
                _ => ("messages".into(), None),
            },
            EngineError::ContextLength { .. } => ("messages".into(), Some("context_length_exceeded")),
            EngineError::Grammar(_) => ("response_format".into(), Some(INVALID_GRAMMAR)),
            error => return Self::new(StatusCode::BAD_REQUEST, error.to_string()),
        };
        Self { code, ..Self::invalid(&param, error.to_string()) }
    }
}

impl From<ProcessorError> for ApiError {
    fn from(error: ProcessorError) -> Self {
        EngineError::from(error).into()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use keye_engine::MediumError;

    use super::*;

    #[test]
    fn statuses() {
        let media = |error| EngineError::from(MediumError { index: 0, of: 1, error: Arc::new(error) });
        let read = |kind: std::io::ErrorKind| media(MediaError::Read { input: "x".into(), source: kind.into() });
        let cases: Vec<(EngineError, u16)> = vec![
            (EngineError::QueueFull(3), 429),
            (EngineError::Stopped, 503),
            (EngineError::Refused("no".into()), 400),
            (EngineError::ContextLength { tokens: 9, max: 8 }, 400),
            (EngineError::Grammar("no".into()), 400),
            (EngineError::Internal("secret".into()), 500),
            (ProcessorError::Template("t".into()).into(), 400),
            (ProcessorError::File { path: "/etc/x".into(), reason: "secret".into() }.into(), 500),
            (media(MediaError::Denied { input: "x".into(), reason: "y".into() }), 400),
            (media(MediaError::Cancelled), 503),
            (read(std::io::ErrorKind::NotFound), 400),
            (read(std::io::ErrorKind::StorageFull), 500),
            (media(MediaError::Ffmpeg("secret".into())), 500),
            (
                media(MediaError::Temporary {
                    folder: "/secret".into(),
                    error: std::io::ErrorKind::StorageFull.into(),
                }),
                500,
            ),
        ];
        for (error, status) in cases {
            let text = error.to_string();
            let error = ApiError::from(error);
            assert_eq!(error.status.as_u16(), status, "{text}");
            if status == 500 {
                assert!(!error.message.contains("secret"), "{text}");
            }
        }
    }
}
