//! Items and changes from JSON; their types derive the way there.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::name::name;
use crate::catalog::items::{Code, to_sid};
use crate::catalog::sid::Sid;
use crate::catalog::{Change, Item, ItemWeight, Watermark};
use crate::error::{Error, Result};
use crate::json;

/// An item before its codes are read. Further fields are an error: of `"availble": false` nothing would
/// be left but an item that is recommended and must not be.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ItemLine {
    #[serde(deserialize_with = "name")]
    #[serde(alias = "item_id")]
    item: String,
    sid: Option<Vec<Code>>,
    title: Option<String>,
    #[serde(default)]
    tags: Vec<String>,
    available: Option<bool>,
    weight: Option<ItemWeight>,
}

impl TryFrom<ItemLine> for Item {
    type Error = Error;

    fn try_from(line: ItemLine) -> Result<Item> {
        let sid = match &line.sid {
            Some(codes) => to_sid(codes)?,
            None if line.title.is_none() => {
                let reason = "is missing; an item without codes, for a model that writes phrases, \
                              has a title, be it empty";
                return Err(Error::InvalidField { field: "sid", reason: reason.into() });
            }
            None => Sid::of_name(&line.item),
        };
        Ok(Item {
            name: line.item,
            sid,
            title: line.title.unwrap_or_default(),
            tags: line.tags,
            available: line.available.unwrap_or(true),
            weight: line.weight.unwrap_or_default(),
        })
    }
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Item, D::Error> {
        ItemLine::deserialize(deserializer)?.try_into().map_err(serde::de::Error::custom)
    }
}

/// Changes that happen together, and where they end in their feed:
/// `{"changes": [{"put": {...}}, {"delete": {"item": "9"}}], "watermark": {"source": "items",
/// "partition": 0, "offset": 41}}`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ChangeBatch {
    /// In the order in which they happen.
    pub changes: Vec<Change>,
    /// The end of the batch in its feed, where it comes from one.
    pub watermark: Option<Watermark>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BatchLine {
    changes: Vec<Value>,
    #[serde(default)]
    watermark: Option<Watermark>,
}

impl ChangeBatch {
    /// Reads a batch of at most `max_changes`.
    ///
    /// # Errors
    /// [`Error::MalformedRequest`], [`Error::LimitExceeded`]; [`Error::InvalidChange`] for one of them.
    pub fn parse(text: &str, max_changes: usize) -> Result<ChangeBatch> {
        let batch: BatchLine = json::parse(text).map_err(|reason| {
            let form = "a batch is {\"changes\": [{\"put\": {...}}, ...], \"watermark\": {...}}";
            Error::MalformedRequest { reason: format!("{reason}; {form}") }
        })?;
        let len = batch.changes.len();
        if len > max_changes {
            return Err(Error::LimitExceeded { what: "changes", len, max: max_changes });
        }
        let changes = batch.changes.into_iter().enumerate().map(|(index, change)| {
            json::from_value(change).map_err(|reason| Error::InvalidChange { index, reason })
        });
        Ok(ChangeBatch { changes: changes.collect::<Result<_>>()?, watermark: batch.watermark })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum ChangeLine {
    Put(Item),
    Delete {
        #[serde(deserialize_with = "name")]
        item: String,
    },
    Availability {
        #[serde(deserialize_with = "name")]
        item: String,
        available: bool,
    },
    Tag {
        #[serde(deserialize_with = "name")]
        item: String,
        #[serde(default)]
        add: Vec<String>,
        #[serde(default)]
        remove: Vec<String>,
    },
    Weight {
        #[serde(deserialize_with = "name")]
        item: String,
        weight: ItemWeight,
    },
}

impl<'de> Deserialize<'de> for Change {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Change, D::Error> {
        Ok(match ChangeLine::deserialize(deserializer)? {
            ChangeLine::Put(item) => Change::Put(item),
            ChangeLine::Delete { item } => Change::Delete { item },
            ChangeLine::Availability { item, available } => {
                Change::Availability { item, available }
            }
            ChangeLine::Tag { item, add, remove } => Change::Tag { item, add, remove },
            ChangeLine::Weight { item, weight } => Change::Weight { item, weight },
        })
    }
}
