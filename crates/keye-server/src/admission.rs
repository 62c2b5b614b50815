//! Places for requests and room for their bodies: what does not fit is told to come again.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use tokio::sync::OwnedSemaphorePermit;

use crate::app::App;
use crate::error::ApiError;

/// What a request holds until its answer is over.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    streams: Vec<OwnedSemaphorePermit>,
    body: Option<OwnedSemaphorePermit>,
}

const UNIT: usize = 1024;

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
    pub async fn read_body(&mut self, app: &App, request: Request) -> Result<Bytes, ApiError> {
        let (parts, body) = request.into_parts();
        let text = |name| parts.headers.get(name).map(|value| value.to_str().unwrap_or_default());
        // Pages of other origins can post text and forms without being asked for consent, json not.
        let kind = text(header::CONTENT_TYPE).unwrap_or("application/json");
        let essence = kind.split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case("application/json") {
            let message = format!("expected content-type application/json, found {essence:.60}");
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
        let reserve = claimed.map_or(most, |length| length as usize);
        let units = |bytes: usize| u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX);
        let permit = Arc::clone(&app.bodies).try_acquire_many_owned(units(reserve));
        let mut permit =
            permit.map_err(|_| ApiError::busy("too many bytes of requests are being held; try again later"))?;
        let whole = tokio::time::timeout(app.config.body_timeout, axum::body::to_bytes(body, most)).await;
        let whole =
            whole.map_err(|_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body took too long to arrive"))?;
        let cut_short = || ApiError::invalid("body", "the body ended too early");
        let whole = whole.map_err(|_| if claimed.is_some() { cut_short() } else { too_large() })?;
        drop(permit.split(units(reserve).saturating_sub(units(whole.len())) as usize));
        self.body = Some(permit);
        Ok(whole)
    }
}
