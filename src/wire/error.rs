//! Errors as JSON.

use serde::Serialize;
use serde_json::Value;

use crate::error::Error;

/// An error: `{"code": "unknown_item", "message": "item \"x\" is not in the catalog; ..."}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ErrorBody {
    code: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
}

impl ErrorBody {
    /// Code and message, as the lines of the command line have them.
    pub fn new(error: &Error) -> ErrorBody {
        let retry_after_ms = error.retry_after().map(|after| after.as_millis() as u64);
        ErrorBody { code: error.code(), kind: None, message: error.to_string(), retry_after_ms }
    }

    /// Code, [kind](crate::ErrorKind) and message, as servers have them.
    pub fn with_kind(error: &Error) -> ErrorBody {
        ErrorBody { kind: Some(error.kind().name()), ..ErrorBody::new(error) }
    }
}

/// The answer to a line of a requests file that failed:
/// `{"id": "u1", "line": 3, "error": {"code": ..., "message": ...}}`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ErrorLine<'a> {
    id: &'a Value,
    line: usize,
    error: ErrorBody,
}

impl<'a> ErrorLine<'a> {
    /// The error of a line, counted from one, with the line's `id` (`null` where it has none).
    pub fn new(id: &'a Value, line: usize, error: &Error) -> ErrorLine<'a> {
        ErrorLine { id, line, error: ErrorBody::new(error) }
    }
}
