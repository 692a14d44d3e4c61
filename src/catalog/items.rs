//! Files of items: JSON lines, the field's `*.index.json`, or Parquet.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};

use super::sid::Sid;
use super::{Change, Item};
use crate::error::{Error, Result};

/// Whether the file's name says that it holds items rather than a compiled catalog.
pub fn is_items_file(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    matches!(extension, Some("json" | "jsonl" | "ndjson" | "parquet"))
}

/// Reads every item of a file and gives it to `add`; `progress` hears how many bytes were read.
///
/// - `*.json`: one object, item to codes: `{"17": ["<a_3>", "<b_250>", "<c_7>"], ...}`. A code is
///   the last number in its text, or a plain number.
/// - `*.parquet`, with the feature of that name: columns `item`, `sid` (a list, or one column a
///   level: `sid_0`, `sid_1` and so on), and, if they are there, `title`, `tags` (a list) and
///   `available`.
/// - any other name: one object a line: `{"item": "17", "sid": [3, 250, 7], "title": "...",
///   "tags": ["garden"], "available": true}`. Further fields are allowed and not kept.
///
/// # Errors
/// [`Error::ItemsFile`] with the line or item; the operating system's; those of `add`.
pub fn read(
    path: &Path,
    mut add: impl FnMut(Item) -> Result<()>,
    progress: impl FnMut(u64),
) -> Result<()> {
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let fail = |place: String, reason: String| Error::ItemsFile {
        path: path.to_path_buf(),
        place,
        reason,
    };
    if path.extension().is_some_and(|extension| extension == "parquet") {
        #[cfg(feature = "parquet")]
        return super::columnar::read(path, file, add, progress);
        #[cfg(not(feature = "parquet"))]
        return Err(Error::Unsupported {
            what: "Parquet".into(),
            way_out: "build with `--features parquet`, or give the items as JSON lines".into(),
        });
    }
    let is_index = path.extension().is_some_and(|extension| extension == "json");
    if is_index {
        let reader = Counting { inner: BufReader::new(file), read: 0, progress };
        let mut failure = None;
        let mut take = |name: String, codes: Vec<Code>| {
            let item = to_sid(&codes).map(|sid| Item::new(name.clone(), sid));
            let fail = |error: Error| fail(format!("item {name:?}"), error.to_string());
            let outcome = item.and_then(&mut add).map_err(fail);
            let is_ok = outcome.is_ok();
            failure = outcome.err();
            is_ok
        };
        let mut deserializer = serde_json::Deserializer::from_reader(BufReader::new(reader));
        let parsed = deserializer
            .deserialize_map(EachEntry { take: &mut take })
            .and_then(|()| deserializer.end());
        return match failure {
            Some(error) => Err(error),
            None => parsed.map_err(|error| json_error(path, &fail, "index", error)),
        };
    }
    let lines = Counting { inner: BufReader::new(file), read: 0, progress };
    each_line(path, lines, add)
}

/// An error about a file's items together rather than about one of them.
pub fn whole_file_error(path: &Path, error: &Error) -> Error {
    Error::ItemsFile {
        path: path.to_path_buf(),
        place: "all items".into(),
        reason: error.to_string(),
    }
}

fn json_error(
    path: &Path,
    fail: &dyn Fn(String, String) -> Error,
    what: &str,
    error: serde_json::Error,
) -> Error {
    match error.classify() {
        serde_json::error::Category::Io => Error::io(path, error.into()),
        _ => fail(format!("{what} at line {}", error.line()), error.to_string()),
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a code, a whole number or a text such as \"<a_3>\"")]
pub(crate) enum Code {
    Number(u64),
    Text(String),
}

impl Code {
    fn value(&self) -> Result<u16> {
        let number = match self {
            Code::Number(number) => Some(*number),
            Code::Text(text) => last_number(text),
        };
        number.and_then(|number| u16::try_from(number).ok()).ok_or_else(|| Error::InvalidField {
            field: "sid",
            reason: match self {
                Code::Number(number) => format!("code {number} is over 65535"),
                Code::Text(text) => format!("code {text:?} holds no number up to 65535"),
            },
        })
    }
}

fn last_number(text: &str) -> Option<u64> {
    let end = text.rfind(|c: char| c.is_ascii_digit())? + 1;
    let start = text[..end].rfind(|c: char| !c.is_ascii_digit());
    let start = start.map_or(0, |at| at + text[at..].chars().next().map_or(1, char::len_utf8));
    text[start..end].parse().ok()
}

pub(crate) fn to_sid(codes: &[Code]) -> Result<Sid> {
    Sid::new(&codes.iter().map(Code::value).collect::<Result<Vec<u16>>>()?)
}

/// Reads every change of a file of JSON lines ([`Change`]) and gives it to `each` with its line;
/// `progress` hears how many bytes were read.
///
/// # Errors
/// [`Error::ItemsFile`] with the line; the operating system's; those of `each`.
pub fn read_changes(
    path: &Path,
    each: impl FnMut(Change) -> Result<()>,
    progress: impl FnMut(u64),
) -> Result<()> {
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let lines = Counting { inner: BufReader::new(file), read: 0, progress };
    each_line(path, lines, each)
}

/// Reads each line of JSON that is not blank.
fn each_line<L: DeserializeOwned>(
    path: &Path,
    mut lines: Counting<impl BufRead, impl FnMut(u64)>,
    mut each: impl FnMut(L) -> Result<()>,
) -> Result<()> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = lines.read_line_bytes(&mut line).map_err(|error| Error::io(path, error))?;
        if read == 0 {
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let fail = |reason: String| Error::ItemsFile {
            path: path.to_path_buf(),
            place: format!("line {number}"),
            reason,
        };
        let parsed = serde_json::from_slice(&line).map_err(|error| fail(error.to_string()))?;
        each(parsed).map_err(|error| fail(error.to_string()))?;
    }
    Ok(())
}

/// Feeds the entries of one JSON object to `take`, without holding them all.
struct EachEntry<'a, F> {
    take: &'a mut F,
}

impl<'de, F: FnMut(String, Vec<Code>) -> bool> Visitor<'de> for EachEntry<'_, F> {
    type Value = ();

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an object of items: {\"17\": [\"<a_3>\", \"<b_250>\"], ...}")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        while let Some((name, codes)) = map.next_entry()? {
            if !(self.take)(name, codes) {
                return Err(serde::de::Error::custom("stopped at a bad item"));
            }
        }
        Ok(())
    }
}

/// A reader that tells how far it is.
struct Counting<R, P> {
    inner: R,
    read: u64,
    progress: P,
}

impl<R: BufRead, P: FnMut(u64)> Counting<R, P> {
    fn read_line_bytes(&mut self, line: &mut Vec<u8>) -> std::io::Result<usize> {
        let read = self.inner.read_until(b'\n', line)?;
        self.count(read);
        Ok(read)
    }
}

impl<R, P: FnMut(u64)> Counting<R, P> {
    fn count(&mut self, read: usize) {
        self.read += read as u64;
        (self.progress)(self.read);
    }
}

impl<R: Read, P: FnMut(u64)> Read for Counting<R, P> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.count(read);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_the_last_number_of_its_text() {
        assert_eq!(last_number("<a_236>"), Some(236));
        assert_eq!(last_number("<l2_7>é"), Some(7));
        assert_eq!(last_number("é9"), Some(9));
        assert_eq!(last_number("12"), Some(12));
        assert_eq!(last_number("<a_>"), None);
        assert_eq!(last_number("99999999999999999999999"), None);
    }
}
