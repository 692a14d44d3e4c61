//! What the doors do: one place for all protocols.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::door::{Call, Door};
use super::error::{Failure, Outcome};
use super::models::{Served, ServedCatalog};
use super::state::State;
use crate::answer::{Answer, Timings};
use crate::catalog::{Catalog, Change, Watermark};
use crate::error::{Error, Result};
use crate::request::{Input, Request};
use crate::service::Handle;
use crate::wire::RequestLine;
use crate::writer::{Applied, Replaced};

/// An answer with its times; the answer itself has none.
pub(super) struct Answered {
    pub answer: Answer,
    pub timings: Timings,
}

/// What a call does with the items that it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// Searches, or scores candidates where the request has some.
    Recommend,
    /// Scores candidates, best first.
    Rank,
    /// Scores candidates, token by token.
    Score,
}

/// Makes a request of its line, for a task; `within` is the time that came beside it.
pub(super) fn request_of(
    state: &State,
    line: &RequestLine,
    task: Task,
    within: Option<Duration>,
) -> Outcome<Request> {
    let mut request = line.to_request(&state.defaults)?;
    limit_time(&mut request, within);
    if task != Task::Recommend && request.candidates.is_empty() {
        let reason = "name the items to score, [\"9\", \"12\", ...]".into();
        return Err(Error::InvalidField { field: "candidates", reason }.into());
    }
    request.log_probs |= task == Task::Score;
    Ok(request)
}

/// The least of a request's own deadline and one that came beside it.
fn limit_time(request: &mut Request, within: Option<Duration>) {
    request.deadline = match (request.deadline, within) {
        (Some(own), Some(other)) => Some(own.min(other)),
        (own, other) => own.or(other),
    };
}

/// Answers a request, or counts why there is none. Dropped, the request is cancelled.
pub(super) async fn recommend(
    state: &State,
    served: &Arc<Served>,
    door: Door,
    request: Outcome<Request>,
) -> Outcome<Answered> {
    let mut answers = recommend_all(state, served, door, vec![request]).await;
    answers.pop().expect("one for each request")
}

/// Answers requests side by side, those aside that are errors already. Dropped, all are cancelled.
pub(super) async fn recommend_all(
    state: &State,
    served: &Arc<Served>,
    door: Door,
    requests: Vec<Outcome<Request>>,
) -> Vec<Outcome<Answered>> {
    let mut calls = Vec::with_capacity(requests.len());
    let mut sound = Vec::with_capacity(requests.len());
    for request in requests {
        let call = state.metrics.begin(door);
        let refused = match request {
            Ok(mut request) => {
                request.timings = true;
                sound.push(request);
                None
            }
            Err(failure) => Some(failure),
        };
        calls.push((call, refused));
    }
    let mut handles = submit(served, sound).await.into_iter();
    let mut answers = Vec::with_capacity(calls.len());
    for (call, refused) in calls {
        let answer = match refused {
            Some(failure) => Err(failure),
            None => match handles.next().expect("one for each sound request") {
                Ok(handle) => handle.await.map_err(Failure::from),
                Err(error) => Err(error.into()),
            },
        };
        answers.push(finish(served, call, answer));
    }
    answers
}

/// Hands requests over. What takes time in proportion to a catalog or a text is done on a thread
/// that may wait.
async fn submit(served: &Arc<Served>, requests: Vec<Request>) -> Vec<Result<Handle>> {
    if requests.iter().all(is_quick) {
        return served.recommender.submit_all(requests);
    }
    let num_requests = requests.len();
    let recommender = served.recommender.clone();
    let task = tokio::task::spawn_blocking(move || recommender.submit_all(requests));
    task.await.unwrap_or_else(|error| {
        let failed = || Error::EngineFailed { reason: format!("a request's check: {error}") };
        (0..num_requests).map(|_| Err(failed())).collect()
    })
}

/// Whether a request is checked in microseconds.
fn is_quick(request: &Request) -> bool {
    const FEW: usize = 4096;
    let is_short = match &request.input {
        Input::History(items) => items.len() <= FEW,
        Input::Tokens(tokens) => tokens.len() <= FEW * 16,
        Input::Text(_) | Input::Messages(_) => false,
    };
    let Request { filter, groups, only, candidates, exclude, .. } = request;
    is_short
        && filter.is_none()
        && groups.is_empty()
        && only.is_none()
        && candidates.len() <= FEW
        && exclude.len() <= FEW
}

fn finish(served: &Served, call: Call<'_>, answer: Outcome<Answer>) -> Outcome<Answered> {
    match answer {
        Ok(mut answer) => {
            let timings = answer.timings.take().unwrap_or_default();
            served.statistics.answered(&timings);
            call.end(None);
            Ok(Answered { answer, timings })
        }
        Err(failure) => {
            served.statistics.failed(call.elapsed_us());
            call.end(Some(&failure));
            Err(failure)
        }
    }
}

/// Applies changes, with the watermark of their feed where they come from one. Waits for the log, and
/// for a compaction where many changes came during it: call it from a thread that may wait.
pub(super) fn apply(
    state: &State,
    catalog: &ServedCatalog,
    watermark: Option<&Watermark>,
    changes: &[Change],
) -> Result<Applied> {
    let writer = catalog.writer.as_ref().ok_or_else(read_only)?;
    let applied = match watermark {
        Some(watermark) => writer.apply_from(watermark, changes)?,
        None => Applied { snapshot: writer.apply(changes)?, is_repeated: false },
    };
    if !applied.is_repeated {
        state.metrics.changes.fetch_add(changes.len() as u64, Relaxed);
    }
    Ok(applied)
}

/// Puts a new full catalog in the place of the one that is searched; changes after its watermarks
/// are kept. Waits for the end.
pub(super) fn replace_base(catalog: &ServedCatalog, path: &std::path::Path) -> Result<Replaced> {
    let writer = catalog.writer.as_ref().ok_or_else(read_only)?;
    let base = Catalog::open(path)?;
    writer.replace_base(&base)
}

fn read_only() -> Error {
    Error::Unsupported {
        what: "a change of a catalog that is served for reading alone".into(),
        way_out: "start the server without --read-only".into(),
    }
}

/// Runs what may wait, away from the threads that serve connections.
pub(super) async fn blocking<T: Send + 'static, E: From<Error> + Send + 'static>(
    work: impl FnOnce() -> std::result::Result<T, E> + Send + 'static,
) -> std::result::Result<T, E> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(Error::EngineFailed { reason: format!("a call broke off: {error}") }.into())
    })
}
