//! Files of items or changes as JSON lines, and the spelling of codes that all formats share.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::catalog::change::Change;
use crate::catalog::item::Item;
use crate::catalog::sid::Sid;
use crate::error::{Error, Result};
use crate::lines::Lines;

pub(super) fn read(
    path: &Path,
    file: File,
    add: impl FnMut(Item) -> Result<()>,
    progress: impl FnMut(u64),
) -> Result<()> {
    each_line(path, Lines::new(Counting::new(file, progress)), add)
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
        assert_eq!(last_number("<a_236>"), Some(236));
        assert_eq!(last_number("<l2_7>é"), Some(7));
        assert_eq!(last_number("é9"), Some(9));
        assert_eq!(last_number("12"), Some(12));
        assert_eq!(last_number("<a_>"), None);
        assert_eq!(last_number("99999999999999999999999"), None);
    }
}
