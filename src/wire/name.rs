//! Names of items, which come as text or as numbers.

use serde::{Deserialize, Deserializer};

/// An item's name: a JSON string or whole number.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected an item's name, a text or a whole number")]
pub(super) enum Name {
    Text(String),
    Number(u64),
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        match name {
            Name::Text(text) => text,
            Name::Number(number) => number.to_string(),
        }
    }
}

/// Reads an item's name as text.
pub(super) fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(Name::deserialize(deserializer)?.into())
}
