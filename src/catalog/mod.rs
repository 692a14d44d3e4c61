//! The catalog: items, their semantic IDs, and which of them may be recommended, now.
//!
//! A catalog is compiled once from a file of items ([`items`]), written as one file ([`format`])
//! and memory-mapped where it is used. Its heart is the rank [`trie`]. What changes afterwards,
//! items that come, go, move or are tagged anew, is laid over the compiled arrays; a request sees
//! one immutable [`Snapshot`] from its start to its end, and what it may be answered with is a
//! [`allowed`].

use std::path::Path;
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use serde::Serialize;

use crate::error::{Error, Result};
use base::Base;
use sid::Sid;

mod added;
pub mod allowed;
pub mod arrays;
pub mod base;
pub mod bitmap;
mod builder;
pub mod candidates;
pub mod change_log;
pub(crate) mod column;
#[cfg(feature = "parquet")]
mod columnar;
pub mod filter;
mod format;
pub mod items;
mod logged;
pub mod sid;
pub mod snapshot;
mod tags;
mod texts;
pub mod trie;

pub use builder::{CatalogBuilder, SidTable};
pub use snapshot::Snapshot;

/// One item.
///
/// As JSON: `{"item": "17", "sid": [3, 250, 7], "title": "...", "tags": ["garden"], "available": true}`;
/// a code may be a text that ends in a number, as `"<a_3>"`, and all but `item` and `sid` may be left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Item {
    /// Its name in histories, exclusions and answers; unique in the catalog.
    #[serde(rename = "item")]
    pub name: String,
    /// Its semantic ID; several items may share one.
    pub sid: Sid,
    /// What a person calls it; may be empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub title: String,
    /// What filters ask for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Whether it may be recommended; if not, it may still stand in histories.
    pub available: bool,
}

impl Item {
    /// An available item without title and tags.
    pub fn new(name: impl Into<String>, sid: Sid) -> Item {
        Item { name: name.into(), sid, title: String::new(), tags: Vec::new(), available: true }
    }

    /// Whether it can be in a catalog of so many levels.
    fn check(&self, num_levels: usize) -> Result<()> {
        if self.name.is_empty() {
            return Err(Error::InvalidField { field: "item", reason: "the name is empty".into() });
        }
        if self.sid.num_levels() != num_levels {
            let reason = format!(
                "item {:?} has {} levels, the catalog's items have {num_levels}",
                self.name,
                self.sid.num_levels()
            );
            return Err(Error::InvalidField { field: "sid", reason });
        }
        Ok(())
    }
}

/// What can happen to an item while the catalog is served.
///
/// As JSON, one of `{"put": {"item": "17", "sid": [3, 250, 7], ...}}`,
/// `{"delete": {"item": "17"}}`, `{"availability": {"item": "17", "available": false}}` and
/// `{"tag": {"item": "17", "add": ["new"], "remove": []}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// A new item, or a new state of a known one, which then stands last among those that share
    /// its semantic ID.
    Put(Item),
    /// The item is forgotten: it does not come back, and a history that names it is an error.
    Delete {
        /// Its name.
        item: String,
    },
    /// Whether the item may be recommended; it stays known to histories.
    Availability {
        /// Its name.
        item: String,
        /// Whether it may be recommended.
        available: bool,
    },
    /// Other tags; the item then stands last among those that share its semantic ID.
    Tag {
        /// Its name.
        item: String,
        /// Tags that it carries from now on.
        add: Vec<String>,
        /// Tags that it carries no longer.
        remove: Vec<String>,
    },
}

/// How often a catalog's file and log are read until they go together.
const OPEN_ATTEMPTS: usize = 3;

/// A catalog that may change while it is searched.
///
/// Readers take a [`Snapshot`], which costs a few nanoseconds and never waits; a
/// [`CatalogWriter`](crate::CatalogWriter) makes the next one.
pub struct Catalog {
    current: ArcSwap<Snapshot>,
    /// What the models that search the catalog can write, level by level: bits by code.
    writable: Mutex<Vec<Vec<Vec<bool>>>>,
}

impl Catalog {
    /// Opens a compiled catalog with the changes logged beside it, or compiles a file of items in
    /// memory ([`items::is_items_file`]).
    ///
    /// # Errors
    /// The file's: missing, damaged, of another version, or with items that cannot be read.
    pub fn open(path: &Path) -> Result<Catalog> {
        if items::is_items_file(path) {
            let mut builder = CatalogBuilder::default();
            items::read(path, |item| builder.add(item), |_| {})?;
            builder.build().map_err(|error| items::whole_file_error(path, &error))
        } else {
            // A writer may compile the catalog anew in between: then file and log are both newer.
            let mut attempts = OPEN_ATTEMPTS;
            loop {
                attempts -= 1;
                let catalog = Catalog::open_compiled(path)?;
                match change_log::replay(path, &catalog.snapshot()) {
                    Ok(None) => return Ok(catalog),
                    Ok(Some(after)) => {
                        catalog.publish(after);
                        return Ok(catalog);
                    }
                    Err(Error::ChangeLog { .. }) if attempts > 0 => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }

    /// Opens a compiled catalog as its file has it, without the changes logged beside it.
    pub(crate) fn open_compiled(path: &Path) -> Result<Catalog> {
        Ok(Catalog::of(format::open(path)?))
    }

    pub(crate) fn of(base: Base) -> Catalog {
        Catalog { current: ArcSwap::from_pointee(Snapshot::of(base)), writable: Mutex::default() }
    }

    /// Writes the catalog, with all its changes, as one file; an existing one is replaced as a
    /// whole or not at all.
    ///
    /// # Errors
    /// The operating system's; [`Error::CatalogContents`] where the old file's sets are damaged.
    pub fn save(&self, path: &Path) -> Result<()> {
        let snapshot = self.snapshot();
        if snapshot.number() == snapshot.base().snapshot {
            return snapshot.base().save(path);
        }
        compile(&snapshot, |_| true)?.expect("nobody says no").save(path)
    }

    /// The state of the catalog now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Makes another state the one that new requests see.
    pub(crate) fn publish(&self, snapshot: Snapshot) {
        self.current.store(Arc::new(snapshot));
    }

    /// Refuses from now on items that a model could not write. `levels` says of each code of each
    /// level whether the model has a token for it.
    ///
    /// # Errors
    /// [`Error::LevelsMismatch`] where the catalog has such items already.
    pub fn require(&self, levels: Vec<Vec<bool>>) -> Result<()> {
        // Registered first: what a writer adds meanwhile is checked by one of us.
        let is_known = {
            let mut writable = self.writable.lock().expect("no holder panics");
            let is_known = writable.contains(&levels);
            if !is_known {
                writable.push(levels.clone());
            }
            is_known
        };
        let checked = check_levels(&levels, &self.snapshot());
        if checked.is_err() && !is_known {
            self.writable.lock().expect("no holder panics").retain(|other| *other != levels);
        }
        checked
    }

    /// Whether the models that search the catalog can write what the changes put into it.
    pub(crate) fn check(&self, changes: &[Change]) -> Result<()> {
        let writable = self.writable.lock().expect("no holder panics");
        for (index, change) in changes.iter().enumerate() {
            let Change::Put(item) = change else { continue };
            for levels in writable.iter() {
                let mut codes = item.sid.codes().iter().zip(levels).enumerate();
                let unknown = |&(_, (&code, level)): &(usize, (&u16, &Vec<bool>))| {
                    !level.get(usize::from(code)).copied().unwrap_or(false)
                };
                if let Some((level, (code, _))) = codes.find(unknown) {
                    let reason = format!(
                        "item {:?} has code {code} on level {level}, for which the model that \
                         searches this catalog has no token",
                        item.name
                    );
                    return Err(Error::InvalidChange { index, reason });
                }
            }
        }
        Ok(())
    }
}

fn check_levels(levels: &[Vec<bool>], snapshot: &Snapshot) -> Result<()> {
    if snapshot.num_levels() != levels.len() {
        let (model, catalog) = (levels.len(), snapshot.num_levels());
        let reason = format!("the model writes {model} levels, the catalog has {catalog}");
        return Err(Error::LevelsMismatch { reason });
    }
    for (level, known) in levels.iter().enumerate() {
        let is_known = |code: u16| known.get(usize::from(code)).copied().unwrap_or(false);
        let unknown = snapshot.codes_at(level).find(|&code| !is_known(code));
        if let Some(code) = unknown {
            let size = known.len();
            let reason = format!(
                "level {level} of the catalog uses code {code}, for which the model has no \
                 token (its level has {size} codes)"
            );
            return Err(Error::LevelsMismatch { reason });
        }
    }
    Ok(())
}

/// A snapshot with all its changes as one compiled catalog; `None` where `progress` says no.
pub(crate) fn compile(
    snapshot: &Snapshot,
    progress: impl FnMut(usize) -> bool,
) -> Result<Option<Base>> {
    Base::compile(snapshot, progress)
}
