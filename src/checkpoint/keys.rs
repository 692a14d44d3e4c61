//! Keys of configurations that nobody asks for.

use serde_json::Value;

/// Whether a value says nothing: null, false, zero, or an empty text, list or object.
pub(crate) fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
    }
}

/// Whether a list of names, each of which may end in `*` for any rest, has a name.
pub(crate) fn is_listed(names: &[String], name: &str) -> bool {
    names.iter().any(|listed| match listed.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => listed == name,
    })
}
