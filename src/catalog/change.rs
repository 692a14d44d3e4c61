//! What can happen to an item while its catalog is served.

use serde::Serialize;

use super::item::Item;
use super::order::ItemWeight;

/// A change of one item while the catalog is served.
///
/// As JSON, one of `{"put": {"item": "17", "sid": [3, 250, 7], ...}}`,
/// `{"delete": {"item": "17"}}`, `{"availability": {"item": "17", "available": false}}`,
/// `{"tag": {"item": "17", "add": ["new"], "remove": []}}` and
/// `{"weight": {"item": "17", "weight": 2.5}}`.
///
/// A change says what the item is afterwards. Repeated, it changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// A new item, or a new state of a known one, every field included.
    Put(Item),
    /// Deletes the item: a history that names it afterwards is an error.
    Delete {
        /// The item's name.
        item: String,
    },
    /// Makes the item available or unavailable; histories may name it either way.
    Availability {
        /// The item's name.
        item: String,
        /// Whether it may be recommended.
        available: bool,
    },
    /// Other tags.
    Tag {
        /// The item's name.
        item: String,
        /// Tags to add.
        add: Vec<String>,
        /// Tags to remove.
        remove: Vec<String>,
    },
    /// Another place among the items that share the item's semantic ID.
    Weight {
        /// The item's name.
        item: String,
        /// The larger, the earlier.
        weight: ItemWeight,
    },
}
