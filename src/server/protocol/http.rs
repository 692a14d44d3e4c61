//! The protocol over HTTP: `/v2/...`.

use std::sync::Arc;

use axum::extract::{Path, State as Shared};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::door::Door;
use super::super::envelope::{Incoming, Json, Reading, Writing};
use super::super::error::{Failure, Outcome};
use super::super::models::Served;
use super::super::operations::blocking;
use super::super::state::State;
use super::infer::{self, Infer};
use super::tensor::{Input, Output};
use super::{Counts, EXTENSIONS, config, counts, metadata};
use crate::json;

/// The length of the JSON before the tensors in binary.
const JSON_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// A failure in the protocol's form.
pub(crate) struct PlainFailure(Failure);

impl From<Failure> for PlainFailure {
    fn from(failure: Failure) -> PlainFailure {
        PlainFailure(failure)
    }
}

impl IntoResponse for PlainFailure {
    fn into_response(self) -> Response {
        self.0.into_plain_response()
    }
}

type Answer = Result<Response, PlainFailure>;
type Call<T> = Result<T, Failure>;

/// `GET /v2`.
pub(crate) async fn server() -> Response {
    Json(json!({
        "name": "sidereal",
        "version": env!("CARGO_PKG_VERSION"),
        "extensions": EXTENSIONS,
    }))
    .into_response()
}

/// `GET /v2/health/live`.
pub(crate) async fn live() -> Response {
    Json(json!({ "live": true })).into_response()
}

/// `GET /v2/health/ready`.
pub(crate) async fn ready(Shared(state): Shared<Arc<State>>) -> Response {
    let is_ready = state.is_ready();
    let status = match is_ready {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, Json(json!({ "ready": is_ready }))).into_response()
}

/// The model that a path names.
#[derive(Deserialize)]
pub(crate) struct Named {
    model: String,
    #[serde(default)]
    version: String,
}

impl Named {
    fn find(&self, state: &State) -> Outcome<Arc<Served>> {
        state.models.find(&self.model, &self.version)
    }
}

/// `GET /v2/models/{model}/ready`.
pub(crate) async fn model_ready(
    Shared(state): Shared<Arc<State>>,
    Path(named): Path<Named>,
) -> Answer {
    let served = named.find(&state)?;
    let is_ready = served.recommender.is_serving() && !state.is_draining();
    let status = match is_ready {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    Ok((status, Json(json!({ "name": served.name, "ready": is_ready }))).into_response())
}

/// `GET /v2/models/{model}`.
pub(crate) async fn model(
    Shared(state): Shared<Arc<State>>,
    Path(named): Path<Named>,
    reading: Call<Reading>,
) -> Answer {
    reading?;
    let served = named.find(&state)?;
    let versions = versions_of(&state, &served.name);
    Ok(Json(metadata(&served, &versions)).into_response())
}

/// The versions of a model that answer.
pub(super) fn versions_of(state: &State, name: &str) -> Vec<String> {
    let served = state.models.all().into_iter().filter(|served| served.name == name);
    served.map(|served| served.version.to_string()).collect()
}

/// `GET /v2/models/{model}/config`.
pub(crate) async fn model_config(
    Shared(state): Shared<Arc<State>>,
    Path(named): Path<Named>,
    reading: Call<Reading>,
) -> Answer {
    reading?;
    Ok(Json(config(&*named.find(&state)?)).into_response())
}

/// `GET /v2/models/{model}/stats`, and of all models `GET /v2/models/stats`.
pub(crate) async fn statistics(
    Shared(state): Shared<Arc<State>>,
    named: Option<Path<Named>>,
    reading: Call<Reading>,
) -> Answer {
    reading?;
    let served = match named {
        Some(Path(named)) => vec![named.find(&state)?],
        None => state.models.all(),
    };
    let entry = |served: &Arc<Served>| {
        let Counts { success, fail, queue, compute_infer, last_ms } = counts(&served.statistics);
        let duration = |(count, ns): (u64, u64)| json!({ "count": count, "ns": ns });
        let nothing = json!({ "count": success.0, "ns": 0 });
        json!({
            "name": served.name,
            "version": served.version.to_string(),
            "last_inference": last_ms,
            "inference_count": success.0,
            "execution_count": success.0,
            "inference_stats": {
                "success": duration(success),
                "fail": duration(fail),
                "queue": duration(queue),
                "compute_input": nothing,
                "compute_infer": duration(compute_infer),
                "compute_output": nothing,
                "cache_hit": { "count": 0, "ns": 0 },
                "cache_miss": { "count": 0, "ns": 0 },
            },
            "batch_stats": [],
        })
    };
    let entries: Vec<Value> = served.iter().map(entry).collect();
    Ok(Json(json!({ "model_stats": entries })).into_response())
}

/// `POST /v2/repository/index`.
pub(crate) async fn index(Shared(state): Shared<Arc<State>>, reading: Call<Reading>) -> Answer {
    let Reading(incoming) = reading?;
    let only_ready = !incoming.body.is_empty() && {
        let body: Value = parse(&incoming.body)?;
        body["ready"] == Value::Bool(true)
    };
    let listed = state.models.index().into_iter();
    let listed = listed.filter(|listed| listed.served.is_some() || !only_ready);
    let entries: Vec<Value> = listed
        .map(|listed| {
            let (state, reason) = listed.state();
            json!({
                "name": listed.name,
                "version": listed.version.to_string(),
                "state": state,
                "reason": reason,
            })
        })
        .collect();
    Ok(Json(entries).into_response())
}

/// `POST /v2/repository/models/{model}/load`.
pub(crate) async fn load(
    Shared(state): Shared<Arc<State>>,
    Path(Named { model, .. }): Path<Named>,
    writing: Call<Writing>,
) -> Answer {
    writing?;
    blocking(move || state.models.load(&model)).await?;
    Ok(Json(json!({})).into_response())
}

/// `POST /v2/repository/models/{model}/unload`.
pub(crate) async fn unload(
    Shared(state): Shared<Arc<State>>,
    Path(Named { model, .. }): Path<Named>,
    writing: Call<Writing>,
) -> Answer {
    writing?;
    blocking(move || state.models.unload(&model)).await?;
    Ok(Json(json!({})).into_response())
}

/// The envelope of an inference; clients add what they like to it.
#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    parameters: Map<String, Value>,
    inputs: Vec<BodyInput>,
    #[serde(default)]
    outputs: Vec<BodyOutput>,
}

#[derive(Deserialize)]
struct BodyInput {
    name: String,
    datatype: String,
    shape: Vec<i64>,
    #[serde(default)]
    parameters: Map<String, Value>,
    #[serde(default)]
    data: Option<Value>,
}

#[derive(Deserialize)]
struct BodyOutput {
    name: String,
    #[serde(default)]
    parameters: Map<String, Value>,
}

fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Outcome<T> {
    json::parse_bytes(bytes).map_err(Failure::malformed)
}

/// `POST /v2/models/{model}/infer`.
pub(crate) async fn infer(
    Shared(state): Shared<Arc<State>>,
    Path(named): Path<Named>,
    reading: Call<Reading>,
) -> Answer {
    let Reading(incoming) = reading?;
    let (head, raw) = split(&incoming)?;
    let body: Body = parse(&head)?;
    let is_binary = |parameters: &Map<String, Value>, name: &str| match parameters.get(name) {
        Some(Value::Bool(is_binary)) => Some(*is_binary),
        _ => None,
    };
    let all_binary = is_binary(&body.parameters, "binary_data_output").unwrap_or(false);
    let binary: Vec<(String, bool)> = body
        .outputs
        .iter()
        .map(|output| {
            let own = is_binary(&output.parameters, "binary_data");
            (output.name.clone(), own.unwrap_or(all_binary))
        })
        .collect();
    let request = Infer {
        model: named.model,
        version: named.version,
        parameters: body.parameters,
        inputs: inputs(body.inputs, raw)?,
        outputs: body.outputs.into_iter().map(|output| output.name).collect(),
        timeout: incoming.timeout,
    };
    let (served, outputs) = infer::infer(&state, Door::Oip, request).await?;
    let is_binary = |output: &Output| {
        let asked = binary.iter().find(|(name, _)| name == output.name);
        asked.map_or(all_binary, |(_, is_binary)| *is_binary)
    };
    Ok(answer(&served, body.id.as_deref(), &outputs, is_binary))
}

/// The JSON of a body and the bytes after it.
fn split(incoming: &Incoming) -> Outcome<(Bytes, Bytes)> {
    let Some(length) = incoming.headers.get(JSON_LENGTH) else {
        return Ok((incoming.body.clone(), Bytes::new()));
    };
    let length: Option<usize> = length.to_str().ok().and_then(|text| text.trim().parse().ok());
    match length {
        Some(length) if length <= incoming.body.len() => {
            Ok((incoming.body.slice(..length), incoming.body.slice(length..)))
        }
        _ => Err(Failure::malformed(format!(
            "{JSON_LENGTH} is no length within the body of {} bytes",
            incoming.body.len()
        ))),
    }
}

/// The inputs; those with a size in binary take their bytes one after another.
fn inputs(inputs: Vec<BodyInput>, mut raw: Bytes) -> Outcome<Vec<Input>> {
    let mut read = Vec::with_capacity(inputs.len());
    for BodyInput { name, datatype, shape, parameters, data } in inputs {
        let input = match (parameters.get("binary_data_size"), data) {
            (Some(size), None) => {
                let size = size.as_u64().and_then(|size| usize::try_from(size).ok());
                let size = size.filter(|&size| size <= raw.len()).ok_or_else(|| {
                    Failure::malformed(format!(
                        "input {name:?}: binary_data_size is not within the {} bytes that are left",
                        raw.len()
                    ))
                })?;
                Input::from_raw(&name, &datatype, &shape, &raw.split_to(size))?
            }
            (None, Some(data)) => Input::from_json(&name, &datatype, &shape, data)?,
            (Some(_), Some(_)) => {
                return Err(Failure::malformed(format!(
                    "input {name:?} has its data twice, as JSON and in binary"
                )));
            }
            (None, None) => {
                return Err(Failure::malformed(format!("input {name:?} has no data")));
            }
        };
        read.push(input);
    }
    match raw.is_empty() {
        true => Ok(read),
        false => Err(Failure::malformed(format!(
            "{} bytes after the JSON belong to no input",
            raw.len()
        ))),
    }
}

fn answer(
    served: &Served,
    id: Option<&str>,
    outputs: &[Output],
    is_binary: impl Fn(&Output) -> bool,
) -> Response {
    let mut raw = BytesMut::new();
    let entries = outputs.iter().map(|output| {
        let mut entry = json!({
            "name": output.name,
            "datatype": output.datatype().name(),
            "shape": output.shape,
        });
        if is_binary(output) {
            let bytes = output.raw();
            entry["parameters"] = json!({ "binary_data_size": bytes.len() });
            raw.extend_from_slice(&bytes);
        } else {
            entry["data"] = output.json();
        }
        entry
    });
    let entries: Vec<Value> = entries.collect();
    let mut head = json!({
        "model_name": served.name,
        "model_version": served.version.to_string(),
        "outputs": entries,
    });
    if let Some(id) = id {
        head["id"] = id.into();
    }
    if raw.is_empty() {
        return Json(head).into_response();
    }
    let head = head.to_string();
    let length = HeaderValue::from(head.len());
    let body = [head.as_bytes(), &raw].concat();
    let content_type = HeaderValue::from_static("application/octet-stream");
    ([(JSON_LENGTH, length), (header::CONTENT_TYPE, content_type)], body).into_response()
}
