//! Items of a request that may come with features of their own.

use serde::de::Error as _;
use serde::ser::SerializeStruct;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::loose::LooseName;

/// Items, each a name or an object that has the name and what else is known:
/// `{"item": "17", "time": 1700000000, "rating": 4}`.
#[derive(Debug, Clone, Default)]
pub(super) struct Entries {
    pub items: Vec<String>,
    /// Empty, or one for each item.
    pub features: Vec<Map<String, Value>>,
}

/// The name in an object, and other names that data sets give it.
const NAMES: [&str; 3] = ["item", "item_id", "id"];

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries, D::Error> {
        let mut entries = Entries::default();
        let mut has_features = false;
        for (at, entry) in Vec::<Value>::deserialize(deserializer)?.into_iter().enumerate() {
            let (name, features) = match entry {
                Value::Object(mut fields) => {
                    let name = NAMES.iter().find_map(|name| fields.remove(*name));
                    let missing = || D::Error::custom(format!("entry {at} has no \"item\""));
                    has_features |= !fields.is_empty();
                    (name.ok_or_else(missing)?, fields)
                }
                name => (name, Map::new()),
            };
            let name = LooseName::deserialize(name)
                .map_err(|error| D::Error::custom(format!("entry {at}: {error}")))?;
            entries.items.push(name.0);
            entries.features.push(features);
        }
        if !has_features {
            entries.features.clear();
        }
        Ok(entries)
    }
}

/// Writes items with their features, as names where there are none.
pub(super) fn write_entries<S: SerializeStruct>(
    line: &mut S,
    field: &'static str,
    items: &[String],
    features: &[Map<String, Value>],
) -> Result<(), S::Error> {
    if features.len() != items.len() {
        return line.serialize_field(field, items);
    }
    let entry = |(item, features): (&String, &Map<String, Value>)| {
        let mut entry = features.clone();
        entry.insert(NAMES[0].into(), Value::String(item.clone()));
        Value::Object(entry)
    };
    let entries: Vec<Value> = items.iter().zip(features).map(entry).collect();
    line.serialize_field(field, &entries)
}
