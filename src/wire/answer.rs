//! Answers as JSON.

use serde::ser::{SerializeSeq, SerializeStruct};
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::answer::{Answer, Recommendation, Sequence, TaskScore};
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

/// `groups`, `read`, `sequences` and `thoughts` are there where the request asks for them, `unknown_items` where some were left
/// out; `timings` and `skipped_items` where it asks for timings.
impl Serialize for Answer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut answer = serializer.serialize_struct("Answer", 11)?;
        answer.serialize_field("items", &self.items)?;
        match self.groups.is_empty() {
            true => answer.skip_field("groups")?,
            false => answer.serialize_field("groups", &self.groups)?,
        }
        match self.read.is_empty() {
            true => answer.skip_field("read")?,
            false => answer.serialize_field("read", &self.read)?,
        }
        match self.sequences.is_empty() {
            true => answer.skip_field("sequences")?,
            false => answer.serialize_field("sequences", &self.sequences)?,
        }
        match self.thoughts.is_empty() {
            true => answer.skip_field("thoughts")?,
            false => answer.serialize_field("thoughts", &self.thoughts)?,
        }
        answer.serialize_field("snapshot", &self.snapshot.number())?;
        answer.serialize_field("tokens", &self.tokens)?;
        answer.serialize_field("cached_tokens", &self.cached_tokens)?;
        if self.unknown_items.count() > 0 {
            answer.serialize_field("unknown_items", &self.unknown_items)?;
        }
        if let Some(timings) = &self.timings {
            answer.serialize_field("skipped_items", &self.skipped_items)?;
            answer.serialize_field("timings", timings)?;
        }
        answer.end()
    }
}

impl Serialize for Recommendation {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut item = serializer.serialize_struct("Recommendation", 7)?;
        item.serialize_field("item", &self.item)?;
        item.serialize_field("sid", self.sid.codes())?;
        item.serialize_field("score", &self.score)?;
        if !self.log_probs.is_empty() {
            item.serialize_field("log_probs", &LogProbs(&self.log_probs))?;
        }
        if let Some(title) = &self.title {
            item.serialize_field("title", title)?;
        }
        if let Some(branch) = self.branch {
            item.serialize_field("branch", &branch)?;
        }
        if !self.tasks.is_empty() {
            item.serialize_field("tasks", &Tasks(&self.tasks))?;
        }
        item.end()
    }
}

/// Scores by task: `{"click": 0.25, "seconds": 31.5}`.
struct Tasks<'a>(&'a [TaskScore]);

impl Serialize for Tasks<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|TaskScore { task, score }| (&**task, score)))
    }
}

impl Serialize for Sequence {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut sequence = serializer.serialize_struct("Sequence", 5)?;
        sequence.serialize_field("tokens", &self.tokens)?;
        if let Some(text) = &self.text {
            sequence.serialize_field("text", text)?;
        }
        sequence.serialize_field("score", &self.score)?;
        if !self.log_probs.is_empty() {
            sequence.serialize_field("log_probs", &LogProbs(&self.log_probs))?;
        }
        sequence.serialize_field("items", &self.items)?;
        sequence.end()
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::answer::{Group, ReadToken, Timings, UnknownByField};
    use crate::catalog::sid::Sid;
    use crate::catalog::{CatalogBuilder, Item};

    fn answer() -> Answer {
        let mut builder = CatalogBuilder::default();
        let mut lamp = Item::new("17", Sid::new(&[3, 250]).expect("two codes"));
        lamp.title = "A lamp".into();
        builder.add(lamp).expect("a sound item");
        let snapshot = builder.build().expect("a catalog").snapshot();
        let item = snapshot.find("17").expect("just added");
        Answer {
            items: vec![Recommendation::new(&snapshot, item, -2.31, false)],
            groups: Vec::new(),
            read: Vec::new(),
            sequences: Vec::new(),
            thoughts: Vec::new(),
            snapshot,
            tokens: 7,
            cached_tokens: 5,
            skipped_items: 2,
            unknown_items: UnknownByField::default(),
            weights_version: 1,
            timings: None,
        }
    }

    #[test]
    fn a_plain_answer_is_written_as_it_always_was() {
        let (id, answer) = (Value::from("u1"), answer());
        let line = serde_json::to_string(&AnswerLine::new(&id, &answer)).expect("a JSON form");
        let expected = r#"{"id":"u1","items":[{"item":"17","sid":[3,250],"score":-2.31}],"snapshot":1,"tokens":7,"cached_tokens":5}"#;
        assert_eq!(line, expected);
    }

    #[test]
    fn an_answer_has_groups_titles_log_probabilities_and_timings_where_they_are_asked_for() {
        let mut answer = answer();
        let item = answer.snapshot.find("17").expect("an item of the catalog");
        let mut found = Recommendation::new(&answer.snapshot, item, -0.5, true);
        found.log_probs = vec![LogProb { vocabulary: -0.5, children: -0.25 }; 2];
        answer.items.clear();
        answer.groups = vec![Group { filter: "tag:a".into(), items: vec![found] }];
        answer.read = vec![
            ReadToken { token: 9, text: Some("Yes".into()), log_prob: -1.5 },
            ReadToken { token: 10, text: None, log_prob: -0.5 },
        ];
        let (queued_us, prefill_us, total_us) = (1, 20, 51);
        let levels_us = vec![10, 20];
        answer.timings = Some(Timings { queued_us, prefill_us, levels_us, total_us });
        let expected = json!({
            "items": [],
            "groups": [{"filter": "tag:a", "items": [{
                "item": "17", "sid": [3, 250], "score": -0.5, "title": "A lamp",
                "log_probs": {"vocabulary": [-0.5, -0.5], "children": [-0.25, -0.25]},
            }]}],
            "read": [{"token": 9, "text": "Yes", "log_prob": -1.5}, {"token": 10, "log_prob": -0.5}],
            "snapshot": 1, "tokens": 7, "cached_tokens": 5, "skipped_items": 2,
            "timings": {"queued_us": 1, "prefill_us": 20, "levels_us": [10, 20], "total_us": 51},
        });
        assert_eq!(serde_json::to_value(&answer).expect("a JSON form"), expected);
    }
}
