//! Places for requests and room for their bodies: what does not fit is told to come again.

use std::future::poll_fn;
use std::ops::Deref;
use std::pin::pin;
use std::sync::Arc;

use axum::extract::Request;
use axum::http::{StatusCode, header};
use futures_core::Stream;
use tokio::sync::OwnedSemaphorePermit;

use crate::app::App;
use crate::error::ApiError;

/// What a request holds until its answer is over.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    streams: Vec<OwnedSemaphorePermit>,
    body: Option<Arc<OwnedSemaphorePermit>>,
}

/// A body that arrived. Its room is given back when both it and the lease are gone: it may outlive a client that went away.
pub(crate) struct Body {
    bytes: Vec<u8>,
    _room: Arc<OwnedSemaphorePermit>,
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Bytes of a body for which there is one permit.
pub(crate) const UNIT: usize = 1024;

impl Lease {
    /// Takes places for `n` choices more.
    pub fn take_streams(&mut self, app: &App, n: usize) -> Result<(), ApiError> {
        if app.stopping() {
            return Err(ApiError::stopping());
        }
        let most = app.config.max_streams;
        let full = || ApiError::busy(format!("{most} answers are being generated, no more are taken; try again later"));
        let permits = u32::try_from(n).map_err(|_| full())?;
        self.streams.push(Arc::clone(&app.streams).try_acquire_many_owned(permits).map_err(|_| full())?);
        Ok(())
    }

    /// Reads a json body within the limits of size, time and memory.
    pub async fn read_body(&mut self, app: &App, request: Request) -> Result<Body, ApiError> {
        let (parts, body) = request.into_parts();
        let text = |name| parts.headers.get(name).map(|value| value.to_str().unwrap_or_default());
        // Pages of other origins can post text, forms and bytes without a type without being asked for consent, json not.
        let kind = text(header::CONTENT_TYPE).unwrap_or_default();
        let essence = kind.split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            let found = if essence.is_empty() { "none" } else { essence };
            let message = format!("expected content-type application/json, found {found:.60}");
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let coding = text(header::CONTENT_ENCODING).unwrap_or_default().trim();
        if !coding.is_empty() && !coding.eq_ignore_ascii_case("identity") {
            let message =
                format!("content-encoding {coding:.60} is not supported; send the body as it is, uncompressed");
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let most = app.config.body_bytes;
        let too_large = || {
            let message = format!("the body is larger than the {most} bytes that this server takes");
            ApiError { code: Some("body_too_large"), ..ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message) }
        };
        let claimed = text(header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
        if claimed.is_some_and(|length| length > most as u64) {
            return Err(too_large());
        }
        let mut room = Arc::clone(&app.bodies).try_acquire_many_owned(0).map_err(|_| ApiError::stopping())?;
        let mut bytes = Vec::with_capacity(claimed.map_or(0, |length| length.min(1 << 20) as usize));
        let mut stream = pin!(body.into_data_stream());
        let read = async {
            while let Some(part) = poll_fn(|context| stream.as_mut().poll_next(context)).await {
                let part = part.map_err(|_| ApiError::invalid("body", "the body ended too early"))?;
                let length = bytes.len() + part.len();
                if length > most {
                    return Err(too_large());
                }
                // Room is taken for what is there, not for what is claimed and may never come.
                let more = length.div_ceil(UNIT) - bytes.len().div_ceil(UNIT);
                let more = Arc::clone(&app.bodies).try_acquire_many_owned(more as u32);
                let full = |_| ApiError::busy("too many bytes of requests are being held; try again later");
                room.merge(more.map_err(full)?);
                bytes.extend_from_slice(&part);
            }
            Ok(())
        };
        let in_time = tokio::time::timeout(app.config.body_timeout, read).await;
        in_time.map_err(|_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body took too long to arrive"))??;
        let room = Arc::new(room);
        self.body = Some(Arc::clone(&room));
        Ok(Body { bytes, _room: room })
    }
}
