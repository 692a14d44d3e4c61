//! Items and changes from JSON; their types derive the way there.

use serde::{Deserialize, Deserializer};

use super::name::name;
use crate::catalog::items::{Code, to_sid};
use crate::catalog::{Change, Item, ItemWeight};
use crate::error::{Error, Result};

/// An item before its codes are read. Further fields are allowed and ignored: files of items hold
/// prices and brands as well.
#[derive(Deserialize)]
struct ItemLine {
    #[serde(deserialize_with = "name")]
    #[serde(alias = "item_id")]
    item: String,
    sid: Vec<Code>,
    title: Option<String>,
    #[serde(default)]
    tags: Vec<String>,
    available: Option<bool>,
    weight: Option<ItemWeight>,
}

impl TryFrom<ItemLine> for Item {
    type Error = Error;

    fn try_from(line: ItemLine) -> Result<Item> {
        Ok(Item {
            name: line.item,
            sid: to_sid(&line.sid)?,
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
