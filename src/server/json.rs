//! The JSON door: `/v1/...`.

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::{Path, Query, State as Shared};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::answer::{AnswerBody, ErrorEntry};
use super::door::Door;
use super::envelope::{Incoming, Json, Reading, Writing};
use super::error::{Failure, Outcome};
use super::models::Served;
use super::operations::{self, Answered, Task};
use super::state::State;
use crate::error::Error;
use crate::json;
use crate::request::Request;
use crate::wire::{ChangeBatch, RequestLine};

/// Which model a call is for: `?model=NAME&version=2`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Which {
    model: String,
    version: String,
}

impl Which {
    fn find(&self, state: &State) -> Outcome<Arc<Served>> {
        state.models.find(&self.model, &self.version)
    }
}

type Chosen = Result<Query<Which>, axum::extract::rejection::QueryRejection>;

fn which(chosen: Chosen) -> Outcome<Which> {
    let Query(which) = chosen.map_err(|rejection| Failure::malformed(rejection.body_text()))?;
    Ok(which)
}

/// `POST /v1/recommend`.
pub(super) async fn recommend(
    Shared(state): Shared<Arc<State>>,
    chosen: Chosen,
    Reading(incoming): Reading,
) -> Outcome<Response> {
    answer(&state, which(chosen)?, &incoming, Task::Recommend).await
}

/// `POST /v1/rank`.
pub(super) async fn rank(
    Shared(state): Shared<Arc<State>>,
    chosen: Chosen,
    Reading(incoming): Reading,
) -> Outcome<Response> {
    answer(&state, which(chosen)?, &incoming, Task::Rank).await
}

/// `POST /v1/score`.
pub(super) async fn score(
    Shared(state): Shared<Arc<State>>,
    chosen: Chosen,
    Reading(incoming): Reading,
) -> Outcome<Response> {
    answer(&state, which(chosen)?, &incoming, Task::Score).await
}

/// `{"requests": [...]}`; other fields are found by the strict reader of one or the other form.
#[derive(Deserialize)]
struct MaybeBatch {
    #[serde(default)]
    requests: Option<Vec<Box<RawValue>>>,
}

/// A batch and nothing beside it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Batch {
    #[allow(dead_code)] // read by `MaybeBatch` already
    requests: serde::de::IgnoredAny,
}

async fn answer(state: &State, which: Which, incoming: &Incoming, task: Task) -> Outcome<Response> {
    let served = which.find(state)?;
    let text = incoming.text()?;
    let lines = match json::parse::<MaybeBatch>(text) {
        Ok(MaybeBatch { requests: Some(lines) }) => lines,
        // The reader of request lines has the better words for what is wrong.
        Ok(MaybeBatch { requests: None }) | Err(_) => {
            return answer_one(state, &served, text, incoming, task).await;
        }
    };
    json::parse::<Batch>(text).map_err(|reason| {
        Failure::malformed(format!("{reason}; \"requests\" stands alone in a batch"))
    })?;
    let (len, max) = (lines.len(), state.limits.batch);
    if len > max {
        return Err(Error::LimitExceeded { what: "requests", len, max }.into());
    }
    answer_batch(state, &served, &lines, incoming, task).await
}

async fn answer_one(
    state: &State,
    served: &Arc<Served>,
    text: &str,
    incoming: &Incoming,
    task: Task,
) -> Outcome<Response> {
    let (line, request) = read(state, text, incoming, task);
    let answered = operations::recommend(state, served, Door::Json, request).await?;
    Ok(Json(body(served, line.as_ref(), &answered, task)).into_response())
}

/// A request's line, and the request that it makes.
fn read(
    state: &State,
    text: &str,
    incoming: &Incoming,
    task: Task,
) -> (Option<RequestLine>, Outcome<Request>) {
    match RequestLine::parse(text) {
        Ok(line) => {
            let request = operations::request_of(state, &line, task, incoming.timeout);
            (Some(line), request)
        }
        Err(error) => (None, Err(error.into())),
    }
}

fn body<'a>(
    served: &'a Served,
    line: Option<&'a RequestLine>,
    answered: &'a Answered,
    task: Task,
) -> AnswerBody<'a> {
    let body = AnswerBody::new(served, line.and_then(|line| line.id.as_ref()), answered);
    match (task, line.and_then(RequestLine::candidates)) {
        (Task::Score, Some(candidates)) => body.with_scores_of(candidates),
        _ => body,
    }
}

async fn answer_batch(
    state: &State,
    served: &Arc<Served>,
    texts: &[Box<RawValue>],
    incoming: &Incoming,
    task: Task,
) -> Outcome<Response> {
    let read = texts.iter().map(|text| read(state, text.get(), incoming, task));
    let (lines, requests): (Vec<_>, Vec<_>) = read.unzip();
    let answers = operations::recommend_all(state, served, Door::Json, requests).await;
    let entries = answers.iter().zip(&lines).map(|(answer, line)| match answer {
        Ok(answered) => Entry::Answer(body(served, line.as_ref(), answered, task)),
        Err(failure) => {
            let id = line.as_ref().and_then(|line| line.id.as_ref());
            Entry::Error(ErrorEntry::new(id, failure))
        }
    });
    Ok(Json(Answers { answers: entries.collect() }).into_response())
}

/// The answers of a batch, in the order of its requests.
#[derive(Serialize)]
struct Answers<'a> {
    answers: Vec<Entry<'a>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Entry<'a> {
    Answer(AnswerBody<'a>),
    Error(ErrorEntry<'a>),
}

/// `POST /v1/catalog/changes`.
pub(super) async fn change(
    Shared(state): Shared<Arc<State>>,
    chosen: Chosen,
    Writing(incoming): Writing,
) -> Outcome<Response> {
    let served = which(chosen)?.find(&state)?;
    let batch = ChangeBatch::parse(incoming.text()?, state.limits.changes)?;
    let applied = operations::blocking(move || {
        operations::apply(&state, &served.catalog, batch.watermark.as_ref(), &batch.changes)
    })
    .await?;
    let body = json!({ "snapshot": applied.snapshot, "applied": !applied.is_repeated });
    Ok(Json(body).into_response())
}

/// A new full catalog on the server's disk: `{"path": "/data/items.sidereal"}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Base {
    path: PathBuf,
}

/// `POST /v1/catalog/base`.
pub(super) async fn replace_base(
    Shared(state): Shared<Arc<State>>,
    chosen: Chosen,
    Writing(incoming): Writing,
) -> Outcome<Response> {
    let served = which(chosen)?.find(&state)?;
    let base: Base = json::parse(incoming.text()?).map_err(|reason| {
        Failure::malformed(format!("{reason}; name a file on the server, {{\"path\": \"...\"}}"))
    })?;
    let replaced =
        operations::blocking(move || operations::replace_base(&served.catalog, &base.path)).await?;
    Ok(Json(json!({ "snapshot": replaced.snapshot, "kept_batches": replaced.kept_batches }))
        .into_response())
}

/// `GET /v1/catalog`.
pub(super) async fn catalog(
    Shared(state): Shared<Arc<State>>,
    chosen: Chosen,
    Reading(_): Reading,
) -> Outcome<Response> {
    let served = which(chosen)?.find(&state)?;
    let (catalog, snapshot) = (&served.catalog, served.catalog.catalog.snapshot());
    let watermarks: Vec<_> = snapshot.watermarks().iter().collect();
    let lineage = format!("{:016x}", snapshot.base().lineage());
    Ok(Json(json!({
        "model": served.name,
        "path": catalog.path,
        "snapshot": snapshot.number(),
        "lineage": lineage,
        "levels": snapshot.num_levels(),
        "items": snapshot.num_items(),
        "changed_since_compaction": { "put": snapshot.num_put(), "deleted": snapshot.num_deleted() },
        "watermarks": watermarks,
        "read_only": catalog.writer.is_none(),
    }))
    .into_response())
}

/// `GET /v1/catalog/items/{item}`.
pub(super) async fn item(
    Shared(state): Shared<Arc<State>>,
    Path(name): Path<String>,
    chosen: Chosen,
    Reading(_): Reading,
) -> Outcome<Response> {
    let served = which(chosen)?.find(&state)?;
    let snapshot = served.catalog.catalog.snapshot();
    let found = snapshot.find(&name).map(|number| snapshot.item(number));
    let item = found.ok_or_else(|| {
        Failure::not_found(format!("no item is named {}", super::error::quoted(&name)))
    })?;
    Ok(Json(json!({ "snapshot": snapshot.number(), "item": item })).into_response())
}

/// `GET /v1/models`: in OpenAI's form, with what we know beside it.
pub(super) async fn models(
    Shared(state): Shared<Arc<State>>,
    Reading(_): Reading,
) -> Outcome<Response> {
    let created = state.started_at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let models = state.models.index().into_iter().map(|listed| {
        let mut model = json!({
            "id": listed.name,
            "object": "model",
            "created": created.as_secs(),
            "owned_by": "sidereal",
            "version": listed.version,
            "ready": false,
        });
        if let Some(served) = listed.served {
            model["ready"] = served.recommender.is_serving().into();
            model["max_context"] = served.recommender.max_context().into();
            model["computes_on"] = served.recommender.description().into();
            model["catalog"] = served.catalog.path.to_string_lossy().into();
            model["snapshot"] = served.catalog.catalog.snapshot().number().into();
        }
        model
    });
    let models: Vec<Value> = models.collect();
    Ok(Json(json!({ "object": "list", "data": models })).into_response())
}

/// `GET /v1/status`: what the page at `/` shows.
pub(super) async fn status(
    Shared(state): Shared<Arc<State>>,
    Reading(_): Reading,
) -> Outcome<Response> {
    let mut models = Vec::new();
    for served in state.models.all() {
        let status = served.recommender.status()?;
        let metrics = served.recommender.metrics()?;
        models.push(json!({
            "model": served.name,
            "version": served.version,
            "is_serving": served.recommender.is_serving(),
            "queued": status.queued,
            "running": status.engine.running,
            "context_pages": status.engine.context_pages,
            "free_context_pages": status.engine.free_context_pages,
            "cached_context_pages": status.engine.cached_context_pages,
            "weights_version": status.weights_version,
            "steps": status.num_steps,
            "answered": metrics.answered,
            "cancelled": metrics.cancelled,
            "deadline_exceeded": metrics.deadline_exceeded,
            "refused": metrics.refused.iter().map(|(_, count)| count).sum::<u64>(),
            "failed": metrics.failed.iter().map(|(_, count)| count).sum::<u64>(),
            "request_us": {
                "bounds": metrics.request_us.bounds,
                "counts": metrics.request_us.counts,
            },
            "items": served.catalog.catalog.snapshot().num_items(),
            "snapshot": served.catalog.catalog.snapshot().number(),
        }));
    }
    Ok(Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_s": state.started.elapsed().as_secs(),
        "is_draining": state.is_draining(),
        "models": models,
    }))
    .into_response())
}
