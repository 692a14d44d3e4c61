//! Files of items or changes as JSON lines, and the spelling of codes that all formats share.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::spelling::Spelling;

use crate::catalog::change::Change;
use crate::catalog::item::Item;
use crate::catalog::sid::Sid;
use crate::error::{Error, Result};
use crate::lines::Lines;

pub(super) fn read(
    path: &Path,
    file: File,
    mut add: impl FnMut(Item) -> Result<()>,
    progress: impl FnMut(u64),
) -> Result<()> {
    let place = place_of_codes(path)?;
    let lines = Lines::new(Counting::new(file, progress));
    if place == 0 {
        return each_line(path, lines, add);
    }
    each_line(path, lines, |line: Value| {
        let invalid = |error: serde_json::Error| Error::InvalidField {
            field: "item",
            reason: error.to_string(),
        };
        let CodesOnly { sid } = CodesOnly::deserialize(&line).map_err(invalid)?;
        let item = Item::deserialize(&line).map_err(invalid)?;
        add(Item { sid: to_sid_at(&sid, place)?, ..item })
    })
}

/// The codes of an item, whatever else stands in its line.
#[derive(Deserialize)]
struct CodesOnly {
    sid: Vec<Code>,
}

/// Where codes stand among the numbers of their texts, from the end. One line tells for most files.
fn place_of_codes(path: &Path) -> Result<usize> {
    let mut spelling = Spelling::default();
    if path.is_file() {
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        // A bad line ends it here, and is an error when the items are read.
        let _ =
            each_line(path, Lines::new(file), |line: CodesOnly| match spelling.look(&line.sid) {
                true => Ok(()),
                false => Err(Error::Cancelled),
            });
    }
    Ok(spelling.place())
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a code, a whole number or a text such as \"<a_3>\"")]
pub(crate) enum Code {
    Number(u64),
    Text(String),
}

impl Code {
    pub(super) fn into_text(self) -> Option<String> {
        match self {
            Code::Number(_) => None,
            Code::Text(text) => Some(text),
        }
    }

    /// The numbers of a text, the last one first; none of a plain number.
    pub(super) fn numbers(&self) -> Vec<u64> {
        match self {
            Code::Number(_) => Vec::new(),
            Code::Text(text) => numbers(text).collect(),
        }
    }

    /// The code; `place` is where it stands among the numbers of a text, from the end.
    fn value(&self, place: usize) -> Result<u16> {
        let number = match self {
            Code::Number(number) => Some(*number),
            Code::Text(text) => numbers(text).nth(place),
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

/// The numbers of a text, the last one first; one that no code can be is larger than all codes.
fn numbers(text: &str) -> impl Iterator<Item = u64> {
    let digits = text.rsplit(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    digits.map(|digits| digits.parse().unwrap_or(u64::MAX))
}

pub(crate) fn to_sid(codes: &[Code]) -> Result<Sid> {
    to_sid_at(codes, 0)
}

/// A semantic ID whose codes stand at this place among the numbers of their texts, from the end.
pub(super) fn to_sid_at(codes: &[Code], place: usize) -> Result<Sid> {
    Sid::new(&codes.iter().map(|code| code.value(place)).collect::<Result<Vec<u16>>>()?)
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
    each_line(path, Lines::new(Counting::new(file, progress)), each)
}

/// Reads each line of JSON that is not blank.
fn each_line<L: DeserializeOwned>(
    path: &Path,
    mut lines: Lines<impl Read>,
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
        let parsed = serde_json::from_str(text).map_err(|error| fail(error.to_string()))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_the_last_number_of_its_text() {
        let code = |text: &str| Code::Text(text.into()).value(0).ok();
        assert_eq!(code("<a_236>"), Some(236));
        assert_eq!(code("<l2_7>é"), Some(7));
        assert_eq!(code("é9"), Some(9));
        assert_eq!(code("12"), Some(12));
        assert_eq!(code("<a_>"), None);
        assert_eq!(code("99999999999999999999999"), None);
    }
}
