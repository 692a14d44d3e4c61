//! Files of items as the field's `*.index.json`: one object, item to codes.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use serde::de::{Deserializer, MapAccess, Visitor};

use super::codes::{Code, Spelling};
use super::jsonl::Counting;
use crate::catalog::item::Item;
use crate::error::{Error, Result};
use crate::json;
use crate::lines::begin;

pub(super) fn read(
    path: &Path,
    file: File,
    spelling: &Spelling,
    mut add: impl FnMut(Item) -> Result<()>,
    progress: impl FnMut(u64),
) -> Result<()> {
    let fail = |place: String, reason: String| Error::ItemsFile {
        path: path.to_path_buf(),
        place,
        reason,
    };
    let mut failure = None;
    let mut take = |name: String, codes: Vec<Code>| {
        let item = spelling.to_sid(&codes).map(|sid| Item::new(name.clone(), sid));
        let fail = |error: Error| fail(format!("item {name:?}"), error.to_string());
        let outcome = item.and_then(&mut add).map_err(fail);
        let is_ok = outcome.is_ok();
        failure = outcome.err();
        is_ok
    };
    let mut reader = BufReader::new(Counting::new(file, progress));
    begin(&mut reader).map_err(|error| Error::io(path, error))?;
    let mut deserializer = serde_json::Deserializer::from_reader(reader);
    let parsed = deserializer
        .deserialize_map(EachEntry { take: &mut take })
        .and_then(|()| deserializer.end());
    if let Some(error) = failure {
        return Err(error);
    }
    parsed.map_err(|error| match error.classify() {
        serde_json::error::Category::Io => Error::io(path, error.into()),
        _ => fail("index".into(), json::reason(&error)),
    })
}

/// The texts of the first item's codes, where they are texts.
///
/// # Errors
/// The operating system's.
pub(super) fn first_codes(path: &Path) -> Result<Option<Vec<String>>> {
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let mut first = None;
    each_codes(file, |codes| {
        first = codes.iter().map(|code| code.text().map(str::to_string)).collect();
        false
    });
    Ok(first)
}

/// Gives the codes of each item to `each`, until it returns false. What is no index ends it.
pub(super) fn each_codes(file: File, mut each: impl FnMut(&[Code]) -> bool) {
    let mut take = |_: String, codes: Vec<Code>| each(&codes);
    let mut reader = BufReader::new(file);
    let _ = begin(&mut reader);
    let mut deserializer = serde_json::Deserializer::from_reader(reader);
    // Whatever is wrong is said when the items are read.
    let _ = deserializer.deserialize_map(EachEntry { take: &mut take });
}

/// Gives the entries of one JSON object to `take` one by one, so that memory holds one at a time.
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
