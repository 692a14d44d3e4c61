//! Which row of the item matrix an item is.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;

use crate::catalog::Snapshot;
use crate::error::{Error, Result};
use crate::json;

/// The row of no item.
const NONE: u32 = u32::MAX;

/// The rows of items by their names, as a folder says.
pub(super) struct ItemRows {
    rows: HashMap<String, u32>,
    num_rows: usize,
    /// What was worked out for the snapshot that was asked for last.
    newest: Mutex<Option<(u64, Arc<RowsOfSnapshot>)>>,
}

/// The rows of the items of one snapshot.
pub(super) struct RowsOfSnapshot {
    /// By row: the item's number in the snapshot, [`NONE`] where it has no such item.
    items: Vec<u32>,
}

impl RowsOfSnapshot {
    /// The item of a row.
    pub fn item(&self, row: u32) -> Option<u32> {
        Some(self.items[row as usize]).filter(|&item| item != NONE)
    }
}

/// A list of names by row, `null` where a row is no item; or rows by name.
#[derive(Deserialize)]
#[serde(untagged)]
enum File {
    Names(Vec<Option<String>>),
    Rows(HashMap<String, u32>),
}

impl ItemRows {
    /// Reads the file: `[null, "17", "4"]` by row, or `{"17": 1, "4": 2}`. Row 0, the padding, is no
    /// item where `has_padding`.
    ///
    /// # Errors
    /// [`Error::ModelFolder`] where the file is missing; [`Error::ModelConfig`] where two items have
    /// one row or one name, or a row is that of the padding or beyond the matrix.
    pub fn read(path: &Path, num_rows: usize, has_padding: bool) -> Result<ItemRows> {
        let text = std::fs::read(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::ModelFolder {
                path: path.parent().unwrap_or(path).to_path_buf(),
                reason: format!(
                    "{} is missing: which row of the model's item table is which item, as \
                     [null, \"17\", ...] by row or {{\"17\": 1, ...}}; in RecBole, \
                     dataset.field2token_id[\"item_id\"] is that object",
                    path.file_name().unwrap_or_default().display()
                ),
            },
            _ => Error::io(path, error),
        })?;
        let bad = |reason: String| Error::ModelConfig { path: path.to_path_buf(), reason };
        let named: Vec<(String, u32)> = match json::parse_bytes(&text).map_err(bad)? {
            File::Names(names) => {
                let row = |(row, name): (usize, Option<String>)| Some((name?, row as u32));
                names.into_iter().enumerate().filter_map(row).collect()
            }
            // RecBole's own object has the padding in it, under a name that no item has.
            File::Rows(rows) => {
                rows.into_iter().filter(|(name, row)| (&**name, *row) != ("[PAD]", 0)).collect()
            }
        };
        let mut rows = HashMap::with_capacity(named.len());
        let mut is_taken = vec![false; num_rows];
        for (name, row) in named {
            if has_padding && row == 0 {
                return Err(bad(format!("{name:?} has row 0, which is the padding's")));
            }
            match is_taken.get_mut(row as usize) {
                None => {
                    return Err(bad(format!(
                        "{name:?} has row {row}, and the item table has {num_rows} rows"
                    )));
                }
                Some(true) => return Err(bad(format!("{name:?} and another have row {row}"))),
                Some(is_taken) => *is_taken = true,
            }
            if rows.insert(name.clone(), row).is_some() {
                return Err(bad(format!("{name:?} has two rows")));
            }
        }
        if rows.is_empty() {
            return Err(bad("it names no item".into()));
        }
        Ok(ItemRows { rows, num_rows, newest: Mutex::default() })
    }

    /// The row of an item.
    pub fn find(&self, name: &str) -> Option<u32> {
        self.rows.get(name).copied()
    }

    /// The rows of a snapshot's items. The first request after a change of the catalog works them out,
    /// in time in proportion to the catalog.
    pub fn of(&self, snapshot: &Snapshot) -> Arc<RowsOfSnapshot> {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((number, rows)) = &*newest
            && *number == snapshot.number()
        {
            return Arc::clone(rows);
        }
        let mut items = vec![NONE; self.num_rows];
        for item in snapshot.all_items() {
            if let Some(row) = self.find(snapshot.name(item)) {
                items[row as usize] = item;
            }
        }
        let rows = Arc::new(RowsOfSnapshot { items });
        *newest = Some((snapshot.number(), Arc::clone(&rows)));
        rows
    }
}
