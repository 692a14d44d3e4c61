//! Lines of text files and streams, each of bounded length.
//!
//! One reader for requests, items, changes and names, so that all of them treat hostile and
//! unusual input alike: an endless line costs bounded memory, a byte order mark is passed over,
//! lines may end in CR LF, and a compressed file is named as one.

use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Result};

/// The most bytes of a line: a history of a hundred thousand names has some two million.
pub const MAX_LINE_BYTES: usize = 16 << 20;

/// What some editors put in front of a file.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// The first bytes of files that are no text, and what to do about them.
const FOREIGN: [(&[u8], &str); 4] = [
    (b"\x1f\x8b", "compressed by gzip; unpack it first (gzip -dc FILE)"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first (zstd -dc FILE)"),
    (b"\xff\xfe", "UTF-16; write it as UTF-8"),
    (b"\xfe\xff", "UTF-16; write it as UTF-8"),
];

/// Reads lines of at most [`MAX_LINE_BYTES`].
pub struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
    is_started: bool,
    /// The rest of a line that was too long is still to be passed over.
    is_inside: bool,
}

/// One line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line<'a> {
    /// Its bytes, without the line feed and a carriage return before it.
    Whole(&'a [u8]),
    /// It has more than [`MAX_LINE_BYTES`]; the next call begins after its end.
    TooLong,
}

impl Line<'_> {
    /// The line as text.
    ///
    /// # Errors
    /// Why it is none: too long, or no UTF-8.
    pub fn text(&self) -> std::result::Result<&str, String> {
        match self {
            Line::Whole(bytes) => std::str::from_utf8(bytes).map_err(|error| error.to_string()),
            Line::TooLong => Err(format!("the line has more than {MAX_LINE_BYTES} bytes")),
        }
    }

    /// Whether nothing but white space is on the line.
    pub fn is_blank(&self) -> bool {
        matches!(self, Line::Whole(bytes) if bytes.iter().all(u8::is_ascii_whitespace))
    }
}

impl<R: Read> Lines<R> {
    /// The lines of what a reader gives; it need not be buffered.
    pub fn new(reader: R) -> Lines<R> {
        Lines {
            reader: BufReader::with_capacity(1 << 16, reader),
            line: Vec::new(),
            is_started: false,
            is_inside: false,
        }
    }

    /// The next line; `None` at the end. The last one need not end in a line feed.
    ///
    /// # Errors
    /// The reader's; [`ErrorKind::InvalidData`] for a file that is compressed or no UTF-8 text.
    #[allow(clippy::should_implement_trait)] // the line borrows the reader's memory
    pub fn next(&mut self) -> Result<Option<Line<'_>>> {
        self.skip_rest()?;
        self.line.clear();
        let mut limited = (&mut self.reader).take(MAX_LINE_BYTES as u64 + 2);
        let read = limited.read_until(b'\n', &mut self.line)?;
        if read == 0 {
            return Ok(None);
        }
        if !self.is_started {
            self.is_started = true;
            self.check_start()?;
        }
        let is_ended = self.line.ends_with(b"\n");
        if is_ended {
            self.line.pop();
            if self.line.ends_with(b"\r") {
                self.line.pop();
            }
        }
        if self.line.len() > MAX_LINE_BYTES {
            self.is_inside = !is_ended;
            self.line = Vec::new();
            return Ok(Some(Line::TooLong));
        }
        Ok(Some(Line::Whole(&self.line)))
    }

    /// Passes over the rest of a line that was too long.
    fn skip_rest(&mut self) -> Result<()> {
        while self.is_inside {
            let bytes = match self.reader.fill_buf() {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                bytes => bytes?,
            };
            let end = bytes.iter().position(|&byte| byte == b'\n');
            self.is_inside = end.is_none() && !bytes.is_empty();
            let len = end.map_or(bytes.len(), |end| end + 1);
            self.reader.consume(len);
        }
        Ok(())
    }

    fn check_start(&mut self) -> Result<()> {
        if let Some(reason) = foreign(&self.line) {
            return Err(Error::new(ErrorKind::InvalidData, reason));
        }
        let mark = self.line.len() - without_mark(&self.line).len();
        self.line.drain(..mark);
        Ok(())
    }
}

/// Passes over a byte order mark at the start of a file that is read as a whole.
///
/// # Errors
/// The reader's; [`ErrorKind::InvalidData`] for a file that is compressed or no UTF-8 text.
pub(crate) fn begin(reader: &mut impl BufRead) -> Result<()> {
    let start = reader.fill_buf()?;
    if let Some(reason) = foreign(start) {
        return Err(Error::new(ErrorKind::InvalidData, reason));
    }
    let mark = start.len() - without_mark(start).len();
    reader.consume(mark);
    Ok(())
}

/// What a file is that begins so and is no text.
pub(crate) fn foreign(start: &[u8]) -> Option<String> {
    let (_, what) = FOREIGN.iter().find(|(foreign, _)| start.starts_with(foreign))?;
    Some(format!("this is no text in UTF-8: it is {what}"))
}

/// A file's bytes after its byte order mark.
pub(crate) fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(input: impl Read) -> Vec<Option<String>> {
        let mut lines = Lines::new(input);
        let mut found = Vec::new();
        while let Some(line) = lines.next().expect("readable") {
            found.push(match line {
                Line::Whole(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
                Line::TooLong => None,
            });
        }
        found
    }

    fn texts(texts: &[&str]) -> Vec<Option<String>> {
        texts.iter().map(|text| Some(text.to_string())).collect()
    }

    #[test]
    fn lines_end_in_lf_or_cr_lf_or_with_the_file() {
        assert_eq!(all(&b""[..]), []);
        assert_eq!(all(&b"a\r\n\nb\rc\nd"[..]), texts(&["a", "", "b\rc", "d"]));
        assert_eq!(all("\u{feff}a\n\u{feff}b\n".as_bytes()), texts(&["a", "\u{feff}b"]));
        assert_eq!(all(&b"a\0b\n\xff\n"[..]), texts(&["a\0b", "\u{fffd}"]));
    }

    #[test]
    fn a_line_that_is_too_long_is_passed_over_wherever_it_stands() {
        let zeros = |count: usize| std::io::repeat(0).take(count as u64);
        let long = MAX_LINE_BYTES + 1;
        assert_eq!(all(zeros(5 * MAX_LINE_BYTES)), [None]);
        let input = b"a\n".chain(zeros(long)).chain(&b"\nb\n"[..]).chain(zeros(3 * long));
        let found = [texts(&["a"]), vec![None], texts(&["b"]), vec![None]].concat();
        assert_eq!(all(input), found);
        for end in [&b"\n"[..], b"\r\n", b""] {
            let found = all(zeros(MAX_LINE_BYTES).chain(end).chain(&b"b"[..]));
            match end {
                b"" => assert_eq!(found, [None]),
                _ => assert_eq!(
                    (found[0].as_ref().map(String::len), found.len()),
                    (Some(MAX_LINE_BYTES), 2)
                ),
            }
        }
    }

    #[test]
    fn compressed_files_are_named() {
        for (start, name) in [(&b"\x1f\x8b\x08"[..], "gzip"), (b"\xff\xfea\0", "UTF-16")] {
            let error = Lines::new(start).next().expect_err("no text").to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
