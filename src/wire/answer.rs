//! Answers as JSON.

use serde::ser::{SerializeSeq, SerializeStruct};
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::answer::{Answer, Recommendation};
use crate::backend::LogProb;

/// The answer to one line of requests: the line's `id`, then the [`Answer`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AnswerLine<'a> {
    id: &'a Value,
    #[serde(flatten)]
    answer: &'a Answer,
}

impl<'a> AnswerLine<'a> {
    /// An answer with its line's `id` (`null` where it has none).
    pub fn new(id: &'a Value, answer: &'a Answer) -> AnswerLine<'a> {
        AnswerLine { id, answer }
    }
}

/// `groups` and `read` are there where the request asks for some; `timings` and `skipped_items`
/// where it asks for timings.
impl Serialize for Answer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut answer = serializer.serialize_struct("Answer", 8)?;
        answer.serialize_field("items", &self.items)?;
        match self.groups.is_empty() {
            true => answer.skip_field("groups")?,
            false => answer.serialize_field("groups", &self.groups)?,
        }
        match self.read.is_empty() {
            true => answer.skip_field("read")?,
            false => answer.serialize_field("read", &self.read)?,
        }
        answer.serialize_field("snapshot", &self.snapshot.number())?;
        answer.serialize_field("tokens", &self.tokens)?;
        answer.serialize_field("cached_tokens", &self.cached_tokens)?;
        if let Some(timings) = &self.timings {
            answer.serialize_field("skipped_items", &self.skipped_items)?;
            answer.serialize_field("timings", timings)?;
        }
        answer.end()
    }
}

impl Serialize for Recommendation {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut item = serializer.serialize_struct("Recommendation", 5)?;
        item.serialize_field("item", &self.item)?;
        item.serialize_field("sid", self.sid.codes())?;
        item.serialize_field("score", &self.score)?;
        if !self.log_probs.is_empty() {
            item.serialize_field("log_probs", &LogProbs(&self.log_probs))?;
        }
        if let Some(title) = &self.title {
            item.serialize_field("title", title)?;
        }
        item.end()
    }
}

/// Two lists, token by token: `{"vocabulary": [...], "children": [...]}`.
struct LogProbs<'a>(&'a [LogProb]);

impl Serialize for LogProbs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut lists = serializer.serialize_struct("LogProbs", 2)?;
        lists.serialize_field("vocabulary", &Column(self.0, |token| token.vocabulary))?;
        lists.serialize_field("children", &Column(self.0, |token| token.children))?;
        lists.end()
    }
}

struct Column<'a>(&'a [LogProb], fn(&LogProb) -> f32);

impl Serialize for Column<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        self.0.iter().try_for_each(|token| list.serialize_element(&self.1(token)))?;
        list.end()
    }
}
