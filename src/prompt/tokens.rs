//! Tokens in `sidereal.json`: numbers, or a text that the model's tokenizer makes tokens of.

use serde::Deserialize;
use serde_json::Value;

use super::text::Text;
use crate::error::Result;

/// Tokens by number, by text, or both in a list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Value")]
pub struct TokensEntry(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Token(u32),
    Text(String),
}

impl TokensEntry {
    /// One token.
    pub(crate) fn token(token: u32) -> TokensEntry {
        TokensEntry(vec![Part::Token(token)])
    }

    /// Whether nothing is given.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The tokens. A text that is an added token is that token; others need the tokenizer. Texts may
    /// name the tokenizer's special tokens, as `{{ eos_token }}`.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub(crate) fn resolve(&self, text: &Text) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        for part in &self.0 {
            match part {
                Part::Token(token) => tokens.push(*token),
                Part::Text(part) => tokens.extend(text.fixed_tokens(part)?),
            }
        }
        Ok(tokens)
    }
}

impl TryFrom<Value> for TokensEntry {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<TokensEntry, String> {
        let wrong = |value: &Value| {
            format!("{value} is neither a token's number nor a text; give a text or a list of both")
        };
        let part = |value: Value| match value {
            Value::String(text) => Ok(Part::Text(text)),
            _ => {
                let token = value.as_u64().and_then(|token| u32::try_from(token).ok());
                token.map(Part::Token).ok_or_else(|| wrong(&value))
            }
        };
        match value {
            Value::Array(parts) => {
                Ok(TokensEntry(parts.into_iter().map(part).collect::<std::result::Result<_, _>>()?))
            }
            Value::String(text) if text.is_empty() => Ok(TokensEntry::default()),
            Value::String(text) => Ok(TokensEntry(vec![Part::Text(text)])),
            other => Err(wrong(&other)),
        }
    }
}
