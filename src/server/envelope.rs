//! What stands around every HTTP call: tokens, bounds, deadlines, the form of bodies.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request as HttpRequest};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use serde_json::Value;

use super::access::Scope;
use super::error::{Failure, Outcome};
use super::state::State;

/// How long the client waits for an answer, in milliseconds.
const TIMEOUT_HEADER: HeaderName = HeaderName::from_static("sidereal-timeout-ms");

/// A call that was let in, with its whole body.
pub(super) struct Incoming {
    pub headers: HeaderMap,
    pub body: Bytes,
    /// The time that its header gives it.
    pub timeout: Option<Duration>,
}

impl Incoming {
    /// The body as text.
    pub fn text(&self) -> Outcome<&str> {
        let text = std::str::from_utf8(&self.body);
        text.map_err(|error| Failure::malformed(format!("the body is not UTF-8: {error}")))
    }
}

/// A call that reads.
pub(super) struct Reading(pub Incoming);

/// A call that changes something.
pub(super) struct Writing(pub Incoming);

impl FromRequest<Arc<State>> for Reading {
    type Rejection = Failure;

    async fn from_request(request: HttpRequest, state: &Arc<State>) -> Outcome<Reading> {
        Ok(Reading(incoming(request, state, Scope::Read).await?))
    }
}

impl FromRequest<Arc<State>> for Writing {
    type Rejection = Failure;

    async fn from_request(request: HttpRequest, state: &Arc<State>) -> Outcome<Writing> {
        Ok(Writing(incoming(request, state, Scope::Write).await?))
    }
}

async fn incoming(request: HttpRequest, state: &State, scope: Scope) -> Outcome<Incoming> {
    let (parts, body) = request.into_parts();
    let headers = parts.headers;
    check_token(state, &headers, scope)?;
    if scope == Scope::Write {
        check_origin(&headers)?;
    }
    if state.is_draining() {
        return Err(Failure::draining());
    }
    let timeout = timeout(&headers)?;
    let body = read_body(state, &headers, body).await?;
    state.metrics.received_bytes.fetch_add(body.len() as u64, Relaxed);
    Ok(Incoming { headers, body, timeout })
}

/// Refuses a call without the token that its scope needs.
pub(super) fn check_token(state: &State, headers: &HeaderMap, scope: Scope) -> Outcome<()> {
    let authorization = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    state.access.check(authorization, scope).inspect_err(|_| {
        state.metrics.refused_tokens.fetch_add(1, Relaxed);
    })
}

/// Refuses changes that a browser sends for the page of another site: where no token is needed, the page
/// would need none either.
fn check_origin(headers: &HeaderMap) -> Outcome<()> {
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let site = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    match site.is_some_and(|(_, site)| Some(site) == host) {
        true => Ok(()),
        false => Err(Failure::new(
            StatusCode::FORBIDDEN,
            "forbidden",
            "changes are not taken from pages of other sites; send them without an Origin header",
        )),
    }
}

fn timeout(headers: &HeaderMap) -> Outcome<Option<Duration>> {
    let Some(value) = headers.get(TIMEOUT_HEADER) else { return Ok(None) };
    let ms: Option<f64> = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    let timeout = ms.and_then(|ms| Duration::try_from_secs_f64(ms / 1e3).ok());
    let malformed =
        || Failure::malformed(format!("{TIMEOUT_HEADER} is not a number of milliseconds"));
    timeout.map(Some).ok_or_else(malformed)
}

async fn read_body(state: &State, headers: &HeaderMap, body: Body) -> Outcome<Bytes> {
    let most = state.limits.body_bytes;
    let too_large = || {
        let message = format!("the body has more than {most} bytes; send it in several calls");
        Failure::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    };
    let encoding = headers.get(header::CONTENT_ENCODING).map(|value| value.as_bytes());
    if encoding.is_some_and(|encoding| !encoding.eq_ignore_ascii_case(b"identity")) {
        return Err(Failure::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_encoding",
            "compressed bodies are not read; send the body as it is",
        ));
    }
    // Before anything is read: a length that is announced need not be waited for.
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let length: Option<u64> = length.and_then(|text| text.parse().ok());
    if length.is_some_and(|length| length > most as u64) {
        return Err(too_large());
    }
    let reading = Limited::new(body, most).collect();
    match tokio::time::timeout(state.limits.body_time, reading).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(Failure::malformed(format!("the body could not be read: {error}"))),
        Err(_) => Err(Failure::new(
            StatusCode::REQUEST_TIMEOUT,
            "body_timeout",
            format!("the body did not come within {:?}", state.limits.body_time),
        )),
    }
}

/// An answer, or the stream of one event that a client asked for: all of it is there at once, and there
/// is nothing to show before the last level of a search.
pub(super) fn json_or_events(value: Value, is_stream: bool) -> Response {
    match is_stream {
        true => {
            let events = format!("data: {value}\n\ndata: [DONE]\n\n");
            ([(header::CONTENT_TYPE, "text/event-stream")], events).into_response()
        }
        false => Json(value).into_response(),
    }
}

/// A body of JSON.
pub(super) struct Json<T>(pub T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self.0).expect("our types have a JSON form");
        ([(header::CONTENT_TYPE, "application/json")], body).into_response()
    }
}
