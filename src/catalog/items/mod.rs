//! Files of items: JSON lines, the field's `*.index.json`, or Parquet.

use std::fs::File;
use std::path::Path;

use super::item::Item;
use crate::error::{Error, Result};

mod codes;
mod index;
mod jsonl;
#[cfg(feature = "parquet")]
mod parquet;

pub(crate) use codes::{Code, to_sid};
use codes::{Learner, Spelling};
pub use jsonl::read_changes;

/// Whether the file's name says that it holds items rather than a compiled catalog.
pub fn is_items_file(path: &Path) -> bool {
    matches!(extension(path), Some("json" | "jsonl" | "ndjson" | "parquet"))
}

/// Reads every item of a file and gives it to `add`; `progress` is told how many bytes were read. Fields
/// that items do not have are an error, unless `ignored` names them.
///
/// - `*.json`: one object, item to codes: `{"17": ["<a_3>", "<b_250>", "<c_7>"], ...}`. A code is
///   a plain number or the number in a text; where the texts of a level have several numbers, the
///   one that differs between items.
/// - `*.parquet`, with the feature `parquet`: columns `item`, `sid` (a list, or one column a
///   level: `sid_0`, `sid_1` and so on), and the optional columns `title`, `tags` (a list),
///   `available` and `weight`.
/// - any other name: one object a line: `{"item": "17", "sid": [3, 250, 7], "title": "...",
///   "tags": ["garden"], "available": true, "weight": 2.5}`.
///
/// # Errors
/// [`Error::ItemsFile`] with the line or item; the operating system's; those of `add`.
pub fn read(
    path: &Path,
    ignored: &[String],
    add: impl FnMut(Item) -> Result<()>,
    progress: impl FnMut(u64),
) -> Result<()> {
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    match extension(path) {
        #[cfg(feature = "parquet")]
        Some("parquet") => parquet::read(path, file, ignored, add, progress),
        #[cfg(not(feature = "parquet"))]
        Some("parquet") => Err(Error::Unsupported {
            what: "Parquet".into(),
            way_out: "build with `--features parquet`, or give the items as JSON lines".into(),
        }),
        Some("json") => {
            let spelling = spelling(path)?.unwrap_or_default();
            index::read(path, file, &spelling, add, progress)
        }
        _ => match spelling(path)? {
            None => jsonl::read(path, file, ignored, add, progress),
            Some(spelling) => jsonl::read_spelled(path, file, &spelling, ignored, add, progress),
        },
    }
}

/// The texts of the codes of the first item in a `*.index.json` of a folder, where it has just one
/// such file and that writes codes as texts.
///
/// # Errors
/// The operating system's.
pub fn first_codes_beside(folder: &Path) -> Result<Option<Vec<String>>> {
    let entries = std::fs::read_dir(folder).map_err(|error| Error::io(folder, error))?;
    let mut found = entries.flatten().map(|entry| entry.path()).filter(|path| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.ends_with("index.json"))
            && !path.to_string_lossy().ends_with(".safetensors.index.json")
            && !path.to_string_lossy().ends_with(".bin.index.json")
    });
    match (found.next(), found.next()) {
        (Some(path), None) => index::first_codes(&path),
        _ => Ok(None),
    }
}

/// How a file spells codes whose texts have several numbers; `None` where those of the first item have
/// one each. All items are read for it.
fn spelling(path: &Path) -> Result<Option<Spelling>> {
    if !path.is_file() {
        return Ok(None); // a pipe is read once
    }
    let each_codes = |each: &mut dyn FnMut(&[Code]) -> bool| -> Result<()> {
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        match extension(path) {
            Some("json") => index::each_codes(file, each),
            _ => jsonl::each_codes(path, file, each),
        }
        Ok(())
    };
    let mut is_unclear = false;
    each_codes(&mut |codes| {
        is_unclear = codes.iter().any(Code::is_unclear);
        false
    })?;
    if !is_unclear {
        return Ok(None);
    }
    let mut learner = Learner::default();
    each_codes(&mut |codes| {
        learner.observe(codes);
        true
    })?;
    learner.finish().map(Some).map_err(|reason| Error::ItemsFile {
        path: path.to_path_buf(),
        place: "all items".into(),
        reason,
    })
}

/// An error that concerns all items of a file rather than one of them.
pub fn whole_file_error(path: &Path, error: &Error) -> Error {
    Error::ItemsFile {
        path: path.to_path_buf(),
        place: "all items".into(),
        reason: error.to_string(),
    }
}

fn extension(path: &Path) -> Option<&str> {
    path.extension().and_then(|extension| extension.to_str())
}
