//! What comes back.

use std::sync::Arc;

use serde::Serialize;

use crate::backend::LogProb;
use crate::catalog::Snapshot;
use crate::catalog::sid::Sid;

/// One item of an answer.
///
/// It carries the item's name, not its number: numbers belong to one snapshot of the catalog, and
/// name other items in the next.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Recommendation {
    /// The item's name.
    pub item: String,
    /// Its semantic ID.
    pub sid: Sid,
    /// Natural log of the probability of the semantic ID (and of the forced tokens that count).
    pub score: f32,
    /// Of each code (and each forced token that counts), where the request asks for them.
    pub log_probs: Vec<LogProb>,
    /// Its title, where the request asks for titles and the catalog has one.
    pub title: Option<String>,
    /// The thought that it follows, an index of [`Answer::thoughts`], where there are several: of
    /// those whose searches found the item, the one that gave it the best score.
    pub branch: Option<usize>,
    /// The scores that a network which scores candidates gives it, one a task; `score` is the first.
    pub tasks: Vec<TaskScore>,
}

/// A score that a network gives an item for one task.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskScore {
    /// The task's name, as in the training.
    pub task: Arc<str>,
    /// A probability or a value.
    pub score: f32,
}

impl Recommendation {
    /// An item by its number in a snapshot, without log-probabilities.
    pub(crate) fn new(snapshot: &Snapshot, item: u32, score: f32, has_title: bool) -> Self {
        let title = if has_title { snapshot.title(item).map(str::to_string) } else { None };
        Recommendation {
            item: snapshot.name(item).to_string(),
            sid: snapshot.sid(item),
            score,
            log_probs: Vec::new(),
            title,
            branch: None,
            tasks: Vec::new(),
        }
    }
}

/// A beam of a search, with all that it wrote.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Sequence {
    /// The tokens behind the input and the thought: those that were forced, those of the search.
    pub tokens: Vec<u32>,
    /// The text of the tokens, where the model folder has a tokenizer.
    pub text: Option<String>,
    /// Natural log of its probability, as of an item.
    pub score: f32,
    /// The log-probabilities of the tokens that count, in order, where the request asks for them.
    pub log_probs: Vec<LogProb>,
    /// The items that it names and that may come back; often one, and none where it names none.
    pub items: Vec<String>,
}

/// The recommendations of one of a request's [`groups`](crate::Request::groups).
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Group {
    /// The group's filter.
    pub filter: String,
    /// Best first.
    pub items: Vec<Recommendation>,
}

/// The log-probability of one of a request's [`read`](crate::Request::read) tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ReadToken {
    /// The token.
    pub token: u32,
    /// Its text, where the request named it so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Natural log of its probability over the whole vocabulary.
    pub log_prob: f32,
}

/// What a model wrote before it recommended.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Thought {
    /// Without the stop token.
    pub tokens: Vec<u32>,
    /// The text of the tokens, up to a stop text, where the model folder has a tokenizer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Whether the model ended it; otherwise it had as many tokens as it may have.
    pub is_complete: bool,
}

/// How long the phases of a request took, in microseconds of wall-clock time. Requests share
/// steps, so that a phase holds the work for others as well.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Timings {
    /// From submission to admission.
    pub queued_us: u64,
    /// From admission to the end of the step that read the last of the prompt.
    pub prefill_us: u64,
    /// Each step of the search, from the end of the step before.
    pub levels_us: Vec<u64>,
    /// From submission to the answer.
    pub total_us: u64,
}

/// Names that an answer lists of each field, at most.
const MAX_NAMES: usize = 16;
/// Bytes of a name in an answer or an error, at most.
const MAX_NAME_BYTES: usize = 128;

/// Names of one field of a request that the catalog does not have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct UnknownNames {
    /// How many there are, repetitions included.
    pub count: usize,
    /// The first 16 in the request's order; of a name over 128 bytes its beginning and an ellipsis.
    pub names: Vec<String>,
}

impl UnknownNames {
    pub(crate) fn push(&mut self, name: &str) {
        self.count += 1;
        if self.names.len() < MAX_NAMES {
            self.names.push(shortened(name));
        }
    }

    fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// A name as answers and errors show it, however long it is.
pub(crate) fn shortened(name: &str) -> String {
    if name.len() <= MAX_NAME_BYTES {
        return name.to_string();
    }
    let end = (0..=MAX_NAME_BYTES).rev().find(|&at| name.is_char_boundary(at));
    format!("{}…", &name[..end.unwrap_or(0)])
}

/// The names in a request that the catalog does not have and that were left out, field by field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct UnknownByField {
    /// Of the history, after it was cut to the model's `max_items`.
    #[serde(skip_serializing_if = "UnknownNames::is_empty")]
    pub history: UnknownNames,
    /// Of the candidates.
    #[serde(skip_serializing_if = "UnknownNames::is_empty")]
    pub candidates: UnknownNames,
    /// Of `only`.
    #[serde(skip_serializing_if = "UnknownNames::is_empty")]
    pub only: UnknownNames,
}

impl UnknownByField {
    /// How many there are in all fields.
    pub fn count(&self) -> usize {
        self.history.count + self.candidates.count + self.only.count
    }
}

/// The answer to one [`Request`](crate::Request).
#[derive(Clone)]
#[non_exhaustive]
pub struct Answer {
    /// Best first; equal scores by smaller semantic ID, then by the catalog's order. Empty where
    /// the request asks for groups, or reads named tokens instead of searching.
    pub items: Vec<Recommendation>,
    /// The recommendations of each of the request's `groups`, in their order.
    pub groups: Vec<Group>,
    /// The log-probabilities of the request's `read` tokens, in their order.
    pub read: Vec<ReadToken>,
    /// The beams of the search, best first, where the request asks for
    /// [`sequences`](crate::Request::sequences).
    pub sequences: Vec<Sequence>,
    /// The thoughts that come before the search, one for each branch, where the request asks the model
    /// to [`think`](crate::Request::think).
    pub thoughts: Vec<Thought>,
    /// The state of the catalog that was searched.
    pub snapshot: Arc<Snapshot>,
    /// Tokens of the request's context, those included that are forced into it.
    pub tokens: usize,
    /// Tokens of the context that the prefix cache had from earlier requests.
    pub cached_tokens: usize,
    /// Items of the history that were left out, the oldest ones, because the model reads fewer
    /// (`max_items` in its `sidereal.json`), or because the request asked to cut a history that is
    /// too long.
    pub skipped_items: usize,
    /// Names in the request that the catalog does not have and that were left out.
    pub unknown_items: UnknownByField,
    /// The weights that answered: 1 as the engine was opened, one more each time that they were
    /// [replaced](crate::Engine::replace_weights).
    pub weights_version: u64,
    /// How long the phases took, where the request asks for it.
    pub timings: Option<Timings>,
}

/// Equal items, groups, read tokens and thoughts of snapshots with equal numbers.
impl PartialEq for Answer {
    fn eq(&self, other: &Answer) -> bool {
        self.items == other.items
            && self.groups == other.groups
            && self.read == other.read
            && self.sequences == other.sequences
            && self.thoughts == other.thoughts
            && self.snapshot.number() == other.snapshot.number()
    }
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Answer")
            .field("items", &self.items)
            .field("groups", &self.groups)
            .field("read", &self.read)
            .field("sequences", &self.sequences)
            .field("thoughts", &self.thoughts)
            .field("snapshot", &self.snapshot.number())
            .finish()
    }
}
