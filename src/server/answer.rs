//! Answers as the JSON doors send them.

use serde::Serialize;
use serde_json::Value;

use super::error::{Failure, FailureBody};
use super::models::Served;
use super::operations::Answered;
use crate::answer::{Answer, Timings};

/// An answer: the request's `id` where it has one, what the library's answer holds, and what only a
/// server knows.
#[derive(Serialize)]
pub(super) struct AnswerBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
    #[serde(flatten)]
    answer: &'a Answer,
    /// The scores of the candidates in the request's order; null for those that are unknown or not
    /// available.
    #[serde(skip_serializing_if = "Option::is_none")]
    scores: Option<Vec<Option<f32>>>,
    model: &'a str,
    model_version: u64,
    weights_version: u64,
    /// Names of the history that the catalog does not have and that were left out; the first 16.
    skipped: &'a [String],
    /// Items of the history that were cut because the model reads fewer.
    skipped_items: usize,
    timings: TimingsBody,
}

#[derive(Serialize)]
struct TimingsBody {
    /// From submission to admission.
    queue_us: u64,
    /// From admission to the answer.
    engine_us: u64,
    total_us: u64,
    prefill_us: u64,
    levels_us: Vec<u64>,
}

impl From<&Timings> for TimingsBody {
    fn from(timings: &Timings) -> TimingsBody {
        let Timings { queued_us, prefill_us, levels_us, total_us } = timings;
        TimingsBody {
            queue_us: *queued_us,
            engine_us: total_us.saturating_sub(*queued_us),
            total_us: *total_us,
            prefill_us: *prefill_us,
            levels_us: levels_us.clone(),
        }
    }
}

impl<'a> AnswerBody<'a> {
    pub fn new(served: &'a Served, id: Option<&'a Value>, answered: &'a Answered) -> Self {
        let Answered { answer, timings } = answered;
        AnswerBody {
            id,
            answer,
            scores: None,
            model: &served.name,
            model_version: served.version,
            weights_version: answer.weights_version,
            skipped: &answer.unknown_items.history.names,
            skipped_items: answer.skipped_items,
            timings: timings.into(),
        }
    }

    /// With the scores of the candidates in their own order.
    pub fn with_scores_of(mut self, candidates: &[String]) -> Self {
        let by_name: std::collections::HashMap<&str, f32> =
            self.answer.items.iter().map(|found| (&*found.item, found.score)).collect();
        let scores = candidates.iter().map(|name| by_name.get(&**name).copied());
        self.scores = Some(scores.collect());
        self
    }
}

/// The error of one request of a batch.
#[derive(Serialize)]
pub(super) struct ErrorEntry<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
    error: &'a FailureBody,
}

impl<'a> ErrorEntry<'a> {
    pub fn new(id: Option<&'a Value>, failure: &'a Failure) -> Self {
        ErrorEntry { id, error: &failure.body }
    }
}
