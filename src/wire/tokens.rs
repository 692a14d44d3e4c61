//! Tokens in requests.

use serde::{Deserialize, Serialize, Serializer};

use super::loose::Whole;
use crate::error::{Error, Result};
use crate::request::NamedToken;

/// A token by its text or its number.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected a token, its text or its number")]
pub(super) enum TokenName {
    Text(String),
    Id(Whole),
}

/// The tokens that a field names.
pub(super) fn named_tokens(field: &'static str, names: &[TokenName]) -> Result<Vec<NamedToken>> {
    let token = |(position, name): (usize, &TokenName)| match name {
        TokenName::Text(text) => Ok(NamedToken::Text(text.clone())),
        TokenName::Id(token) => Ok(NamedToken::Id(in_range(field, position, *token)?)),
    };
    names.iter().enumerate().map(token).collect()
}

/// The tokens of a field, by number.
pub(super) fn tokens_in_range(field: &'static str, tokens: &[Whole]) -> Result<Vec<u32>> {
    let tokens = tokens.iter().enumerate();
    tokens.map(|(position, &token)| in_range(field, position, token)).collect()
}

fn in_range(field: &'static str, position: usize, Whole(token): Whole) -> Result<u32> {
    u32::try_from(token).map_err(|_| Error::InvalidField {
        field,
        reason: format!("{token} at position {position} is not a token"),
    })
}

impl Serialize for NamedToken {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            NamedToken::Id(token) => serializer.serialize_u32(*token),
            NamedToken::Text(text) => serializer.serialize_str(text),
        }
    }
}
