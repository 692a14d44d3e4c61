//! OpenAI's door: one choice an item, best first.
//!
//! `prompt` is a text, or tokens; `messages` go through the model's chat template. The text of a
//! choice is the item's name; semantic ID and score stand beside it.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State as Shared;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::door::Door;
use super::envelope::{Incoming, Reading, json_or_events};
use super::error::{Failure, Outcome};
use super::generate::{Widths, request};
use super::models::Served;
use super::operations::{self, Answered};
use super::state::State;
use crate::json;

/// The fields that have a meaning here; clients send many others that steer sampling.
#[derive(Deserialize)]
struct CompletionBody {
    #[serde(default)]
    model: String,
    #[serde(default)]
    prompt: Option<Value>,
    #[serde(default)]
    messages: Option<Value>,
    #[serde(flatten)]
    widths: Widths,
    #[serde(default)]
    user: Option<Value>,
    #[serde(default)]
    stream: bool,
    /// Fields of our own request line, such as `filter` and `exclude`.
    #[serde(default)]
    sidereal: Map<String, Value>,
}

/// `POST /v1/completions`.
pub(super) async fn completions(
    Shared(state): Shared<Arc<State>>,
    Reading(incoming): Reading,
) -> Outcome<Response> {
    complete(&state, &incoming, false).await
}

/// `POST /v1/chat/completions`.
pub(super) async fn chat(
    Shared(state): Shared<Arc<State>>,
    Reading(incoming): Reading,
) -> Outcome<Response> {
    complete(&state, &incoming, true).await
}

async fn complete(state: &State, incoming: &Incoming, is_chat: bool) -> Outcome<Response> {
    let body: CompletionBody = json::parse(incoming.text()?).map_err(Failure::malformed)?;
    let served = state.models.find(&body.model, "")?;
    let mut line = body.sidereal;
    body.widths.write(&mut line);
    let (field, input) = match (body.prompt, body.messages, is_chat) {
        (Some(Value::String(text)), None, false) => ("text", Value::String(text)),
        (Some(Value::Array(tokens)), None, false) => ("tokens", one_prompt(tokens)?),
        (None, Some(messages), true) => ("messages", messages),
        (_, _, true) => return Err(Failure::malformed("give \"messages\"")),
        (_, _, false) => {
            return Err(Failure::malformed("give one \"prompt\", a text or a list of tokens"));
        }
    };
    // A list of one text is the same prompt as the text.
    let field = if input.is_string() { "text" } else { field };
    line.insert(field.into(), input);
    if let Some(user) = body.user {
        line.insert("user".into(), user);
    }
    let request = request(state, line, incoming);
    let answered = operations::recommend(state, &served, Door::Completions, request).await?;
    let completion = completion(&served, &answered, is_chat);
    Ok(json_or_events(completion, body.stream))
}

/// The tokens of a prompt, or its only prompt where it is a list of them.
fn one_prompt(mut values: Vec<Value>) -> Outcome<Value> {
    match values.first() {
        Some(Value::Array(_) | Value::String(_)) if values.len() == 1 => {
            Ok(values.pop().expect("there is one"))
        }
        Some(Value::Array(_) | Value::String(_)) => {
            Err(Failure::malformed("send several prompts in several calls"))
        }
        _ => Ok(Value::Array(values)),
    }
}

fn completion(served: &Served, answered: &Answered, is_chat: bool) -> Value {
    let Answered { answer, timings } = answered;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let (kind, prefix) = match is_chat {
        true => ("chat.completion", "chatcmpl"),
        false => ("text_completion", "cmpl"),
    };
    let choices = answer.items.iter().enumerate().map(|(index, found)| {
        let mut choice = json!({
            "index": index,
            "finish_reason": "stop",
            "logprobs": null,
            "item": found.item,
            "sid": found.sid.codes(),
            "score": found.score,
        });
        match is_chat {
            true => choice["message"] = json!({ "role": "assistant", "content": found.item }),
            false => choice["text"] = found.item.clone().into(),
        }
        if let Some(title) = &found.title {
            choice["title"] = title.clone().into();
        }
        choice
    });
    let choices: Vec<Value> = choices.collect();
    let written = answer.items.len() * answer.snapshot.num_levels();
    json!({
        "id": format!("{prefix}-{created:x}"),
        "object": kind,
        "created": (created / 1_000_000_000) as u64,
        "model": served.name,
        "choices": choices,
        "usage": {
            "prompt_tokens": answer.tokens,
            "completion_tokens": written,
            "total_tokens": answer.tokens + written,
            "prompt_tokens_details": { "cached_tokens": answer.cached_tokens },
        },
        "snapshot": answer.snapshot.number(),
        "timings": { "queue_us": timings.queued_us, "total_us": timings.total_us },
    })
}
