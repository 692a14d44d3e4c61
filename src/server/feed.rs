//! `--feed FILE`: changes of the catalog from a file that another program appends to.
//!
//! A line is a change of ours (`{"put": {...}}`) or one of Debezium's
//! (`{"op": "u", "after": {...}}`, `{"op": "d", "before": {...}}`, with or without `payload` around
//! it). The watermark of a batch is the byte after its last line, stored in the same record of the
//! log, so a server that is started again goes on where it was. A line that cannot be applied is
//! told of, counted and passed over: one bad line must not stop the rest.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::models::ServedCatalog;
use super::operations;
use super::state::State;
use crate::catalog::{Change, Item, Watermark};
use crate::error::{Error, Result};
use crate::json;
use crate::lines::MAX_LINE_BYTES;

/// How long the follower waits before it looks at the file again.
const PAUSE: Duration = Duration::from_millis(100);
/// Bytes of the file that are read, and changes that are applied, at a time.
const BATCH_BYTES: usize = 1 << 20;

/// A file that is followed.
pub(super) struct Follower {
    /// Gone when the server is.
    state: Weak<State>,
    catalog: Arc<ServedCatalog>,
    path: PathBuf,
    /// The name of the feed in watermarks.
    source: String,
    /// Where the next line begins.
    offset: u64,
    /// The beginning of a line whose end is not there yet.
    rest: Vec<u8>,
    /// A line that is too long is being passed over.
    is_inside: bool,
}

impl Follower {
    /// Follows a file into the catalog of the first model, from the catalog's watermark on.
    ///
    /// # Errors
    /// The file's; [`Error::InvalidOption`] where the catalog takes no changes.
    pub fn open(state: &Arc<State>, path: &Path) -> Result<Follower> {
        let invalid = |reason: String| Error::InvalidOption { option: "--feed", reason };
        let served = state.models.find("", "");
        let served = served.map_err(|failure| invalid(failure.body.message))?;
        if served.catalog.writer.is_none() {
            return Err(invalid("the catalog is served for reading alone".into()));
        }
        let name = path.file_name().ok_or_else(|| invalid(format!("{path:?} is no file")))?;
        let source = name.to_string_lossy().into_owned();
        File::open(path).map_err(|error| Error::io(path, error))?;
        let snapshot = served.catalog.catalog.snapshot();
        let offset = snapshot.watermarks().offset(&source, 0).unwrap_or(0);
        let (state, path) = (Arc::downgrade(state), path.to_path_buf());
        let catalog = Arc::clone(&served.catalog);
        Ok(Follower { state, catalog, path, source, offset, rest: Vec::new(), is_inside: false })
    }

    /// Applies lines as they come until the server ends.
    pub fn run(mut self) {
        loop {
            let Some(state) = self.state.upgrade().filter(|state| !state.is_draining()) else {
                return;
            };
            let pause = match self.step(&state) {
                Ok(true) => continue,
                Ok(false) => PAUSE,
                Err(error) => {
                    let path = self.path.display();
                    tracing::error!(target: "sidereal", %path, %error, "feed");
                    state.metrics.feed_errors.fetch_add(1, Relaxed);
                    // What was not applied is read again from the watermark.
                    self.rest.clear();
                    PAUSE * 10
                }
            };
            drop(state);
            std::thread::sleep(pause);
        }
    }

    /// Reads what came and applies it; returns whether anything did.
    fn step(&mut self, state: &State) -> Result<bool> {
        let bytes = self.read().map_err(|error| Error::io(&self.path, error))?;
        if bytes.is_empty() {
            return Ok(false);
        }
        self.rest.extend_from_slice(&bytes);
        let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') else {
            if self.rest.len() > MAX_LINE_BYTES {
                self.offset += self.rest.len() as u64;
                self.rest.clear();
                self.is_inside = true;
            }
            return Ok(true);
        };
        let whole: Vec<u8> = self.rest.drain(..=end).collect();
        let after = self.offset + whole.len() as u64;
        let changes = self.changes(state, &whole);
        self.apply(state, after, changes)?;
        (self.offset, self.is_inside) = (after, false);
        Ok(true)
    }

    fn read(&self) -> std::io::Result<Vec<u8>> {
        let mut file = File::open(&self.path)?;
        let at = self.offset + self.rest.len() as u64;
        if file.metadata()?.len() < at {
            return Err(std::io::Error::other(format!(
                "the file has fewer than the {at} bytes that were read of it; a feed is appended to, \
                 and a new one gets a new name"
            )));
        }
        file.seek(SeekFrom::Start(at))?;
        let mut bytes = Vec::new();
        file.take(BATCH_BYTES as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// The changes of whole lines.
    fn changes(&self, state: &State, lines: &[u8]) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut lines = lines.split(|&byte| byte == b'\n');
        if self.is_inside {
            lines.next();
            self.passed_over(state, "a line is too long");
        }
        for line in lines.filter(|line| !line.trim_ascii().is_empty()) {
            state.metrics.feed_lines.fetch_add(1, Relaxed);
            match change_of(line) {
                Ok(change) => changes.extend(change),
                Err(reason) => self.passed_over(state, &reason),
            }
        }
        changes
    }

    /// Applies changes and moves the watermark, both or neither. Where one change of the batch
    /// cannot be, the others are applied without it.
    fn apply(&self, state: &State, after: u64, mut changes: Vec<Change>) -> Result<()> {
        let watermark = Watermark::new(&*self.source, 0, after);
        loop {
            match operations::apply(state, &self.catalog, Some(&watermark), &changes) {
                Ok(_) => return Ok(()),
                Err(Error::InvalidChange { index, reason }) if index < changes.len() => {
                    changes.remove(index);
                    self.passed_over(state, &reason);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn passed_over(&self, state: &State, reason: &str) {
        state.metrics.feed_errors.fetch_add(1, Relaxed);
        let path = self.path.display();
        tracing::warn!(target: "sidereal", %path, reason, "a line of the feed was passed over");
    }
}

/// One row of a table as Debezium sends it.
#[derive(Deserialize)]
struct Row {
    op: String,
    #[serde(default)]
    before: Option<Value>,
    #[serde(default)]
    after: Option<Value>,
}

/// The change of a line; `None` for a line that changes nothing, as Debezium's heartbeats.
fn change_of(line: &[u8]) -> std::result::Result<Option<Change>, String> {
    let mut value: Value = json::parse_bytes(line)?;
    if let Some(payload) = value.get_mut("payload") {
        value = payload.take();
        if value.is_null() {
            return Ok(None); // a tombstone
        }
    }
    if value.get("op").is_none() {
        return json::from_value(value).map(Some);
    }
    let row: Row = json::from_value(value)?;
    let change = match (&*row.op, row.before, row.after) {
        ("c" | "u" | "r", _, Some(mut after)) => {
            // A row has all the columns of its table.
            if let Some(columns) = after.as_object_mut() {
                columns.retain(|column, _| Item::FIELDS.contains(&&**column));
            }
            json!({ "put": after })
        }
        ("d", Some(before), _) => {
            let item = before.get("item").or_else(|| before.get("item_id"));
            json!({ "delete": { "item": item } })
        }
        ("m" | "t", _, _) => return Ok(None),
        (op, _, _) => return Err(format!("op {op:?} without the row that it needs")),
    };
    json::from_value(change).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> std::result::Result<Option<Change>, String> {
        change_of(line.as_bytes())
    }

    #[test]
    fn changes_are_read_in_our_form_and_in_debeziums() {
        let lamp = r#"{"item": "lamp", "sid": [1, 2]}"#;
        let ours = of(&format!(r#"{{"put": {lamp}}}"#)).expect("a change");
        for op in ["c", "u", "r"] {
            let row = format!(r#"{{"op": "{op}", "before": null, "after": {lamp}}}"#);
            assert_eq!(of(&row).expect("a change"), ours);
            let wider = row.replace(r#""sid""#, r#""price": 3, "sid""#);
            assert_eq!(of(&wider).expect("a change"), ours);
            assert_eq!(of(&format!(r#"{{"payload": {row}}}"#)).expect("a change"), ours);
        }
        let deleted = of(r#"{"op": "d", "before": {"item": "lamp"}, "after": null}"#);
        assert_eq!(deleted, Ok(Some(Change::Delete { item: "lamp".into() })));
        assert_eq!(of(r#"{"payload": null}"#), Ok(None));
        for wrong in ["{", r#"{"op": "d"}"#, r#"{"op": "x", "after": {}}"#, r#"{"puts": {}}"#] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
