//! JSON from outside, and in a user's words what is wrong with it.
//!
//! The parser's own words name types of Rust (`expected i64`, `struct LayoutFile with 4 elements`) and
//! count the lines of what it was given, which for one line of a file is always the first.

use serde::Deserialize;
use serde_json::Value;
use serde_json::error::Category;

use crate::lines::{foreign, without_mark};

/// Reads one value: a file, a body, or a line.
///
/// # Errors
/// What is wrong, with its place.
pub fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| match (error.classify(), table(text)) {
        (Category::Syntax, Some(reason)) => reason,
        (Category::Data, _) => {
            // Read again, by a reader that knows where it is.
            let mut again = serde_json::Deserializer::from_str(text);
            match serde_path_to_error::deserialize::<_, T>(&mut again) {
                Err(error) => with_path(&error),
                Ok(_) => reason(&error),
            }
        }
        _ => reason(&error),
    })
}

/// Reads one value of a whole file. A byte order mark is passed over.
///
/// # Errors
/// What is wrong, with its place; what the file is where it is compressed or no UTF-8.
pub fn parse_bytes<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    if let Some(reason) = foreign(bytes) {
        return Err(reason);
    }
    let text = std::str::from_utf8(without_mark(bytes)).map_err(|error| error.to_string())?;
    parse(text)
}

/// Reads a value that was parsed before.
///
/// # Errors
/// What is wrong, and in which field.
pub fn from_value<T: for<'a> Deserialize<'a>>(value: Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| with_path(&error))
}

/// What a text is where it is a table of a spreadsheet instead of JSON.
pub fn table(text: &str) -> Option<String> {
    let first = text.trim_start().lines().next()?;
    let is_json = first.starts_with(['{', '[']);
    let separator = [',', '\t', ';'].into_iter().find(|&separator| first.contains(separator))?;
    (!is_json).then(|| {
        let what = if separator == '\t' { "TSV" } else { "CSV" };
        format!("this is no JSON; it looks like {what}: write each row as a JSON object, on a line of its own")
    })
}

/// The parser's error in a user's words.
pub fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let (what, place) = match text.strip_suffix(&place) {
        Some(what) if error.line() == 1 => (what, format!(" at column {}", error.column())),
        Some(what) => (what, place),
        None => (&*text, String::new()),
    };
    format!("{}{place}", in_plain_words(what))
}

/// The error of a value with the field that it is in, but where the error names a field itself.
fn with_path(error: &serde_path_to_error::Error<serde_json::Error>) -> String {
    let (path, reason) = (error.path().to_string(), reason(error.inner()));
    match reason.starts_with("invalid ") && path != "." {
        true => format!("{path}: {reason}"),
        false => reason,
    }
}

/// `invalid type: sequence, expected i64` as `invalid type: a list, expected a whole number`.
fn in_plain_words(error: &str) -> String {
    if error.starts_with("data did not match any variant of untagged enum") {
        return "it has none of the forms that it may have".into();
    }
    let Some((found, expected)) = error.rsplit_once(", expected ") else {
        return error.to_string();
    };
    let found = match found.rsplit_once(": ") {
        Some((before, "sequence")) => format!("{before}: a list"),
        Some((before, "map")) => format!("{before}: an object"),
        Some((before, "unit")) => format!("{before}: null"),
        _ => found.to_string(),
    };
    format!("{found}, expected {}", plain_type(expected))
}

fn plain_type(name: &str) -> &str {
    match name.split(' ').next().unwrap_or_default() {
        "u8" | "u16" | "u32" | "u64" | "u128" | "usize" => "a whole number that is not negative",
        "i8" | "i16" | "i32" | "i64" | "i128" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "struct" | "map" | "internally" | "adjacently" => "an object",
        "tuple" => "a list",
        "enum" => "one of the documented forms",
        "unit" => "null",
        _ => match name {
            "a sequence" => "a list",
            other if other.starts_with("a tuple") => "a list",
            "a map" => "an object",
            "a boolean" => "true or false",
            "variant identifier" | "field identifier" => "a name",
            other => other,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[allow(dead_code)] // read by nobody, as every value is refused
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Layout {
        size: u32,
        offset: Option<i64>,
        scale: Option<f32>,
        names: Option<Vec<String>>,
        table: Option<BTreeMap<String, bool>>,
        pair: Option<(u8, u8)>,
        inner: Option<Box<Layout>>,
    }

    fn error(text: &str) -> String {
        parse::<Layout>(text).expect_err("no layout")
    }

    #[test]
    fn errors_speak_of_json_and_not_of_rust() {
        for (text, expected) in [
            (
                r#"{"size": "a"}"#,
                r#"size: invalid type: string "a", expected a whole number that is not negative at column 12"#,
            ),
            (r#"{"size": 1, "offset": []}"#, "invalid type: a list, expected a whole number"),
            (r#"{"size": 1, "scale": {}}"#, "invalid type: an object, expected a number"),
            (r#"{"size": 1, "names": {}}"#, "invalid type: an object, expected a list"),
            (r#"{"size": 1, "table": [1]}"#, "invalid type: a list, expected an object"),
            (
                r#"{"size": 1, "table": {"a": 2}}"#,
                "invalid type: integer `2`, expected true or false",
            ),
            (r#"{"size": 1, "pair": 7}"#, "invalid type: integer `7`, expected a list"),
            (r#"{"size": 1, "inner": 7}"#, "invalid type: integer `7`, expected an object"),
            (
                "{\"size\": 1,\n \"inner\": 7}",
                "invalid type: integer `7`, expected an object at line 2 column ",
            ),
            (r#"{"size": 1, "sise": 2}"#, "unknown field `sise`, expected one of `size`, `offset`"),
            (r#"{"size": 1, "inner": {"size": 1, "names": ["a", 2]}}"#, "inner.names[1]: invalid"),
            (r#"[[[1]]]"#, "expected a whole number that is not negative"),
            ("item,sid\n1,2\n", "it looks like CSV"),
            ("item\tsid\n1\t2\n", "it looks like TSV"),
            ("", "EOF while parsing a value"),
        ] {
            let error = error(text);
            assert!(error.contains(expected), "{text}: {error}");
            for word in ["struct", "i64", "u32", "f32", "sequence", "tuple", "untagged", "line 1 "]
            {
                assert!(!error.contains(word), "{text}: {error}");
            }
        }
    }

    #[test]
    fn the_field_of_a_wrong_value_is_named() {
        let wrong = serde_json::json!({"size": 1, "table": {"a": 2}});
        let error = from_value::<Layout>(wrong).expect_err("no layout");
        assert_eq!(error, "table.a: invalid type: integer `2`, expected true or false");
    }

    #[test]
    fn files_of_another_kind_are_named() {
        for (bytes, name) in [(&b"\x1f\x8b\x08"[..], "gzip"), (b"\xff\xfea\0", "UTF-16")] {
            let error = parse_bytes::<Layout>(bytes).expect_err("no JSON");
            assert!(error.contains(name), "{error}");
        }
        let marked = "\u{feff}{\"size\": 3}".as_bytes();
        assert_eq!(parse_bytes::<Layout>(marked).map(|layout| layout.size), Ok(3));
    }
}
