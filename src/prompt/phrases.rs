//! What a model writes for an item in the place of a semantic ID: a phrase, and its end.

use serde::Deserialize;
use serde_json::{Value, json};

use super::text::{Template, Text};
use super::tokens::TokensEntry;
use crate::error::{Error, Result};
use crate::search::PhraseRule;

/// Tokens of a phrase at most.
const MAX_PHRASE_LEN: usize = 512;

/// How items become phrases.
#[derive(Debug, Clone, PartialEq)]
pub struct PhraseLayout {
    source: Source,
    /// The token that ends each phrase.
    pub end: u32,
    /// How they are searched where a request does not say.
    pub rule: PhraseRule,
    text: Text,
}

#[derive(Debug, Clone, PartialEq)]
enum Source {
    Titles,
    Names,
    Template(Template),
}

/// Phrases as `sidereal.json` writes them: `"titles"`, `"items"`, or an object.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "Value")]
pub struct PhrasesEntry {
    of: Of,
    end: TokensEntry,
    rule: PhraseRule,
}

#[derive(Debug, Clone)]
enum Of {
    Titles,
    Names,
    Template(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PhrasesObject {
    of: Option<String>,
    text: Option<String>,
    #[serde(default)]
    end: TokensEntry,
    #[serde(default)]
    rule: PhraseRule,
}

impl TryFrom<Value> for PhrasesEntry {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<PhrasesEntry, String> {
        let object = match value {
            Value::String(of) => PhrasesObject {
                of: Some(of),
                text: None,
                end: TokensEntry::default(),
                rule: PhraseRule::default(),
            },
            other => serde_json::from_value(other).map_err(|error| format!("phrases: {error}"))?,
        };
        let of = match (object.of.as_deref(), object.text) {
            (Some("titles"), None) => Of::Titles,
            (Some("items"), None) => Of::Names,
            (None, Some(text)) => Of::Template(text),
            (Some(of), None) => {
                return Err(format!("phrases: of {of:?}; \"titles\" and \"items\" are possible"));
            }
            _ => return Err("phrases: give either \"of\" or \"text\"".into()),
        };
        if let Some(fault) = object.rule.fault() {
            return Err(format!("phrases: {fault}"));
        }
        Ok(PhrasesEntry { of, end: object.end, rule: object.rule })
    }
}

impl PhraseLayout {
    /// Phrases as a file writes them; `text` is the model folder's, and `ends` are the tokens that its
    /// configuration names as ends.
    ///
    /// # Errors
    /// What is wrong with them, as [`Error::InvalidOption`]; those of texts.
    pub fn read(entry: PhrasesEntry, text: Text, ends: &[u32]) -> Result<PhraseLayout> {
        let invalid = |reason: String| Error::InvalidOption { option: "phrases", reason };
        let end = match entry.end.is_empty() {
            true => ends.to_vec(),
            false => entry.end.resolve(&text)?,
        };
        let [end] = end[..] else {
            return Err(invalid(format!(
                "a phrase has one token as its end, and these are given: {end:?}; name it by \"end\""
            )));
        };
        let source = match entry.of {
            Of::Titles => Source::Titles,
            Of::Names => Source::Names,
            Of::Template(source) => Source::Template(Template::prompt(&source).map_err(invalid)?),
        };
        Ok(PhraseLayout { source, end, rule: entry.rule, text })
    }

    /// What phrases are: `titles`, `items`, or `text` where a template makes them.
    pub fn of(&self) -> &'static str {
        match self.source {
            Source::Titles => "titles",
            Source::Names => "items",
            Source::Template(_) => "text",
        }
    }

    /// The tokens of an item's phrase without the end; `None` for an item that has no text, and for
    /// a phrase that no search could write: longer than 512 tokens, with the end inside, or with a
    /// token outside the vocabulary.
    ///
    /// # Errors
    /// Those of the tokenizer and the template.
    pub fn tokens(
        &self,
        name: &str,
        title: Option<&str>,
        vocab_size: usize,
    ) -> Result<Option<Vec<u32>>> {
        let title = title.unwrap_or_default();
        let rendered;
        let text = match &self.source {
            Source::Titles => title,
            Source::Names => name,
            Source::Template(template) => {
                let variables = json!({"item": name, "title": title});
                rendered = template.render(&variables).map_err(|reason| Error::InvalidOption {
                    option: "phrases",
                    reason: format!("item {name:?}: {reason}"),
                })?;
                &rendered
            }
        };
        if text.is_empty() {
            return Ok(None);
        }
        let tokens = self.text.encode(text)?;
        let can_be = (1..=MAX_PHRASE_LEN).contains(&tokens.len())
            && tokens.iter().all(|&token| token != self.end && (token as usize) < vocab_size);
        Ok(can_be.then(|| tokens.to_vec()))
    }
}
