//! Files of items as the field's `*.index.json`: one object, item to codes.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use serde::de::{Deserializer, MapAccess, Visitor};

use super::jsonl::{Code, Counting, to_sid_at};
use super::spelling::Spelling;
use crate::catalog::item::Item;
use crate::error::{Error, Result};

pub(super) fn read(
    path: &Path,
    file: File,
    mut add: impl FnMut(Item) -> Result<()>,
    progress: impl FnMut(u64),
) -> Result<()> {
    let fail = |place: String, reason: String| Error::ItemsFile {
        path: path.to_path_buf(),
        place,
        reason,
    };
    let mut spelling = Spelling::default();
    each_entry(open(path)?, &mut |_, codes| spelling.look(&codes));
    let place = spelling.place();
    let mut failure = None;
    let mut take = |name: String, codes: Vec<Code>| {
        let item = to_sid_at(&codes, place).map(|sid| Item::new(name.clone(), sid));
        let fail = |error: Error| fail(format!("item {name:?}"), error.to_string());
        let outcome = item.and_then(&mut add).map_err(fail);
        let is_ok = outcome.is_ok();
        failure = outcome.err();
        is_ok
    };
    let reader = BufReader::new(Counting::new(file, progress));
    let mut deserializer = serde_json::Deserializer::from_reader(reader);
    let parsed = deserializer
        .deserialize_map(EachEntry { take: &mut take })
        .and_then(|()| deserializer.end());
    if let Some(error) = failure {
        return Err(error);
    }
    parsed.map_err(|error| match error.classify() {
        serde_json::error::Category::Io => Error::io(path, error.into()),
        _ => fail(format!("index at line {}", error.line()), error.to_string()),
    })
}

/// The texts of the first item's codes, where they are texts.
///
/// # Errors
/// The operating system's.
pub(super) fn first_codes(path: &Path) -> Result<Option<Vec<String>>> {
    let mut first = None;
    each_entry(open(path)?, &mut |_, codes| {
        first = codes.into_iter().map(Code::into_text).collect();
        false
    });
    Ok(first)
}

fn open(path: &Path) -> Result<BufReader<File>> {
    Ok(BufReader::new(File::open(path).map_err(|error| Error::io(path, error))?))
}

/// Looks at entries until `take` has seen enough. Faults of the file are found when it is read.
fn each_entry(file: impl Read, take: &mut impl FnMut(String, Vec<Code>) -> bool) {
    let _ = serde_json::Deserializer::from_reader(file).deserialize_map(EachEntry { take });
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
