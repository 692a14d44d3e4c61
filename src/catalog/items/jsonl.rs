//! Files of items or changes as JSON lines.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::codes::{Code, Spelling};
use crate::catalog::change::Change;
use crate::catalog::item::Item;
use crate::error::{Error, Result};
use crate::json;
use crate::lines::Lines;

pub(super) fn read(
    path: &Path,
    file: File,
    ignored: &[String],
    add: impl FnMut(Item) -> Result<()>,
    progress: impl FnMut(u64),
) -> Result<()> {
    each_line(path, Lines::new(Counting::new(file, progress)), ignored, add)
}

/// The codes of an item, whatever else stands in its line.
#[derive(Deserialize)]
struct CodesOnly {
    sid: Vec<Code>,
}

/// Gives the codes of each item to `each`, until it returns false. A line that is no item ends it.
pub(super) fn each_codes(path: &Path, file: File, mut each: impl FnMut(&[Code]) -> bool) {
    let lines = Lines::new(Counting::new(file, |_| {}));
    // Whatever is wrong is said when the items are read.
    let _ = each_line(path, lines, &[], |line: CodesOnly| match each(&line.sid) {
        true => Ok(()),
        false => Err(Error::EmptyInput),
    });
}

/// As [`read`], with codes whose texts have several numbers.
pub(super) fn read_spelled(
    path: &Path,
    file: File,
    spelling: &Spelling,
    ignored: &[String],
    mut add: impl FnMut(Item) -> Result<()>,
    progress: impl FnMut(u64),
) -> Result<()> {
    let lines = Lines::new(Counting::new(file, progress));
    each_line(path, lines, ignored, |mut line: Value| {
        let invalid = |error| Error::InvalidField {
            field: "item",
            reason: with_way_out(json::reason(&error)),
        };
        let CodesOnly { sid } = CodesOnly::deserialize(&line).map_err(invalid)?;
        line["sid"] = spelling.to_sid(&sid)?.codes().into();
        add(Item::deserialize(line).map_err(invalid)?)
    })
}

/// Reads every change of a file of JSON lines ([`Change`]) and gives it to `each`; `progress` is told how
/// many bytes were read. Fields that items do not have are an error, unless `ignored` names them.
///
/// # Errors
/// [`Error::ItemsFile`] with the line; the operating system's; those of `each`.
pub fn read_changes(
    path: &Path,
    ignored: &[String],
    each: impl FnMut(Change) -> Result<()>,
    progress: impl FnMut(u64),
) -> Result<()> {
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    each_line(path, Lines::new(Counting::new(file, progress)), ignored, each)
}

/// Reads each line of JSON that is not blank.
fn each_line<L: DeserializeOwned>(
    path: &Path,
    mut lines: Lines<impl Read>,
    ignored: &[String],
    mut each: impl FnMut(L) -> Result<()>,
) -> Result<()> {
    let mut number = 0;
    while let Some(line) = lines.next().map_err(|error| Error::io(path, error))? {
        number += 1;
        if line.is_blank() {
            continue;
        }
        let fail = |reason: String| Error::ItemsFile {
            path: path.to_path_buf(),
            place: format!("line {number}"),
            reason,
        };
        let text = line.text().map_err(fail)?;
        let parsed = match ignored {
            [] => json::parse(text),
            ignored => json::parse(text).and_then(|line| json::from_value(without(line, ignored))),
        };
        let parsed = parsed.map_err(|reason| fail(with_way_out(reason)))?;
        each(parsed).map_err(|error| fail(error.to_string()))?;
    }
    Ok(())
}

/// An item, or a change that puts one, without some of the item's fields.
fn without(mut line: Value, ignored: &[String]) -> Value {
    let is_change = line.get("put").is_some_and(Value::is_object);
    let item = if is_change { line.get_mut("put") } else { Some(&mut line) };
    if let Some(fields) = item.and_then(Value::as_object_mut) {
        fields.retain(|name, _| !ignored.contains(name));
    }
    line
}

/// A reason with what to do about a field that items do not have.
pub(super) fn with_way_out(reason: String) -> String {
    let rest = reason.strip_prefix("unknown field `");
    let field = rest.and_then(|rest| rest.split_once('`')).map(|(field, _)| field);
    match field {
        Some(field) => format!(
            "{reason}; mend the name, or, where the field is to have no effect, name it in \
             `sidereal catalog build --ignore {field}`"
        ),
        None => reason,
    }
}

/// A reader that reports how many bytes were read.
pub(super) struct Counting<R, P> {
    inner: R,
    read: u64,
    progress: P,
}

impl<R, P: FnMut(u64)> Counting<R, P> {
    pub fn new(inner: R, progress: P) -> Counting<R, P> {
        Counting { inner, read: 0, progress }
    }
}

impl<R: Read, P: FnMut(u64)> Read for Counting<R, P> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.read += read as u64;
        (self.progress)(self.read);
        Ok(read)
    }
}
