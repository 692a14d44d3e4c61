//! Inference: tensors become request lines, answers become tensors.
//!
//! Parameters and inputs of one element are fields of the request line by their own names. A batch
//! is ragged: `history` has the items of all requests one after another, and `history_lengths` how
//! many each has; or it is a matrix `[B, n]` whose empty texts (`history`) stand for nothing; or
//! `request` has a whole request line for each.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};

use super::super::door::Door;
use super::super::error::{Failure, Outcome};
use super::super::models::Served;
use super::super::operations::{self, Answered, Task};
use super::super::state::State;
use super::tensor::{Input, Output, Values};
use super::{Datatype, OUTPUTS};
use crate::error::Error;
use crate::json;
use crate::request::Request;
use crate::wire::RequestLine;

/// Inputs that are lists, one for each request.
const LISTS: [&str; 5] = ["history", "tokens", "exclude", "only", "candidates"];
/// Parameters that hold lists or objects as JSON, where they are texts.
const STRUCTURED: [&str; 4] = ["beams", "messages", "forced", "variables"];
/// Fields whose answers have no tensor.
const WITHOUT_TENSOR: [&str; 2] = ["groups", "read"];
/// Parameters of the protocols and their clients that say nothing to us.
const OF_CLIENTS: [&str; 3] = ["binary_data_output", "binary_data_size", "content_type"];

/// A request of the protocol, however it came.
pub(super) struct Infer {
    pub model: String,
    pub version: String,
    pub parameters: Map<String, Value>,
    pub inputs: Vec<Input>,
    /// Names of the outputs that are wanted; empty for the usual ones.
    pub outputs: Vec<String>,
    /// The time that the envelope gives it.
    pub timeout: Option<Duration>,
}

/// Answers a request: the model that did, and its outputs.
pub(super) async fn infer(
    state: &State,
    door: Door,
    infer: Infer,
) -> Outcome<(Arc<Served>, Vec<Output>)> {
    let served = state.models.find(&infer.model, &infer.version)?;
    let requests = requests(state, &infer).unwrap_or_else(|failure| vec![Err(failure)]);
    let num_requests = requests.len();
    let answers = operations::recommend_all(state, &served, door, requests).await;
    let mut answered = Vec::with_capacity(answers.len());
    for (index, answer) in answers.into_iter().enumerate() {
        answered.push(answer.map_err(|failure| match num_requests {
            1 => failure,
            _ => failure.within(&format!("request {index} of the batch")),
        })?);
    }
    let wants_log_probs = infer.parameters.get("log_probs") == Some(&Value::Bool(true));
    let wants_titles = infer.parameters.get("titles") == Some(&Value::Bool(true));
    let outputs = outputs(&answered, &infer.outputs, wants_titles, wants_log_probs)?;
    Ok((served, outputs))
}

fn requests(state: &State, infer: &Infer) -> Outcome<Vec<Outcome<Request>>> {
    for name in &infer.outputs {
        if !OUTPUTS.iter().any(|output| output.name == name) {
            let known: Vec<&str> = OUTPUTS.iter().map(|output| output.name).collect();
            return Err(Failure::malformed(format!(
                "there is no output {}; there are {}",
                super::super::error::quoted(name),
                known.join(", ")
            )));
        }
    }
    let (fields, timeout) = fields(&infer.parameters)?;
    let timeout = timeout.into_iter().chain(infer.timeout).min();
    let mut lines = lines(state, &infer.inputs)?;
    for line in &mut lines {
        for (field, value) in &fields {
            if line.insert(field.clone(), value.clone()).is_some() {
                return Err(Failure::malformed(format!(
                    "{field:?} is given twice, as a parameter and as an input"
                )));
            }
        }
        if infer.outputs.iter().any(|output| output == "titles") {
            line.insert("titles".into(), true.into());
        }
        if infer.outputs.iter().any(|output| output == "log_probs") {
            line.insert("log_probs".into(), true.into());
        }
        if let Some(field) = WITHOUT_TENSOR.iter().find(|field| line.contains_key(**field)) {
            return Err(Failure::malformed(format!(
                "{field:?} has no tensor for its answer; send the request to /v1/recommend"
            )));
        }
    }
    let request = |line| {
        let line = RequestLine::from_fields(line)?;
        operations::request_of(state, &line, Task::Recommend, timeout)
    };
    Ok(lines.into_iter().map(request).collect())
}

/// The parameters that are fields of a request line, and the time that they give.
fn fields(parameters: &Map<String, Value>) -> Outcome<(Map<String, Value>, Option<Duration>)> {
    let mut fields = Map::new();
    let mut timeout = None;
    for (name, value) in parameters {
        match &**name {
            "timeout" => {
                let us = value.as_u64().or_else(|| value.as_str()?.parse().ok());
                let us = us
                    .ok_or_else(|| Failure::malformed("timeout is not a number of microseconds"))?;
                // Triton's clients write 0 for none.
                timeout = (us > 0).then(|| Duration::from_micros(us));
            }
            "priority" if value.is_number() => {
                // Triton's: 0 is the default, 1 the highest.
                let priority = match value.as_u64() {
                    Some(1) => "high",
                    Some(0 | 2) => "normal",
                    _ => "low",
                };
                fields.insert(name.clone(), priority.into());
            }
            name if name.starts_with("triton_") || name.starts_with("sequence_") => {}
            name if OF_CLIENTS.contains(&name) => {}
            name if STRUCTURED.contains(&name) => {
                let parsed = value.as_str().map(json::parse::<Value>);
                let value = match parsed {
                    Some(Ok(parsed)) => parsed,
                    Some(Err(error)) => return Err(Failure::malformed(format!("{name}: {error}"))),
                    None => value.clone(),
                };
                fields.insert(name.into(), value);
            }
            name => {
                fields.insert(name.into(), value.clone());
            }
        }
    }
    Ok((fields, timeout))
}

/// The inputs as the fields of one request line for each request.
fn lines(state: &State, inputs: &[Input]) -> Outcome<Vec<Map<String, Value>>> {
    let find = |name: &str| inputs.iter().find(|input| input.name == name);
    if let Some(twice) = inputs
        .iter()
        .enumerate()
        .find(|(index, input)| inputs[..*index].iter().any(|other| other.name == input.name))
    {
        return Err(Failure::malformed(format!("input {:?} is given twice", twice.1.name)));
    }
    let num_requests = num_requests(inputs)?;
    let (len, max) = (num_requests, state.limits.batch);
    if len > max {
        return Err(Error::LimitExceeded { what: "requests", len, max }.into());
    }
    let mut lines = match find("request") {
        Some(requests) => requests.values.iter().map(object).collect::<Outcome<Vec<_>>>()?,
        None => vec![Map::new(); num_requests],
    };
    for input in inputs {
        let name = &*input.name;
        if name == "request" || name.ends_with("_lengths") {
            continue;
        }
        let values: Vec<Value> = match LISTS.contains(&name) {
            true => {
                let lengths = find(&format!("{name}_lengths"));
                rows(input, lengths, num_requests)?.into_iter().map(Value::Array).collect()
            }
            false if input.values.len() == num_requests => input.values.clone(),
            false if input.values.len() == 1 => vec![input.values[0].clone(); num_requests],
            false => {
                return Err(Failure::malformed(format!(
                    "input {name:?} has {} values for {num_requests} requests",
                    input.values.len()
                )));
            }
        };
        for (line, value) in lines.iter_mut().zip(values) {
            if line.insert(name.into(), value).is_some() {
                return Err(Failure::malformed(format!("{name:?} is given twice")));
            }
        }
    }
    Ok(lines)
}

fn object(line: &Value) -> Outcome<Map<String, Value>> {
    let text = line.as_str().unwrap_or_default();
    json::parse(text).map_err(|reason| Failure::malformed(format!("input \"request\": {reason}")))
}

/// How many requests the inputs make.
fn num_requests(inputs: &[Input]) -> Outcome<usize> {
    let mut counts = inputs.iter().filter_map(|input| {
        let is_list = LISTS.contains(&&*input.name);
        let name = &*input.name;
        match name.ends_with("_lengths") || matches!(name, "request" | "text") {
            true => Some(input.values.len()),
            false if is_list && input.shape.len() >= 2 => Some(input.shape[0]),
            false => None,
        }
    });
    let Some(first) = counts.next() else { return Ok(1) };
    match counts.find(|&other| other != first) {
        Some(other) => Err(Failure::malformed(format!(
            "the inputs are of {first} requests and of {other}; give each as many rows"
        ))),
        None => Ok(first),
    }
}

/// The rows of a list input, one for each request.
fn rows(input: &Input, lengths: Option<&Input>, num_requests: usize) -> Outcome<Vec<Vec<Value>>> {
    let name = &input.name;
    let Some(lengths) = lengths else {
        if num_requests == 0 {
            return Ok(Vec::new());
        }
        if input.shape.len() < 2 && num_requests > 1 {
            // One list, for all of them.
            return Ok(vec![input.values.clone(); num_requests]);
        }
        let row_len = input.values.len() / num_requests;
        let is_padding =
            |value: &&Value| input.datatype != Datatype::Bytes || value.as_str() != Some("");
        let row = |row: usize| {
            let row = &input.values[row * row_len..(row + 1) * row_len];
            row.iter().filter(is_padding).cloned().collect()
        };
        return Ok((0..num_requests).map(row).collect());
    };
    let mut rest = &input.values[..];
    let mut rows = Vec::with_capacity(num_requests);
    for length in &lengths.values {
        let length = length.as_u64().and_then(|length| usize::try_from(length).ok());
        let split = length.and_then(|length| rest.split_at_checked(length));
        let (row, after) = split.ok_or_else(|| {
            Failure::malformed(format!("{name}_lengths do not add up to the {name} given"))
        })?;
        rows.push(row.to_vec());
        rest = after;
    }
    match rest.is_empty() {
        true => Ok(rows),
        false => Err(Failure::malformed(format!(
            "{name}_lengths leave {} values of {name} over",
            rest.len()
        ))),
    }
}

/// The outputs, rows of all answers as long as the longest: what is behind `counts` is padding,
/// empty texts, codes of -1 and the lowest score.
fn outputs(
    answered: &[Answered],
    wanted: &[String],
    wants_titles: bool,
    wants_log_probs: bool,
) -> Outcome<Vec<Output>> {
    let answers = || answered.iter().map(|answered| &answered.answer);
    let num_rows = answered.len();
    let row_len = answers().map(|answer| answer.items.len()).max().unwrap_or(0);
    let num_levels = answers().map(|answer| answer.snapshot.num_levels()).max().unwrap_or(0);
    let mut items = vec![String::new(); num_rows * row_len];
    let mut titles = items.clone();
    let mut sids = vec![-1; num_rows * row_len * num_levels];
    let mut scores = vec![f32::MIN; num_rows * row_len];
    let mut log_probs = vec![0.0; num_rows * row_len * num_levels];
    for (row, answer) in answers().enumerate() {
        for (rank, found) in answer.items.iter().enumerate() {
            let at = row * row_len + rank;
            items[at].clone_from(&found.item);
            titles[at] = found.title.clone().unwrap_or_default();
            scores[at] = found.score;
            for (level, &code) in found.sid.codes().iter().enumerate() {
                sids[at * num_levels + level] = i32::from(code);
            }
            // Of more tokens than codes, those of the codes come last.
            let skipped = found.log_probs.len().saturating_sub(num_levels);
            for (level, token) in found.log_probs[skipped..].iter().enumerate() {
                log_probs[at * num_levels + level] = token.vocabulary;
            }
        }
    }
    let counts = answers().map(|answer| answer.items.len() as i32).collect();
    let snapshot = answers().map(|answer| answer.snapshot.number()).max().unwrap_or(0);
    let all = [
        (vec![num_rows, row_len], Values::Text(items)),
        (vec![num_rows, row_len, num_levels], Values::Int32(sids)),
        (vec![num_rows, row_len], Values::Fp32(scores)),
        (vec![num_rows], Values::Int32(counts)),
        (vec![1], Values::Uint64(vec![snapshot])),
        (vec![num_rows, row_len], Values::Text(titles)),
        (vec![num_rows, row_len, num_levels], Values::Fp32(log_probs)),
    ];
    let outputs = OUTPUTS.iter().zip(all).map(|(described, (shape, values))| Output {
        name: described.name,
        shape,
        values,
    });
    let is_wanted = |output: &Output| match (wanted.is_empty(), output.name) {
        (true, "titles") => wants_titles,
        (true, "log_probs") => wants_log_probs,
        (true, _) => true,
        (false, name) => wanted.iter().any(|wanted| wanted == name),
    };
    Ok(outputs.filter(is_wanted).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn input(name: &str, datatype: &str, shape: &[i64], data: Value) -> Input {
        Input::from_json(name, datatype, shape, data).expect("a tensor")
    }

    #[test]
    fn a_batch_is_ragged_or_a_matrix() {
        let history = input("history", "BYTES", &[3], json!(["a", "b", "c"]));
        let lengths = input("history_lengths", "INT64", &[2], json!([1, 2]));
        let inputs = [history, lengths];
        assert_eq!(num_requests(&inputs).expect("two"), 2);
        let ragged = rows(&inputs[0], Some(&inputs[1]), 2).expect("two rows");
        assert_eq!(ragged, [vec![json!("a")], vec![json!("b"), json!("c")]]);
        let matrix = input("history", "BYTES", &[2, 2], json!([["a", ""], ["b", "c"]]));
        assert_eq!(rows(&matrix, None, 2).expect("two rows"), ragged);
        let one = input("history", "BYTES", &[2], json!(["a", "b"]));
        assert_eq!(rows(&one, None, 1).expect("a row"), [vec![json!("a"), json!("b")]]);
        for lengths in [json!([1, 1]), json!([2, 2]), json!([-1, 4]), json!(["x", 3])] {
            let lengths = input("history_lengths", "INT64", &[2], lengths);
            assert!(rows(&inputs[0], Some(&lengths), 2).is_err());
        }
    }

    #[test]
    fn parameters_are_fields_but_for_those_of_the_protocol() {
        let parameters = json!({
            "timeout": 2500, "priority": 1, "triton_enable_empty_final_response": true,
            "sequence_id": 7, "binary_data_output": true, "beams": "[4, 8]", "filter": "tag:a",
        });
        let Value::Object(parameters) = parameters else { unreachable!("it is an object") };
        let (fields, timeout) = fields(&parameters).expect("sound parameters");
        assert_eq!(timeout, Some(Duration::from_micros(2500)));
        let expected = json!({ "priority": "high", "beams": [4, 8], "filter": "tag:a" });
        assert_eq!(Value::Object(fields), expected);
    }
}
