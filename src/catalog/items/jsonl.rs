//! Files of items or changes as JSON lines.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::codes::{Code, Spelling};
use crate::catalog::change::Change;
use crate::catalog::item::Item;
use crate::error::{Error, Result};

pub(super) fn read(
    path: &Path,
    file: File,
    add: impl FnMut(Item) -> Result<()>,
    progress: impl FnMut(u64),
) -> Result<()> {
    let lines = Counting::new(BufReader::new(file), progress);
    each_line(path, lines, add)
}

/// The codes of an item, whatever else stands in its line.
#[derive(Deserialize)]
struct CodesOnly {
    sid: Vec<Code>,
}

/// Gives the codes of each item to `each`, until it returns false. A line that is no item ends it.
pub(super) fn each_codes(path: &Path, file: File, mut each: impl FnMut(&[Code]) -> bool) {
    let lines = Counting::new(BufReader::new(file), |_| {});
    // Whatever is wrong is said when the items are read.
    let _ = each_line(path, lines, |line: CodesOnly| match each(&line.sid) {
        true => Ok(()),
        false => Err(Error::EmptyInput),
    });
}

/// As [`read`], with codes that are not the last numbers of their texts.
pub(super) fn read_spelled(
    path: &Path,
    file: File,
    spelling: &Spelling,
    mut add: impl FnMut(Item) -> Result<()>,
    progress: impl FnMut(u64),
) -> Result<()> {
    let lines = Counting::new(BufReader::new(file), progress);
    each_line(path, lines, |line: Value| {
        let invalid = |error: serde_json::Error| Error::InvalidField {
            field: "item",
            reason: error.to_string(),
        };
        let CodesOnly { sid } = CodesOnly::deserialize(&line).map_err(invalid)?;
        let item = Item::deserialize(&line).map_err(invalid)?;
        add(Item { sid: spelling.to_sid(&sid)?, ..item })
    })
}

/// Reads every change of a file of JSON lines ([`Change`]) and gives it to `each` with its line;
/// `progress` is told how many bytes were read.
///
/// # Errors
/// [`Error::ItemsFile`] with the line; the operating system's; those of `each`.
pub fn read_changes(
    path: &Path,
    each: impl FnMut(Change) -> Result<()>,
    progress: impl FnMut(u64),
) -> Result<()> {
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let lines = Counting::new(BufReader::new(file), progress);
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

/// A reader that reports how many bytes were read.
pub(super) struct Counting<R, P> {
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
    pub fn new(inner: R, progress: P) -> Counting<R, P> {
        Counting { inner, read: 0, progress }
    }

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
