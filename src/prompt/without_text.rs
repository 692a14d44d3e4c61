//! What stands for texts in a build without the feature `text`: every use is refused.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::models::vocabulary::Vocabulary;

/// The texts of a model folder, of which this build reads added tokens alone.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Text(Vocabulary);

impl Text {
    /// The texts of a model folder.
    pub fn of_folder(_folder: &Path, vocabulary: Vocabulary) -> Text {
        Text(vocabulary)
    }

    /// The vocabulary of the folder.
    pub fn vocabulary(&self) -> Vocabulary {
        self.0.clone()
    }

    /// Refuses every text.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn tokens(&self, _text: &str, _special_tokens: bool) -> Result<Arc<[u32]>> {
        Err(unsupported())
    }

    pub(super) fn encode(&self, _text: &str) -> Result<Arc<[u32]>> {
        Err(unsupported())
    }

    pub(super) fn fixed_tokens(&self, text: &str) -> Result<Vec<u32>> {
        let added = self.0.added().unwrap_or_default();
        let added = added.iter().find(|(_, added)| added == text);
        added.map(|&(token, _)| vec![token]).ok_or_else(unsupported)
    }

    /// Refuses all tokens.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn decode(&self, _tokens: &[u32]) -> Result<String> {
        Err(unsupported())
    }

    /// Whether the folder has a tokenizer that this build can use: never.
    pub fn has_tokenizer(&self) -> bool {
        false
    }

    /// Refuses to name special tokens.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn special_tokens(&self) -> Result<&Map<String, Value>> {
        Err(unsupported())
    }

    /// Refuses all messages.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn chat(&self, _messages: &[Value], _variables: &Map<String, Value>) -> Result<String> {
        Err(unsupported())
    }
}

/// A template, which this build cannot compile.
#[derive(Debug, Clone, PartialEq)]
pub enum Template {}

impl Template {
    /// Refuses every template.
    ///
    /// # Errors
    /// Always.
    pub fn prompt(_source: &str) -> std::result::Result<Template, String> {
        Err(unsupported().to_string())
    }

    /// Renders nothing: there is no template.
    pub fn render(
        &self,
        _variables: &impl serde::Serialize,
    ) -> std::result::Result<String, String> {
        match *self {}
    }
}

fn unsupported() -> Error {
    Error::Unsupported {
        what: "text".into(),
        way_out: "build with the feature `text`, or give \"tokens\" and a prompt without text"
            .into(),
    }
}
