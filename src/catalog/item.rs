//! One item of a catalog.

use serde::Serialize;

use super::order::ItemWeight;
use super::sid::Sid;
use crate::error::{Error, Result};

/// One item.
///
/// As JSON: `{"item": "17", "sid": [3, 250, 7], "title": "...", "tags": ["garden"], "available": true,
/// "weight": 2.5}`; a code may be a text that ends in a number, as `"<a_3>"`, and all but `item` may
/// be left out. An item without `sid` gets two codes made of its name: it is for models that write
/// phrases, and the other items must have none either. It has a title, be it empty. Other fields
/// are an error, as they may be one of these with a slip in its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Item {
    /// Its name in histories, exclusions and answers; unique in the catalog.
    #[serde(rename = "item")]
    pub name: String,
    /// Its semantic ID; several items may share one.
    pub sid: Sid,
    /// A title for people to read; may be empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub title: String,
    /// Tags that filters name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Whether the item may be recommended. An unavailable item may still stand in histories.
    pub available: bool,
    /// Its place among the items that share its semantic ID: larger comes first; equal weights go by
    /// name.
    #[serde(skip_serializing_if = "ItemWeight::is_default")]
    pub weight: ItemWeight,
}

impl Item {
    /// The fields of an item in files: names of JSON and columns of Parquet.
    pub const FIELDS: [&str; 7] =
        ["item", "item_id", "sid", "title", "tags", "available", "weight"];

    /// An available item without title, tags and weight.
    pub fn new(name: impl Into<String>, sid: Sid) -> Item {
        Item {
            name: name.into(),
            sid,
            title: String::new(),
            tags: Vec::new(),
            available: true,
            weight: ItemWeight::default(),
        }
    }

    /// Checks that the item can be in a catalog whose semantic IDs have `num_levels` codes.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for an empty name or another number of levels.
    pub(super) fn check(&self, num_levels: usize) -> Result<()> {
        if self.name.is_empty() {
            return Err(Error::InvalidField { field: "item", reason: "the name is empty".into() });
        }
        if self.sid.num_levels() != num_levels {
            let reason = format!(
                "item {:?} has {} levels, the catalog's items have {num_levels}",
                self.name,
                self.sid.num_levels()
            );
            return Err(Error::InvalidField { field: "sid", reason });
        }
        Ok(())
    }
}
