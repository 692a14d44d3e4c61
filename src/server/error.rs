//! Errors as the doors send them.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::error::{Error, ErrorKind};

/// Clients that went away are answered with this status, which nobody reads but logs and metrics.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// An error on its way to a client.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub status: StatusCode,
    pub body: FailureBody,
    pub retry_after: Option<Duration>,
}

/// `{"code": "unknown_item", "kind": "caller", "message": "..."}`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct FailureBody {
    pub code: &'static str,
    pub kind: &'static str,
    pub message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

/// A name from outside as messages show it, however long it is.
pub(super) fn quoted(name: &str) -> String {
    format!("{:?}", crate::answer::shortened(name))
}

pub(super) type Outcome<T> = std::result::Result<T, Failure>;

impl Failure {
    /// An error of the envelope around a request: nothing of the engine was asked.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Failure {
        let kind = match status.as_u16() {
            400..=428 => ErrorKind::Caller,
            429 | 503 => ErrorKind::Overloaded,
            _ => ErrorKind::Internal,
        };
        let body =
            FailureBody { code, kind: kind.name(), message: message.into(), retry_after_ms: None };
        Failure { status, body, retry_after: None }
    }

    /// A request that is not of the protocol's form.
    pub fn malformed(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::BAD_REQUEST, "malformed_request", message)
    }

    /// Something that is not there: a model, a version, a route.
    pub fn not_found(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// The error of calls that come while the server ends.
    pub fn draining() -> Failure {
        let message = "the server is shutting down; send the request to another one";
        Failure::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", message)
    }

    /// The error with the place where it happened before its message.
    pub fn within(mut self, place: &str) -> Failure {
        self.body.message = format!("{place}: {}", self.body.message);
        self
    }

    /// A whole number of seconds for the header, at least one.
    pub fn retry_after_seconds(&self) -> Option<u64> {
        self.retry_after.map(|after| after.as_millis().div_ceil(1000).max(1) as u64)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let retry_after = error.retry_after();
        let body = FailureBody {
            code: error.code(),
            kind: error.kind().name(),
            message: error.to_string(),
            retry_after_ms: retry_after.map(|after| after.as_millis() as u64),
        };
        Failure { status: status_of(&error), body, retry_after }
    }
}

fn status_of(error: &Error) -> StatusCode {
    match error {
        Error::Cancelled => {
            StatusCode::from_u16(CLIENT_CLOSED_REQUEST).expect("three digits are a status")
        }
        // Nothing is wrong with the form of these; the model or the catalog cannot serve them.
        Error::UnknownItem { .. }
        | Error::EmptyInput
        | Error::TokenOutOfRange { .. }
        | Error::HistoryTooLong { .. }
        | Error::InvalidChange { .. }
        | Error::LimitExceeded { .. }
        | Error::TooLarge { .. }
        | Error::Unsupported { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        Error::Forked | Error::CalledFromCallback => StatusCode::INTERNAL_SERVER_ERROR,
        Error::Overloaded { .. } | Error::WriterBusy { .. } => StatusCode::TOO_MANY_REQUESTS,
        // With a time to come again, others are what made it late.
        Error::DeadlineExceeded { retry_after_ms: Some(_), .. } => StatusCode::TOO_MANY_REQUESTS,
        Error::DeadlineExceeded { retry_after_ms: None, .. } => StatusCode::REQUEST_TIMEOUT,
        error => match error.kind() {
            ErrorKind::Caller => StatusCode::BAD_REQUEST,
            ErrorKind::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        },
    }
}

/// `{"error": {...}}`.
#[derive(Serialize)]
struct Wrapped<'a> {
    error: &'a FailureBody,
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = serde_json::to_string(&Wrapped { error: &self.body }).expect("a JSON form");
        let mut response =
            (self.status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        self.add_headers(&mut response);
        response
    }
}

impl Failure {
    /// The answer with the message alone as text in `{"error": ...}`, as the Open Inference Protocol
    /// has it; code and kind stand beside it.
    pub fn into_plain_response(self) -> Response {
        let FailureBody { code, kind, message, retry_after_ms } = &self.body;
        let mut body = serde_json::json!({ "error": message, "code": code, "kind": kind });
        if let Some(after) = retry_after_ms {
            body["retry_after_ms"] = (*after).into();
        }
        let mut response =
            (self.status, [(header::CONTENT_TYPE, "application/json")], body.to_string())
                .into_response();
        self.add_headers(&mut response);
        response
    }

    fn add_headers(&self, response: &mut Response) {
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_seconds() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
    }

    /// The gRPC code for it.
    pub fn grpc_code(&self) -> tonic::Code {
        use tonic::Code;
        match self.status.as_u16() {
            401 => Code::Unauthenticated,
            403 => Code::PermissionDenied,
            404 => Code::NotFound,
            408 => Code::DeadlineExceeded,
            429 => Code::ResourceExhausted,
            CLIENT_CLOSED_REQUEST => Code::Cancelled,
            501 => Code::Unimplemented,
            503 => Code::Unavailable,
            500.. => Code::Internal,
            _ => Code::InvalidArgument,
        }
    }
}

impl From<Failure> for tonic::Status {
    fn from(failure: Failure) -> tonic::Status {
        let mut status = tonic::Status::new(failure.grpc_code(), failure.body.message.clone());
        let metadata = status.metadata_mut();
        if let Ok(code) = failure.body.code.parse() {
            metadata.insert("sidereal-code", code);
        }
        if let Some(after) = failure.retry_after {
            // The name that gRPC's own retries read.
            metadata.insert("grpc-retry-pushback-ms", (after.as_millis() as u64).into());
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_error_has_the_status_that_its_sender_needs() {
        let overloaded =
            Error::Overloaded { queued: 9, limit: 9, wait_ms: 1500, retry_after_ms: 1500 };
        let behind = Error::CatalogBehind { snapshot: 1, min_snapshot: 2 };
        let late = |retry_after_ms| Error::DeadlineExceeded { deadline_ms: 5.0, retry_after_ms };
        for (error, status, grpc) in [
            (Error::EmptyInput, 422, tonic::Code::InvalidArgument),
            (Error::TopK { top_k: 0 }, 400, tonic::Code::InvalidArgument),
            (overloaded, 429, tonic::Code::ResourceExhausted),
            (late(Some(3)), 429, tonic::Code::ResourceExhausted),
            (late(None), 408, tonic::Code::DeadlineExceeded),
            (behind, 503, tonic::Code::Unavailable),
            (Error::ShuttingDown, 503, tonic::Code::Unavailable),
            (Error::Cancelled, 499, tonic::Code::Cancelled),
            (Error::EngineFailed { reason: "x".into() }, 500, tonic::Code::Internal),
        ] {
            let failure = Failure::from(error);
            assert_eq!(failure.status.as_u16(), status, "{failure:?}");
            assert_eq!(failure.grpc_code(), grpc, "{failure:?}");
        }
    }

    #[test]
    fn an_overloaded_server_says_when_to_come_again() {
        let error = Error::Overloaded { queued: 9, limit: 9, wait_ms: 1, retry_after_ms: 1500 };
        let response = Failure::from(error).into_response();
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
    }
}
