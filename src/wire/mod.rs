//! The JSON of requests, answers, errors, items and changes: one form for every door.
//!
//! - A [`RequestLine`] reads `{"id": "u1", "history": ["17", "4"], "beams": 50, "top_k": 10}` and
//!   becomes a [`Request`](crate::Request), which serialises in that form again.
//! - An [`Answer`](crate::Answer) serialises as `{"items": [{"item": "9", "sid": [3, 250, 7],
//!   "score": -2.31}], "snapshot": 1, "tokens": 7, "cached_tokens": 0}`; an [`AnswerLine`] puts the
//!   request's `id` before it.
//! - An [`ErrorBody`] is `{"code": "unknown_item", "message": "..."}`, with a `kind` for doors that
//!   say it; an [`ErrorLine`] is the answer to a line that failed.
//! - An [`Item`](crate::catalog::Item) is `{"item": "17", "sid": [3, 250, 7], "title": "...",
//!   "tags": ["garden"], "available": true, "weight": 2.5}`, and a [`Change`](crate::catalog::Change) is one of
//!   `{"put": {...}}`, `{"delete": {...}}`, `{"availability": {...}}`, `{"tag": {...}}` and
//!   `{"weight": {...}}`; a [`ChangeBatch`] holds some that happen together.
//!
//! Scores are written with as many digits as an `f32` needs to be read back to the last bit.

mod answer;
mod change;
mod entries;
mod error;
mod loose;
mod name;
mod request;
mod think;
mod tokens;

pub use answer::AnswerLine;
pub use change::ChangeBatch;
pub use error::{ErrorBody, ErrorLine};
pub use request::{RequestDefaults, RequestLine};
