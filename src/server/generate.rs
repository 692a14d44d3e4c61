//! SGLang's door: `/generate`, and what its load client and router ask for before they send.
//!
//! The rule for widths, here and in the OpenAI door: the beam width is `beam_width`, or else
//! `best_of`, or else `n`; the number of results is `n`, or else the beam width. Routers that write
//! bodies anew keep `n` alone, and then both are `n`.

use std::sync::Arc;

use axum::extract::State as Shared;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::door::Door;
use super::envelope::{Incoming, Json, Reading, json_or_events};
use super::error::{Failure, Outcome};
use super::models::Served;
use super::operations::{self, Answered, Task};
use super::state::State;
use crate::error::Error;
use crate::json;
use crate::request::Request;
use crate::wire::RequestLine;

/// Widths of one request, from its synonyms.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub(super) struct Widths {
    pub beam_width: Option<u64>,
    pub best_of: Option<u64>,
    pub n: Option<u64>,
}

impl Widths {
    /// Writes `beams` and `top_k` into a request line, as far as they are given.
    pub fn write(self, line: &mut Map<String, Value>) {
        let width = self.beam_width.or(self.best_of).or(self.n);
        if let Some(width) = width {
            line.insert("beams".into(), width.into());
        }
        if let Some(results) = self.n.or(width) {
            line.insert("top_k".into(), results.into());
        }
    }
}

/// The fields that have a meaning here; clients send many others that steer sampling.
#[derive(Deserialize)]
struct GenerateBody {
    #[serde(default)]
    input_ids: Option<Value>,
    #[serde(default)]
    text: Option<Value>,
    #[serde(default)]
    sampling_params: Option<SamplingParameters>,
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    rid: Option<Value>,
    /// Fields of our own request line, such as `filter` and `exclude`.
    #[serde(default)]
    sidereal: Map<String, Value>,
}

/// One set for all inputs, or one for each.
#[derive(Deserialize)]
#[serde(untagged)]
enum SamplingParameters {
    One(Box<Sampling>),
    Each(Vec<Sampling>),
}

#[derive(Clone, Copy, Deserialize)]
struct Sampling {
    #[serde(flatten)]
    widths: Widths,
    #[serde(default)]
    max_new_tokens: Option<u64>,
}

/// `POST /generate`.
pub(super) async fn generate(
    Shared(state): Shared<Arc<State>>,
    Reading(incoming): Reading,
) -> Outcome<Response> {
    let body: GenerateBody = json::parse(incoming.text()?).map_err(Failure::malformed)?;
    let served = state.models.find("", "")?;
    let (inputs, is_batch) = inputs(&state, &body)?;
    let requests = requests(&state, &served, &body, inputs, &incoming)?;
    let answers = operations::recommend_all(&state, &served, Door::Generate, requests).await;
    let mut generated = Vec::with_capacity(answers.len());
    for (index, answer) in answers.into_iter().enumerate() {
        let place = format!("input {index}");
        let answered = answer.map_err(|failure| match is_batch {
            true => failure.within(&place),
            false => failure,
        })?;
        generated.push(output(&served, &answered, body.rid.as_ref(), index));
    }
    let generated = match is_batch {
        true => Value::Array(generated),
        false => generated.pop().expect("one input"),
    };
    Ok(json_or_events(generated, body.stream))
}

/// The inputs as the fields of request lines, and whether they came as a batch.
fn inputs(state: &State, body: &GenerateBody) -> Outcome<(Vec<(&'static str, Value)>, bool)> {
    let nothing = || Failure::malformed("give \"input_ids\" or \"text\"");
    let (field, value, is_batch) = match (&body.input_ids, &body.text) {
        (Some(Value::Array(ids)), None) => {
            let is_batch = ids.first().is_some_and(Value::is_array);
            ("tokens", Value::Array(ids.clone()), is_batch)
        }
        (None, Some(text)) => ("text", text.clone(), text.is_array()),
        _ => return Err(nothing()),
    };
    let inputs = match value {
        Value::Array(values) if is_batch => {
            values.into_iter().map(|value| (field, value)).collect()
        }
        value => vec![(field, value)],
    };
    let (len, max) = (inputs.len(), state.limits.batch);
    match len {
        0 => Err(nothing()),
        len if len > max => Err(Error::LimitExceeded { what: "inputs", len, max }.into()),
        _ => Ok((inputs, is_batch)),
    }
}

fn requests(
    state: &State,
    served: &Served,
    body: &GenerateBody,
    inputs: Vec<(&'static str, Value)>,
    incoming: &Incoming,
) -> Outcome<Vec<Outcome<Request>>> {
    let num_levels = served.catalog.catalog.snapshot().num_levels() as u64;
    let mut requests = Vec::with_capacity(inputs.len());
    for (index, (field, value)) in inputs.into_iter().enumerate() {
        let sampling = match &body.sampling_params {
            None => None,
            Some(SamplingParameters::One(sampling)) => Some(**sampling),
            Some(SamplingParameters::Each(each)) => Some(*each.get(index).ok_or_else(|| {
                Failure::malformed(format!("\"sampling_params\" has none for input {index}"))
            })?),
        };
        let mut line = body.sidereal.clone();
        if let Some(Sampling { widths, max_new_tokens }) = sampling {
            widths.write(&mut line);
            if let Some(most) = max_new_tokens.filter(|&most| most < num_levels) {
                return Err(Failure::malformed(format!(
                    "max_new_tokens is {most}, and an item has {num_levels} codes; leave it out"
                )));
            }
        }
        line.insert(field.into(), value);
        requests.push(request(state, line, incoming));
    }
    Ok(requests)
}

/// A request of the fields of its line.
pub(super) fn request(
    state: &State,
    line: Map<String, Value>,
    incoming: &Incoming,
) -> Outcome<Request> {
    let line = RequestLine::from_fields(line)?;
    operations::request_of(state, &line, Task::Recommend, incoming.timeout)
}

fn output(served: &Served, answered: &Answered, rid: Option<&Value>, index: usize) -> Value {
    let Answered { answer, timings } = answered;
    let beams: Vec<Value> = answer
        .items
        .iter()
        .map(|found| {
            json!({
                "text": found.item,
                "output_ids": served.recommender.tokens_of(&found.sid),
                "sequence_score": found.score,
                "item": found.item,
                "sid": found.sid.codes(),
            })
        })
        .collect();
    let id = match rid {
        Some(Value::Array(ids)) => ids.get(index).cloned().unwrap_or(Value::Null),
        Some(id) => id.clone(),
        None => Value::Null,
    };
    let best = beams.first().cloned().unwrap_or_else(|| json!({ "text": "", "output_ids": [] }));
    json!({
        "text": best["text"],
        "output_ids": best["output_ids"],
        "meta_info": {
            "id": id,
            "prompt_tokens": answer.tokens,
            "cached_tokens": answer.cached_tokens,
            "completion_tokens": best["output_ids"].as_array().map_or(0, Vec::len),
            "finish_reason": { "type": "length", "length": answer.snapshot.num_levels() },
            "e2e_latency": timings.total_us as f64 / 1e6,
            "sequence_score": best["sequence_score"],
            "weight_version": answer.weights_version.to_string(),
            "snapshot": answer.snapshot.number(),
            "beam_results": beams,
        },
    })
}

/// `GET /model_info` and `GET /get_model_info`.
pub(super) async fn model_info(
    Shared(state): Shared<Arc<State>>,
    Reading(_): Reading,
) -> Outcome<Response> {
    let served = state.models.find("", "")?;
    Ok(Json(json!({
        "model_path": served.name,
        "tokenizer_path": served.name,
        "is_generation": true,
        "weight_version": served.version.to_string(),
    }))
    .into_response())
}

/// `GET /server_info` and `GET /get_server_info`.
pub(super) async fn server_info(
    Shared(state): Shared<Arc<State>>,
    Reading(_): Reading,
) -> Outcome<Response> {
    let served = state.models.find("", "")?;
    Ok(Json(json!({
        "model_path": served.name,
        "served_model_name": served.name,
        "version": env!("CARGO_PKG_VERSION"),
        "status": if state.is_ready() { "ready" } else { "draining" },
        "max_total_num_tokens": served.recommender.max_context(),
        "max_req_input_len": served.recommender.max_context(),
        "internal_states": [],
    }))
    .into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_and_results_follow_one_rule() {
        for (given, beams, top_k) in [
            ((None, None, None), None, None),
            ((Some(50), None, Some(10)), Some(50), Some(10)),
            ((Some(50), Some(20), None), Some(50), Some(50)),
            ((None, Some(20), Some(5)), Some(20), Some(5)),
            ((None, None, Some(10)), Some(10), Some(10)),
        ] {
            let mut line = Map::new();
            let (beam_width, best_of, n) = given;
            Widths { beam_width, best_of, n }.write(&mut line);
            let number = |field: &str| line.get(field).and_then(Value::as_u64);
            assert_eq!((number("beams"), number("top_k")), (beams, top_k), "{given:?}");
        }
    }
}
